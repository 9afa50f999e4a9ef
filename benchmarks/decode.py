"""Decode speed of a model whose experts do not fit: in memory, with moetier, and with accelerate's disk offload.

    python benchmarks/decode.py --json benchmarks/results/decode.json     # everything, about half an hour
    python benchmarks/decode.py --update-docs benchmarks/results/decode.json
    python benchmarks/decode.py --smoke                                   # do all arms run? about a minute

Each arm runs in a fresh process, in a memory control group of its own. See docs/benchmarks.md for the method.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import common
from common import BIG, GIB, MIB, TINY, Ended, MemoryGroup, NoMemoryGroup, Shape

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs" / "benchmarks.md"
PLOT = ROOT / "docs" / "images" / "decode.png"
BEGIN, END = "<!-- decode results: begin -->", "<!-- decode results: end -->"
SHARES = (25, 50, 75, 100)
ARMS = ("memory", *(f"moetier-{share}" for share in SHARES), "accelerate-50")
OTHER_ARMS = ("accelerate-25", "accelerate-75")
READERS = 4  # moetier's default
THREAD_COUNTS = (1, 2, 4, 8, 16)


# -- in the child: loading --------------------------------------------------------------------------------------------


def load_memory(spec: dict[str, Any]) -> Any:
    """Plain transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(spec["folder"], dtype="auto")


def load_moetier(spec: dict[str, Any]) -> Any:
    """moetier with its defaults; only the number of slots and the context are given."""
    import moetier

    model = moetier.from_pretrained(spec["folder"], slots=f"{spec['share']}%", context=spec["context"], device="cpu")
    if spec["share"] == 100:
        touch_all(model.moetier.cache)
    time_core(model.moetier)
    return model


def time_core(tiered: Any) -> None:
    """Let `stats()` also tell the seconds spent in the residency core: its calls, without queues, locks and views."""
    spent = [0.0]

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            result = call(*args, **kwargs)
            spent[0] += time.perf_counter() - begin
            return result

        return wrapper

    core, plain_stats = tiered.cache.core, tiered.stats
    for name in ("acquire", "release", "completed", "take", "place"):
        setattr(core, name, timed(getattr(core, name)))

    def stats() -> dict[str, Any]:
        found = plain_stats()
        found["seconds"]["core"] = spent[0]
        return found

    tiered.stats = stats


def touch_all(cache: Any) -> None:
    """Bring every expert into memory: that is what 100 % resident means, and what the in-memory model starts with."""
    from moetier import Access, ExpertKey

    for layer in range(cache.store.layers):
        keys = tuple(ExpertKey(layer, expert) for expert in range(cache.store.experts))
        for _ in cache.stream(Access(0, layer, keys)):
            pass


def load_accelerate(spec: dict[str, Any]) -> Any:
    """transformers' model with the experts of all but `resident` layers dispatched to disk by accelerate.

    The documented API (`dispatch_model` with an offload index of safetensors files), with the finest device map: all
    weights but experts stay in memory.
    """
    from accelerate import dispatch_model, init_empty_weights
    from accelerate.utils import set_module_tensor_to_device
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM

    index = json.loads((Path(spec["offload"]) / "offload.json").read_text())
    config = AutoConfig.from_pretrained(spec["folder"])
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    device_map = accelerate_device_map(config.num_hidden_layers, spec["resident"])
    on_disk = {}
    for name, entry in index.items():
        if device_map.get(name.rpartition(".")[0]) == "disk":
            on_disk[name] = entry
            continue
        with safe_open(entry["safetensors_file"], framework="pt") as file:
            value = file.get_tensor(entry["weight_name"]).clone()
        set_module_tensor_to_device(model, name, "cpu", value=value)
    model.eval()
    if not on_disk:
        return model
    return dispatch_model(model, device_map, main_device="cpu", offload_dir=spec["offload"], offload_index=on_disk)


def accelerate_device_map(layers: int, resident: int) -> dict[str, str]:
    """Everything in memory but the experts of the layers from `resident` on."""
    device_map = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    for layer in range(layers):
        at = f"model.layers.{layer}"
        device_map |= dict.fromkeys(
            (f"{at}.self_attn", f"{at}.input_layernorm", f"{at}.post_attention_layernorm", f"{at}.mlp.gate"), "cpu"
        )
        device_map[f"{at}.mlp.experts"] = "cpu" if layer < resident else "disk"
    return device_map


LOADERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "memory": load_memory,
    "moetier": load_moetier,
    "accelerate": load_accelerate,
}


# -- in the child: tasks ----------------------------------------------------------------------------------------------


def task_arm(spec: dict[str, Any]) -> dict[str, Any]:
    """One run of one arm: prefill, warm-up, decode."""
    begin = time.perf_counter()
    model = LOADERS[spec["kind"]](spec)
    result: dict[str, Any] = {"load_seconds": time.perf_counter() - begin}
    result |= run_tokens(model, spec)
    result["memory"] = common.memory_of()
    result["read_bytes_total"] = common.disk_read_bytes()
    if spec["kind"] == "moetier":
        result["plan_nbytes"] = model.moetier.plan.host_total_nbytes
        result["slots"] = model.moetier.plan.slots
        result["direct_io"] = model.moetier.cache.store.direct
        model.moetier.close()
    return result


def run_tokens(model: Any, spec: dict[str, Any]) -> dict[str, Any]:
    """Greedy decoding over a given text: the next id is computed, then the text's own token is fed.

    So every arm routes alike, and the random model cannot fall into a loop of one token, which would flatter caches.
    """
    import torch

    prompt, warm_up = spec["prompt"], spec["warm_up"]
    tokens = torch.tensor([spec["tokens"]])
    stats = model.moetier.stats if hasattr(model, "moetier") else dict
    chosen: list[int] = []
    steps: list[float] = []
    before: tuple[dict[str, Any], int] = ({}, 0)
    prefill_begin, reads_begin = time.perf_counter(), common.disk_read_bytes()
    with torch.no_grad():
        output = model(input_ids=tokens[:, :prompt], use_cache=True, logits_to_keep=1)
        chosen.append(int(output.logits[0, -1].argmax()))
        prefill, prefill_reads = time.perf_counter() - prefill_begin, common.disk_read_bytes() - reads_begin
        for position in range(prompt, tokens.shape[1]):
            if position == prompt + warm_up:
                before = stats(), common.disk_read_bytes()
            begin = time.perf_counter()
            output = model(
                input_ids=tokens[:, position : position + 1], past_key_values=output.past_key_values, use_cache=True
            )
            chosen.append(int(output.logits[0, -1].argmax()))
            steps.append(time.perf_counter() - begin)
    result = {
        "prompt": prompt,
        "prefill_seconds": prefill,
        "prefill_read_bytes": prefill_reads,
        "steps": steps[warm_up:],
        "warm_up_steps": steps[:warm_up],
        "read_bytes": common.disk_read_bytes() - before[1],
        "chosen": chosen,
    }
    return result | ({"engine": difference(before[0], stats())} if before[0] else {})


def difference(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """moetier's counters over the measured steps."""
    tiers = [stats["tiers"][-1] for stats in (before, after)]
    found = {key: sum(tiers[1][key]) - sum(tiers[0][key]) for key in ("hits", "lates", "misses")}
    found |= {key: after["seconds"][key] - before["seconds"][key] for key in ("wait", "compute", "decide", "core")}
    return found | {"read_bytes": _link_bytes(after) - _link_bytes(before)}


def _link_bytes(stats: dict[str, Any]) -> int:
    return next(iter(stats["links"].values()))["bytes"]


def task_base(spec: dict[str, Any]) -> dict[str, Any]:
    """What the interpreter and the libraries take: merely imported, and in use by plain transformers.

    Loading any model imports more of transformers and of torch. The limits and the plan check use the second number,
    taken with a model of a few kilobytes that moetier has no part in.
    """
    import torch
    import transformers  # noqa: F401

    import moetier  # noqa: F401

    imported = common.memory_of()
    common.make_checkpoint(Path(spec["folder"]), common.MICRO)
    model = load_memory(spec)
    with torch.no_grad():
        model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False)
    return common.memory_of() | {"imported": imported["VmHWM"]}


