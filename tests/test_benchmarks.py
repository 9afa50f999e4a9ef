"""The benchmarks' code, at the smallest sizes: every arm runs, reads what it must, and is reported for what it did."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

import common
import decode
import decode_report
import engines
import gpu
import kernels
import neighbour
import prefetch
import report
import tasks
import train
import train_deepspeed
import train_disk
import train_limit
import train_report
import train_tasks

accelerate = pytest.importorskip("accelerate", reason="the peers need the extra `bench`")

SMALL = common.Shape(128, 2, 16, 3, 96, 2, 1, 32, vocab=64, topics=4, layers_per_shard=1)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """Children run in this process, one by one; gives their specifications."""
    specs: list[dict[str, Any]] = []

    def run(script: Path, spec: dict[str, Any], folder: Path, group: Any = None) -> tuple[Any, common.Ended]:
        spec = json.loads(json.dumps(spec))
        specs.append(spec)
        return json.loads(json.dumps(tasks.TASKS[spec["task"]](spec))), common.Ended(0, "", 0)

    monkeypatch.setattr(common, "run_child", run)
    monkeypatch.setattr(common, "drop_page_cache", lambda: False)  # it would slow down all the other tests
    monkeypatch.setattr(common, "raw_bandwidth", lambda *_: 1e9)  # not every file system has direct reads
    threads = torch.get_num_threads()
    yield specs
    torch.set_num_threads(threads)


def run_main(module: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
    module.main()


def test_all_arms_of_decode(
    here: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(decode, "TINY", SMALL)
    out = tmp_path / "found.json"
    arms = ("memory", "moetier-50", "moetier-100", "mmap-50", "mmap-fused-50", "accelerate-50")
    arguments = ["--smoke", "--threads", "1", "default", "--memory-limit", "none", "--disk-rounds", "1"]
    arguments += ["--prefill-arms", "memory", "moetier-25", "--time-core"]
    run_main(decode, monkeypatch, *arguments, "--work", str(tmp_path), "--json", str(out), "--arms", *arms)
    found = json.loads(out.read_text())
    assert [(run["threads"], run["arm"]) for run in found["runs"]] == [
        *((1, arm) for arm in arms),
        *(("default", arm) for arm in ("memory", "moetier-50", "moetier-100")),  # peers' users set threads
    ]
    chosen = {tuple(run["chosen"]) for run in found["runs"]}
    assert len(chosen) == 1
    by_arm = {run["arm"]: run for run in found["runs"]}
    assert by_arm["moetier-50"]["engine"]["core"] > 0 and by_arm["moetier-100"]["engine"]["misses"] == 0
    for run in found["prefill_runs"]:
        if run["arm"] == "moetier-25":
            assert [one["most_reads"] for one in run["passes"]] == [1, 1]
            assert run["passes"][0]["link_bytes"] == run["passes"][0]["needed_bytes"]  # the cache was empty
            assert run["passes"][0]["experts_needed"] == run["passes"][0]["experts_read"] > 4
    text = capsys.readouterr().out
    assert "All arms chose the same next tokens." in text and "mapped shards" in text and "step ÷ bound" in text


def test_mapped_weights_stay_mapped(here: list[dict[str, Any]], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    common.make_checkpoint(folder, SMALL)
    spec = {"folder": str(folder), "offload": str(tmp_path / "offload")}
    tasks.arms.write_offload(spec)
    for kind in ("mmap", "mmap-fused"):
        model = tasks.arms.load(spec | {"kind": kind})
        weights = dict(model.named_parameters())
        experts = model.model.layers[1].mlp.experts
        if kind == "mmap":
            assert not any("experts" in name for name in weights)
            weights |= {str(number): weight for number, weight in enumerate(experts.mapped[3])}
        files = mapped_ranges(str(tmp_path))
        for name, weight in weights.items():
            begin, end = weight.data_ptr(), weight.data_ptr() + weight.nbytes
            assert any(low <= begin and end <= high for low, high in files), f"{kind}: {name} was copied"


def mapped_ranges(under: str) -> list[tuple[int, int]]:
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if under in line:
            low, high = line.split()[0].split("-")
            ranges.append((int(low, 16), int(high, 16)))
    return ranges


def test_children_use_the_sources_they_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    environment = common.child_environment({"threads": 2, "source": "/engine"})
    assert (environment["OMP_NUM_THREADS"], environment["PYTHONPATH"]) == ("2", "/engine:/elsewhere")
    assert "OMP_NUM_THREADS" not in common.child_environment({"threads": "default"})
    with pytest.raises(RuntimeError, match="the engine came from"):
        tasks.arms.load({"kind": "foundation", "source": str(tmp_path)})


def test_the_foundation_is_a_former_commit(tmp_path: Path) -> None:
    known = ["git", "-C", str(engines.ROOT), "cat-file", "-e", engines.FOUNDATION]
    if subprocess.run(known, capture_output=True).returncode:
        pytest.skip("this checkout has no history")
    source = engines.source_of("foundation", tmp_path)
    assert source.is_relative_to(tmp_path) and (source / "moetier" / "cache.py").is_file()
    assert engines.source_of("foundation", tmp_path) == source  # kept
    assert engines.source_of("moetier", tmp_path) == engines.ROOT / "src"


def runs_of(arm: str, step: float, read: int = 0, threads: Any = 1, **more: Any) -> list[dict[str, Any]]:
    engine = {"read_bytes": 2 * read, "hits": 1, "lates": 0, "misses": 1, "wait": 0.0, "compute": 0.1, "decide": 0.0}
    run = {"arm": arm, "threads": threads, "limit": None, "steps": [step, step], "bandwidth": [9e8, 11e8], **more}
    return [run | ({"engine": engine} if arm.startswith("moetier") else {})]


def test_marks_of_decode() -> None:
    """At 50 % the disk takes 0.2 s a step and is the bound, at 25 % computing is."""
    runs = [
        *runs_of("memory", 0.1),
        *runs_of("moetier-50", 0.22, 200_000_000),
        *runs_of("moetier-25", 0.15, 10_000_000),
        *runs_of("foundation-50", 0.33),
        *runs_of("mmap-50", 0.5),
        *runs_of("mmap-fused-50", 0.88),
        *runs_of("accelerate-50", 2.0),
        {"arm": "accelerate-50", "threads": 1, "failed": "killed"},
        *runs_of("moetier-50", 1.0, 0, threads=2),  # nothing to compare it with
    ]
    marks = decode_report.marks({"runs": runs})
    assert [(round(mark.value, 3), mark.limit, mark.reached) for mark in marks] == [
        (1.1, 1.15, True),
        (1.5, 1.25, False),
        (1.5, 1.5, True),
        (9.091, 10, False),
        (2.273, 3, False),  # the faster of the two mapped models
    ]
    assert "**missed**" in report.marks_table(marks)


def test_marks_of_prefill() -> None:
    def one(arm: str, seconds: float, **counts: int) -> dict[str, Any]:
        passes = [{"seconds": seconds, **counts}]
        return {"arm": arm, "threads": 1, "passes": passes, "prompt": 512, "bandwidth": [1e9], "chosen": [1]}

    counts = {"link_bytes": 4_000_000_000, "needed_bytes": 2_000_000_000, "most_reads": 2}
    runs = [one("memory", 3.0), one("moetier-25", 4.4, **counts)]
    marks = decode_report.marks({"runs": [], "prefill_runs": runs})
    assert [(round(mark.value, 3), mark.reached) for mark in marks] == [(1.1, True), (2, False), (2, False)]


def test_bootstrap_interval() -> None:
    low, high = report.bootstrap([0.9, 1.0, 1.1, 1.0, 0.95, 1.05, 1.0])
    assert 0.9 <= low < 1.0 < high <= 1.1
    assert report.bootstrap([1.5]) == (1.5, 1.5)


def test_sections_of_the_docs(tmp_path: Path) -> None:
    for name in ("decode", "kernels", "neighbour", "prefetch", "gpu", "train", "train-limit"):
        assert f"<!-- {name} results: begin -->" in report.DOCS.read_text()
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- x results: begin -->\nold\n<!-- x results: end -->\nb\n")
    report.update_section("x", "new", page)
    assert page.read_text() == "a\n<!-- x results: begin -->\n\nnew\n\n<!-- x results: end -->\nb\n"
    with pytest.raises(SystemExit, match="markers"):
        report.update_section("y", "new", page)


def test_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out, threads = tmp_path / "kernels.json", torch.get_num_threads()
    arguments = ("--smoke", "--no-extra", "--json", str(out), "--resume", "--minutes", "0")
    run_main(kernels, monkeypatch, *arguments)
    first = json.loads(out.read_text())
    assert {row["dtype"] for row in first["products"]} == {"bfloat16"}  # a part
    run_main(kernels, monkeypatch, *arguments)
    torch.set_num_threads(threads)
    found = json.loads(out.read_text())
    assert found["products"][: len(first["products"])] == first["products"]
    assert len(found["bandwidth"]["1"]["read"]) == 2 * len(first["bandwidth"]["1"]["read"])  # beside each part
    names = {(row["dtype"], row["batch"], row["kernel"]) for row in found["products"]}
    assert ("bfloat16", 1, "torch.mv") in names and ("float32", 4, "F.linear") in names
    assert ("bfloat16", 4, "torch.mv") not in names
    assert all(min(row["bytes_per_second"]) > 0 for row in found["products"])
    assert "share of reading" in capsys.readouterr().out
    x, weight = torch.randn(2, 8), torch.randn(4, 8)
    assert kernels.check(lambda x, w, out: x @ w.t(), x, weight) < 1e-5
    assert kernels.check(lambda x, w, out: 2 * (x @ w.t()), x, weight) > 0.5  # a wrong product is found


def test_neighbour(
    here: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(neighbour, "TINY", SMALL)
    monkeypatch.setattr(neighbour, "SPIN", "import time; time.sleep(60)")
    with neighbour.neighbours(2):
        pass  # ends them: else the test would take a minute
    out = tmp_path / "found.json"
    arguments = ("--smoke", "--arms", "moetier-50", "memory", "--threads", "1", "--work", str(tmp_path))
    arguments += ("--json", str(out), "--resume", "--minutes", "0")
    run_main(neighbour, monkeypatch, *arguments)
    assert "| moetier, 50 % of the experts | 1 thread | 1 |" in capsys.readouterr().out
    first = json.loads(out.read_text())["runs"]
    run_main(neighbour, monkeypatch, *arguments)
    runs = json.loads(out.read_text())["runs"]
    assert runs[:2] == first and len(here) == 4  # the first piece's pair was not run again
    said = [(run["round"], run["arm"], run["neighbours"]) for run in runs]
    assert said == [(0, "moetier-50", 0), (0, "moetier-50", 1), (0, "memory", 0), (0, "memory", 1)]


def test_neighbour_compares_within_pairs() -> None:
    """The machine was twice as slow in the second round; a run of the third failed."""
    steps = {(0, 0): 1.0, (0, 1): 3.0, (1, 0): 2.0, (1, 1): 8.0, (2, 1): 100.0}
    runs = [{"round": number, "neighbours": count, "steps": [step]} for (number, count), step in steps.items()]
    pairs = neighbour.pairs_of(runs)
    assert [(before["steps"], after["steps"]) for before, after in pairs] == [([1.0], [3.0]), ([2.0], [8.0])]
    assert neighbour.spread([3.0, 4.0]) == "3.50 (3.00–4.00)"


def test_prefetch_workloads(here: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "TINY", SMALL)
    out = tmp_path / "found.json"

    def run(self: Any, spec: dict[str, Any], way: str) -> dict[str, Any]:
        """Both ways the same engine: here the harness is tested, not prefetching."""
        result, _ = common.run_child(tasks.SCRIPT, spec, self.work)
        return dict(result) | {"prefetches": {"issued": 3, "useful": 2, "wasted": 1, "controller": {"words": way}}}

    monkeypatch.setattr(prefetch.Comparison, "run", run)
    arguments = ("--smoke", "--work", str(tmp_path), "--json", str(out), "--resume", "--workloads")
    run_main(prefetch, monkeypatch, *arguments, "5", "0", "--minutes", "0")
    run_main(prefetch, monkeypatch, *arguments, "0", "5")
    found = json.loads(out.read_text())
    assert [len(spec["tokens"]) for spec in here] == [4, 4, 1, 1]  # sequences, with and without
    names = [prefetch.WORKLOADS[number].name for number in (0, 5)]
    assert [entry["name"] for entry in prefetch.measured(found)] == names
    pair = found["workloads"][0]["pairs"][0]
    assert pair["on"]["chosen"] == pair["off"]["chosen"] and len(pair["on"]["chosen"]) == 4 * 7
    text = prefetch.tables(found)
    assert (
        "per workload: 1; on is" in text
        and "auto; 3 issued, 2 useful, 1 wasted" in text
        and "time with prefetching ÷ without" in text
    )


def test_every_text_of_the_demo_model_is_there() -> None:
    for workload in prefetch.WORKLOADS:
        if workload.model == "demo":
            assert all((prefetch.TEXTS / f"{text}.txt").is_file() for text in workload.texts)


def test_gpu_dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu, "TINY", SMALL)
    out = tmp_path / "gpu.json"
    run_main(gpu, monkeypatch, "--dry-run", "--json", str(out), "--work", str(tmp_path))
    found = json.loads(out.read_text())
    assert found["left_out"] == {}
    assert set(found["runs"]) == {"transformers", *(f"moetier-{share}" for share in gpu.SHARES), "accelerate-50"}
    assert len({tuple(run["rounds"][0]["chosen"]) for run in found["runs"].values()}) == 1
    quarter = found["runs"]["moetier-25"]["rounds"][-1]["engine"]
    assert quarter["link_bytes"] > 0 and quarter["read_bytes"] == 0  # all else was in host memory
    assert found["runs"]["moetier-100"]["rounds"][-1]["engine"]["link_bytes"] == 0
    assert [mark.limit for mark in gpu.marks(found)] == [0.6, 0.9, 10]
    assert "A dry run" in capsys.readouterr().out


def test_gpu_names_what_its_budget_leaves_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "TINY", SMALL)
    out = tmp_path / "gpu.json"
    run_main(gpu, monkeypatch, "--dry-run", "--budget-seconds", "0", "--json", str(out), "--work", str(tmp_path))
    found = json.loads(out.read_text())
    assert found["runs"] == {} and "time budget" in found["left_out"]["accelerate"]


@pytest.fixture
def trains(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Children of the training benchmarks run in this process; gives their specifications."""
    specs: list[dict[str, Any]] = []

    def run(script: Path, spec: dict[str, Any], folder: Path, group: Any = None) -> tuple[Any, common.Ended]:
        spec = json.loads(json.dumps(spec))
        specs.append(spec)
        result = train_tasks.TASKS[spec["task"]](spec)
        return json.loads(json.dumps(result)), common.Ended(0, "", 0)

    monkeypatch.setattr(common, "run_child", run)
    monkeypatch.setattr(common, "drop_page_cache", lambda: False)
    monkeypatch.setattr(train_disk.MixedDisk, "bandwidth", lambda self, nbytes: 1e9)
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(1 << 25))  # other tests keep the allocator they had
    return specs


