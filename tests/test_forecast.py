"""The forecast: it recovers a machine that is known, counts as the core counts, and says in words what it found."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import moetier
from moetier.access import Access, ExpertKey, Phase
from moetier.cli import app
from moetier.errors import ConfigError
from moetier.forecast import (
    Forecast,
    Observation,
    Split,
    Workday,
    advice,
    calibrate,
    fit,
    forecast,
    from_profile,
    from_trace,
    recommend,
    serve,
)
from moetier.measure import measure, measure_disk, replay
from moetier.profile import Profile
from moetier.recording import TraceRecorder
from moetier.residency import Residency
from moetier.simulate.config import Link, Timing
from moetier.tiers import configure
from moetier.trace import Trace
from moetier.trace.files import write_trace
from moetier.trace.synthetic import uniform_control, zipf_markov

LAYERS, EXPERTS, TOP_K, NBYTES = 4, 32, 4, 1_000_000
RECORDS = LAYERS * EXPERTS
SLOW = Link(0.1, 2e-4, 4)
MACHINE = Timing(
    NBYTES,
    disk_read=Link(1.0, 2e-4, 4),
    layer_seconds=1e-3,
    expert_seconds=5e-4,
    step_seconds=2e-3,
    contention=0.3,
    miss_seconds=4e-4,
    wake_seconds=1e-4,
)


def trace(tokens: int = 160, **changes: Any) -> Trace:
    return zipf_markov(tokens, LAYERS, EXPERTS, TOP_K, **{"sequences": 1, "prompt": 8, "seed": 3} | changes)


def observed(machine: Timing, accesses: list[Access], slots: int) -> list[Observation]:
    """What a watcher would see on that machine: hits and misses of the real core, times by the machine's rules."""
    core = Residency([configure(slots, RECORDS, LAYERS, TOP_K)], LAYERS, EXPERTS)
    found, missed = [], False
    for access in accesses:
        ticket = core.acquire(access)
        misses = len(access.keys) - len(ticket.ready)
        beside = len(access.keys) - 1 if misses else 0
        while not ticket.done:
            for copy in core.take():
                core.completed(copy.id)
            while ticket.ready:
                core.release(ticket, ticket.ready.popleft())
        before = machine.layer_seconds - 1e-4 + (0 if access.layer else machine.step_seconds)
        compute = machine.expert_seconds * (len(access.keys) + machine.contention * beside)
        decide = 1e-4 + (machine.miss_seconds if misses else 0.0)
        wake = machine.wake_seconds * bool(misses)
        found.append(Observation(access, misses, before, missed, beside, compute, decide, int(misses > 0), wake, wake))
        missed = misses > 0
    return found


# -- fitting -----------------------------------------------------------------------------------------------------------


def test_fit_recovers_the_machine() -> None:
    seen = observed(MACHINE, trace().accesses(), RECORDS)
    found = fit(seen, NBYTES, MACHINE.disk_read)
    for name in ("layer_seconds", "expert_seconds", "step_seconds", "contention", "miss_seconds", "wake_seconds"):
        assert getattr(found, name) == pytest.approx(getattr(MACHINE, name), rel=1e-6), name
    assert (found.record_nbytes, found.disk_read) == (NBYTES, MACHINE.disk_read)


def test_fit_withstands_outliers() -> None:
    seen = observed(MACHINE, trace().accesses(), RECORDS)
    for number in range(0, len(seen), 50):  # now and then another process takes the core
        seen[number] = replace(seen[number], compute=seen[number].compute * 30, before=seen[number].before * 30)
    found = fit(seen, NBYTES, MACHINE.disk_read)
    assert found.expert_seconds == pytest.approx(MACHINE.expert_seconds, rel=0.02)
    assert found.layer_seconds == pytest.approx(MACHINE.layer_seconds, rel=0.02)


def test_too_few_accesses_to_fit() -> None:
    seen = observed(MACHINE, trace(10).accesses(), RECORDS)
    with pytest.raises(ConfigError, match=r"had \d+ accesses without a miss; at least 24 .* more tokens or more slots"):
        fit(seen, NBYTES, MACHINE.disk_read)


