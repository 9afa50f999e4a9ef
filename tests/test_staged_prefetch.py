"""Prefetches into staging slots, what a prefetch may not evict, and what becomes of one that nobody wants."""

from __future__ import annotations

import pytest

from moetier.access import Phase
from moetier.tiers import Kind, TierConfig
from test_residency import Bench, k

pytestmark = pytest.mark.timeout(20)


def full(slots: int = 4, staging: int = 2, *lower: TierConfig | int) -> Bench:
    """Tier 0 full of layer 0, its staging slots free."""
    bench = Bench(TierConfig(slots, "lru", "decode-only", staging=staging), *lower)
    bench.finish(bench(0, *range(slots - staging)))
    return bench


def test_it_displaces_nothing_and_goes_after_its_first_use() -> None:
    bench = full()
    before = bench.core.residents()
    assert bench.core.prefetch(k(1, 0), staged=True) and bench.core.prefetch(k(1, 1), staged=True)
    assert not bench.core.prefetch(k(1, 2), staged=True), "both staging slots are taken"
    bench.end(*bench.core.take())
    assert bench.core.residents() == before | {k(1, 0), k(1, 1)}
    ticket = bench(1, 0, 1, phase=Phase.PREFILL)
    assert list(ticket.ready) == [k(1, 0), k(1, 1)] and bench.counts("hits") == 2
    assert bench.finish(ticket) == [] and bench.core.residents() == before
    assert bench.prefetches() == (2, 2, 0) and bench.counts("evictions") == 0


def test_the_next_layer_streams_while_this_one_computes() -> None:
    """A prefill in waves; the working set of decoding stays."""
    bench = full(6, 4)
    before = bench.core.residents()
    for layer in (1, 2, 3):
        ticket = bench(layer, 0, 1, phase=Phase.PREFILL)
        if layer < 3:
            assert bench.core.prefetch(k(layer + 1, 0), staged=True)
            assert bench.core.prefetch(k(layer + 1, 1), staged=True)
        bench.finish(ticket)
    assert before <= bench.core.residents() and bench.prefetches() == (4, 4, 0)


def test_a_demand_takes_the_slot_of_one_that_is_not_demanded_yet() -> None:
    bench = full(3, 1)
    bench.core.prefetch(k(1, 0), staged=True)
    bench.end(*bench.core.take())
    ticket = bench(2, 5, phase=Phase.PREFILL)
    assert [copy.key for copy in bench.core.take()] == [k(2, 5)]
    assert not bench.core.holds(k(1, 0)) and bench.prefetches() == (1, 0, 1)
    assert ticket.leased == {k(2, 5)}


def test_a_demand_waits_for_one_that_is_on_its_way() -> None:
    bench = full(3, 1)
    bench.core.prefetch(k(1, 0), staged=True)
    (copy,) = bench.core.take()
    ticket = bench(2, 5, phase=Phase.PREFILL)
    assert ticket.waiting == [k(2, 5)]
    bench.end(copy)
    bench.finish(ticket)
    assert bench.prefetches() == (1, 0, 1)


def test_through_two_tiers_it_displaces_nothing_in_either() -> None:
    bench = full(4, 2, 4)
    bench.finish(bench(1, 0, 1))
    bench.finish(bench(0, 0, 1))
    assert len(bench.core.residents(1)) == 4
    assert not bench.core.prefetch(k(2, 0), staged=True), "tier 1 is full"
    assert bench.core.prefetch(k(1, 0), staged=True), "from tier 1"
    assert [(copy.source.tier, copy.kind) for copy in bench.core.take()] == [(1, Kind.PREFETCH)]


def test_a_double_may_go_for_it() -> None:
    bench = full(4, 2, TierConfig(4, "lru", exclusive=True))
    bench.finish(bench(1, 0, 1))
    before = bench.core.residents()
    assert bench.core.prefetch(k(2, 0), staged=True)
    assert before == bench.core.residents() and len(bench.core.residents() | bench.core.residents(1)) == 4
    bench.core.check()