def task_make(spec: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint."""
    common.make_checkpoint(Path(spec["folder"]), Shape(**spec["shape"]))
    return {}


def task_plan(spec: dict[str, Any]) -> dict[str, Any]:
    """moetier's plan for each share."""
    from moetier.hf import Options
    from moetier.loading import inspect

    plans = {}
    for share in SHARES:
        plan = inspect(Path(spec["folder"]), Options(slots=f"{share}%", context=spec["context"]))
        plans[str(share)] = {
            "total": plan.host_total_nbytes,
            "slots": plan.slots,
            "workload": asdict(plan.workload),
        }
    return plans


def task_offload(spec: dict[str, Any]) -> dict[str, Any]:
    """accelerate's folder: the experts as transformers holds them (stacked per layer), as safetensors, and an index."""
    from transformers import AutoConfig, AutoModelForCausalLM

    offload = Path(spec["offload"])
    config = AutoConfig.from_pretrained(spec["folder"])
    model = AutoModelForCausalLM.from_pretrained(
        spec["folder"],
        dtype="auto",
        device_map=accelerate_device_map(config.num_hidden_layers, 0),
        offload_folder=str(offload),
    )
    weight_map = json.loads((Path(spec["folder"]) / "model.safetensors.index.json").read_text())["weight_map"]
    index = {}
    for name, _ in model.named_parameters():
        own = offload / f"{name}.safetensors"
        file = own if own.is_file() else Path(spec["folder"]) / weight_map[name]
        index[name] = {"safetensors_file": str(file), "weight_name": name, "dtype": "bfloat16"}
    (offload / "offload.json").write_text(json.dumps(index, indent=1))
    return {}


def task_skew(spec: dict[str, Any]) -> dict[str, Any]:
    """How the text is routed: popularity and likeness of consecutive tokens, per layer, over the whole text."""
    import torch

    model = load_memory(spec)
    routed: list[Any] = []
    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_hook(lambda module, args, output: routed.append(output[2]))
    with torch.no_grad():
        model(input_ids=torch.tensor([spec["tokens"]]), use_cache=False, logits_to_keep=1)
    experts = model.config.num_experts
    found = routing_skew(routed, experts)
    generator = torch.Generator().manual_seed(0)
    rows, top_k = routed[0].shape
    uniform = [torch.rand(rows, experts, generator=generator).topk(top_k).indices for _ in range(20)]
    return found | {"uniform": routing_skew(uniform, experts), "tokens": rows}


def routing_skew(routed: list[Any], experts: int) -> dict[str, float]:
    """Means over layers of [T, K] expert ids."""
    top_half, recall, distinct = [], [], []
    for index in routed:
        counts = index.flatten().bincount(minlength=experts).sort(descending=True).values
        top_half.append(float(counts[: experts // 2].sum() / counts.sum()))
        distinct.append(float((counts > 0).sum()))
        chosen = index.new_zeros(len(index), experts).scatter_(1, index, 1)
        recall.append(float((chosen[1:] * chosen[:-1]).sum() / chosen[1:].sum()))
    return {
        "top_half_share": statistics.mean(top_half),
        "recall_of_previous": statistics.mean(recall),
        "experts_used": statistics.mean(distinct),
    }


def task_disk(spec: dict[str, Any]) -> dict[str, Any]:
    """Rounds of plain direct reads and of moetier's read path, interleaved, over the same files."""
    files = sorted(Path(spec["folder"]).glob("*.safetensors"), key=lambda file: file.stat().st_size)[1:]
    nbytes = spec["nbytes"]
    raw: dict[str, list[float]] = {str(threads): [] for threads in THREAD_COUNTS}
    engine: dict[str, list[float]] = {"layer": [], "token": []}
    with ReadPath(spec) as path:
        for number in range(spec["rounds"]):
            for position, threads in enumerate(THREAD_COUNTS):
                start = (number * len(THREAD_COUNTS) + position) * (nbytes // MIB)
                raw[str(threads)].append(common.raw_bandwidth(files, threads, nbytes, start))
                if position % 2 == 0:
                    for kind, width in (("layer", path.experts), ("token", spec["top_k"])):
                        engine[kind].append(path.bandwidth(width, nbytes))
    return {"raw": raw, "moetier": engine, "direct": path.direct, "nbytes": nbytes}


class ReadPath:
    """moetier's cache with slots for one layer, driven by accesses that find nothing and compute nothing."""

    def __init__(self, spec: dict[str, Any]):
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        from moetier.arenas import HostArena
        from moetier.cache import ExpertCache
        from moetier.hf import find_experts, map_experts
        from moetier.residency import Residency
        from moetier.stores.checkpoint import CheckpointStore
        from moetier.stores.shards import Shards
        from moetier.tiers import TierConfig

        config = AutoConfig.from_pretrained(spec["folder"])
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
        shards = Shards.open(Path(spec["folder"]))
        maps, _ = map_experts(model, find_experts(model), shards, config.dtype)
        store = CheckpointStore(shards, [m.layout for m in maps], [m.recipes for m in maps])
        self.layers, self.experts, self.direct = store.layers, store.experts, store.direct
        core = Residency([TierConfig(self.experts, "lru")], store.layers, store.experts)
        self.cache = ExpertCache(store, core, HostArena(self.experts, store.slot_nbytes), None, READERS)
        self.clock = self.next = 0
        self.bandwidth(self.experts, 1)  # touches every slot and starts the threads

    def bandwidth(self, width: int, nbytes: int) -> float:
        """Bytes/s over at least `nbytes`, in accesses of `width` experts."""
        from moetier.access import Access, ExpertKey

        link = self.cache.mover.links[0]
        before, begin = link.nbytes, time.perf_counter()
        self.next += -self.next % width
        while link.nbytes - before < nbytes:
            layer, first = divmod(self.next, self.experts)
            keys = tuple(ExpertKey(layer % self.layers, expert) for expert in range(first, first + width))
            self.next += width
            self.clock += 1
            for _ in self.cache.stream(Access(self.clock, layer % self.layers, keys)):
                pass
        return (link.nbytes - before) / (time.perf_counter() - begin)

    def __enter__(self) -> ReadPath:
        return self

    def __exit__(self, *_: object) -> None:
        self.cache.close()


TASKS = {name.removeprefix("task_"): task for name, task in globals().items() if name.startswith("task_")}


def child(text: str) -> None:
    spec = json.loads(text)
    threads = spec.get("threads", 1)
    if spec["task"] in ("arm", "skew", "base", "disk"):
        import torch

        torch.set_num_threads(threads if spec["task"] != "skew" else 2)
        torch.set_num_interop_threads(1)
    result = TASKS[spec["task"]](spec)
    Path(spec["out"]).write_text(json.dumps(result))


# -- in the parent ----------------------------------------------------------------------------------------------------


class Benchmark:
    """The sequence of children, and what they found."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.shape = TINY if args.smoke else BIG
        self.work: Path = args.work.resolve()
        self.folder = self.work / ("tiny" if args.smoke else "big")
        length = args.prompt + args.warm_up + args.tokens
        self.spec = {
            "folder": str(self.folder),
            "offload": str(self.folder.with_name(self.folder.name + "-accelerate")),
            "threads": args.threads,
            "prompt": args.prompt,
            "warm_up": args.warm_up,
            "context": length,
            "tokens": common.make_tokens(self.shape, length, args.seed),
        }
        self.found: dict[str, Any] = {
            "machine": common.machine_info(ROOT),
            "shape": asdict(self.shape),
            "settings": {
                key: getattr(args, key)
                for key in ("threads", "prompt", "warm_up", "tokens", "repeat", "seed", "memory_limit", "smoke")
            },
            "runs": [],
        }

    def task(self, task: str, **more: Any) -> Any:
        """A child without a limit, which must succeed."""
        result, ended = common.run_child(Path(__file__).resolve(), self.spec | {"task": task} | more, self.work)
        if result is None:
            raise SystemExit(f"{task}: failed with exit status {ended.returncode}\n{ended.stderr}")
        return result

    def prepare(self) -> None:
        """Files, plans and the interpreter's own memory."""
        say(f"checkpoint: {self.folder}")
        self.task("make", shape=asdict(self.shape))
        if any(arm.startswith("accelerate") for arm in self.args.arms):
            index = Path(self.spec["offload"]) / "offload.json"
            shape = self.folder / "shape.json"
            if not index.is_file() or index.stat().st_mtime < shape.stat().st_mtime:
                say("accelerate's offload folder")
                self.task("offload")
        self.found["plans"] = self.task("plan")
        self.found["base"] = self.task("base", folder=str(self.work / "micro"))
        base = self.found["base"]
        say(f"interpreter and libraries: {size(base['VmHWM'])}, {size(base['RssAnon'])} of it anonymous")
        if not self.args.no_skew:
            self.found["skew"] = self.task("skew")
            say(f"routing: {self.found['skew']}")

    def limit_of(self, arm: str) -> int | None:
        """Bytes for an arm's control group; None for no limit."""
        kind, _, share = arm.partition("-")
        if self.args.memory_limit == "none" or kind == "memory" or share == "100":
            return None
        if self.args.memory_limit != "auto":
            return int(self.args.memory_limit)
        return int(self.found["base"]["VmHWM"] + self.found["plans"][share]["total"])

    def measure_disk(self) -> None:
        say("disk")
        nbytes = 8 * MIB if self.args.smoke else GIB
        common.drop_page_cache()
        self.found["disk"] = self.task("disk", nbytes=nbytes, rounds=self.args.disk_rounds, top_k=self.shape.top_k)
        raw, best, engine = disk_summary(self.found["disk"])
        say(f"  plain direct reads {raw / 1e9:.2f} GB/s ({best} threads), moetier: {engine}")

    def run_arm(self, arm: str) -> dict[str, Any]:
        """One run of one arm, with an empty page cache."""
        kind, _, share = arm.partition("-")
        limit = self.limit_of(arm)
        dropped = common.drop_page_cache()
        more = {"task": "arm", "kind": kind, "share": int(share or 100), "resident": self.resident(share)}
        with ExitStack() as stack:
            group: MemoryGroup | None = None
            if self.args.memory_limit != "none":  # without a limit the group still measures
                group = stack.enter_context(common.memory_group(limit if limit is not None else 1 << 50))
            result, ended = common.run_child(Path(__file__).resolve(), self.spec | more, self.work, group)
            stats = group.stats() if group is not None else None
        run = {"arm": arm, "limit": limit, "cache_dropped": dropped, "cgroup": stats, "peak_anon": ended.peak_anon}
        if kind == "accelerate":
            run["resident_layers"] = more["resident"]
        return run | (result or failure(ended, stats))

    def resident(self, share: str) -> int:
        """Layers whose experts accelerate keeps in memory."""
        if self.args.accelerate_resident is not None:
            return int(self.args.accelerate_resident)
        return int(self.shape.layers * int(share or 100) / 100)

    def main(self) -> None:
        self.prepare()
        for arm in self.args.arms:
            limit = self.limit_of(arm)
            say(f"  {arm}: {'no limit' if limit is None else size(limit)}")
        if not self.args.no_disk:
            self.measure_disk()
        for number in range(self.args.repeat):
            for arm in self.args.arms:
                run = self.run_arm(arm)
                self.found["runs"].append(run)
                say(f"[{number + 1}/{self.args.repeat}] {describe(run)}")
                if self.args.json:
                    self.args.json.parent.mkdir(parents=True, exist_ok=True)
                    self.args.json.write_text(json.dumps(self.found, indent=1) + "\n")
        print(tables(self.found))


def failure(ended: Ended, stats: dict[str, int] | None) -> dict[str, Any]:
    killed = bool(stats and stats["killed"])
    text = "killed: more than its memory limit" if killed else ended.stderr[-500:]
    return {"failed": f"exit status {ended.returncode}: {text}"}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def size(nbytes: float) -> str:
    return f"{nbytes / GIB:.2f} GiB"


def describe(run: dict[str, Any]) -> str:
    if "failed" in run:
        return f"{run['arm']}: {run['failed']}"
    steps = run["steps"]
    text = (
        f"{run['arm']}: {len(steps) / sum(steps):.2f} tokens/s, prefill {run['prefill_seconds']:.1f} s, "
        f"load {run['load_seconds']:.1f} s, {run['read_bytes'] / len(steps) / 1e6:.0f} MB/token, "
        f"peak {size(run['memory']['VmHWM'])} (anonymous {size(run['peak_anon'])}"
    )
    if run["cgroup"]:
        text += f", group {size(run['cgroup']['peak'])}, limit hit {run['cgroup']['limit_hits']} times"
    if "engine" in run:
        text += "; " + ", ".join(
            f"{key} {1e3 * run['engine'][key] / len(steps):.1f} ms" for key in ("wait", "compute", "decide", "core")
        )
    return text + ")"


# -- the report -------------------------------------------------------------------------------------------------------


def disk_summary(disk: dict[str, Any]) -> tuple[float, str, dict[str, float]]:
    """The disk's limit (best median over thread counts), its thread count, and moetier's medians."""
    medians = {threads: statistics.median(values) for threads, values in disk["raw"].items()}
    best = max(medians, key=lambda threads: medians[threads])
    return medians[best], best, {kind: statistics.median(values) for kind, values in disk["moetier"].items()}


def rates(runs: list[dict[str, Any]]) -> list[float]:
    return [len(run["steps"]) / sum(run["steps"]) for run in runs]


def by_arm(found: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The successful runs of each arm."""
    arms: dict[str, list[dict[str, Any]]] = {}
    for run in found["runs"]:
        arms.setdefault(run["arm"], [])
        if "failed" not in run:
            arms[run["arm"]].append(run)
    return {arm: runs for arm, runs in arms.items() if runs}


def title(arm: str) -> str:
    kind, _, share = arm.partition("-")
    return {"memory": "in memory", "moetier": f"moetier, {share} % of the experts"}.get(
        kind, f"accelerate, limit of moetier {share} %"
    )


def median_of(runs: list[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> float:
    return statistics.median(value(run) for run in runs)


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def speed_table(arms: dict[str, list[dict[str, Any]]]) -> str:
    """Tokens per second, and the same as ratios."""
    medians = {arm: statistics.median(rates(runs)) for arm, runs in arms.items()}
    rows = []
    for arm, runs in arms.items():
        values = rates(runs)
        rival = medians.get(f"accelerate-{arm.rpartition('-')[2]}")
        rows.append(
            [
                title(arm),
                "none" if runs[0]["limit"] is None else size(runs[0]["limit"]),
                f"**{medians[arm]:.2f}** ({min(values):.2f}–{max(values):.2f})",
                f"{medians[arm] / medians['memory']:.2f}" if "memory" in medians else "",
                f"{medians[arm] / rival:.2f}" if rival else "",
                f"{median_of(runs, lambda run: run['prompt'] / run['prefill_seconds']):.1f}",
                f"{median_of(runs, lambda run: run['read_bytes'] / len(run['steps'])) / 1e6:.0f}",
            ]
        )
    head = ["arm", "memory limit", "decode, tokens/s (min–max)", "÷ in memory", "÷ accelerate, same limit"]
    return table([*head, "prefill, tokens/s", "read, MB/token"], rows)


def memory_table(found: dict[str, Any], arms: dict[str, list[dict[str, Any]]]) -> str:
    """Peaks, and the plan against them."""
    rows = []
    for arm, runs in arms.items():
        peak = median_of(runs, lambda run: run["memory"]["VmHWM"])
        plan = runs[0].get("plan_nbytes")
        expected = plan + found["base"]["VmHWM"] if plan else 0
        group = "" if runs[0]["cgroup"] is None else size(median_of(runs, lambda run: run["cgroup"]["peak"]))
        rows.append(
            [
                title(arm),
                size(peak),
                size(median_of(runs, lambda run: run["peak_anon"])),
                group,
                size(expected) if plan else "",
                f"{100 * (peak / expected - 1):+.1f} %" if plan else "",
            ]
        )
    head = ["arm", "peak resident", "of it anonymous", "control group's peak, with page cache"]
    return table([*head, "plan + interpreter", "peak against it"], rows)


def time_table(found: dict[str, Any], arms: dict[str, list[dict[str, Any]]]) -> str:
    """Where a moetier step's time goes, and what the machine would allow."""
    disk = disk_summary(found["disk"])[0] if "disk" in found else None
    compute = median_of(arms["memory"], lambda run: statistics.mean(run["steps"])) if "memory" in arms else None
    rows = []
    for arm, runs in arms.items():
        step = 1 / statistics.median(rates(runs))
        cells = [title(arm), f"{1e3 * step:.0f}", *engine_cells(runs, step)]
        if disk and compute:
            read = median_of(runs, lambda run: run["read_bytes"] / len(run["steps"])) / disk
            best, serial = max(read, compute), read + compute
            cells += [f"{1e3 * read:.0f}", f"{1 / best:.2f} ({100 * best / step:.0f} %)"]
            cells += [f"{1 / serial:.2f} ({100 * serial / step:.0f} %)"]
        rows.append(cells)
    head = ["arm", "step, ms", "computing experts, ms", "waiting, ms", "deciding, ms (share)", "of it the core", "hits"]
    if disk and compute:
        head += ["its reads at disk speed, ms", "bound, reads beside math", "bound, reads then math"]
    return table(head, rows)


def engine_cells(runs: list[dict[str, Any]], step: float) -> list[str]:
    if "engine" not in runs[0]:
        return [""] * 5

    def per_step(key: str) -> float:
        return median_of(runs, lambda run: run["engine"][key] / len(run["steps"]))

    decide, core, hits = per_step("decide"), per_step("core"), per_step("hits")
    asked = hits + per_step("lates") + per_step("misses")
    return [
        f"{1e3 * per_step('compute'):.0f}",
        f"{1e3 * per_step('wait'):.0f}",
        f"{1e3 * decide:.1f} ({100 * decide / step:.1f} %)",
        f"{1e3 * core:.1f} ({100 * core / step:.1f} %)",
        f"{100 * hits / asked:.0f} %" if asked else "",
    ]


def disk_table(found: dict[str, Any]) -> str:
    """Bandwidths, and moetier's share of the limit."""
    disk = found["disk"]
    limit, _, engine = disk_summary(disk)
    rows = []
    for threads, values in disk["raw"].items():
        name = f"`preadv`, direct, 1 MiB, {threads} thread{'' if threads == '1' else 's'}"
        rows.append([name, gbs(values), f"{statistics.median(values) / limit:.2f}"])
    names = {
        "layer": "moetier, accesses of a whole layer (prefill)",
        "token": "moetier, accesses of one token's experts",
    }
    rows += [[names[kind], gbs(disk["moetier"][kind]), f"{engine[kind] / limit:.2f}"] for kind in names]
    return table(["reader", "GB/s (min–max)", "÷ best"], rows)


def gbs(values: list[float]) -> str:
    return f"{statistics.median(values) / 1e9:.2f} ({min(values) / 1e9:.2f}–{max(values) / 1e9:.2f})"


def skew_text(skew: dict[str, Any]) -> str:
    uniform = skew["uniform"]
    return (
        f"Routing of this text ({skew['tokens']} tokens, mean over layers; in brackets, what uniform routing gives): "
        f"the more popular half of a layer's experts gets {100 * skew['top_half_share']:.0f} % "
        f"({100 * uniform['top_half_share']:.0f} %) of the routed (token, expert) pairs; the previous "
        f"token's set holds "
        f"{100 * skew['recall_of_previous']:.0f} % ({100 * uniform['recall_of_previous']:.0f} %) of a token's experts; "
        f"{skew['experts_used']:.0f} ({uniform['experts_used']:.0f}) experts are used at all."
    )


def machine_text(found: dict[str, Any]) -> str:
    machine, settings = found["machine"], found["settings"]
    versions = ", ".join(f"{name} {value}" for name, value in machine["versions"].items())
    dropped = all(run["cache_dropped"] for run in found["runs"])
    return (
        f"{machine['cpu']} ({machine['cores']} cores, {', '.join(machine['simd']) or 'no wide SIMD'}), "
        f"{size(machine['memory'])} of memory, Linux {machine['kernel']}, Python {machine['python']}, {versions}; "
        f"{settings['threads']} thread{'' if settings['threads'] == 1 else 's'} for math; "
        f"{machine['date'][:10]}, commit {machine['commit']}. {settings['prompt']} prompt tokens, "
        f"{settings['warm_up']} warm-up tokens, {settings['tokens']} measured ones; medians of {settings['repeat']} "
        f"interleaved runs; page cache "
        f"{'dropped' if dropped else 'NOT dropped'} before each; `python benchmarks/{machine['command']}`."
    )


def same_outputs(arms: dict[str, list[dict[str, Any]]]) -> str:
    reference = next(iter(arms.values()))[0]["chosen"]
    other = [title(arm) for arm, runs in arms.items() if any(run["chosen"] != reference for run in runs)]
    return (
        f"Not the same next tokens as the first arm: {', '.join(other)}."
        if other
        else "All arms chose the same next tokens."
    )


def tables(found: dict[str, Any]) -> str:
    """The whole report in markdown."""
    arms = by_arm(found)
    parts = [machine_text(found)]
    if arms:
        parts += [speed_table(arms), same_outputs(arms), time_table(found, arms), memory_table(found, arms)]
        base = found["base"]
        parts.append(
            f"The interpreter and its libraries alone: {size(base['VmHWM'])} resident, {size(base['RssAnon'])} "
            f"anonymous (merely imported: {size(base['imported'])} resident)."
        )
    parts += [f"Failed: {run['arm']}: {run['failed']}" for run in found["runs"] if "failed" in run]
    if "disk" in found:
        parts.append(disk_table(found))
    if "skew" in found:
        parts.append(skew_text(found["skew"]))
    return "\n\n".join(parts)


def update_docs(path: Path) -> None:
    """Replace what is between the markers, and draw the plot."""
    found = json.loads(path.read_text())
    text = DOCS.read_text()
    before, _, rest = text.partition(BEGIN)
    _, found_end, after = rest.partition(END)
    if not found_end:
        raise SystemExit(f"{DOCS}: the markers {BEGIN} and {END} are missing")
    image = f"![Decode speed of each arm](images/{PLOT.name})"
    DOCS.write_text(f"{before}{BEGIN}\n\n{image}\n\n{tables(found)}\n\n{END}{after}")
    plot(found, PLOT)


def plot(found: dict[str, Any], path: Path) -> None:
    """Median tokens/s per arm, with whiskers from the slowest to the fastest run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    arms = by_arm(found)
    colours = {"memory": "#7f8c8d", "moetier": "#1f77b4", "accelerate": "#d98032"}
    figure, axes = pyplot.subplots(figsize=(8, 0.55 * len(arms) + 1.4), layout="constrained")
    for row, (arm, runs) in enumerate(arms.items()):
        values = rates(runs)
        middle = statistics.median(values)
        axes.barh(row, middle, 0.62, color=colours[arm.partition("-")[0]])
        axes.errorbar(
            middle,
            row,
            xerr=[[middle - min(values)], [max(values) - middle]],
            color="#222222",
            capsize=4,
            linewidth=1.2,
        )
        axes.annotate(f"{middle:.2f}", (max(values), row), (8, 0), textcoords="offset points", va="center", fontsize=10)
    axes.set_yticks(range(len(arms)), [f"{title(arm)}\n{limit_text(runs)}" for arm, runs in arms.items()], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * max(max(rates(runs)) for runs in arms.values()))
    axes.set_xlabel("decode, tokens/s (median; whiskers: slowest and fastest run)")
    shape = found["shape"]
    axes.set_title(
        f"{shape['layers']} layers × {shape['experts']} experts, top {shape['top_k']}, "
        f"{Shape(**shape).experts_nbytes / GIB:.1f} GiB of experts in bf16, on a CPU",
        fontsize=10,
    )
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def limit_text(runs: list[dict[str, Any]]) -> str:
    return "no memory limit" if runs[0]["limit"] is None else f"limit {size(runs[0]['limit'])}"


# -- the command line -------------------------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--arms", nargs="+", choices=(*ARMS, *OTHER_ARMS), default=list(ARMS))
    add("--repeat", type=int, default=3, help="runs of each arm, interleaved")
    add("--threads", type=int, default=1, help="torch threads")
    add("--prompt", type=int, default=64, help="tokens of the prefill")
    add("--warm-up", type=int, default=4, help="decoded tokens before the measured ones")
    add("--tokens", type=int, default=32, help="measured tokens")
    add("--seed", type=int, default=0, help="of the text")
    add("--memory-limit", default="auto", help="auto (by moetier's plan), none, or bytes for the 25, 50 and 75 %% arms")
    add("--accelerate-resident", type=int, help="layers whose experts accelerate keeps in memory")
    add("--work", type=Path, default=Path(__file__).parent / "work", help="folder for checkpoints (8 GB)")
    add("--json", type=Path, help="where to write the results")
    add("--disk-rounds", type=int, default=5)
    add("--no-disk", action="store_true", help="skip the disk measurement")
    add("--no-skew", action="store_true", help="skip the routing measurement")
    add("--smoke", action="store_true", help="a tiny model and few tokens: do all arms run?")
    add("--update-docs", type=Path, metavar="JSON", help="write results into docs/benchmarks.md and draw the plot")
    add("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.smoke:
        args.prompt, args.warm_up, args.tokens, args.repeat = 16, 2, 4, 1
        args.disk_rounds = min(args.disk_rounds, 2)
    if args.memory_limit not in ("auto", "none") and not args.memory_limit.isdigit():
        parser.error("--memory-limit: auto, none, or a number of bytes")
    return args


def main() -> None:
    args = parse()
    if args.child:
        child(args.child)
    elif args.update_docs:
        update_docs(args.update_docs)
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the child and removes its control group
        try:
            Benchmark(args).main()
        except NoMemoryGroup as error:
            raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