@pytest.mark.parametrize("factor", [0.4, 0.8, 1.0, 2.5])
def test_calibration_finds_the_disk_beside_the_math(factor: float) -> None:
    accesses = trace(80).accesses()
    tiers = [configure(60, RECORDS, LAYERS, TOP_K)]
    real = replace(MACHINE, disk_read=replace(MACHINE.disk_read, gbps=factor * MACHINE.disk_read.gbps))
    waited = serve(Workday(accesses, LAYERS, EXPERTS, TOP_K), tiers, real).wait
    seen = [replace(one, wait=0.0) for one in observed(MACHINE, accesses, 60)]
    last = max(index for index, one in enumerate(seen) if one.access.phase is Phase.DECODE)
    seen[last] = replace(seen[last], wait=waited)
    found = calibrate(MACHINE, seen, LAYERS, EXPERTS, tiers)
    assert found.disk_read.gbps == pytest.approx(real.disk_read.gbps, rel=0.02)
    assert replace(found, disk_read=real.disk_read) == real


def test_a_run_that_never_waited_calibrates_nothing() -> None:
    seen = [replace(one, wait=0.0) for one in observed(MACHINE, trace(20).accesses(), RECORDS)]
    assert calibrate(MACHINE, seen, LAYERS, EXPERTS, [configure(RECORDS, RECORDS, LAYERS, TOP_K)]) is MACHINE


# -- forecasts ---------------------------------------------------------------------------------------------------------


def test_all_resident_is_computing_only() -> None:
    accesses = [
        Access(1 + step * LAYERS + layer, layer, tuple(ExpertKey(layer, e) for e in range(TOP_K)), (1,) * TOP_K)
        for step in range(10)
        for layer in range(LAYERS)
    ]
    found = forecast(Workday(accesses, LAYERS, EXPERTS, TOP_K, 4 * LAYERS), RECORDS, NBYTES, MACHINE)
    step = MACHINE.step_seconds + LAYERS * (MACHINE.layer_seconds + TOP_K * MACHINE.expert_seconds)
    assert found.tokens_per_second == pytest.approx(1 / step)
    assert (found.hit_rate, found.loads_per_token, found.wait, found.bound) == (1.0, 0.0, 0.0, "compute")


def test_everything_missing_waits_for_the_disk() -> None:
    one = Timing(NBYTES, disk_read=Link(1.0, 0.0, 4), layer_seconds=1e-3)
    accesses = [
        Access(1 + n, 0, tuple(ExpertKey(0, (n * TOP_K + e) % EXPERTS) for e in range(TOP_K)), (1,) * TOP_K)
        for n in range(40)
    ]
    found = forecast(Workday(accesses, 1, EXPERTS, TOP_K, 8), TOP_K, NBYTES, one, policy="lru", admission="always")
    assert found.loads_per_token == TOP_K and found.hit_rate == 0
    assert found.tokens_per_second == pytest.approx(1 / (1e-3 + TOP_K * 1e-3))
    assert found.bound == "disk" and found.bytes_per_token == TOP_K * NBYTES


def test_more_slots_are_never_slower() -> None:
    work, slow = from_trace(trace(200)), replace(MACHINE, disk_read=SLOW)
    found = [forecast(work, slots, NBYTES, slow) for slots in (16, 32, 64, 96, RECORDS)]
    speeds = [one.tokens_per_second or 0.0 for one in found]
    assert speeds == sorted(speeds) and speeds[0] < 0.7 * speeds[-1]
    assert [one.hit_rate for one in found] == sorted(one.hit_rate for one in found)
    assert found[0].bound == "disk" and found[-1].bound == "compute"
    counted = forecast(work, 32, NBYTES)
    assert counted.tokens_per_second is None and counted.hit_rate == found[1].hit_rate


def test_a_slower_machine_is_slower() -> None:
    work = from_trace(trace(120))
    usual = forecast(work, 32, NBYTES, MACHINE).tokens_per_second or 0.0
    for change in (
        {"contention": 1.0},
        {"miss_seconds": 2e-3},
        {"wake_seconds": 2e-3},
        {"disk_read": Link(0.5, 2e-4, 4)},
        {"expert_seconds": 1e-3},
    ):
        assert (forecast(work, 32, NBYTES, replace(MACHINE, **change)).tokens_per_second or 0.0) < usual, change


def test_a_second_tier_saves_disk_reads() -> None:
    work = from_trace(trace(120))
    one, two = (forecast(work, 24, NBYTES, MACHINE, host_slots=host) for host in (None, 72))
    assert two.loads_per_token < one.loads_per_token
    assert (two.tokens_per_second or 0) > (one.tokens_per_second or 0)


