"""Exclusive residency: what two tiers hold together, what is copied down, and what is never read again."""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetier.access import Access, ExpertKey, Phase
from moetier.errors import ConfigError
from moetier.misses import AlwaysInPlace
from moetier.residency import Residency
from moetier.tiers import Copy, Kind, TierConfig
from prepared import ONLINE
from test_residency import Bench, k

pytestmark = pytest.mark.timeout(60)


def bench_of(upper: int, lower: int, **options: Any) -> Bench:
    return Bench(TierConfig(upper, "lru"), TierConfig(lower, "lru", exclusive=True, **options))


def from_home(copies: list[Copy], home: int = 2) -> list[ExpertKey]:
    return [copy.key for copy in copies if copy.source.tier == home]


def demoted(copies: list[Copy]) -> list[ExpertKey]:
    return [copy.key for copy in copies if copy.kind is Kind.DEMOTE]


# -- by hand ----------------------------------------------------------------------------------------------------------


def test_doubles_are_dropped_first_and_what_has_one_leaves_for_nothing() -> None:
    bench = bench_of(2, 2)
    bench.finish(bench(0, 0), bench(0, 1))  # both in both tiers
    copies = bench.finish(bench(0, 2))  # the double of 1, the newer, makes way; 0 leaves tier 0 and stays below
    assert not demoted(copies)
    assert bench.core.residents() == {k(0, 1), k(0, 2)} and bench.core.residents(1) == {k(0, 0), k(0, 2)}


def test_what_has_no_double_is_copied_down_before_it_leaves() -> None:
    bench = bench_of(2, 3)
    bench.core._exclusive.fits = True  # type: ignore[union-attr]
    for expert in range(4):
        bench.finish(bench(0, expert))
    assert bench.core.residents() == {k(0, 2), k(0, 3)} and bench.core.residents(1) == {k(0, 0), k(0, 1), k(0, 3)}
    ticket = bench(0, 0)
    assert ticket.waiting == [k(0, 0)], "2 has to be copied down first"
    (down,) = bench.core.take()
    assert (down.kind, down.key, down.source.tier, down.target.tier) == (Kind.DEMOTE, k(0, 2), 0, 1)
    assert down.id in bench.core.promoted, "a demand waits for it"
    bench.end(down)
    assert [(copy.key, copy.source.tier) for copy in bench.core.take()] == [(k(0, 0), 1)]
    assert bench.core.residents(1) == {k(0, 0), k(0, 1), k(0, 2)} and bench.counts("demotions", 1) == 1


def test_the_next_victims_are_copied_ahead() -> None:
    bench = bench_of(4, 8, spare=2)
    for expert in range(4):
        bench.finish(bench(0, expert))
    for expert in range(4, 8):
        bench.finish(bench(0, expert))
    bench.finish(bench(1, 0), bench(1, 1))  # 4 and 5 leave; 10 records
    copies = bench.finish(bench(1, 2))
    copies += bench.finish(bench(1, 3))
    assert demoted(copies), "after the access"
    ticket = bench(0, 0)
    assert not ticket.waiting, "its slot can be left at once"
    bench.finish(ticket)


def test_a_demotion_that_fails_loses_nothing_and_is_not_tried_again() -> None:
    bench = bench_of(2, 3)
    bench.core._exclusive.fits = True  # type: ignore[union-attr]
    for expert in range(4):
        bench.finish(bench(0, expert))
    ticket = bench(0, 0)
    (down,) = bench.core.take()
    bench.end(down, ok=False)
    assert k(0, 2) not in bench.core.residents(), "it has left: home still has it"
    assert demoted(bench.finish(ticket)) == [] and ticket.failed is None
    assert from_home(bench.finish(bench(0, 2))) == [k(0, 2)]


