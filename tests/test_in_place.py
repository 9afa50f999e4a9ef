"""Misses of tier 0 that are served in tier 1: chosen once, leased there, loaded there first where they must be."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import pytest

from moetier.access import Access, ExpertKey, Phase
from moetier.errors import ConfigError, ReplayError
from moetier.eventlog import Recorder, replay
from moetier.misses import AlwaysInPlace, AlwaysLoad, Miss
from moetier.residency import Residency
from moetier.tiers import Kind, Place, Ticket, TierConfig
from test_residency import Bench, k

pytestmark = pytest.mark.timeout(20)


class Choose:
    """Serves these experts in place, and remembers what it was asked."""

    def __init__(self, *experts: int):
        self.experts = experts
        self.asked: list[list[Miss]] = []

    def split(self, access: Access, misses: Sequence[Miss]) -> Collection[ExpertKey]:
        self.asked.append(list(misses))
        return [miss.key for miss in misses if miss.key.expert in self.experts]


def bench_with(misses: object, *tiers: TierConfig | int) -> Bench:
    bench = Bench(*tiers)
    bench.core.misses = misses  # type: ignore[assignment]
    return bench


def test_the_policy_sees_what_is_missing_and_where_it_is() -> None:
    chooser = Choose()
    bench = bench_with(chooser, 1, 4)
    bench.finish(bench(0, 0))
    bench.finish(bench(0, 1))
    late = bench(0, 2)
    access = Access(9, 0, (k(0, 0), k(0, 1), k(0, 3)), (4, 2, 1))
    ticket = bench.core.acquire(access)
    assert chooser.asked[-1] == [Miss(k(0, 0), 4, 1), Miss(k(0, 1), 2, 1), Miss(k(0, 3), 1, 2)]
    assert not ticket.in_place
    bench.finish(late, ticket)
    bench.finish(bench(0, 3))
    assert len(chooser.asked) == 4, "an access without a miss is not asked about"


def test_a_record_in_tier_1_is_leased_there_at_once() -> None:
    bench = bench_with(Choose(0), 2, 4)
    for layer in (0, 1):
        bench.finish(bench(layer, 1, 2))
    bench.core.misses = None
    bench.finish(bench(0, 0))
    bench.finish(bench(1, 1, 2))
    bench.core.misses = Choose(0)
    ticket = bench(0, 0, 1)
    assert list(ticket.ready) == [k(0, 0)] and ticket.in_place == {k(0, 0)}
    assert bench.core.place(k(0, 0), ticket).tier == 1
    assert {copy.key for copy in bench.finish(ticket)} == {k(0, 1)}, "only the other one moves"
    assert k(0, 0) not in bench.core.residents() and bench.counts("in_place", 1) == 1
    assert bench.counts("hits", 1) == 2


def test_from_home_it_is_loaded_into_tier_1_only() -> None:
    bench = bench_with(Choose(0), 2, 4)
    ticket = bench(0, 0, 1)
    copies = bench.core.take()
    assert {(copy.key, copy.source.tier, copy.target.tier) for copy in copies} == {(k(0, 0), 2, 1), (k(0, 1), 2, 1)}
    bench.end(*copies)
    assert list(ticket.ready) == [k(0, 0)]
    copies = bench.finish(ticket)
    assert [(copy.key, copy.target.tier) for copy in copies] == [(k(0, 1), 0)]


@pytest.mark.parametrize("tokens", [(), (1, 5, 2)])
def test_one_miss_at_least_is_fetched(tokens: tuple[int, ...]) -> None:
    """The nearest; of these, the one with the most tokens."""
    bench = bench_with(AlwaysInPlace(), 2, 4)
    ticket = bench.core.acquire(Access(1, 0, (k(0, 0), k(0, 1), k(0, 2)), tokens))
    fetched = k(0, 1 if tokens else 0)
    assert set(ticket.access.keys) - ticket.in_place == {fetched}
    bench.finish(ticket)
    bench.core.misses = None
    bench.finish(bench(3, 0, 1))
    bench.core.misses = AlwaysInPlace()
    ticket = bench.core.acquire(Access(5, 0, (k(0, 2), k(0, 7)), (1, 9)))
    assert ticket.in_place == {k(0, 2), k(0, 7)} - {k(0, 2) if k(0, 2) in bench.core.residents(1) else k(0, 7)}
    bench.finish(ticket)


def test_all_are_served_in_place_where_tier_0_has_no_room() -> None:
    bench = bench_with(AlwaysInPlace(), 1, 4)
    holder = bench(1, 0)
    bench.end(*bench.core.take())
    bench.end(*bench.core.take())
    ticket = bench(0, 0, 1)
    assert ticket.in_place == {k(0, 0), k(0, 1)} and not ticket.waiting
    bench.finish(ticket)
    assert list(holder.ready) == [k(1, 0)]


def test_none_is_served_in_place_if_none_is_chosen() -> None:
    bench = bench_with(AlwaysLoad(), 2, 4)
    ticket = bench(0, 0, 1)
    assert not ticket.in_place and len(bench.finish(ticket)) == 4


def test_it_cannot_leave_while_it_is_in_use() -> None:
    bench = bench_with(Choose(0), 1, 1)
    ticket = in_place(bench, 1)
    other = bench(1, 1)
    assert other.waiting == [k(1, 1)], "it has to pass through tier 1"
    bench.finish(ticket, other)


def test_waves_in_tier_1() -> None:
    """More experts in place than tier 1 has slots: each is fetched once."""
    bench = bench_with(Choose(*range(8)), 1, 2)
    ticket = bench(0, *range(8))
    assert len(ticket.in_place) == 7 and len(ticket.waiting) == 6
    copies = bench.finish(ticket)
    assert sorted(copy.key for copy in copies if copy.target.tier == 1) == [k(0, expert) for expert in range(8)]
    assert len([copy for copy in copies if copy.target.tier == 0]) == 1


def test_prefills_pass_through_the_staging_slots_of_tier_1() -> None:
    bench = bench_with(None, 1, TierConfig(3, "lru", "decode-only", staging=1))
    bench.finish(bench(0, 0), bench(0, 1))
    before = bench.core.residents(1)
    bench.core.misses = Choose(2, 3)
    ticket = bench(1, 2, 3, 4, phase=Phase.PREFILL)
    bench.finish(ticket)
    assert bench.core.residents(1) == before and bench.counts("staged", 1) == 3


def test_one_in_place_and_one_loaded() -> None:
    bench = bench_with(Choose(0), 2, 4)
    here = bench(0, 0, 1)
    bench.core.misses = None
    there = bench(0, 0)
    assert bench.counts("lates", 1) == 1
    bench.end(*bench.core.take())
    assert list(here.ready) == [k(0, 0)] and not there.ready
    bench.end(*bench.core.take())
    assert list(there.ready) == [k(0, 0)]
    assert [bench.core.place(k(0, 0), ticket).tier for ticket in (here, there)] == [1, 0]
    bench.finish(here, there)


def test_who_waits_in_place_joins_the_load_of_another() -> None:
    bench = bench_with(None, 2, 1)
    holder = bench(1, 0)
    bench.end(*bench.core.take())
    bench.core.misses = Choose(0)
    waits = bench(0, 0, 1)
    assert waits.waiting == [k(0, 0), k(0, 1)], "tier 1 is busy with what passes through it"
    bench.core.misses = None
    there = bench(0, 0)
    copies = bench.finish(holder, waits, there)
    assert [copy.target.tier for copy in copies if copy.key == k(0, 0)] == [1, 0]


# -- changed in place -------------------------------------------------------------------------------------------------


def in_place(bench: Bench, slots: int) -> Ticket:
    """Expert 0 of layer 0 leased in tier 1: tier 0, of so many slots, had no room for it."""
    holder = bench(1, *range(8 - slots, 8))
    while holder.leased != set(holder.ready):
        bench.end(*bench.core.take())
    ticket = bench(0, 0)
    assert ticket.in_place == {k(0, 0)}
    bench.end(*bench.core.take())
    while holder.ready:
        bench.release(holder)
    bench.core.misses = None
    return ticket


def test_a_record_changed_in_place_goes_home_from_there() -> None:
    bench = bench_with(Choose(0), 1, 2)
    bench.release(in_place(bench, 1), dirty=True)
    bench.finish(bench(2, 1))
    other = bench(2, 2)
    (saving,) = bench.core.take()
    assert (saving.kind, saving.key, saving.target) == (Kind.WRITE_BACK, k(0, 0), Place(2, -1))
    assert saving.source.tier == 1 and bench.counts("write_backs", 1) == 1
    bench.end(saving)
    bench.finish(other)


def test_the_same_version_above_inherits_what_must_be_saved() -> None:
    bench = bench_with(Choose(0), 2, 2)
    bench.release(in_place(bench, 2), dirty=True)
    assert [copy.source.tier for copy in bench.finish(bench(0, 0))] == [1], "now in tier 0 too"
    copies = bench.finish(bench(2, 5))
    bench.finish(bench(0, 0))
    copies += bench.finish(bench(2, 6))
    assert k(0, 0) not in bench.core.residents(1) and k(0, 0) in bench.core.residents()
    assert all(copy.kind is Kind.LOAD for copy in copies), "nothing to save while tier 0 has it"
    copies = bench.finish(bench(3, 1, 2))
    assert [copy.source.tier for copy in copies if copy.kind is Kind.WRITE_BACK] == [0]


def test_a_load_from_a_record_that_changes_meanwhile_is_made_again() -> None:
    bench = bench_with(Choose(0), 2, 2)
    here = bench(0, 0, 1)
    bench.end(*bench.core.take())
    bench.core.misses = None
    there = bench(0, 0)
    (one, upload) = sorted(bench.core.take(), key=lambda copy: -copy.key.expert)
    bench.end(one)
    bench.release(here, k(0, 0), dirty=True)
    bench.end(upload)
    assert not there.ready, "half of it may be old"
    (again,) = bench.core.take()
    assert (again.key, again.source, again.target) == (upload.key, upload.source, upload.target)
    bench.end(again)
    assert list(there.ready) == [k(0, 0)]
    bench.finish(here, there)


def test_who_has_the_old_version_gets_the_new_one() -> None:
    bench = bench_with(Choose(0), 1, 2)
    here = in_place(bench, 1)
    there = bench(0, 0)
    bench.end(*bench.core.take())
    assert bench.core.place(k(0, 0), there).tier == 0 and list(there.ready) == [k(0, 0)]
    bench.release(here, dirty=True)
    assert bench.core.place(k(0, 0), there).tier == 1 and k(0, 0) not in bench.core.residents()
    bench.finish(there)


def test_a_change_in_tier_0_takes_over_who_computes_in_tier_1() -> None:
    bench = bench_with(Choose(0), 1, 2)
    here = in_place(bench, 1)
    there = bench(0, 0)
    bench.end(*bench.core.take())
    bench.release(there, dirty=True)
    assert bench.core.place(k(0, 0), here).tier == 0 and k(0, 0) not in bench.core.residents(1)
    bench.finish(here)
    assert [copy.source.tier for copy in bench.finish(bench(1, 3)) if copy.kind is Kind.WRITE_BACK] == [0]


# -- failures ---------------------------------------------------------------------------------------------------------


def test_a_load_into_tier_1_that_fails_is_told() -> None:
    bench = bench_with(Choose(0), 2, 4)
    ticket = bench(0, 0, 1)
    zero, one = bench.core.take()
    bench.end(zero, ok=False)
    assert ticket.failed == zero.id and k(0, 0) not in ticket.leased
    bench.core.abort(ticket)
    bench.core.check()
    bench.end(one)
    bench.finish(bench(0, 0))


def test_abort_gives_back_the_leases_in_tier_1() -> None:
    bench = bench_with(Choose(0), 2, 1)
    ticket = bench(0, 0, 1)
    bench.end(*bench.core.take())
    bench.core.abort(ticket)
    bench.core.check()
    bench.finish(bench(1, 5))
    assert bench.core.tickets == []


# -- the log ----------------------------------------------------------------------------------------------------------


def test_a_replay_makes_the_same_choices_without_the_policy() -> None:
    core = Recorder(Residency([TierConfig(2, "lru"), TierConfig(4, "lru")], 4, 8, Choose(0, 3)))
    for time in range(1, 9):
        ticket = core.acquire(Access(time, time % 4, (k(time % 4, 0), k(time % 4, time % 3 + 1))))
        while not ticket.done:
            for copy in core.take():
                core.completed(copy.id)
            while ticket.ready:
                core.release(ticket, ticket.ready.popleft())
    assert any(event[0] == "acquire" and event[4] for event in core.log.events)
    again = replay(core.log)
    assert again.digest() == core.digest() and again.counters() == core.counters()
    core.log.tiers = core.log.tiers[:1]
    with pytest.raises(ReplayError, match="event 1: served in place, where there is no second tier"):
        replay(core.log)


def test_one_tier_has_no_place() -> None:
    with pytest.raises(ConfigError, match="only where there is a second tier"):
        Residency([TierConfig(2)], 1, 1, AlwaysInPlace())