def test_two_tiers_keep_an_expert_once_as_in_a_run() -> None:
    """Together the two have room for nearly all experts; each of its own accord, for those of the larger one."""
    work = from_trace(trace())
    found = forecast(work, 48, NBYTES, MACHINE, host_slots=72)
    alone = [configure(slots, RECORDS, LAYERS, TOP_K) for slots in (48, 72)]
    assert found.loads_per_token < 0.7 * serve(work, alone, MACHINE).loads / work.tokens


def test_what_counts_of_a_trace() -> None:
    part = trace(100)
    work = from_trace(part, tokens=60, warm_up=0.5)
    decode = [access for access in work.accesses if access.phase is Phase.DECODE]
    assert work.tokens == 26 and len(decode) == 52 * LAYERS
    with pytest.raises(ConfigError, match="has 0 decode steps among its first 8 tokens"):
        from_trace(part, tokens=8)


def test_a_profile_keeps_the_skew_and_loses_the_memory() -> None:
    recorded = trace(400, skew=1.2, persistence=0.9)
    profile = Profile.from_trace(recorded)
    work = from_profile(profile, TOP_K)
    again = Profile.from_accesses(work.accesses, LAYERS, EXPERTS)
    for layer in range(LAYERS):
        assert np.corrcoef(again.uses[layer], profile.uses[layer])[0, 1] > 0.9
    assert forecast(work, 32, NBYTES).hit_rate < forecast(from_trace(recorded), 32, NBYTES).hit_rate
    with pytest.raises(ConfigError, match="a token uses 40 of 32"):
        from_profile(profile, 40)
    with pytest.raises(ConfigError, match="a layer without any use"):
        from_profile(Profile(LAYERS, EXPERTS), TOP_K)


# -- words -------------------------------------------------------------------------------------------------------------


def words(routing: Trace, **options: Any) -> str:
    work = from_trace(routing)
    return " ".join(advice(work, [forecast(work, slots, NBYTES, **options) for slots in (12, 32, 64, RECORDS)]))


def test_words_for_a_model_that_does_not_cache() -> None:
    said = words(uniform_control(300, LAYERS, EXPERTS, TOP_K), policy="lru")
    assert "will not cache well" in said
    assert "12 slots hold less than one token uses (16 experts)" in said
    assert "fastest" not in said  # nothing was timed


def test_words_for_a_model_that_caches() -> None:
    said = words(trace(300, skew=1.2, persistence=0.8), timing=replace(MACHINE, disk_read=SLOW))
    assert "It caches well" in said and "not cache" not in said
    assert "the disk decides the speed" in said and "of the fastest" in said
    profile = Profile.from_trace(trace(300))
    work = from_profile(profile, TOP_K)
    assert any("drawn independently" in sentence for sentence in advice(work, [forecast(work, 32, NBYTES)]))


def test_the_longest_context_that_costs_little() -> None:
    def split(context: int, speed: float | None, hits: float = 0.5) -> Split:
        return Split(context, 1, Forecast(1, None, 0.1, hits, 1.0, 1.0, speed))

    assert recommend([split(1024, 10.0), split(4096, 9.5), split(16384, 8.0)]).context == 4096
    assert recommend([split(1024, None, 0.8), split(4096, None, 0.4)]).context == 1024


# -- measuring, on a tiny model ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace file of the tiny model: a prefill of 6 tokens and 100 decoded ones."""
    model = moetier.from_pretrained(checkpoint("qwen3_moe"), slots="50%", context=64)
    ids = torch.randint(3, 100, (1, 106), generator=torch.Generator().manual_seed(1))
    past = None
    with torch.no_grad(), TraceRecorder(model) as recorder:
        for begin, end in [(0, 6), *((n, n + 1) for n in range(6, 106))]:
            past = model(input_ids=ids[:, begin:end], past_key_values=past, use_cache=True).past_key_values
            recorder.step([0], end - begin, ids[:, begin:end])
    model.moetier.close()
    path = tmp_path_factory.mktemp("trace") / "t.parquet"
    write_trace(recorder.trace(), path)
    return path