def test_cancelled_it_is_dropped_whatever_its_state() -> None:
    bench = full()
    before = bench.core.residents()
    bench.core.prefetch(k(1, 0), staged=True)
    assert bench.core.cancel(k(1, 0)) and bench.core.take() == []  # not taken
    bench.core.prefetch(k(1, 0), staged=True)
    (copy,) = bench.core.take()
    assert not bench.core.cancel(k(1, 0)) and bench.core.obsolete == [copy.id]  # taken
    bench.end(copy)
    assert bench.core.residents() == before and bench.prefetches() == (1, 0, 1)
    bench.core.prefetch(k(1, 0), staged=True)
    bench.end(*bench.core.take())
    assert not bench.core.cancel(k(1, 0)) and bench.core.residents() == before  # arrived
    bench.core.check()


def test_demanded_after_all() -> None:
    bench = full()
    bench.core.prefetch(k(1, 0), staged=True)
    (copy,) = bench.core.take()
    bench.core.cancel(k(1, 0))
    ticket = bench(1, 0, phase=Phase.PREFILL)
    bench.end(copy)
    assert list(ticket.ready) == [k(1, 0)] and bench.prefetches() == (1, 1, 0)
    bench.finish(ticket)


# -- withdrawals ------------------------------------------------------------------------------------------------------


def test_a_copy_that_had_not_begun_is_undone() -> None:
    bench = Bench(2, 4)
    bench.core.prefetch(k(0, 0))
    (read,) = bench.core.take()
    assert bench.core.cancel(k(0, 0)), "it will not reach tier 0"
    bench.core.check()
    assert bench.core.obsolete == [read.id]
    bench.core.cancelled(read.id)
    bench.core.check()
    assert not bench.core.busy and not bench.core.residents(1) and bench.prefetches() == (0, 0, 0)


def test_a_copy_that_had_begun_ends_where_it_was_going() -> None:
    bench = Bench(2, 4)
    bench.core.prefetch(k(0, 0))
    (read,) = bench.core.take()
    bench.core.cancel(k(0, 0))
    bench.end(read)
    assert bench.core.residents(1) == {k(0, 0)} and not bench.core.busy and bench.core.take() == []


def test_a_chain_that_nobody_took_is_undone_in_every_tier() -> None:
    bench = Bench(2, 4)
    bench.core.prefetch(k(0, 0))
    assert bench.core.cancel(k(0, 0)) and bench.core.take() == [] and not bench.core.busy
    bench.core.check()


def test_a_withdrawn_copy_that_is_demanded_meanwhile_is_ordered_again() -> None:
    bench = Bench(2)
    bench.core.prefetch(k(0, 0))
    (copy,) = bench.core.take()
    bench.core.cancel(k(0, 0))
    ticket = bench(0, 0)
    bench.core.cancelled(copy.id)
    bench.core.check()
    (again,) = bench.core.take()
    assert (again.key, again.kind) == (k(0, 0), Kind.LOAD)
    bench.end(again)
    bench.finish(ticket)


# -- what a prefetch may not evict ------------------------------------------------------------------------------------


def test_not_what_was_loaded_in_this_round_of_the_model() -> None:
    bench = Bench(2)
    bench.finish(bench(0, 0))
    bench.finish(bench(1, 0))
    assert not bench.core.prefetch(k(2, 0), displace=True)
    bench.finish(bench(0, 0))  # a new round
    assert bench.core.prefetch(k(2, 0), displace=True)
    assert bench.core.residents() == {k(1, 0)} or bench.core.residents() == {k(0, 0)}


def test_not_a_prefetch_that_may_still_be_used() -> None:
    bench = Bench(2)
    bench.finish(bench(0, 0))
    bench.core.prefetch(k(1, 0))
    bench.finish()
    bench.finish(bench(0, 0))
    bench.core.pin(k(0, 0))
    assert not bench.core.prefetch(k(2, 0), displace=True), "one more round for what came in the last one"
    bench.finish(bench(0, 0))
    assert bench.core.prefetch(k(2, 0), displace=True) and bench.prefetches() == (2, 0, 1)