def test_a_record_that_changes_while_it_is_copied_down_goes_home() -> None:
    bench = bench_of(2, 3)
    bench.core._exclusive.fits = True  # type: ignore[union-attr]
    for expert in range(4):
        bench.finish(bench(0, expert))
    ticket = bench(0, 0)
    (down,) = bench.core.take()
    writer = bench(0, 2)
    bench.release(writer, dirty=True)
    bench.end(down)
    assert k(0, 2) not in bench.core.residents(1)
    copies = bench.finish(ticket)
    assert [copy.key for copy in copies if copy.kind is Kind.WRITE_BACK] in ([k(0, 2)], [])
    bench.finish(bench(1, 0, 1))
    assert bench.counts("write_backs") == 1


def test_a_victim_that_is_demanded_meanwhile_stays() -> None:
    bench = bench_of(2, 3)
    bench.core._exclusive.fits = True  # type: ignore[union-attr]
    for expert in range(4):
        bench.finish(bench(0, expert))
    ticket = bench(0, 0)
    (down,) = bench.core.take()
    again = bench(0, 2)
    assert list(again.ready) == [k(0, 2)], "it is in tier 0 until it leaves"
    bench.end(down)
    assert ticket.waiting == [k(0, 0)] or k(0, 2) in bench.core.residents()
    bench.finish(ticket, again)


def test_what_left_is_read_again_where_that_is_cheaper() -> None:
    bench = bench_of(2, 4, refill=True)
    for expert in range(6):
        copies = bench.finish(bench(0, expert))
    assert not demoted(copies)
    refills = [copy for copy in copies if copy.kind is Kind.PREFETCH]
    assert all(copy.source.tier == 2 and copy.target.tier == 1 for copy in refills)
    for _ in range(3):
        for expert in range(6):
            copies += bench.finish(bench(0, expert))
    refills = [copy for copy in copies if copy.kind is Kind.PREFETCH]
    assert bench.counts("refills", 1) == len(refills) > 0 and bench.counts("demotions", 1) == 0
    assert bench.prefetches() == (0, 0, 0), "a refill is no prefetch"


def test_a_refill_that_is_demanded_hurries() -> None:
    bench = bench_of(2, 4, refill=True)
    refills: list[Copy] = []
    for time in range(40):
        ticket = bench(0, time * 5 % 6)
        while not ticket.done:
            orders = bench.core.take()
            refills = [copy for copy in orders if copy.kind is Kind.PREFETCH]
            bench.end(*[copy for copy in orders if copy.kind is not Kind.PREFETCH])
            while ticket.ready:
                bench.release(ticket)
        refills += [copy for copy in bench.core.take() if copy.kind is Kind.PREFETCH]
        if refills:
            break
    (refill,) = refills
    ticket = bench(0, refill.key.expert)
    assert refill.id in bench.core.promoted and bench.counts("lates", 1) == 1
    bench.end(refill)
    bench.finish(ticket)