def test_measure(tiered: Callable[..., Any]) -> None:
    model = tiered("qwen3_moe", slots="100%")
    found = measure(model, [3 + n % 50 for n in range(80)])
    timing = found.timing
    assert found.observations == 77 * model.moetier.plan.workload.layers
    assert found.missing > 0 and found.warm_slots == 24
    assert 0 < timing.expert_seconds < 0.1 and 0 < timing.layer_seconds < 0.5 and timing.disk_read.gbps > 0
    assert json.loads(json.dumps(found.to_dict()))["timing"]["record_nbytes"] == timing.record_nbytes
    assert model.moetier.cache.mover.links[0].ends is None and "batches" not in vars(model.moetier.cache)
    disk = measure_disk(model.moetier.cache.store, 4, 2)
    assert disk.gbps > 0 and disk.latency >= 0 and disk.depth == 2
    with pytest.raises(ConfigError, match="at least 12 tokens are needed"):
        measure(model, [3] * 5)


def test_replay_feeds_the_recorded_tokens(tiered: Callable[..., Any], recorded: Path) -> None:
    from moetier.trace.files import read_trace

    routing = read_trace(recorded).first(20)
    model = tiered("qwen3_moe", slots="50%")
    with TraceRecorder(model) as recorder:
        plain = model.moetier.observe_forward
        assert plain is not None
        model.register_forward_hook(lambda module, args, output: recorder.step([0], output.logits.shape[1]))
        steps = replay(model, routing)
    assert [(phase, tokens) for phase, tokens, _ in steps] == [(Phase.PREFILL, 6)] + [(Phase.DECODE, 1)] * 14
    assert (recorder.trace().experts == routing.experts).all()
    with pytest.raises(ConfigError, match="does not hold its tokens' numbers"):
        replay(model, replace(routing, token_ids=None))


def plan(*flags: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["plan", *map(str, flags)])
    assert result.exit_code == code, result.stderr + result.stdout
    return result


def test_the_command(checkpoint: Callable[..., Path], recorded: Path, tmp_path: Path) -> None:
    folder = checkpoint("qwen3_moe")
    text = plan(folder, "--trace", recorded, "--budgets", "6,50%").stdout
    assert "hits" in text and "add --measure" in text and "tokens/s" not in text
    flags = ("--trace", recorded, "--slots", "100%", "--budgets", "25%,100%", "--measure", "--compare", "--threads", 1)
    found = json.loads(plan(folder, *flags, "--json").stdout)["forecast"]
    assert [row["slots"] for row in found["budgets"]] == [6, 24]
    for row in found["budgets"]:
        error = 100 * (row["tokens_per_second"] / row["measured_tokens_per_second"] - 1)
        assert row["error_percent"] == pytest.approx(error)
    assert found["budgets"][0]["loads_per_token"] > found["budgets"][1]["loads_per_token"]
    text = plan(folder, *flags[:6], "--measure").stdout
    assert "measured: disk" in text and "CPU ms" in text
    Profile.from_trace(trace(50)).save(tmp_path / "p.json")
    assert "a profile of 4 layers" in plan(folder, "--profile", tmp_path / "p.json", code=2).stderr


def test_memory_split_between_context_and_slots(checkpoint: Callable[..., Path], recorded: Path) -> None:
    folder = checkpoint("qwen3_moe")
    shown = json.loads(plan(folder, "--context", 64, "--json").stdout)
    tight = shown["host_total_nbytes"] - 12 * shown["workload"]["slot_nbytes"]
    found = json.loads(plan(folder, "--context", 64, "--host-memory", tight, "--trace", recorded, "--json").stdout)[
        "forecast"
    ]
    assert all(first["context"] < second["context"] for first, second in pairwise(found["splits"]))
    slots = [split["forecast"]["slots"] for split in found["splits"]]
    assert slots == sorted(slots, reverse=True)
    assert bool(found["splits"]) == (found["recommended_context"] is not None)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--compare", "--compare needs a recorded routing"),
        ("--budgets 25%", "--budgets needs a recorded routing"),
        ("--trace a --profile b", "contradict each other"),
        ("--profile a --compare --measure", "give --trace, not --profile"),
        ("--trace {trace} --compare", "give --measure too"),
        ("--trace {trace} --budgets 25%,,50%", "write them with commas"),
        ("--trace {trace} --budgets many", "--budgets many: slots: 'many' is neither"),
        ("--trace none.parquet", "none.parquet"),
        ("--profile none.json", "none.json: the profile cannot be read"),
    ],
)
def test_flags_that_cannot_be_used(flags: str, words: str, checkpoint: Callable[..., Path], recorded: Path) -> None:
    result = plan(checkpoint("qwen3_moe"), *flags.format(trace=recorded).split(), code=2)
    assert words in result.stderr and "Traceback" not in result.stderr
