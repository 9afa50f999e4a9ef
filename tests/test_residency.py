"""What the residency core promises, one example each. `test_residency_machine.py` has the random runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from moetier.access import Access, ExpertKey, Phase
from moetier.errors import CapacityError, ConfigError
from moetier.policies import ADMISSIONS
from moetier.policies.lru import LRU
from moetier.residency import Residency
from moetier.tiers import Copy, Kind, Place, Ticket, TierConfig
from prepared import ONLINE

pytestmark = pytest.mark.timeout(20)


class Bench:
    """A core of 4 layers x 8 experts, driven by hand. `bench(0, 1, 2)` acquires experts 1 and 2 of layer 0."""

    def __init__(self, *tiers: TierConfig | int, policy: str = "lru"):
        configs = [tier if isinstance(tier, TierConfig) else TierConfig(tier, policy) for tier in tiers]
        self.core = Residency(configs, 4, 8)
        self.time = 0

    def __call__(self, layer: int, *experts: int, phase: Phase = Phase.DECODE) -> Ticket:
        self.time += 1
        keys = tuple(ExpertKey(layer, expert) for expert in experts)
        ticket = self.core.acquire(Access(self.time, layer, keys, phase=phase, writes=True))
        self.core.check()
        return ticket

    def end(self, *orders: Copy, ok: bool = True) -> None:
        for copy in orders:
            self.core.completed(copy.id, ok)
            self.core.check()

    def release(self, ticket: Ticket, key: ExpertKey | None = None, dirty: bool = False) -> None:
        if key is None:
            key = ticket.ready.popleft()
        else:
            ticket.ready.remove(key)
        self.core.release(ticket, key, dirty)
        self.core.check()

    def finish(self, *tickets: Ticket, dirty: bool = False) -> list[Copy]:
        """Serve to the end; the copies that it took."""
        copies = []
        for _ in range(100):
            orders = self.core.take()
            copies += orders
            self.end(*orders)
            for ticket in tickets:
                while ticket.ready:
                    self.release(ticket, dirty=dirty)
            if all(ticket.done for ticket in tickets) and not self.core.busy:
                return copies
        raise AssertionError("no progress")

    def counts(self, name: str, tier: int = 0) -> int:
        value = self.core.counters()["tiers"][tier][name]
        return sum(value) if isinstance(value, list) else value

    def prefetches(self) -> tuple[int, int, int]:
        counts = self.core.counters()["prefetches"]
        return counts["issued"], counts["useful"], counts["wasted"]


def k(layer: int, expert: int) -> ExpertKey:
    return ExpertKey(layer, expert)


# -- accesses ---------------------------------------------------------------------------------------------------------


def test_hits_are_leased_at_once_and_misses_ordered() -> None:
    bench = Bench(4)
    bench.finish(bench(0, 0, 1))
    ticket = bench(0, 1, 2)
    assert list(ticket.ready) == [k(0, 1)] and ticket.leased == {k(0, 1), k(0, 2)}
    (copy,) = bench.core.take()
    assert (copy.key, copy.source, copy.kind) == (k(0, 2), Place(1, -1), Kind.LOAD) and bench.core.busy
    bench.end(copy)
    assert list(ticket.ready) == [k(0, 1), k(0, 2)] and not bench.core.busy
    assert bench.core.place(k(0, 2)) == copy.target
    bench.finish(ticket)
    assert (bench.counts("hits"), bench.counts("misses"), bench.counts("lates")) == (1, 3, 0)
    assert bench.core.tickets == []


@pytest.mark.parametrize("policy", ONLINE)
def test_no_expert_of_an_access_is_its_victim(policy: str) -> None:
    bench = Bench(4, policy=policy)
    for layer in (0, 1):
        bench.finish(bench(layer, 0, 1))
    ticket = bench(0, 0, 1, 2, 3)
    assert list(ticket.ready) == [k(0, 0), k(0, 1)]
    bench.finish(ticket)
    assert bench.core.residents() == {k(0, expert) for expert in range(4)}


@pytest.mark.parametrize("policy", ONLINE)
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_waves_fetch_each_expert_once(policy: str, slots: int) -> None:
    bench = Bench(slots, policy=policy)
    bench.finish(bench(0, 3))
    ticket = bench(0, *range(8))
    loads = [copy.key for copy in bench.finish(ticket)]
    assert sorted(loads) == [k(0, expert) for expert in range(8) if expert != 3]


def test_an_empty_access_is_done() -> None:
    bench = Bench(1)
    assert bench(0).done and bench.core.tickets == []


def test_late_accesses_join_the_flight() -> None:
    bench = Bench(4)
    first = bench(0, 0)
    (copy,) = bench.core.take()
    second = bench(0, 0, 1)
    assert [c.key for c in bench.core.take()] == [k(0, 1)] and bench.counts("lates") == 1
    bench.end(copy)
    assert list(first.ready) == list(second.ready) == [k(0, 0)]


def test_two_accesses_that_wait_for_one_record_fetch_it_once() -> None:
    bench = Bench(1)
    holder = bench(0, 0)
    bench.end(*bench.core.take())
    waiting = bench(1, 1), bench(1, 1)
    bench.release(holder)
    (copy,) = bench.core.take()
    bench.end(copy)
    assert all(list(ticket.ready) == [k(1, 1)] for ticket in waiting)
    assert bench.finish(*waiting) == []


def test_a_record_that_an_access_waits_for_is_not_evicted_by_another() -> None:
    bench = Bench(2)
    one, two = bench(0, 0), bench(0, 1)
    bench.end(*bench.core.take())
    wants_both = bench(1, 2, 3)  # no slot yet
    wants_other = bench(2, 4)
    bench.release(one)
    (copy,) = bench.core.take()
    joins = bench(1, 2)
    bench.end(copy)
    bench.release(wants_both)
    assert k(1, 2) in bench.core.residents() and list(joins.ready) == [k(1, 2)]
    bench.finish(two, wants_both, wants_other, joins)


def test_pins_and_leases_of_others_make_an_access_wait_not_fail() -> None:
    bench = Bench(2)
    bench.finish(bench(0, 0))
    bench.core.pin(k(0, 0))
    holder = bench(1, 0)
    bench.end(*bench.core.take())
    ticket = bench(2, 0)
    assert ticket.waiting == [k(2, 0)] and bench.core.take() == []
    bench.core.unpin(k(0, 0))
    bench.core.check()
    assert [copy.key for copy in bench.core.take()] == [k(2, 0)]
    assert k(0, 0) not in bench.core.residents()
    assert list(holder.ready) == [k(1, 0)]


def test_abort_gives_everything_back() -> None:
    bench = Bench(2)
    bench.finish(bench(0, 0))
    ticket = bench(0, 0, 1, 2)
    other = bench(1, 1, 2)
    orders = bench.core.take()
    bench.core.abort(ticket)
    bench.core.check()
    assert ticket not in bench.core.tickets and not ticket.ready
    more = bench.core.take()
    assert [copy.key for copy in more] == [k(1, 1)], "the lease on 0 is free, the loading slot of 1 is not"
    bench.end(*orders, *more)
    bench.finish(other)
    assert bench.core.residents() == {k(1, 1), k(1, 2)} and bench.core.tickets == []


def test_slots_that_come_free_together_serve_all_who_wait() -> None:
    bench = Bench(2)
    holder = bench(0, 0, 1)
    bench.end(*bench.core.take())
    bench(1, 0)
    bench(2, 0)
    bench.core.abort(holder)
    assert [copy.key for copy in bench.core.take()] == [k(1, 0), k(2, 0)]


def test_abort_of_a_waiting_access() -> None:
    bench = Bench(1, 2)
    holder = bench(0, 0)
    ticket = bench(0, 1, 2)
    bench.core.abort(ticket)
    bench.core.check()
    bench.finish(holder)
    assert bench.core.tickets == [] and bench.core.residents() == {k(0, 0)}


# -- admission, staging, floor, pins ----------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [3, 4])
def test_prefill_passes_through_staging_and_keeps_the_decode_set(slots: int) -> None:
    bench = Bench(TierConfig(slots, "lru", "decode-only", staging=1))
    decode = tuple(range(slots - 1))
    bench.finish(bench(0, *decode))
    before = bench.core.residents()
    ticket = bench(1, *range(6), phase=Phase.PREFILL)
    loads = bench.finish(ticket)
    assert sorted(copy.key for copy in loads) == [k(1, expert) for expert in range(6)]
    assert len({copy.target for copy in loads}) == 1 and bench.counts("staged") == 6
    assert bench.core.residents() == before and bench.counts("evictions") == 0
    assert len(list(bench(0, *decode).ready)) == slots - 1


def test_a_cold_cache_fills_even_in_prefill() -> None:
    bench = Bench(TierConfig(4, "lru", "decode-only", staging=1))
    bench.finish(bench(0, *range(8), phase=Phase.PREFILL))
    assert len(bench.core.residents()) == 3 and bench.counts("staged") == 5


@pytest.mark.parametrize("admission", sorted(ADMISSIONS))
def test_without_staging_slots_everything_is_admitted(admission: str) -> None:
    bench = Bench(TierConfig(2, "lru", admission))
    for layer in range(3):
        bench.finish(bench(layer, 0, 1, 2, phase=Phase.PREFILL))
    assert bench.core.residents() <= {k(2, expert) for expert in range(3)}


def test_a_staged_record_is_shared_while_in_use() -> None:
    bench = Bench(TierConfig(2, "lru", "decode-only", staging=1))
    bench.finish(bench(0, 0))
    first = bench(1, 1, phase=Phase.PREFILL)
    second = bench(1, 1, phase=Phase.PREFILL)
    assert len(bench.core.take()) == 1
    bench.end(Copy(1 + 1, k(1, 1), Place(1, -1), bench.core.place(k(1, 1)), Kind.LOAD))
    bench.release(first)
    assert k(1, 1) in bench.core.residents()
    bench.release(second)
    assert bench.core.residents() == {k(0, 0)}


def test_a_changed_staged_record_is_written_back_and_its_slot_waits() -> None:
    bench = Bench(TierConfig(2, "lru", "decode-only", staging=1))
    bench.finish(bench(0, 0))
    ticket = bench(1, 1, 2, phase=Phase.PREFILL)
    bench.end(*bench.core.take())
    bench.release(ticket, dirty=True)
    (saving,) = bench.core.take()
    assert saving.kind is Kind.WRITE_BACK and ticket.waiting == [k(1, 2)]
    bench.end(saving)
    assert [copy.target for copy in bench.core.take()] == [saving.source]


def test_staged_records_that_cannot_be_written_back_do_not_block_prefills() -> None:
    bench = Bench(TierConfig(2, "lru", "decode-only", staging=1))
    bench.finish(bench(0, 0))
    ticket = bench(1, 1, phase=Phase.PREFILL)
    bench.end(*bench.core.take())
    bench.release(ticket, dirty=True)
    bench.end(*bench.core.take(), ok=False)
    assert bench.core.residents() == {k(0, 0), k(1, 1)}
    bench.finish(bench(2, 5, phase=Phase.PREFILL))


def test_floor_protects_other_layers_while_another_victim_exists() -> None:
    bench = Bench(TierConfig(4, "lru", floor=1))
    bench.finish(bench(0, 0))
    bench.finish(bench(1, 0, 1, 2))
    bench.finish(bench(2, 0, 1))
    assert bench.core.residents() == {k(0, 0), k(1, 2), k(2, 0), k(2, 1)}, "LRU alone would evict (0, 0) first"
    bench.finish(bench(3, *range(4)))
    assert bench.core.residents() == {k(3, expert) for expert in range(4)}, "the floor gives way if it must"


def test_floor_counts_the_victims_of_the_same_access() -> None:
    bench = Bench(TierConfig(4, "lru", floor=1))
    bench.finish(bench(0, 0, 1))
    bench.finish(bench(1, 0, 1))
    bench.finish(bench(2, 0, 1))
    assert bench.core.residents() == {k(0, 1), k(1, 1), k(2, 0), k(2, 1)}, "one from each, not both of layer 0"


def test_floor_does_not_protect_a_layer_from_itself() -> None:
    bench = Bench(TierConfig(2, "lru", floor=2))
    bench.finish(bench(0, 0, 1))
    bench.finish(bench(0, 2))
    assert bench.core.residents() == {k(0, 1), k(0, 2)}


def test_a_pinned_record_stays_and_pins_take_half_at_most() -> None:
    bench = Bench(4)
    bench.finish(bench(0, 0, 1))
    bench.core.pin(k(0, 0))
    bench.core.pin(k(0, 1))
    bench.core.pin(k(0, 1))
    with pytest.raises(CapacityError, match="pins may take at most half of the 4 slots of tier 0") as caught:
        bench.core.pin(k(0, 2))
    assert caught.value.minimum_slots == 6
    bench.finish(bench(1, *range(8)))
    assert {k(0, 0), k(0, 1)} <= bench.core.residents()


def test_pins_hold_in_tier_0_only() -> None:
    """A small tier below must not fill up with pinned records, or nothing could pass."""
    bench = Bench(8, 1)
    for expert in range(4):
        bench.core.pin(k(0, expert))
        bench.finish(bench(0, expert))
    bench.finish(bench(1, *range(8)))
    assert {k(0, expert) for expert in range(4)} <= bench.core.residents()


# -- changed records --------------------------------------------------------------------------------------------------


def test_a_changed_record_is_written_before_its_slot_is_reused() -> None:
    bench = Bench(1)
    bench.finish(bench(0, 0), dirty=True)
    ticket = bench(0, 1)
    (saving,) = bench.core.take()
    assert (saving.kind, saving.key, saving.target) == (Kind.WRITE_BACK, k(0, 0), Place(1, -1))
    other = bench(0, 2)
    assert bench.core.take() == [] and other.waiting, "the slot is promised to the key that caused the write-back"
    bench.end(saving)
    (load,) = bench.core.take()
    assert (load.key, load.target) == (k(0, 1), saving.source)
    bench.end(load)
    bench.finish(ticket, other)
    assert bench.counts("write_backs") == 1, "unchanged records are dropped"


def test_a_leaving_record_is_reloaded_after_its_write_back() -> None:
    bench = Bench(2)
    bench.finish(bench(0, 0), dirty=True)
    bench.finish(bench(0, 1))
    heir = bench(1, 1)
    (saving,) = bench.core.take()
    again = bench(0, 0)
    assert bench.core.take() == [], "home is out of date, and the slot not free"
    bench.end(saving)
    assert {copy.key for copy in bench.core.take()} == {k(1, 1), k(0, 0)}
    assert not heir.ready and not again.ready


def test_an_older_version_below_is_dropped() -> None:
    bench = Bench(1, 4)
    bench.finish(bench(0, 0), dirty=True)
    assert k(0, 0) not in bench.core.residents(1)
    bench.finish(bench(0, 1))
    copies = bench.finish(bench(0, 0))
    assert [copy.source.tier for copy in copies if copy.kind is Kind.LOAD] == [2, 1]


# -- failures ---------------------------------------------------------------------------------------------------------


def test_a_failed_load_is_told_and_leaves_the_core_usable() -> None:
    bench = Bench(2)
    ticket, other = bench(0, 0, 1), bench(0, 0)
    zero, one = bench.core.take()
    bench.end(zero, ok=False)
    assert ticket.failed == other.failed == zero.id and not other.leased
    assert not other.done, "an access that failed is never done: its user must see it"
    assert other in bench.core.tickets
    bench.end(one)
    for each in (ticket, other):
        bench.core.abort(each)
    bench.core.check()
    assert bench.core.tickets == []
    assert [copy.key for copy in bench.finish(bench(0, 0, 1))] == [k(0, 0)]


def test_releasing_the_rest_of_a_failed_access_does_not_end_it() -> None:
    bench = Bench(2)
    ticket = bench(0, 0, 1)
    zero, one = bench.core.take()
    bench.end(one)
    bench.end(zero, ok=False)
    bench.release(ticket)
    assert not ticket.done and ticket in bench.core.tickets
    bench.core.abort(ticket)
    assert bench.core.tickets == []


def test_a_failed_write_back_loses_nothing() -> None:
    bench = Bench(1)
    bench.finish(bench(0, 0), dirty=True)
    ticket, again = bench(0, 1), bench(0, 0)
    (saving,) = bench.core.take()
    bench.end(saving, ok=False)
    assert ticket.failed is not None and bench.core.residents() == {k(0, 0)}
    assert list(again.ready) == [k(0, 0)], "who waited for the leaving record has it back"
    bench.core.abort(ticket)
    bench.release(again)
    retry = bench.finish(bench(0, 1))
    assert [copy.kind for copy in retry] == [Kind.WRITE_BACK, Kind.LOAD], "still dirty: written back next time"


def test_a_failed_write_back_undoes_reloads_of_the_same_record() -> None:
    bench = Bench(2)
    bench.finish(bench(0, 0), dirty=True)
    bench.finish(bench(0, 1))
    heir = bench(1, 1)
    (saving,) = bench.core.take()
    again = bench(0, 0)  # displaces (0, 1), waits for the write-back
    bench.end(saving, ok=False)
    assert heir.failed is not None and again.failed is not None
    assert bench.core.residents() == {k(0, 0)} and not bench.core.busy
    for ticket in (heir, again):
        bench.core.abort(ticket)
    assert list(bench(0, 0).ready) == [k(0, 0)]


def test_a_failed_chain_is_undone_in_every_tier() -> None:
    bench = Bench(2, 2, 2)
    ticket = bench(0, 0)
    (first,) = bench.core.take()
    assert (first.source, first.target.tier) == (Place(3, -1), 2)
    bench.end(first, ok=False)
    assert ticket.failed is not None and not bench.core.busy
    bench.core.abort(ticket)
    assert [len(bench.core.residents(tier)) for tier in range(3)] == [0, 0, 0]
    bench.finish(bench(0, 0))


def test_a_chain_that_fails_on_the_way_keeps_what_arrived() -> None:
    bench = Bench(2, 2)
    ticket = bench(0, 0)
    bench.end(*bench.core.take())
    (second,) = bench.core.take()
    bench.end(second, ok=False)
    assert ticket.failed == second.id and bench.core.residents(1) == {k(0, 0)}
    bench.core.abort(ticket)
    assert [copy.source.tier for copy in bench.finish(bench(0, 0))] == [1]


# -- prefetches -------------------------------------------------------------------------------------------------------


def test_a_useful_prefetch() -> None:
    bench = Bench(2)
    assert bench.core.prefetch(k(0, 0)) and not bench.core.prefetch(k(0, 0))
    (copy,) = bench.core.take()
    assert copy.kind is Kind.PREFETCH
    bench.end(copy)
    ticket = bench(0, 0)
    assert list(ticket.ready) == [k(0, 0)] and bench.core.promoted == []
    assert bench.prefetches() == (1, 1, 0) and bench.counts("hits") == 1
    assert bench.core.late_prefetches == 0


def test_a_wasted_prefetch() -> None:
    bench = Bench(1)
    bench.core.prefetch(k(0, 0))
    bench.finish()
    bench.finish(bench(0, 1))
    assert bench.prefetches() == (1, 0, 1)


def test_a_failed_prefetch_is_counted_and_forgotten() -> None:
    bench = Bench(1)
    bench.core.prefetch(k(0, 0))
    bench.end(*bench.core.take(), ok=False)
    assert bench.prefetches() == (1, 0, 1)
    bench.finish(bench(0, 0))


def test_prefetches_take_free_slots_and_displace_only_if_told() -> None:
    bench = Bench(2)
    bench.finish(bench(0, 0, 1))
    assert not bench.core.prefetch(k(1, 0))
    assert not bench.core.prefetch(k(1, 0), displace=True), "both were just loaded"
    bench.finish(bench(0, 0, 1))
    assert bench.core.prefetch(k(1, 0), displace=True)
    bench.core.check()
    holder = bench(0, 1)
    assert not bench.core.prefetch(k(1, 1), displace=True), "one slot is leased, one loading"
    bench.finish(holder)


def test_prefetches_keep_out_of_staging() -> None:
    bench = Bench(TierConfig(2, "lru", "decode-only", staging=1))
    bench.finish(bench(0, 0))
    assert not bench.core.prefetch(k(0, 1))
    prefill = bench(0, 0, phase=Phase.PREFILL)
    bench.finish(prefill)
    assert not bench.core.prefetch(k(0, 1), displace=True)


def test_demand_goes_before_prefetches() -> None:
    bench = Bench(4)
    bench.core.prefetch(k(0, 0))
    bench(1, 1)
    assert [copy.kind for copy in bench.core.take()] == [Kind.LOAD, Kind.PREFETCH]


def test_a_demanded_prefetch_is_promoted_in_every_tier() -> None:
    bench = Bench(2, 2)
    bench.core.prefetch(k(0, 0))
    (read,) = bench.core.take()
    ticket = bench(0, 0)
    assert read.id in bench.core.promoted and len(bench.core.promoted) == 2
    assert bench.counts("lates") == 1 and bench.prefetches() == (1, 1, 0)
    assert bench.core.late_prefetches == 1
    bench.end(read)
    (upload,) = bench.core.take()
    assert upload.kind is Kind.LOAD, "the second leg goes out as a demand"
    bench.end(upload)
    assert list(ticket.ready) == [k(0, 0)]


def test_cancel_undoes_an_order_nobody_took_or_wants() -> None:
    bench = Bench(1)
    bench.core.prefetch(k(0, 0))
    waiting = bench(0, 1)
    assert waiting.waiting
    assert bench.core.cancel(k(0, 0)) and not bench.core.cancel(k(0, 0))
    bench.core.check()
    assert [copy.key for copy in bench.core.take()] == [k(0, 1)], "the slot went to who waited for it"
    assert bench.prefetches() == (0, 0, 0)


def test_cancel_comes_too_late() -> None:
    bench = Bench(2)
    bench.core.prefetch(k(0, 0))
    bench(0, 0)
    assert not bench.core.cancel(k(0, 0)), "an access waits for it"
    bench.core.prefetch(k(0, 1))
    bench.core.take()
    assert not bench.core.cancel(k(0, 1)), "it was taken"


def test_a_prefetch_serves_an_access_that_waits_for_a_slot() -> None:
    bench = Bench(1)
    holder = bench(0, 0)
    bench.end(*bench.core.take())
    ticket = bench(0, 1)
    assert not bench.core.prefetch(k(0, 1), displace=True)
    bench.release(holder)
    assert k(0, 1) in ticket.leased and not bench.core.prefetch(k(0, 1))


# -- more tiers -------------------------------------------------------------------------------------------------------


def test_two_tiers_load_in_a_chain_and_then_from_the_nearer_one() -> None:
    bench = Bench(1, 4)
    copies = bench.finish(bench(0, 0))
    assert [(copy.source.tier, copy.target.tier) for copy in copies] == [(2, 1), (1, 0)]
    bench.finish(bench(0, 1))
    copies = bench.finish(bench(0, 0))
    assert [(copy.source.tier, copy.target.tier) for copy in copies] == [(1, 0)]
    assert bench.counts("hits", tier=1) == 1 and bench.counts("misses", tier=1) == 2


def test_a_tier_is_asked_only_for_what_the_one_above_lacks() -> None:
    bench = Bench(1, 2, 4)
    bench.finish(bench(0, 0))
    bench.finish(bench(0, 1))
    bench.finish(bench(0, 0))
    assert [bench.counts("hits", tier) for tier in range(3)] == [0, 1, 0]
    assert [bench.counts("misses", tier) for tier in range(3)] == [3, 2, 2]


class HighestFirst(LRU):
    """A policy that would always evict the highest expert."""

    def victims(self, access: Access) -> Iterator[ExpertKey]:
        return iter(sorted(super().victims(access), reverse=True))


def test_what_an_access_still_needs_stays_in_the_tier_below() -> None:
    bench = Bench(1, TierConfig(2, f"{__name__}:HighestFirst"))
    for expert in (6, 7, 6):
        bench.finish(bench(0, expert))
    copies = bench.finish(bench(0, 0, 7))
    assert [copy.key.expert for copy in copies if copy.source.tier == 2] == [0]
    assert bench.core.residents(1) == {k(0, 0), k(0, 7)}


def test_the_best_victim_goes_first_when_not_all_are_needed() -> None:
    bench = Bench(2, 4)
    for expert in range(4):
        bench.finish(bench(0, expert))
    bench.finish(bench(0, 1, 5))  # only 5 needs a slot of tier 1
    assert bench.core.residents(1) == {k(0, 1), k(0, 2), k(0, 3), k(0, 5)}


def test_a_key_that_cannot_pass_leaves_the_slot_above_to_the_next() -> None:
    bench = Bench(1, 1)
    failed = bench(0, 7)
    bench.end(*bench.core.take())
    bench.end(*bench.core.take(), ok=False)
    bench.core.abort(failed)
    ticket = bench(0, 0, 7)  # tier 0 is empty, tier 1 has 7, which 0 must not displace
    assert ticket.leased == {k(0, 7)}
    bench.finish(ticket)


@pytest.mark.parametrize("below", [1, 2])
def test_a_tier_below_smaller_than_the_access(below: int) -> None:
    bench = Bench(6, below)
    copies = bench.finish(bench(0, *range(6)))
    assert len(copies) == 12 and len(bench.core.residents()) == 6


# -- bad arguments ----------------------------------------------------------------------------------------------------


def test_configurations_that_cannot_work() -> None:
    with pytest.raises(ConfigError, match="at least one tier is needed above home"):
        Residency([], 1, 1)
    with pytest.raises(CapacityError, match="a tier needs at least 1 slot, got 0") as caught:
        Residency([TierConfig(0)], 1, 1)
    assert caught.value.minimum_slots == 1
    with pytest.raises(ConfigError, match="staging must be between 0 and slots - 1 = 1, got 2"):
        Residency([TierConfig(2, staging=2)], 1, 1)
    with pytest.raises(ConfigError, match="floor must not be negative, got -1"):
        Residency([TierConfig(2, floor=-1)], 1, 1)
    with pytest.raises(ConfigError, match="unknown policy 'mru'"):
        Residency([TierConfig(2, "mru")], 1, 1)
    with pytest.raises(CapacityError, match="at most half of the 1 slots"):
        Bench(1).core.pin(k(0, 0))


def test_equal_inputs_give_equal_digests_and_others_do_not() -> None:
    def run(expert: int) -> int:
        bench = Bench(3)
        for time in range(10):
            bench.finish(bench(time % 4, time % 4, 7 if time == 5 else expert))
        return bench.core.digest()

    assert run(6) == run(6) != run(5)


def test_a_prefetch_that_fails_once_it_is_demanded_is_loaded_anew() -> None:
    """Only a demanded read may fail an access: one that began as a prefetch gets a second chance as a load."""
    key = ExpertKey(0, 1)
    for tiers in ([TierConfig(2, "lru")], [TierConfig(2, "lru"), TierConfig(2, "lru")]):
        core = Residency(tiers, 1, 4)
        assert core.prefetch(key)
        (copy,) = core.take()
        ticket = core.acquire(Access(1, 0, (key,)))
        core.completed(copy.id, False)
        core.check()
        (again,) = core.take()
        assert again.kind is Kind.LOAD and again.key == key and ticket.failed is None
        core.completed(again.id)
        for rest in core.take():
            core.completed(rest.id)
        assert list(ticket.ready) == [key]
        core.release(ticket, key)
        core.check()
        assert core.prefetch(ExpertKey(0, 2))
        (copy,) = core.take()
        late = core.acquire(Access(2, 0, (ExpertKey(0, 2),)))
        core.completed(copy.id, False)
        (again,) = core.take()
        core.completed(again.id, False)
        assert late.failed is not None
        core.abort(late)
        core.check()
