"""The residency core's invariants, as one check. Tests run it after every step; runs never do.

It reads the core's private books on purpose: it is the core's own auditor, kept apart to keep the core short.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from moetier.tiers import HOMEWARD, Entry, Kind, State

if TYPE_CHECKING:
    from moetier.residency import Residency


def check(core: Residency) -> None:
    """Raise `AssertionError`, naming what is wrong, if any invariant does not hold."""
    _check_slots(core)
    _check_copies(core)
    _check_leases(core)
    _check_dirty(core)
    _check_cleaning(core)
    _check_doubles(core)
    for tier in core._tiers:
        counted = [0] * core.layers
        for entry in tier.entries.values():
            if not entry.transient:
                counted[entry.key.layer] += 1
        assert counted == tier.residents, "residents per layer are miscounted"
        assert tier.transients == sum(entry.transient for entry in tier.entries.values()), "staged are miscounted"
        assert tier.transients <= tier.config.staging, "more staged records than staging slots"
        ranked = list(tier.policy.victims(core._last))
        assert len(ranked) == len(set(ranked)), "the policy ranks a key twice"
        assert set(ranked) == {k for k, e in tier.entries.items() if not e.transient}, "the policy lost track"
    assert all(ticket.waiting == [] or ticket in core._live.values() for ticket in core._stuck), "a dead access waits"
    assert len(core._pinned) <= core._top.config.slots // 2, "pins exceed half of the tier"


def _check_slots(core: Residency) -> None:
    for index, tier in enumerate(core._tiers):
        owners: dict[int, object] = {place.slot: "free" for place in tier.free}
        assert len(owners) == len(tier.free), "a slot is free twice"
        for entry in tier.entries.values():
            slot = entry.place.slot
            assert entry.tier is tier and entry.place.tier == index and entry.state is not State.LEAVING
            assert slot not in owners, f"slot {slot} of tier {index} has two owners"
            owners[slot] = entry
        for entry in core._leaving.values():
            if entry.tier is not tier:
                continue
            slot = entry.place.slot
            if entry.heir is None:
                assert slot not in owners, "the slot of a leaving record was given away"
                owners[slot] = entry
            else:
                assert owners.get(slot) is entry.heir, "the slot of a leaving record is not kept for its heir"
        assert len(owners) == tier.config.slots, f"tier {index} lost a slot"


def _check_copies(core: Residency) -> None:
    orders = core._orders
    ordered = [copy.id for copy in orders.ready]
    assert len(ordered) == len(set(ordered)) and set(ordered) <= set(orders.copies), "an order is not a live copy"
    filled: set[Entry] = set()
    saved: set[Entry] = set()
    for copy in orders.copies.values():
        blocked = copy.id in orders.blockers
        assert not (blocked and copy.id in ordered), "a blocked copy was ordered"
        if copy.kind is Kind.WRITE_BACK:
            entry = core._leaving[copy.key]
            assert entry.copy == copy.id and entry.place == copy.source and entry.dirty
            saved.add(entry)
            continue
        if copy.kind is Kind.CLEAN:
            entry = core._tiers[copy.source.tier].entries[copy.key]
            assert entry.place == copy.source and entry.dirty and entry.state is State.READY and not blocked
            assert core.writing.running[copy.key] == copy.id, "a record is written home that nobody remembers"
            continue
        entry = core._tiers[copy.target.tier].entries[copy.key]
        assert entry not in filled, "two flights of one key into one tier"
        filled.add(entry)
        assert entry.state is State.LOADING and entry.copy == copy.id and entry.place == copy.target
        assert entry.after is None or (blocked and entry.after.heir is entry), (
            "a slot is filled while its last record is still being written back"
        )
        if copy.source.tier < core._home.tier:
            source = core._tiers[copy.source.tier].entries[copy.key]
            assert source.place == copy.source and source.leases > 0, "a copy's source may be evicted under it"
            assert blocked or source.state is State.READY, "a copy reads a slot that is being filled"
        elif copy.key in core._leaving:
            assert blocked, "a record is loaded from a home that is out of date"
    loading = {entry for tier in core._tiers for entry in tier.entries.values() if entry.state is State.LOADING}
    assert loading == filled, "a record waits for a copy that nobody makes"
    assert saved == set(core._leaving.values()), "a record leaves and nobody writes it back"
    for copy_id, count in orders.blockers.items():
        waits = sum(dependents.count(copy_id) for dependents in orders.dependents.values())
        assert copy_id in orders.copies and waits == count > 0, "a blocked copy waits for nothing"
    assert set(orders.dependents) <= set(orders.copies), "a copy waits for one that has ended"


def _check_leases(core: Residency) -> None:
    readers = Counter(c.source for c in core._orders.copies.values() if c.kind is not Kind.WRITE_BACK)
    users = Counter(core._entry(ticket, key).place for ticket in core._live.values() for key in ticket.leased)
    for tier in core._tiers:
        for entry in tier.entries.values():
            count = readers[entry.place] + users[entry.place]
            assert entry.leases == count, f"{entry.key} has {entry.leases} leases for {count} users"
            if entry.state is State.READY:
                written = entry.key in core.writing.running
                assert all(written and t.access.writes for t in entry.tickets), "someone waits for what is ready"
                staged = entry.prefetched and not entry.lost
                assert entry.leases or not entry.transient or staged, "a staged record outlives its use"
    for ticket in core._live.values():
        for key in ticket.leased:
            entry = core._entry(ticket, key)
            waits = entry.state is State.LOADING or (ticket.access.writes and key in core.writing.running)
            assert (ticket in entry.tickets) == waits, "an access is not told when its record arrives, or is written"
        for key in ticket.ready:
            assert core._entry(ticket, key).state is State.READY and key in ticket.leased
        if ticket.waiting:
            assert ticket in core._stuck, "an access waits and nobody remembers it"
            for key in ticket.waiting:
                serving = core._tiers[key in ticket.in_place]
                assert key not in serving.entries, "an access waits for a record that is there"
        assert ticket.in_place <= set(ticket.access.keys), "a record is served in place that nobody needs"
    waiting = Counter(key for ticket in core._live.values() for key in ticket.waiting if core._lower)
    assert +core._wanted == waiting and all(count >= 0 for count in core._wanted.values()), "_wanted is miscounted"


def _check_dirty(core: Residency) -> None:
    """The newest version of a record is at home, or dirty in one place; what else there is of it is no older."""
    for key in {key for tier in core._tiers for key in tier.entries} | set(core._leaving):
        kept = [tier.entries[key] for tier in core._tiers if key in tier.entries]
        dirty = [entry for entry in kept if entry.dirty]
        assert len(dirty) <= 1, f"{key} is dirty twice"
        if dirty:
            below = [entry for entry in kept if entry.place.tier > dirty[0].place.tier and not entry.stale]
            assert not below, f"an old version of {key} is kept below the dirty one"
            assert dirty[0].place.tier < 2, f"{key} was changed in a tier where nothing computes"
            assert dirty[0].place.tier or not core.updates_below, (
                f"{key} is dirty in tier 0, and updates are made below"
            )
            assert dirty[0].state is State.READY and key not in core._leaving, f"two newest versions of {key}"
        if key in core._leaving:
            same = core._tiers[:1] if core.updates_below else []  # copies of what leaves, and never newer
            old = [entry for entry in kept if entry.state is State.READY and entry.tier not in same]
            assert not old, f"an old version of {key} is kept beside the one on its way home"
    for tier in core._tiers:
        for entry in tier.entries.values():
            assert not entry.stale or entry.state is State.LOADING, "a record that was half copied is ready"


def _check_cleaning(core: Residency) -> None:
    """What is dirty is known, and what is being written stays as it is."""
    writing = core.writing
    dirty = {key for tier in core._tiers for key, entry in tier.entries.items() if entry.dirty}
    assert not dirty & core._leaving.keys(), "a record is dirty and leaves in an older version"
    assert writing.dirty.keys() == dirty | core._leaving.keys(), "the dirty records are miscounted"
    assert list(writing.dirty.values()) == sorted(writing.dirty.values()), "the longest dirty record is not the first"
    copies = {copy.key: copy.id for copy in core._orders.copies.values() if copy.kind is Kind.CLEAN}
    assert writing.running == copies, "cleaning is miscounted"
    assert writing.flushing | writing.failed <= writing.dirty.keys(), "a clean record is to be written"
    homeward = Counter(copy.key for copy in core._orders.copies.values() if copy.kind in HOMEWARD)
    assert all(count == 1 for count in homeward.values()), "two writes of one record at once"
    for ticket in core._live.values():
        if ticket.access.writes:
            held = ticket.leased - {key for key in ticket.leased if ticket in core._entry(ticket, key).tickets}
            assert not held & writing.running.keys(), "a record may change while it is written"


def _check_doubles(core: Residency) -> None:
    exclusive = core._exclusive
    if exclusive is None:
        return
    kept = [
        {key for key, entry in tier.entries.items() if entry.state is State.READY and not entry.transient}
        for tier in core._tiers[:2]
    ]
    assert exclusive.doubles.keys() == kept[0] & kept[1], "the records that are kept twice are miscounted"
    assert exclusive.ahead <= exclusive.doubles.keys(), "a record is to leave first that cannot leave at once"
    for copy in core._orders.copies.values():
        if copy.kind is Kind.DEMOTE:
            above = core._top.entries[copy.key]
            assert (copy.source.tier, copy.target.tier) == (0, 1) and above.state is State.READY
            below = core._tiers[1].entries[copy.key]
            assert below.stale or not above.dirty, "a changed record is copied down as if it were at home"
