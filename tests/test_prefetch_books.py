"""Prefetching by hand: exact books on made cases, and in step with the core under any timing."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetier import Access, ExpertKey, Residency, TierConfig
from moetier.eventlog import Recorder, replay
from moetier.predictors import Prediction, make_predictor
from moetier.prefetch_control import Controller, Setting, State
from moetier.prefetch_engine import Prefetching
from moetier.tiers import Copy
from routing import EXPERTS, LAYERS, TOP_K, random_trace

NBYTES = 1000


class Always(Controller):
    """Always on, at one setting."""

    def __init__(self, confidence: float = 0.5, limit: int = 4):
        super().__init__()
        self.state, self.fixed = State.ON, Setting(confidence, limit)

    @property
    def setting(self) -> Setting | None:
        return self.fixed

    def passed(self) -> None:
        pass

    def record(self, step: Any, ahead: bool) -> None:
        self.steps = [*getattr(self, "steps", []), step]


class Script:
    """Predicts what it is told to, with certainty; or raises it."""

    def __init__(self, *rounds: Any):
        self.rounds = list(rounds)

    def observe(self, access: Access, hidden: Any = None) -> None:
        self.now = self.rounds.pop(0) if self.rounds else []

    def predict(self, access: Access, distance: int = 1) -> Iterable[Prediction]:
        if isinstance(self.now, Exception):
            raise self.now
        return [Prediction(ExpertKey(*key), chance, distance) for *key, chance in self.now]


class Bench:
    """A core and its prefetching by hand; the test ends copies."""

    def __init__(self, slots: int, *rounds: Any, policy: str = "lru"):
        self.core = Residency([TierConfig(slots, policy)], LAYERS, EXPERTS)
        self.controller = Always()
        self.prefetching = Prefetching(
            self.core, lambda: Script(*rounds), "script", lambda layer: NBYTES, self.controller
        )
        self.prefetching.withdraw = self.withdraw
        self.prefetching._turned()  # as when the controller begins a trial
        self.queue: list[Copy] = []
        self.now = self.time = 0
        self.kept = False  # prefetches stay in the queue

    def withdraw(self, copy_ids: Iterable[int]) -> list[int]:
        gone = [copy for copy in self.queue if copy.id in set(copy_ids)]
        self.queue = [copy for copy in self.queue if copy not in gone]
        return [copy.id for copy in gone]

    def begin(self, layer: int, *experts: int) -> Any:
        self.time += 1
        self.now += 10
        access = Access(self.time, layer, tuple(ExpertKey(layer, e) for e in experts), (1,) * len(experts))
        self.prefetching.begin(access, self.now)
        ticket = self.core.acquire(access)
        self.start()
        self.prefetching.issue(self.prefetching.predict(access), self.now)
        self.start()
        return ticket

    def start(self) -> None:
        orders = self.core.take()
        self.prefetching.orders(orders, self.now)
        self.queue += orders

    def end(self, copy: Copy, ok: bool = True) -> bool:
        self.queue.remove(copy)
        self.core.completed(copy.id, ok)
        return self.prefetching.ended(copy, ok, self.now)

    def serve(self, layer: int, *experts: int) -> None:
        """An access from begin to end; everything arrives, prefetches too unless they are kept."""
        ticket = self.begin(layer, *experts)
        while not ticket.done:
            for copy in [copy for copy in self.queue if copy.key in ticket.leased]:
                self.end(copy)
            while ticket.ready:
                self.core.release(ticket, ticket.ready.popleft())
            self.start()
        for copy in [] if self.kept else list(self.queue):
            self.end(copy)
        self.core.check()

    def counts(self) -> dict[str, int]:
        report = self.prefetching.report()
        assert report["error"] is None
        names = ("useful", "late", "wasted", "failed", "cancelled", "pending")
        assert report["issued"] == sum(report[name] for name in ("useful", "wasted", "cancelled", "pending"))
        return {name: report[name] for name in names if report[name]} | {"issued": report["issued"]}


SURE = 0.99


def test_useful() -> None:
    bench = Bench(4, [(1, 0, SURE)])
    bench.serve(0, 0)
    assert bench.counts() == {"issued": 1, "pending": 1}
    bench.serve(1, 0)
    assert bench.counts() == {"issued": 1, "useful": 1}
    bench.serve(2, 0)
    spared = [(step.misses, step.spared, step.regretted) for step in bench.controller.steps]
    assert spared == [(1, 0, 0), (0, 1, 0)] and bench.controller.steps[0].seconds == 10


def test_late_and_promoted() -> None:
    bench = Bench(4, [(1, 0, SURE)])
    bench.kept = True
    bench.serve(0, 0)
    ticket = bench.begin(1, 0)
    assert not ticket.ready and len(bench.core.promoted) == 1 and len(bench.queue) == 1, "the same read is waited for"
    assert not bench.end(bench.queue[0]) and list(ticket.ready) == [ExpertKey(1, 0)]
    assert bench.counts() == {"issued": 1, "useful": 1, "late": 1}


def test_taken_back_before_it_began_costs_no_byte() -> None:
    bench = Bench(4, [(1, 0, SURE)])
    bench.kept = True
    bench.serve(0, 0)
    bench.serve(1, 3)
    assert bench.counts() == {"issued": 1, "cancelled": 1}
    assert not bench.core.holds(ExpertKey(1, 0)) and bench.prefetching.report()["wasted_bytes"] == 0


def test_wasted_when_evicted_unused() -> None:
    bench = Bench(2, [(1, 0, SURE)])
    bench.serve(0, 0)
    bench.serve(1, 1, 2)
    assert bench.counts() == {"issued": 1, "wasted": 1}
    assert bench.prefetching.report()["wasted_bytes"] == NBYTES
    bench.serve(1, 0)
    assert bench.counts() == {"issued": 1, "wasted": 1}, "a later demand of it is an ordinary miss"


def test_a_victim_that_is_wanted_while_the_useless_one_sits_there_is_regretted() -> None:
    for wanted, regretted in ((0, 1), (1, 0)):  # of use: without it the load would have displaced the same one
        bench = Bench(2, [], [], [(1, 1, SURE)])
        bench.serve(0, 0)
        bench.serve(1, 0)
        bench.serve(0)  # the next round: prefetches (1, 1) over (0, 0)
        assert bench.core.residents() == {(1, 0), (1, 1)}
        bench.serve(1, wanted)
        bench.serve(0, 0)
        bench.serve(1, 0)
        assert bench.controller.steps[-1].regretted == regretted


def test_a_failed_prefetch_is_counted_forgiven_and_not_repeated() -> None:
    wrong = [(1, 0, SURE)]
    bench = Bench(4, wrong, [], [], wrong)
    bench.kept = True
    bench.serve(0, 0)
    assert bench.end(bench.queue[0], ok=False), "nobody is told"
    assert bench.counts() == {"issued": 1, "wasted": 1, "failed": 1}
    bench.serve(1, 1)
    bench.serve(2, 0)
    bench.serve(0, 1)
    assert bench.counts()["issued"] == 1, "what cannot be read is left to demand"
    bench.serve(1, 0)


def test_a_failed_prefetch_that_is_demanded_is_read_anew_and_only_then_fails_the_access() -> None:
    bench = Bench(4, [(1, 0, SURE)])
    bench.kept = True
    bench.serve(0, 0)
    ticket = bench.begin(1, 0)
    bench.end(bench.queue[0], ok=False)
    assert ticket.failed is None
    (again,) = bench.core.take()
    bench.core.completed(again.id, False)
    assert ticket.failed == again.id
    bench.core.abort(ticket)
    bench.core.check()


@pytest.mark.parametrize(
    "fault",
    [
        RuntimeError("broken"),
        [(7, 0, SURE)],
        [(1, EXPERTS, SURE)],
        [(1, 0, "likely")],
        [("a", "b", SURE)],
        [(1, -1, SURE)],
    ],
)
def test_a_fault_of_the_predictor_ends_prefetching_and_nothing_else(fault: Any) -> None:
    bench = Bench(3, fault, [(2, 0, SURE)])
    for layer in (0, 1, 2, 0):
        bench.serve(layer, 0)
    report = bench.prefetching.report()
    assert report["issued"] == 0 and report["error"] is not None


@pytest.mark.parametrize("chance", [float("nan"), -1.0, 0.0, float("-inf")])
def test_no_probability_is_no_prefetch(chance: float) -> None:
    bench = Bench(3, [(1, 0, chance)])
    bench.serve(0, 0)
    assert bench.counts() == {"issued": 0}


def test_infinite_confidence_is_survived() -> None:
    bench = Bench(3, [(1, 0, float("inf"))])
    bench.serve(0, 0)
    bench.serve(1, 1)
    assert bench.counts()["issued"] <= 1


@settings(max_examples=40, derandomize=True, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    slots=st.integers(2, 18),
    policy=st.sampled_from(["lru", "horizon"]),
    name=st.sampled_from(["previous-token", "layer-transition", "mix"]),
    confidence=st.sampled_from([0.0, 0.3, 0.6]),
    fail=st.sampled_from([0.0, 0.2]),
)
def test_any_timing_keeps_books_and_core_in_step(
    seed: int, slots: int, policy: str, name: str, confidence: float, fail: float
) -> None:
    """Copies end in any order, some prefetches fail; the core's own counters say the same, and its log replays."""
    choose = random.Random(seed)
    core = Residency([TierConfig(slots, policy)], LAYERS, EXPERTS)
    recorder = Recorder(core)
    bench = Bench(slots)
    bench.core = recorder  # type: ignore[assignment]
    prefetching = bench.prefetching = Prefetching(
        recorder, lambda: make_predictor(name, LAYERS, EXPERTS, TOP_K), name, lambda layer: NBYTES, Always(confidence)
    )
    prefetching._load_seconds = 1.0
    prefetching.controller.baseline.seconds = lambda kind, misses: 3.0 + misses  # type: ignore[method-assign]
    prefetching.withdraw = bench.withdraw
    for access in random_trace(seed, 20).accesses():
        bench.now += 1
        prefetching.begin(access, bench.now)
        ticket = recorder.acquire(access)
        bench.start()
        prefetching.issue(prefetching.predict(access), bench.now)
        bench.start()
        while not ticket.done:
            if bench.queue and (not ticket.ready or choose.random() < 0.5):
                copy = choose.choice(bench.queue)
                bench.end(copy, copy.key in ticket.leased or choose.random() >= fail)
            elif ticket.ready:
                recorder.release(ticket, ticket.ready.popleft())
            bench.start()
        core.check()
    counts, outcomes = bench.counts(), core.counters()["prefetches"]
    assert isinstance(outcomes, dict)
    assert counts.get("useful", 0) == outcomes["useful"] and counts.get("late", 0) == outcomes["late"]
    withdrawn_or_wasted = counts.get("wasted", 0) + counts.get("cancelled", 0)
    assert withdrawn_or_wasted == outcomes["wasted"] + counts["issued"] - outcomes["issued"]
    assert counts.get("pending", 0) == sum(entry.prefetched for entry in core._top.entries.values())
    assert replay(recorder.log).digest() == core.digest()
