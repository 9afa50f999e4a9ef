"""Sweeps: the same results however they are run, interrupted and resumed; a failing configuration stops no other."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moetier.errors import ConfigError
from moetier.simulate.config import Result, SimulationConfig
from moetier.simulate.journal import Journal, fingerprint, job_key
from moetier.simulate.run import simulate
from moetier.simulate.sweep import Failure, Queue, SweepError, sweep
from moetier.trace import Trace
from moetier.trace.synthetic import zipf_markov


@pytest.fixture(scope="module")
def trace() -> Trace:
    return zipf_markov(240, 3, 8, 2, sequences=6, seed=1)


CONFIGS = [
    SimulationConfig(policy, slots, batch=batch, seed=seed, relabel=seed is not None)
    for policy in ("lru", "belady", "slru(protected=0.5)")
    for slots in (6, 12)
    for batch, seed in ((1, None), (3, 5))
]


def timeless(results: list[Result]) -> list[Result]:
    return [dataclasses.replace(result, wall_seconds=0.0) for result in results]


@pytest.fixture(scope="module")
def expected(trace: Trace) -> list[Result]:
    return timeless([simulate(trace, config) for config in CONFIGS])


def test_in_this_process(trace: Trace, expected: list[Result]) -> None:
    """A sweep makes the accesses itself and keeps them: nothing may differ from one simulation at a time."""
    assert timeless(sweep(trace, CONFIGS, processes=1)) == expected


def test_processes(trace: Trace, expected: list[Result]) -> None:
    heard: list[Result] = []
    results = sweep(trace, CONFIGS, processes=2, on_result=heard.append)
    assert timeless(results) == expected
    assert sorted(map(repr, timeless(heard))) == sorted(map(repr, expected))


def test_trace_file(trace: Trace, expected: list[Result], tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    from moetier.trace.files import write_trace

    write_trace(trace, tmp_path / "t.parquet")
    assert timeless(sweep(tmp_path / "t.parquet", CONFIGS[:2], processes=1)) == expected[:2]


def test_fitted_policies(trace: Trace) -> None:
    fit, rest = trace.split()
    for relabel in (False, True):
        config = SimulationConfig("static", 6, batch=1, seed=3, relabel=relabel)
        (result,) = sweep(rest, [config], fit, processes=1)
        assert timeless([result]) == timeless([simulate(rest, config, fit)])
    with pytest.raises(ConfigError, match="both must come from one model"):
        sweep(rest, CONFIGS, zipf_markov(20, 2, 8, 2), processes=1)


def test_the_same_configuration_twice(trace: Trace) -> None:
    heard: list[Result] = []
    results = sweep(trace, [CONFIGS[0], CONFIGS[0]], processes=1, on_result=heard.append)
    assert len(results) == 2 and results[0] is results[1]
    assert len(heard) == 1


# -- failures ----------------------------------------------------------------------------------------------------------


BAD = SimulationConfig("nonsense", 6)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_failing_configuration(trace: Trace, expected: list[Result], processes: int) -> None:
    failures: list[Failure] = []
    results = sweep(trace, [BAD, *CONFIGS[:3]], processes=processes, on_failure=failures.append)
    assert timeless(results) == expected[:3]
    assert [failure.config for failure in failures] == [BAD]
    assert "unknown policy 'nonsense'" in failures[0].message


def test_failures_are_raised_at_the_end(trace: Trace, expected: list[Result]) -> None:
    with pytest.raises(
        SweepError, match=r"1 of 3 simulations failed: nonsense, 6 slots, scope global: unknown"
    ) as info:
        sweep(trace, [CONFIGS[0], BAD, CONFIGS[1]], processes=1)
    assert timeless(info.value.results) == expected[:2]


def test_a_bug_in_somebody_elses_policy(trace: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_policy.py").write_text(
        "from moetier.policies.lru import LRU\n"
        "class Broken(LRU):\n    def on_hit(self, key, access):\n        raise ZeroDivisionError('oh')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    failures: list[Failure] = []
    assert sweep(trace, [SimulationConfig("broken_policy:Broken", 12)], processes=1, on_failure=failures.append) == []
    assert failures[0].message == "ZeroDivisionError: oh"
    assert "on_hit" in failures[0].details


def test_a_worker_that_dies_is_told(trace: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deadly_policy.py").write_text(
        "import os, signal\nfrom moetier.policies.lru import LRU\n"
        "class Deadly(LRU):\n    def on_hit(self, key, access):\n        os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    jobs = [SimulationConfig("deadly_policy:Deadly", slots) for slots in (10, 12)]
    with pytest.raises(ConfigError, match=r"a worker process died \(it was killed"):
        sweep(trace, jobs, processes=2)


def test_at_least_one_process(trace: Trace) -> None:
    with pytest.raises(ConfigError, match="processes: at least 1"):
        sweep(trace, CONFIGS, processes=0)


# -- resuming ----------------------------------------------------------------------------------------------------------


class Enough(Exception):
    """Stands for an interruption."""


def test_resume_after_an_interruption(trace: Trace, expected: list[Result], tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    count = 0

    def stop(result: Result) -> None:
        nonlocal count
        count += 1
        if count == 4:
            raise Enough

    with pytest.raises(Enough):
        sweep(trace, CONFIGS, processes=1, resume=file, on_result=stop)
    assert len(file.read_text().splitlines()) == 4
    before = file.read_bytes()
    with open(file, "ab") as half:
        half.write(before.splitlines()[0][:100])  # a fifth line, torn off in the middle
    results = sweep(trace, CONFIGS, processes=1, resume=file)
    assert timeless(results) == expected
    assert file.read_bytes().startswith(before), "what was there was computed again"
    lines = file.read_text().splitlines()
    assert len(lines) == len({json.loads(line)["key"] for line in lines}) == len(CONFIGS)
    done = file.read_bytes()
    again = sweep(trace, CONFIGS, processes=1, resume=file)
    assert again == results, "not even the seconds that it took may differ"
    assert file.read_bytes() == done


def test_another_trace_finds_nothing(trace: Trace, tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    sweep(trace, CONFIGS[:1], processes=1, resume=file)
    other = zipf_markov(240, 3, 8, 2, sequences=6, seed=2)
    (result,) = sweep(other, CONFIGS[:1], processes=1, resume=file)
    assert timeless([result]) == timeless([simulate(other, CONFIGS[0])])
    assert len(file.read_text().splitlines()) == 2


def test_what_a_key_depends_on(trace: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prints = fingerprint(trace)
    keys = {job_key(config, prints) for config in CONFIGS}
    assert len(keys) == len(CONFIGS)
    assert fingerprint(dataclasses.replace(trace, info=dataclasses.replace(trace.info, model="x"))) == prints
    assert fingerprint(dataclasses.replace(trace, weights=None)) != prints
    assert fingerprint(trace.first(100)) != prints
    assert job_key(CONFIGS[0], prints + prints) not in keys
    module = tmp_path / "edited_policy.py"
    module.write_text("from moetier.policies.lru import LRU as Mine\n")
    monkeypatch.syspath_prepend(tmp_path)
    mine = SimulationConfig("edited_policy:Mine", 6)
    before = job_key(mine, prints)
    assert job_key(mine, prints) == before
    module.write_text("from moetier.policies.lfu import LFU as Mine\n")
    assert job_key(mine, prints) != before, "results of an edited policy would be taken from the file"


@pytest.mark.parametrize("content", [b"PAR1 something", b'{"a": 1}\n', b"text\nmore\n"])
def test_a_file_of_something_else_is_left_alone(trace: Trace, tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "results.jsonl"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"resume: .*results\.jsonl"):
        sweep(trace, CONFIGS[:1], processes=1, resume=file)
    assert file.read_bytes() == content


def test_two_sweeps_do_not_share_a_file(trace: Trace, tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    with Journal(file), pytest.raises(ConfigError, match="in use by another sweep"):
        sweep(trace, CONFIGS[:1], processes=1, resume=file)


def test_a_folder_is_no_file_of_results(trace: Trace, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be opened: Is a directory"):
        sweep(trace, CONFIGS[:1], processes=1, resume=tmp_path)


INTERRUPTED = """
import signal
import sys
from moetier.simulate.config import SimulationConfig
from moetier.simulate.sweep import sweep
from moetier.trace.synthetic import zipf_markov

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent in the background may have it ignored
    trace = zipf_markov(1500, 8, 16, 2, sequences=6, seed=1)
    configs = [SimulationConfig("lfru", slots, seed=seed) for slots in range(20, 80) for seed in range(20)]
    try:
        sweep(trace, configs, processes=2, resume=sys.argv[1], on_result=lambda result: print("one", flush=True))
    except KeyboardInterrupt:
        sys.exit(130)