def test_train(
    trains: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "train.json"
    arguments = ["--smoke", "--memory-limit", "none", "--work", str(tmp_path), "--json", str(out), "--resume"]
    arms = ["moetier-25", "moetier-25-backward", "moetier-25-writethrough", "reference"]
    with torch.enable_grad():
        run_main(train, monkeypatch, *arguments, "--minutes", "0", "--arms", *arms)
        first = json.loads(out.read_text())["pairs"]
        run_main(train, monkeypatch, *arguments, "--arms", *arms)
        run_main(train, monkeypatch, *arguments, "--arms", "moetier-50", "--dtypes", "bfloat16")
    found = json.loads(out.read_text())
    assert len(first) == 1 and found["pairs"][:1] == first
    assert [(pair["dtype"], pair["arm"]) for pair in found["pairs"]] == [
        *(("float32", arm) for arm in arms),
        ("bfloat16", "moetier-50"),
    ]
    losses = [[step["loss"] for step in pair["run"]["steps"]] for pair in found["pairs"][:4]]
    assert losses[0] == losses[1] == losses[2] == losses[3]  # the reference has the same bits
    runs = {pair["arm"]: pair["run"] for pair in found["pairs"]}
    in_backward = runs["moetier-25-backward"]["steps"][-1]["moved"]
    assert in_backward["gradients, host→disk"] == 0  # it stores none
    for run in runs.values():
        if "moved" in run["steps"][0]:
            assert run["steps"][-1]["moved"]["weights, disk→host"] > 0 and run["commit"]["seconds"] > 0
            assert run["steps"][-1]["changed_nbytes"] > 0
    for arm in ("moetier-25", "moetier-25-writethrough"):  # writes are asynchronous: some are the next step's
        assert 0.5 < train_report.amplification(found, runs[arm]) < 2
    text = capsys.readouterr().out
    assert "the same losses in all runs, bit for bit" in text and "bf16, fp32 masters" in text


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
@pytest.mark.timeout(3600)  # its operators are compiled on first use
def test_deepspeed_trains_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In processes of its own: it changes torch and transformers."""
    monkeypatch.setattr(train_disk.MixedDisk, "bandwidth", lambda self, nbytes: 1e9)
    # the experts of 1 MiB and more, so that they go to files; norms of 64 numbers before them, see docs/benchmarks.md
    monkeypatch.setattr(train, "TINY", common.Shape(128, 2, 16, 3, 256, 2, 1, 64, vocab=64, topics=4))
    out = tmp_path / "train.json"
    arguments = ["--smoke", "--memory-limit", "none", "--work", str(tmp_path), "--json", str(out)]
    run_main(train, monkeypatch, *arguments, "--arms", "deepspeed-nvme")
    pair = json.loads(out.read_text())["pairs"][0]
    assert "failed" not in pair["run"], pair["run"]
    assert pair["run"]["steps"][-1]["written"] > 0
    assert train_report.apart(*([train_report.losses(pair[name])] for name in ("run", "memory"))) < 1e-6
    assert "DeepSpeed, optimizer on the disk" in capsys.readouterr().out


def test_a_missing_deepspeed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(SystemExit, match="DeepSpeed is not installed: pip install deepspeed"):
        run_main(train, monkeypatch, "--smoke", "--work", str(tmp_path), "--arms", "deepspeed-nvme")


def test_an_operator_that_cannot_be_compiled_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = types.ModuleType("deepspeed.accelerator")
    accelerator.get_accelerator = Mock(side_effect=RuntimeError("no compiler"))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "deepspeed", types.ModuleType("deepspeed"))
    monkeypatch.setitem(sys.modules, "deepspeed.accelerator", accelerator)
    monkeypatch.setenv("DS_ACCELERATOR", "")  # which the task sets
    with pytest.raises(SystemExit, match=r"no compiler\nerror: .*AsyncIOBuilder cannot be compiled; it needs libaio"):
        train_deepspeed.task_build({})


def test_deepspeed_joins_the_results_there_are(
    trains: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the loop in memory in its place: it has no plan and no counters, and the marks are moetier's alone."""

    def load(spec: dict[str, Any]) -> tuple[Any, Any]:
        Path(spec["run"]).mkdir()
        return train_tasks.load_memory(spec)

    monkeypatch.setattr(train_deepspeed, "check", lambda: None)
    monkeypatch.setattr(train_deepspeed, "load", load)
    monkeypatch.setitem(train_tasks.TASKS, "build", lambda spec: {"version": "1"})
    arguments = ["--smoke", "--memory-limit", "none", "--work", str(tmp_path), "--json", str(tmp_path / "train.json")]
    arguments += ["--resume", "--arms"]
    with torch.enable_grad():
        run_main(train, monkeypatch, *arguments, "moetier-25")
        run_main(train, monkeypatch, *arguments, "deepspeed-nvme")
    found = json.loads((tmp_path / "train.json").read_text())
    assert [pair["arm"] for pair in found["pairs"]] == ["moetier-25", "deepspeed-nvme"] and found["deepspeed"] == "1"
    assert not any("DeepSpeed" in mark.name for mark in train_report.marks(found))
    rows = [line for line in train_report.tables(found).splitlines() if "DeepSpeed, optimizer on the disk" in line]
    assert [len(row.split(" | ")) for row in rows] == [10, 11, 4]  # times, bytes, memory
    assert "the losses of DeepSpeed 1 are within 0.0e+00 of those in memory" in capsys.readouterr().out
    monkeypatch.setitem(train_tasks.TASKS, "build", lambda spec: {"version": "2"})
    with pytest.raises(SystemExit, match="DeepSpeed was 1, here it is 2"):
        run_main(train, monkeypatch, *arguments, "deepspeed-nvme")


def test_marks_of_train() -> None:
    """The disk takes 0.6 s for the bytes, the step in memory half a second: the disk is the bound."""
    memory = {"steps": [{"seconds": 9.0}, {"seconds": 0.5}], "memory": {"VmHWM": 1}}
    step = {"seconds": 0.75, "read": 4e8, "written": 2e8}
    run = {"steps": [{"seconds": 9.0}, step], "bandwidth": [0.9e9, 1.1e9], "plan_nbytes": 900}
    run |= {"memory": {"VmHWM": 1060}}
    pair = {"round": 0, "dtype": "float32", "arm": "moetier-25", "memory": memory, "run": run}
    failed = pair | {"run": {"failed": "killed"}}
    found = {"settings": {"warm_up": 1}, "base": {"VmHWM": 100}, "pairs": [pair, failed]}
    made = train_report.marks(found)
    assert [(round(mark.value, 3), mark.reached) for mark in made] == [(1.25, True), (0.06, False)]


def test_train_limit(
    trains: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train_limit, "LIMIT", 600 << 20)
    monkeypatch.setitem(train_tasks.TASKS, "base", lambda spec: {"VmHWM": 400 << 20})
    with torch.enable_grad():
        run_main(train_limit, monkeypatch, "--smoke", "--memory-limit", "none", "--work", str(tmp_path))
    assert trains[-1]["host_memory"] == (600 - 400 - 64) << 20
    assert "experts' weights and optimizer states ÷ memory limit" in capsys.readouterr().out


def test_the_mixed_disk_reads_and_writes(tmp_path: Path) -> None:
    disk = train_disk.MixedDisk(tmp_path / "disk.bin", 16 << 20)
    try:
        assert disk.bandwidth(16 << 20) > 0
    except OSError as error:
        pytest.skip(f"no direct I/O here: {error}")
    assert disk.path.stat().st_size == 16 << 20