@pytest.mark.parametrize(
    ("tiers", "message"),
    [
        ([TierConfig(2, exclusive=True), TierConfig(2)], "tier 1 can be exclusive, towards tier 0; tier 0 cannot"),
        ([TierConfig(2), TierConfig(2), TierConfig(2, exclusive=True)], "tier 2 cannot"),
        ([TierConfig(2), TierConfig(2, spare=1)], "do nothing in a tier that is not exclusive"),
        ([TierConfig(2), TierConfig(2, refill=True)], "do nothing in a tier that is not exclusive"),
        ([TierConfig(2), TierConfig(2, exclusive=True, spare=-1)], "spare must not be negative, got -1"),
    ],
)
def test_configurations_that_cannot_be(tiers: list[TierConfig], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Residency(tiers, 1, 1)


# -- together they hold everything ------------------------------------------------------------------------------------

LAYERS, EXPERTS = 3, 4
RECORDS = LAYERS * EXPERTS


class Users:
    """Up to two accesses at a time; copies end in any order, none fails, nothing is changed. Counts what home gives."""

    def __init__(self, tiers: list[TierConfig], seed: int):
        self.core = Residency(tiers, LAYERS, EXPERTS)
        self.random = Random(seed)
        self.home = len(tiers)
        self.reads: Counter[ExpertKey] = Counter()
        self.flights: list[Copy] = []
        self.live: list[Any] = []
        self.time = 0

    def acquire(self, phase: Phase) -> None:
        self.time += 1
        layer = self.random.randrange(LAYERS)
        experts = sorted(self.random.sample(range(EXPERTS), self.random.randint(1, EXPERTS)))
        keys = tuple(ExpertKey(layer, expert) for expert in experts)
        self.live.append(self.core.acquire(Access(self.time, layer, keys, phase=phase)))

    def step(self) -> None:
        for copy in self.core.take():
            self.flights.append(copy)
            self.reads[copy.key] += copy.source.tier == self.home
        for _ in range(self.random.randint(0, 3)):
            if self.flights:
                self.core.completed(self.flights.pop(self.random.randrange(len(self.flights))).id)
        for ticket in self.live:
            if ticket.ready and self.random.random() < 0.7:
                self.core.release(ticket, ticket.ready.popleft())
        self.live = [ticket for ticket in self.live if not ticket.done]
        self.core.check()

    def drain(self) -> None:
        for _ in range(300):
            self.step()
            if not (self.live or self.flights or self.core.busy):
                return
        raise AssertionError("no progress")

    def run(self, accesses: int, prefetch: bool = False) -> None:
        for _ in range(accesses):
            while len(self.live) > 1:
                self.step()
            self.acquire(self.random.choice(list(Phase)))
            if prefetch and self.random.random() < 0.5:
                key = ExpertKey(self.random.randrange(LAYERS), self.random.randrange(EXPERTS))
                self.core.prefetch(key, displace=self.random.random() < 0.5)
            self.step()
        self.drain()


@given(
    upper=st.integers(1, RECORDS),
    more=st.integers(1, 4),
    policies=st.tuples(st.sampled_from(ONLINE), st.sampled_from(ONLINE)),
    spare=st.integers(0, 5),
    staging=st.sampled_from([0, 0, 1, 2]),
    floor=st.sampled_from([0, 0, 1]),
    prefetch=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(derandomize=True, deadline=None, max_examples=50)
def test_with_room_for_all_and_one_each_record_is_read_once(
    upper: int,
    more: int,
    policies: tuple[str, str],
    spare: int,
    staging: int,
    floor: int,
    prefetch: bool,
    seed: int,
) -> None:
    lower = max(1, RECORDS - upper + more)
    above = TierConfig(upper + staging, policies[0], "decode-only" if staging else "always", staging, floor)
    users = Users([above, TierConfig(lower, policies[1], exclusive=True, spare=spare)], seed)
    users.run(40, prefetch)
    assert max(users.reads.values()) == 1
    if len(users.reads) == RECORDS:
        held = users.core.residents() | users.core.residents(1)
        assert len(held) == RECORDS
        users.core.misses = AlwaysInPlace()
        users.run(20, prefetch)
        assert max(users.reads.values()) == 1, "nor with experts that run in place"


@pytest.mark.parametrize("spare", [0, 2])
def test_without_exclusive_residency_they_are_read_again(spare: int) -> None:
    reads = {}
    for exclusive in (True, False):
        lower = TierConfig(7, "lru", exclusive=exclusive, spare=spare if exclusive else 0)
        users = Users([TierConfig(6, "lru"), lower], 3)
        users.run(200)
        reads[exclusive] = users.reads.total()
    assert reads[True] == RECORDS < reads[False] / 2


@pytest.mark.parametrize("policy", ["lru", "horizon"])
def test_where_not_all_fit_far_fewer_are_read_again(policy: str) -> None:
    """Decoding, 32 records in 10 + 12 slots: nothing waits, and more than a third of the reads is saved."""
    reads = {}
    for exclusive in (True, False):
        lower = TierConfig(12, policy, exclusive=exclusive, spare=2 if exclusive else 0)
        bench, random = Bench(TierConfig(10, policy), lower), Random(1)
        copies: list[Copy] = []
        for time in range(400):
            experts = sorted({int(8 * random.random() ** 2) for _ in range(2)})
            ticket = bench(time % 4, *experts)
            assert not ticket.waiting
            copies += bench.finish(ticket)
        reads[exclusive] = len(from_home(copies))
    assert reads[True] < 0.65 * reads[False]
