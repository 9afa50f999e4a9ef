"""Loads before the demand, in the residency core: into free slots, over victims, or into staging slots.

A prefetch never evicts a live record (leased, waited for, pinned) or a just-loaded one (loaded or used in this round of
the model; undemanded prefetches are kept for one more). A *staged* prefetch displaces nothing at all: it sits in a
staging slot until its first demand is released, it is cancelled, or a demand needs the slot.
Part of the core: plain functions over its books.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moetier import endings
from moetier.access import ExpertKey
from moetier.tiers import FREE, LOADING, READY, STAGING, Grant, Kind, Room
from moetier.victims import room_in

if TYPE_CHECKING:
    from moetier.residency import Residency


def prefetch(core: Residency, key: ExpertKey, displace: bool, staged: bool) -> bool:
    """Order the loads of `key` into tier 0. False if it is there already, or nothing gives it a slot."""
    if key in core._top.entries:
        return False
    rooms: list[Room] = []
    for tier in core._tiers[: core._depth(key)]:
        above = rooms[-1] if rooms else None
        wanted = 1 if displace and not staged else 0
        rooms.append(room_in(core, tier, wanted, core._last, above, background=True))
        if core._exclusive is not None and tier.index == 1 and not wanted:
            rooms[-1].victims = core._exclusive.spare_doubles()[:1]  # dropping one of two displaces nothing
            rooms[-1].doubles = core._exclusive.doubles
    grants = _staged(rooms) if staged else core._grants(key, rooms)
    if not grants or (STAGING in grants and not staged):
        return False
    core._fill(key, grants, Kind.PREFETCH, core._last)
    core.prefetches += 1
    return True


def _staged(rooms: list[Room]) -> list[Grant]:
    """A staging slot of tier 0; below it any free slot to pass through. Nothing, if one of them is missing."""
    grants: list[Grant] = []
    for room in rooms:
        tier = room.tier
        staging = tier.config.staging > tier.transients and bool(tier.free)
        if tier.index and room.spare > 0:
            grants.append(FREE)
        elif tier.index and room.victims:
            grants.append(room.victims.pop())
        elif staging:
            grants.append(STAGING)
        else:
            return []
    return grants


def cancel(core: Residency, key: ExpertKey) -> bool:
    """Undo a prefetch that nobody demands. True if nothing of it will reach tier 0.

    What of it was not taken is withdrawn; what was is named in `obsolete`, for the mover to answer with `cancelled` if
    it had not begun. A staged record that has arrived is dropped.
    """
    entry = core._top.entries.get(key)
    if entry is None or not entry.prefetched:
        return False
    if entry.state is READY:
        if entry.transient and not entry.leases:
            core._drop(entry)
            core._serve_stuck()
        return False
    if core._orders.started(entry.copy):
        core.obsolete.append(entry.copy)
        entry.lost = entry.transient  # on arrival, unless demanded by then
        return False
    entry.prefetched = False
    core.prefetches -= 1
    endings.failed(core, core._orders.withdraw(entry.copy))
    for tier in core._lower:  # and what was to be loaded for its sake only
        below = tier.entries.get(key)
        if below is None or below.state is not LOADING or below.leases:
            break
        if core._orders.copies[below.copy].kind is not Kind.PREFETCH:
            break
        if core._orders.started(below.copy):
            core.obsolete.append(below.copy)
            break
        endings.failed(core, core._orders.withdraw(below.copy))
    core._serve_stuck()
    return True


def cancelled(core: Residency, copy_id: int) -> None:
    """The mover had not begun an `obsolete` copy, and has dropped it."""
    copy = core._orders.copies[copy_id]
    entry = core._tiers[copy.target.tier].entries[copy.key]
    del core._orders.copies[copy_id]
    if copy.kind is not Kind.PREFETCH or entry.leases:  # demanded since: the mover was asked too late
        endings.again(core, copy)
        return
    if entry.prefetched:
        entry.prefetched = False
        core.prefetches -= 1
    endings.failed(core, copy)
    core._serve_stuck()
