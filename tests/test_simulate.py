"""The simulator: its two drivers decide alike, nothing is lost, and its clock keeps the time one can work out by hand."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetier.access import Access, ExpertKey, Phase
from moetier.policies import POLICIES, find_policy
from moetier.simulate.config import Link, Result, SimulationConfig, Timing
from moetier.simulate.run import simulate_accesses
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
@settings(derandomize=True, deadline=None, max_examples=25)
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
