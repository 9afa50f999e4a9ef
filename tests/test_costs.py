"""The cost model of misses: against trying everything, and against the formulas of the papers."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetier.costs import Cost, Costs, Split, Work, makespan, split
from moetier.errors import ConfigError

SECONDS = st.floats(1e-6, 1e-2)
COST = st.builds(Cost, SECONDS, st.floats(0, 1e-2), st.floats(0, 1e-3))
COSTS = st.builds(
    Costs,
    cpu=COST,
    device=st.builds(Cost, st.floats(1e-6, 1e-4)),
    link=SECONDS,
    disk=SECONDS,
    disk_latency=st.floats(0, 1e-3),
    contention=st.floats(0, 3),
    in_place=st.floats(0, 1e-3),
)
MISSES = st.lists(st.builds(Work, st.integers(1, 40), st.booleans()), min_size=1, max_size=5)


def best_of_all(misses: list[Work], costs: Costs, busy: float) -> float:
    """Every choice of sides with one fetch at least."""
    sides = [choice for choice in product((False, True), repeat=len(misses)) if not all(choice)]
    return min(makespan(misses, choice, costs, busy) for choice in sides)


@settings(derandomize=True, deadline=None, max_examples=120)
@given(MISSES, COSTS, st.floats(0, 1e-2))
def test_never_far_from_the_best_choice(misses: list[Work], costs: Costs, busy: float) -> None:
    found = split(misses, costs, busy)
    assert not all(found.in_place)
    assert found.seconds == pytest.approx(makespan(misses, found.in_place, costs, busy))
    assert found.seconds <= 4 / 3 * best_of_all(misses, costs, busy)
    assert found.seconds <= makespan(misses, [False] * len(misses), costs, busy) * (1 + 1e-9)


@settings(derandomize=True, deadline=None, max_examples=80)
@given(MISSES, COSTS, st.floats(0, 1e-2))
def test_exact_where_all_is_in_host_memory_and_the_device_is_fast(
    misses: list[Work], costs: Costs, busy: float
) -> None:
    misses = [Work(miss.tokens) for miss in misses]
    assert split(misses, costs, busy).seconds == pytest.approx(best_of_all(misses, costs, busy), rel=1e-6)


def test_mostly_the_best_choice_with_the_disk_too() -> None:
    import random

    draw, equal, rounds = random.Random(0), 0, 150
    for _ in range(rounds):
        costs = Costs(
            Cost(draw.uniform(1e-4, 2e-3), 0.0, draw.uniform(0, 1e-3)),
            Cost(draw.uniform(1e-5, 1e-4)),
            link=draw.uniform(1e-4, 2e-3),
            disk=draw.uniform(1e-4, 3e-3),
            contention=draw.uniform(0, 2),
        )
        misses = [Work(draw.randint(1, 8), draw.random() < 0.5) for _ in range(draw.randint(2, 6))]
        equal += split(misses, costs).seconds <= best_of_all(misses, costs, 0.0) * 1.000001
    assert equal >= 0.97 * rounds


@pytest.mark.parametrize("misses", [2, 5, 10, 40])
@pytest.mark.parametrize("share", [0.1, 0.31, 0.5, 0.9])  # link bandwidth of memory bandwidth
def test_equal_misses_divide_by_freetokens_formula(misses: int, share: float) -> None:
    """q* = m · B_link / B_memory, where the link keeps its bandwidth and the CPU has what is left."""
    record, memory = 1e7, 4e10
    link = share * memory
    costs = Costs(Cost(record / memory), link=record / link, contention=memory / (memory - link) - 1)
    fetched = split([Work(1)] * misses, costs).in_place.count(False)
    assert abs(fetched - max(1, misses * share)) < 1


def test_tokens_go_to_the_device() -> None:
    """Fiddler: an expert with many tokens is worth its transfer, one with few is not."""
    costs = Costs(Cost(1e-4, 0.0, 1e-4), Cost(1e-5), link=1e-3)
    assert split([Work(1), Work(64), Work(2), Work(1)], costs).in_place == (True, False, True, True)


def test_extremes() -> None:
    slow_link = Costs(Cost(1e-5), link=1.0)
    assert split([Work(3)] * 4, slow_link).in_place.count(False) == 1, "one is always fetched"
    assert split([Work(3)], slow_link) == Split((False,), 1.0)
    assert split([], slow_link) == Split((), 0.0)
    fast_link = Costs(Cost(1.0), link=1e-5)
    assert not any(split([Work(3)] * 4, fast_link).in_place)
    assert not any(split([Work(3)] * 4, Costs(Cost(1e-5), link=1e-3, in_place=1.0)).in_place), "moving rows costs too"
    off_disk = Costs(Cost(1e-3), link=1e-3, disk=0.1)
    assert split([Work(1, True)] * 3, off_disk).seconds == pytest.approx(0.301), "the disk bounds both sides alike"


def test_many_misses_of_both_sources_are_divided_too() -> None:
    misses = [Work(1 + i % 7, i % 3 == 0) for i in range(120)]
    costs = Costs(Cost(1e-3, 0.0, 1e-4), Cost(1e-5), link=1e-3, disk=5e-4, contention=0.5)
    found = split(misses, costs)
    assert 0 < sum(found.in_place) < len(misses)
    assert found.seconds < 0.75 * makespan(misses, [False] * len(misses), costs)


def test_math_beside_copies_takes_longer() -> None:
    alone = makespan([Work(1), Work(1)], [True, False], Costs(Cost(1e-3), link=1e-2))
    assert alone == pytest.approx(1e-2)
    costs = Costs(Cost(1e-3), link=5e-4, contention=1.0)
    # half of the first 0.5 ms is lost to the copy
    assert makespan([Work(1), Work(1)], [True, False], costs) == pytest.approx(1.25e-3)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.floats(1e-5, 1e-2), st.floats(0.02, 1.0))
def test_a_cost_is_found_again(floor: float, slope: float) -> None:
    cost = Cost(floor, 0.0, slope * floor)
    fitted = Cost.fit([(n, cost(n)) for n in (1, 2, 4, 8, 16, 32)])
    for n in (1, 2, 4, 8, 16, 32):
        assert fitted(n) == pytest.approx(cost(n), rel=0.15)


def test_fitting_needs_points() -> None:
    with pytest.raises(ConfigError, match="two measured points"):
        Cost.fit([(1, 1e-3)])
    falling = Cost.fit([(1, 2e-3), (8, 1e-3)])
    assert falling(64) >= falling(1) > 0, "noise never makes more tokens cheaper"
