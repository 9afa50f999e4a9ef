"""The prefetcher: within its limits, counted to the last one, and never the end of a run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetier import Access, ConfigError, ExpertKey, Residency, TierConfig
from moetier.eventlog import Recorder, replay
from moetier.predictors import Prediction, make_predictor
from moetier.prefetch import Prefetcher
from moetier.tiers import Copy, Kind
from routing import EXPERTS, LAYERS, TOP_K, random_trace


class Script:
    """Predicts what it is told to, by distance; or raises it."""

    def __init__(self, *rounds: Any):
        self.rounds = list(rounds)

    def observe(self, access: Access, hidden: Any = None) -> None:
        self.now = self.rounds.pop(0) if self.rounds else {}

    def predict(self, access: Access, distance: int = 1) -> Iterable[Prediction]:
        if isinstance(self.now, Exception):
            raise self.now
        return [Prediction(ExpertKey(*key), chance, distance) for key, chance in self.now.get(distance, [])]


def core_of(slots: int, policy: str = "lru") -> Residency:
    return Residency([TierConfig(slots, policy)], LAYERS, EXPERTS)


def serve(core: Any, access: Access, prefetcher: Prefetcher | None = None) -> int:
    """One access of a run: acquire, prefetch, let copies end, release."""
    ticket = core.acquire(access)
    issued = prefetcher.after(access) if prefetcher is not None else 0
    while not ticket.done:
        for copy in core.take():
            core.completed(copy.id)
        while ticket.ready:
            core.release(ticket, ticket.ready.popleft())
    return issued


def access(time: int, layer: int, *experts: int) -> Access:
    return Access(time, layer, tuple(ExpertKey(layer, e) for e in experts), (1,) * len(experts))


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    slots=st.integers(2, 18),
    limit=st.integers(0, 3),
    displace=st.booleans(),
    confidence=st.sampled_from([0.0, 0.3, 0.6]),
    distances=st.sampled_from([(1,), (1, 2), (3,)]),
    delay=st.integers(0, 4),
    name=st.sampled_from(["previous-token", "layer-transition", "activation-matrix", "mix"]),
)
def test_limits_hold_and_counters_add_up(
    seed: int,
    slots: int,
    limit: int,
    displace: bool,
    confidence: float,
    distances: tuple[int, ...],
    delay: int,
    name: str,
) -> None:
    core = core_of(slots)
    predictor = make_predictor(name, LAYERS, EXPERTS, TOP_K)
    prefetcher = Prefetcher(core, predictor, confidence, limit, displace, distances)
    flights: list[Copy] = []
    issued = 0
    for number, now in enumerate(random_trace(seed, 12).accesses()):
        ticket = core.acquire(now)
        before = core.residents()
        count = prefetcher.after(now)
        assert 0 <= count <= limit
        if not displace:
            assert before <= core.residents(), "only free slots are taken"
        issued += count
        while not ticket.done:
            if number % (delay + 1) == 0 or not ticket.ready:  # else orders wait, and may be cancelled
                flights += core.take()
                flights.sort(key=lambda copy: core._orders.copies[copy.id].kind is Kind.PREFETCH)
                while flights and (not ticket.ready or delay < 2):
                    core.completed(flights.pop(0).id)
            while ticket.ready:
                core.release(ticket, ticket.ready.popleft())
            core.check()
    counts = prefetcher.counters()
    pending = sum(entry.prefetched for entry in core._top.entries.values())
    assert counts["issued"] == issued
    assert issued == counts["cancelled"] + counts["useful"] + counts["wasted"] + pending
    assert counts["late"] <= counts["useful"] and counts["error"] is None


def test_useful_and_late() -> None:
    sure = {1: [((1, 0), 0.9)]}
    core = core_of(4)
    prefetcher = Prefetcher(core, Script(sure))
    assert serve(core, access(1, 0, 0), prefetcher) == 1
    serve(core, access(2, 1, 0), prefetcher)
    nothing = {"late": 0, "wasted": 0, "cancelled": 0, "error": None}
    assert prefetcher.counters() == {"issued": 1, "useful": 1, **nothing}
    core = core_of(4)
    prefetcher = Prefetcher(core, Script(sure))
    assert prefetcher.after(access(1, 0)) == 1
    (copy,) = core.take()
    ticket = core.acquire(access(2, 1, 0))
    assert not ticket.ready and prefetcher.counters() == {"issued": 1, "useful": 1, **nothing, "late": 1}
    core.completed(copy.id)
    assert list(ticket.ready) == [ExpertKey(1, 0)]


def test_wasted() -> None:
    core = core_of(2)
    prefetcher = Prefetcher(core, Script({1: [((1, 0), 0.9)]}))
    serve(core, access(1, 0, 0), prefetcher)
    serve(core, access(2, 1, 1, 2), prefetcher)
    assert prefetcher.counters()["wasted"] == 1 and prefetcher.counters()["useful"] == 0


def test_an_order_nobody_took_is_cancelled_when_its_access_has_passed() -> None:
    core = core_of(4)
    prefetcher = Prefetcher(core, Script({1: [((1, 0), 0.9)]}, {}))
    serve(core, access(1, 0, 0))
    core.acquire(access(2, 0, 0))
    assert prefetcher.after(access(2, 0, 0)) == 1 and core.holds(ExpertKey(1, 0))
    core.acquire(access(3, 1))
    prefetcher.after(access(3, 1))
    assert prefetcher.counters()["cancelled"] == 1 and not core.holds(ExpertKey(1, 0)) and not core.take()


def test_a_better_prediction_cancels_a_worse_one() -> None:
    core = core_of(6)
    far, near = {2: [((2, 0), 0.9), ((2, 1), 0.9)]}, {1: [((2, 1), 0.9), ((2, 0), 0.2)]}
    prefetcher = Prefetcher(core, Script(far, near), distances=(2, 1))
    assert prefetcher.after(access(1, 0)) == 2
    assert prefetcher.after(access(2, 1)) == 0
    assert core.holds(ExpertKey(2, 1)) and not core.holds(ExpertKey(2, 0))
    assert prefetcher.counters()["cancelled"] == 1


def test_residents_cost_nothing_of_the_limit_and_the_likeliest_go_first() -> None:
    core = core_of(8)
    serve(core, access(1, 1, 0))
    told = {1: [((1, 0), 0.95), ((1, 3), 0.8), ((1, 2), 0.7), ((1, 4), 0.4)], 3: [((0, 5), 0.85), ((0, 4), 0.75)]}
    prefetcher = Prefetcher(core, Script(told, told), limit=2, distances=(1, 3))
    assert serve(core, access(2, 0, 0), prefetcher) == 2
    assert core.holds(ExpertKey(1, 3)) and core.holds(ExpertKey(1, 2)), "far ones count for less"
    assert not core.holds(ExpertKey(1, 4)), "not likely enough"


@pytest.mark.parametrize(
    "fault",
    [
        RuntimeError("no memory"),
        {1: [((9, 0), 0.9)]},
        {1: [((1, 99), 0.9)]},
        {1: [(("a", 0), 0.9)]},
        {1: [((1, 0), "likely")]},
        {1: 7},
    ],
)
def test_a_fault_of_the_predictor_ends_prefetching_and_not_the_run(fault: Any, caplog: Any) -> None:
    core, plain = core_of(6), core_of(6)
    prefetcher = Prefetcher(core, Script({1: [((1, 0), 0.9)]}, fault, {1: [((0, 1), 0.9)]}))
    for time, layer in enumerate((0, 1, 2, 0, 1), 1):
        serve(core, access(time, layer, 0, 1), prefetcher)
        serve(plain, access(time, layer, 0, 1))
        core.check()
    assert not prefetcher.enabled and prefetcher.counters()["issued"] == 1
    assert prefetcher.counters()["error"].startswith(type(prefetcher.error).__name__)
    assert sum("prefetching ends" in record.message for record in caplog.records) == 1
    assert core.residents() == plain.residents()


def test_what_is_not_an_error_of_the_predictor_is_not_caught() -> None:
    class Stopped(Script):
        def observe(self, access: Access, hidden: Any = None) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Prefetcher(core_of(2), Stopped()).after(access(1, 0, 0))


def test_nan_is_not_confidence() -> None:
    core = core_of(6)
    assert Prefetcher(core, Script({1: [((1, 0), float("nan"))]})).after(access(1, 0)) == 0


def test_a_recorded_run_with_prefetches_replays() -> None:
    recorder = Recorder(core_of(7, "horizon"))
    prefetcher = Prefetcher(recorder, make_predictor("mix", LAYERS, EXPERTS, TOP_K), 0.2, 2, displace=True)
    for now in random_trace(1, 20).accesses():
        serve(recorder, now, prefetcher)
    assert prefetcher.counters()["issued"] > 0
    assert replay(recorder.log).digest() == recorder.digest()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"confidence": 1.5}, "between 0 and 1"),
        ({"limit": -1}, "must not be negative"),
        ({"distances": ()}, "from 1 to 3"),
        ({"distances": (0,)}, "from 1 to 3"),
        ({"distances": (4,)}, "from 1 to 3"),
    ],
)
def test_wrong_limits_are_told(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Prefetcher(core_of(2), Script(), **wrong)
