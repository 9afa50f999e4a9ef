"""LRU curves in one pass: what runs at every size find, one by one."""

from __future__ import annotations

import builtins
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetier import CapacityError, ConfigError
from moetier.simulate import mattson
from moetier.simulate.config import SimulationConfig
from moetier.simulate.mattson import layer_curve, lru_curve, needs_of_accesses
from moetier.simulate.run import simulate_accesses
from moetier.trace.needs import Needs, needs_of
from test_simulate import EXPERTS, LAYERS, make_accesses, make_trace

RECORDS = LAYERS * EXPERTS
STACK = "moetier.simulate.mattson:StackLRU"


@given(seed=st.integers(0, 1000), largest=st.integers(1, EXPERTS))
@settings(derandomize=True, deadline=None, max_examples=6)
def test_the_curve_is_a_run_at_every_size(seed: int, largest: int) -> None:
    accesses = make_accesses(seed, 120, largest)
    curve = lru_curve(needs_of_accesses(accesses, EXPERTS), RECORDS)
    assert curve.smallest == max(len(access.keys) for access in accesses)
    for slots in range(curve.smallest, RECORDS + 1):
        result = simulate_accesses(accesses, LAYERS, EXPERTS, SimulationConfig(STACK, slots))
        assert (int(curve.hits[slots]), curve.needs) == (sum(result.hits), sum(result.needs))
    each = layer_curve(needs_of_accesses(accesses, EXPERTS), LAYERS, EXPERTS)
    for slots in range(each.smallest, EXPERTS + 1):
        config = SimulationConfig(STACK, slots * LAYERS, scope="layer")
        assert int(each.hits[slots]) == sum(simulate_accesses(accesses, LAYERS, EXPERTS, config).hits)


@given(seed=st.integers(0, 1000))
@settings(derandomize=True, deadline=None, max_examples=10)
def test_one_by_one_it_is_plain_lru(seed: int) -> None:
    accesses = make_accesses(seed, 60)
    needs = needs_of_accesses(accesses, EXPERTS)
    single = Needs(np.arange(len(needs.record)), needs.record)
    curve = lru_curve(single, RECORDS)
    for slots in range(1, RECORDS + 1):
        config = SimulationConfig("lru", slots, semantics="sequential")
        assert int(curve.hits[slots]) == sum(simulate_accesses(accesses, LAYERS, EXPERTS, config).hits)


def test_long_lines_are_renumbered() -> None:
    """Against stack distances by definition, far beyond the length of the line of positions."""
    rng = np.random.default_rng(0)
    records = 7
    record = np.minimum(rng.geometric(0.3, 2000) - 1, records - 1)
    curve = lru_curve(Needs(np.arange(2000), record), records)
    stack: list[int] = []
    hits = np.zeros(records + 1, dtype=np.int64)
    for key in record.tolist():
        if key in stack:
            hits[len(stack) - stack.index(key) :] += 1
            stack.remove(key)
        stack.append(key)
    assert curve.hits.tolist() == hits.tolist()


def test_a_trace_gives_the_same_needs_as_its_accesses() -> None:
    trace = make_trace(2)
    for ours, theirs in zip(needs_of_accesses(trace.accesses(), EXPERTS), needs_of(trace), strict=True):
        assert ours.tolist() == theirs.tolist()


def test_reading_a_curve() -> None:
    accesses = make_accesses(4, 150, prefills=0.0)
    curve = lru_curve(needs_of_accesses(accesses, EXPERTS), RECORDS)
    rate = curve.hit_rate(RECORDS)
    assert curve.hit_rate(10**6) == rate and curve.slots_for(1.0) is None
    slots = curve.slots_for(0.5)
    assert slots is not None and curve.hit_rate(slots) >= 0.5 > curve.hit_rate(slots - 1)
    with pytest.raises(CapacityError, match="begins at 4 slots"):
        curve.hit_rate(3)
    empty = lru_curve(needs_of_accesses([], EXPERTS), RECORDS)
    assert empty.needs == 0 and empty.hit_rate(5) == 0.0
    with pytest.raises(ConfigError, match="not below 5"):
        lru_curve(needs_of_accesses(accesses, EXPERTS), 5)


def test_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name.partition(".")[0] == "numba":
            raise ImportError(name)
        return real(name, *arguments, **options)

    mattson._counter.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"pip install 'moetier\[lab\]'"):
        lru_curve(needs_of_accesses(make_accesses(0, 3), EXPERTS), RECORDS)
