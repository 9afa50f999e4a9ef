"""The residency core's invariants, as one check. Tests run it after every step; runs never do.

It reads the core's private books on purpose: it is the core's own auditor, kept apart to keep the core short.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moetier.tiers import Kind, State

if TYPE_CHECKING:
    from moetier.residency import Residency


def check(core: Residency) -> None:
    """Raise `AssertionError`, naming what is wrong, if any invariant does not hold."""
    _check_slots(core)
    _check_copies(core)
    _check_leases(core)
    _check_dirty(core)
    for tier in core._tiers:
        counted = [0] * core.layers
        for entry in tier.entries.values():
            if not entry.transient:
                counted[entry.key.layer] += 1
        assert counted == tier.residents, "residents per layer are miscounted"
        assert tier.transients == sum(entry.transient for entry in tier.entries.values()), "staged are miscounted"
        assert tier.transients <= max(tier.config.staging, 0), "more staged records than staging slots"
        ranked = list(tier.policy.victims(core._last))
        assert len(ranked) == len(set(ranked)), "the policy ranks a key twice"
        assert set(ranked) == {k for k, e in tier.entries.items() if not e.transient}, "the policy lost track"
    assert len(core._pinned) <= core._top.config.slots // 2, "pins exceed half of the tier"


def _check_slots(core: Residency) -> None:
    for index, tier in enumerate(core._tiers):
        owners: dict[int, object] = dict.fromkeys(tier.free, "free")
        assert len(owners) == len(tier.free), "a slot is free twice"
        for entry in tier.entries.values():
            assert entry.slot not in owners, f"slot {entry.slot} of tier {index} has two owners"
            owners[entry.slot] = entry.key
            assert tier.entries[entry.key] is entry
        for leaving_tier, entry, heir in core._leaving.values():
            if leaving_tier is tier and (heir is None or heir not in core._copies):
                assert entry.slot not in owners, "the slot of a leaving record was given away"
                owners[entry.slot] = entry.key
            elif leaving_tier is tier:
                assert heir is not None
                key = core._copies[heir].key
                assert owners.get(entry.slot) == key, "the slot of a leaving record is not kept for its heir"
        assert len(owners) == tier.config.slots, f"tier {index} lost a slot"


def _check_copies(core: Residency) -> None:
    ordered = {copy.id for copy in core._orders}
    filled: set[tuple[int, object]] = set()
    for copy in core._copies.values():
        if copy.kind is Kind.WRITE_BACK:
            assert copy.id in core._leaving
            continue
        flight = (copy.target.tier, copy.key)
        assert flight not in filled, "two flights of one key into one tier"
        filled.add(flight)
        entry = core._tiers[copy.target.tier].entries[copy.key]
        assert entry.state is State.LOADING and entry.copy == copy.id and entry.slot == copy.target.slot
        if copy.source.tier < core._home.tier:
            source = core._tiers[copy.source.tier].entries[copy.key]
            assert source.slot == copy.source.slot and source.leases > 0, "a copy's source may be evicted under it"
        blocked = copy.id in core._blockers
        assert not (blocked and copy.id in ordered), "a blocked copy was ordered"
        if entry.vacating is not None and entry.vacating in core._leaving:
            assert blocked, "a slot is filled while its last record is still being written back"
        if copy.source.tier == core._home.tier and copy.key in core._stale:
            assert blocked, "a record is loaded from a home that is out of date"
    loading = {
        (i, e.key) for i, tier in enumerate(core._tiers) for e in tier.entries.values() if e.state is State.LOADING
    }
    assert loading == filled, "a record waits for a copy that nobody makes"
    for copy_id, count in core._blockers.items():
        waits = sum(dependents.count(copy_id) for dependents in core._dependents.values())
        assert copy_id in core._copies and waits == count > 0, "a blocked copy waits for nothing"


def _check_leases(core: Residency) -> None:
    for index, tier in enumerate(core._tiers):
        for entry in tier.entries.values():
            readers = sum(
                copy.key == entry.key and copy.source.tier == index and copy.kind is not Kind.WRITE_BACK
                for copy in core._copies.values()
            )
            users = sum(entry.key in ticket.leased for ticket in core._live.values()) if index == 0 else 0
            assert entry.leases == readers + users, f"{entry.key} has {entry.leases} leases for {readers + users} users"
            if entry.state is State.READY:
                assert not entry.tickets, "someone waits for a record that is ready"
    for ticket in core._live.values():
        for key in ticket.leased:
            assert key in core._top.entries, "a leased record was evicted"
        for key in ticket.ready:
            assert core._top.entries[key].state is State.READY and key in ticket.leased
        if ticket.waiting:
            assert ticket in core._stuck, "an access waits and nobody remembers it"
    waiting = sum(len(ticket.waiting) for ticket in core._live.values()) if len(core._tiers) > 1 else 0
    assert sum(core._wanted.values()) == waiting and all(count >= 0 for count in core._wanted.values())


def _check_dirty(core: Residency) -> None:
    for key in {entry.key for tier in core._tiers for entry in tier.entries.values()} | set(core._stale):
        newest = [(index, entry) for index, entry in core if entry.key == key and entry.dirty]
        assert len(newest) <= 1, f"{key} is dirty in two places"
        for tier_index, _ in newest:
            below = [t for t in core._tiers[tier_index + 1 :] if key in t.entries]
            assert not below, f"an old version of {key} is kept below the dirty one"