"""


def test_ctrl_c_ends_the_workers(tmp_path: Path) -> None:
    """The whole foreground group gets the signal, as from a terminal."""
    script, file = tmp_path / "script.py", tmp_path / "results.jsonl"
    script.write_text(INTERRUPTED)
    process = subprocess.Popen(
        [sys.executable, str(script), str(file)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "one\n"
    os.killpg(process.pid, signal.SIGINT)
    try:
        _, errors = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    assert process.returncode == 130
    assert errors == ""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.05)
    else:
        pytest.fail("a worker lives on")
    with Journal(file) as journal:
        assert journal.results, "what was finished is kept"


# -- order of jobs -----------------------------------------------------------------------------------------------------


def test_order_of_jobs(trace: Trace) -> None:
    """A worker stays with its accesses; the unknown come first, then the longest."""
    jobs = [SimulationConfig(policy, slots, batch=batch) for batch in (1, 2) for policy in "ab" for slots in (4, 8)]
    known = Result(SimulationConfig("a", 4, batch=1), *[0] * 3, *[[] for _ in range(6)], 0, 0, {}, {}, 0.0, 0.0, [])
    queue = Queue(jobs, [dataclasses.replace(known, wall_seconds=1.0)], trace)
    first, other = queue.take(0), queue.take(1)
    assert {first.batch, other.batch} == {1, 2}, "each worker has a group of its own"
    at = 0 if first.batch == 1 else 1
    taken = [first if at == 0 else other] + [queue.take(at) for _ in range(3)]
    assert [(job.policy, job.slots) for job in taken] == [("b", 4), ("b", 8), ("a", 4), ("a", 8)]
    assert all(job.batch == 1 for job in taken)
    assert queue.take(at).batch == 2, "then it helps with the other group"


# -- Ray ---------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
def test_without_ray() -> None:
    from moetier.simulate.ray import ray_workers

    with pytest.raises(ConfigError, match=r"pip install 'moetier\[ray\]'"):
        ray_workers("auto")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
def test_on_a_ray_cluster(
    trace: Trace, expected: list[Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # Ray keeps a token there
    from moetier.simulate.ray import ray_workers

    failures: list[Failure] = []
    results = sweep(trace, [*CONFIGS, BAD], executor=ray_workers("local", 2), on_failure=failures.append)
    assert timeless(results) == expected
    assert [failure.config for failure in failures] == [BAD]
