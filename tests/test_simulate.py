"""The simulator: its two drivers decide alike, nothing is lost, and what cannot be simulated is said."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetier import CapacityError, ConfigError, MoetierError
from moetier.access import Access, ExpertKey, Phase
from moetier.policies import POLICIES, find_policy
from moetier.policies.lru import LRU
from moetier.simulate.config import Link, Result, SimulationConfig, Timing, result_from_dict
from moetier.simulate.run import has_admission, simulate, simulate_accesses
from moetier.simulate.witness import Witness
from moetier.trace import Trace

LAYERS, EXPERTS, TOP_K = 3, 8, 3
FREE = Link(math.inf)
NO_TIME = Timing(100, FREE, FREE, FREE, FREE)  # the clock driver, with nothing to wait for


def make_accesses(seed: int, count: int, largest: int = 4, prefills: float = 0.1) -> list[Access]:
    """Layers in a cycle; skewed experts with some that stay; a few large accesses of prefills."""
    choose = random.Random(seed)
    accesses: list[Access] = []
    last: dict[int, set[int]] = {layer: set() for layer in range(LAYERS)}
    phase = Phase.DECODE
    for time in range(1, count + 1):
        layer = (time - 1) % LAYERS
        if layer == 0:
            phase = Phase.PREFILL if choose.random() < prefills else Phase.DECODE
        size = choose.randint(1, largest if phase is Phase.DECODE else EXPERTS)
        experts = {expert for expert in last[layer] if choose.random() < 0.5}
        while len(experts) < size:
            experts.add(
                min(EXPERTS - 1, int(choose.expovariate(0.4))) if choose.random() < 0.8 else choose.randrange(EXPERTS)
            )
        last[layer] = experts
        keys = tuple(ExpertKey(layer, expert) for expert in sorted(experts))
        tokens = tuple(choose.randint(1, 3) for _ in keys)
        mass = tuple(choose.random() for _ in keys)
        accesses.append(Access(time, layer, keys, tokens, phase, time // 60, mass))
    return accesses


def make_trace(seed: int, tokens: int = 60, sequences: int = 3) -> Trace:
    rng = np.random.default_rng(seed)
    popularity = rng.permuted(np.tile(1 / np.arange(1, EXPERTS + 1), (LAYERS, 1)), axis=1)
    experts = np.argsort(np.log(popularity) + rng.gumbel(size=(tokens, LAYERS, EXPERTS)), axis=2)[:, :, -TOP_K:]
    sequence = np.sort(rng.integers(0, sequences, tokens))
    return Trace(
        experts.astype(np.int16), EXPERTS, sequence.astype(np.int32), np.arange(tokens), np.ones(tokens, np.uint8)
    )


FIT = make_accesses(99, 90)


def run(accesses: list[Access], config: SimulationConfig, **options: Any) -> Result:
    fitted = hasattr(find_policy(config.policy.partition("(")[0]), "fit")
    return simulate_accesses(accesses, LAYERS, EXPERTS, config, fit=FIT if fitted else None, **options)


def check_conserved(result: Result, record: int) -> None:
    needs = [
        hits + lates + misses for hits, lates, misses in zip(result.hits, result.lates, result.misses, strict=True)
    ]
    assert needs == result.needs
    if result.config.host_slots is None:
        assert result.host_hits == result.host_misses == [0] * LAYERS
    else:
        assert [a + b for a, b in zip(result.host_hits, result.host_misses, strict=True)] == result.misses
    if result.config.predictor is None:
        home = result.misses if result.config.host_slots is None else result.host_misses
        assert result.bytes_moved["disk_read"] == sum(home) * record
        assert result.bytes_moved["h2d"] == (0 if result.config.host_slots is None else sum(result.misses) * record)
    assert result.evictions + result.staged <= sum(result.misses) + result.prefetches["issued"]


# -- two drivers, one behaviour ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", sorted(POLICIES))
@given(data=st.data())
@settings(derandomize=True, deadline=None, max_examples=15)
def test_the_fast_path_decides_as_the_core(policy: str, data: st.DataObject) -> None:
    """Hook by hook, for any size, admission, staging, floor, scope and semantics; waves included."""
    slots = data.draw(st.integers(LAYERS, LAYERS * EXPERTS + 2), "slots")
    scope = data.draw(st.sampled_from(["global", "global", "layer"]), "scope")
    parts = LAYERS if scope == "layer" else 1
    staging = data.draw(st.sampled_from([0, 0, 1, 2, 5]), "staging")
    staging = staging * parts if staging * parts < slots - parts + 1 and staging < slots // parts else 0
    config = SimulationConfig(
        policy,
        slots,
        scope=scope,
        staging=staging,
        admission=data.draw(st.sampled_from(["always", "decode-only"]), "admission") if staging else "always",
        floor=data.draw(st.integers(0, 2), "floor") if scope == "global" else 0,
    )
    accesses = make_accesses(data.draw(st.integers(0, 1000), "seed"), 90, data.draw(st.integers(1, EXPERTS), "largest"))
    seen: list[list[list[Witness]]] = [[], []]
    fast = run(accesses, config, witnesses=seen[0])
    real = run(accesses, replace(config, timing=NO_TIME), witnesses=seen[1])
    assert (fast.driver, real.driver) == ("instant", "clock")
    for (fast_witness,), (real_witness,) in zip(*seen, strict=True):
        assert fast_witness.noted == real_witness.noted
    assert fast.hits == real.hits and fast.misses == real.misses and real.lates == [0] * LAYERS
    assert (fast.evictions, fast.staged, fast.timeline) == (real.evictions, real.staged, real.timeline)
    check_conserved(fast, 1)
    check_conserved(real, 100)


@given(seed=st.integers(0, 1000), scope=st.sampled_from(["global", "layer"]))
@settings(derandomize=True, deadline=None, max_examples=20)
def test_a_layer_of_its_own_is_a_run_of_its_own(seed: int, scope: str) -> None:
    """Scope "layer" is one run per layer, slots shared out, the remainder to the first layers."""
    accesses = make_accesses(seed, 90)
    for options in ({}, {"timing": NO_TIME}):
        together = run(accesses, SimulationConfig("lfru", 3 * LAYERS + 2, scope="layer", **options))
        for layer, slots in enumerate((4, 4, 3)):
            own = [access for access in accesses if access.layer == layer]
            alone = run(own, SimulationConfig("lfru", slots, **options))
            assert (together.hits[layer], together.misses[layer]) == (alone.hits[layer], alone.misses[layer])
            assert sum(alone.needs) == alone.needs[layer] == together.needs[layer]


# -- what comes out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["belady", "belady-forced"])
@given(seed=st.integers(0, 1000))
@settings(derandomize=True, deadline=None, max_examples=15)
def test_more_slots_never_hurt_the_oracle(policy: str, seed: int) -> None:
    accesses = make_accesses(seed, 90, prefills=0.0)
    hits = [sum(run(accesses, SimulationConfig(policy, slots)).hits) for slots in range(4, LAYERS * EXPERTS + 1)]
    assert hits == sorted(hits)
    distinct = len({key for access in accesses for key in access.keys})
    assert hits[-1] == sum(len(access.keys) for access in accesses) - distinct


def test_a_trace_in_a_result_out() -> None:
    trace = make_trace(0)
    calls: list[tuple[int, int]] = []
    config = SimulationConfig("lru", 9, windows=7)
    result = simulate(trace, config, progress=lambda done, total: calls.append((done, total)))
    assert result.tokens == result.steps == trace.tokens and result.accesses == trace.tokens * LAYERS
    assert result.needs == [trace.tokens * TOP_K] * LAYERS and result.driver == "instant"
    assert result.demand_ratio == 1.0 and result.overcommitted == 0.0 and result.tokens_per_second is None
    assert [count for count, _ in result.timeline] == [done for done, _ in calls] and len(calls) == 7
    assert calls[-1] == (result.accesses, result.accesses)
    sizes = np.diff([0] + [count for count, _ in result.timeline])
    rates = [rate for _, rate in result.timeline]
    assert np.average(rates, weights=sizes) == pytest.approx(result.hit_rate)
    assert result_from_dict(json.loads(json.dumps(result.to_dict()))) == result
    tight = simulate(trace, replace(config, slots=7))
    assert tight.demand_ratio == pytest.approx(9 / 7) and tight.overcommitted == 1.0
    by_layer = simulate(trace, replace(config, slots=10, scope="layer"))  # 4, 3, 3
    assert by_layer.demand_ratio == pytest.approx((3 / 4 + 1 + 1) / 3) and by_layer.overcommitted == 0.0


def test_streams_and_seeds() -> None:
    trace = make_trace(1, tokens=90, sequences=6)
    plain = simulate(trace, SimulationConfig("lru", 9))
    assert simulate(trace, SimulationConfig("lru", 9, batch=1)).hits == plain.hits
    several = simulate(trace, SimulationConfig("lru", 9, batch=3))
    assert several.steps < plain.steps and sum(several.needs) < sum(plain.needs) and several.tokens == 90
    seeds = [simulate(trace, SimulationConfig("lru", 9, seed=seed)) for seed in (1, 1, 2)]
    assert seeds[0].hits == seeds[1].hits != seeds[2].hits
    assert seeds[0].needs == plain.needs


def test_sequential_accesses_are_needs_one_by_one() -> None:
    accesses = make_accesses(5, 60)
    config = SimulationConfig("lru", 5, semantics="sequential")
    result = run(accesses, config)
    single = [
        Access(number, access.layer, (key,))
        for number, (access, key) in enumerate(((a, key) for a in accesses for key in a.keys), 1)
    ]
    assert result.accesses == len(single) and result.steps == 20
    assert result.hits == run(single, SimulationConfig("lru", 5)).hits
    assert sum(result.hits) != sum(run(accesses, SimulationConfig("lru", 5)).hits)


def test_bypass_gets_staging_slots_beside_the_cache() -> None:
    accesses = make_accesses(6, 120)
    largest = max(len(access.keys) for access in accesses)
    result = run(accesses, SimulationConfig("belady", 6))
    assert has_admission("belady") and not has_admission("lru")
    assert result.extra_staging == largest and result.staged > 0
    witnesses: list[list[Witness]] = []
    run(accesses, SimulationConfig("belady", 6), witnesses=witnesses)
    assert sum(len(noted.staged) for noted in witnesses[0][0].noted) == result.staged
    resident: set[ExpertKey] = set()
    for noted in witnesses[0][0].noted:
        resident = (resident | {*noted.inserted}) - {*noted.victims}
        assert len(resident) <= 6
    forced = run(accesses, SimulationConfig("belady-forced", 6))
    assert forced.extra_staging == forced.staged == 0 and sum(result.hits) > sum(forced.hits)
    given = run(accesses, SimulationConfig("belady", 6 + largest, staging=largest))
    assert given.extra_staging == 0 and given.hits == result.hits


def test_pins_are_reported() -> None:
    accesses = make_accesses(7, 300)
    result = run(accesses, SimulationConfig("lru", 12, warm_pinning=60), top_k=1)
    assert result.driver == "clock" and len(result.pinned) == LAYERS
    assert result.pinning["state"] in ("pinned", "dropped") and result.pinning["after"] == 60
    assert sum(result.hits) + sum(result.misses) == sum(result.needs) and result.seconds == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scope": "expert"}, "scope must be"),
        ({"semantics": "serial"}, "semantics must be"),
        ({"windows": 0}, "windows: at least 1"),
        ({"admission": "decode-only"}, "needs staging slots"),
        ({"admission": "sometimes", "staging": 2}, "unknown admission policy"),
        ({"host_policy": "lru"}, "give host_slots too"),
        ({"staging": 9}, "staging must be between"),
        ({"scope": "layer", "staging": 2}, "at least one slot a layer"),
        ({"scope": "layer", "floor": 1}, "floor is for scope global"),
        ({"scope": "layer", "warm_pinning": 9}, "use scope global"),
        ({"semantics": "sequential", "timing": NO_TIME}, "sequential accesses have no time"),
        ({"prefetch_displace": True}, "without a predictor"),
        ({"policy": "best"}, "unknown policy 'best'"),
        ({"predictor": "crystal-ball"}, "unknown predictor 'crystal-ball'"),
        ({"warm_pinning": 0}, "at least 1 access is needed"),
    ],
)
def test_what_cannot_be_is_said(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        simulate(make_trace(0), SimulationConfig(**{"policy": "lru", "slots": 9, **options}))


class Secretive(LRU):
    """A policy that keeps its residents to itself."""

    def victims(self, access: Access) -> Iterator[ExpertKey]:
        return iter(())


@pytest.mark.parametrize("options", [{}, {"timing": NO_TIME}])
def test_a_policy_that_names_no_victim_is_an_error(options: dict[str, Any]) -> None:
    with pytest.raises(MoetierError, match="access"):
        simulate(make_trace(0), SimulationConfig("test_simulate:Secretive", 9, **options))


def test_slots_that_are_too_few() -> None:
    with pytest.raises(CapacityError, match="at least 1 needed, got 0"):
        simulate(make_trace(0), SimulationConfig("lru", 0))
    with pytest.raises(CapacityError, match=r"host_slots: at least 3 needed \(one a layer\), got 2"):
        simulate(make_trace(0), SimulationConfig("lru", 9, host_slots=2, scope="layer"))


def test_fitted_policies_need_another_trace() -> None:
    with pytest.raises(ConfigError, match=r"'static' is fitted beforehand: give a trace to fit on"):
        simulate(make_trace(0), SimulationConfig("static", 9))
    one, other = make_trace(0, tokens=120).split()
    assert simulate(other, SimulationConfig("static", 9), fit=one).hit_rate > 0
    wrong = Trace(one.experts[:, :2], EXPERTS, one.sequence, one.step, one.phase)
    with pytest.raises(ConfigError, match="2 layers of 8 experts, the other 3 of 8"):
        simulate(other, SimulationConfig("static", 9), fit=wrong)
