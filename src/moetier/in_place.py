"""Serving misses of tier 0 where they are, in tier 1, and what it means when records change there.

Part of the residency core: plain functions over its books.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moetier.access import ExpertKey
from moetier.misses import Miss, MissPolicy
from moetier.tiers import LOADING, Entry, Ticket
from moetier.victims import room_in

if TYPE_CHECKING:
    from moetier.residency import Residency


def split(core: Residency, ticket: Ticket, missing: list[ExpertKey], misses: MissPolicy) -> list[ExpertKey]:
    """Choose what is served in tier 1, and lease what is there already; returns the keys that need a slot.

    One miss at least goes to tier 0 if a slot can be had: a cache that never loads never learns.
    """
    access = ticket.access
    tokens = dict(zip(access.keys, access.tokens, strict=False))
    asked = [Miss(key, tokens.get(key, 1), core._depth(key)) for key in missing]
    answer = misses.split(access, asked)
    chosen = {key for key in missing if key in answer}
    if len(chosen) == len(missing):
        room = room_in(core, core._top, 1, access)
        if room.spare > 0 or room.victims:
            chosen.remove(min(asked, key=lambda miss: (miss.source, -miss.tokens)).key)
    if not chosen:
        return missing
    ticket.in_place = frozenset(chosen)
    below = core._tiers[1]
    below.in_place += len(chosen)
    core._digest = hash((core._digest, *sorted(chosen)))
    waiting = []
    for key in missing:
        entry = below.entries.get(key) if key in chosen else None
        if entry is None:
            waiting.append(key)
        else:
            core._wanted[key] -= 1
            core._join(ticket, entry)
    return waiting


def supersede(core: Residency, entry: Entry) -> None:
    """A record was changed where it is: its older versions in other tiers are worthless."""
    key = entry.key
    for tier in core._tiers:
        old = tier.entries.get(key)
        if old is None or old is entry:
            continue
        if old.state is LOADING:  # from here, up or down: what it reads may be half old, half new
            old.stale = old.stale or core._orders.started(old.copy) or tier is not core._top
            continue
        for ticket in core._live.values():  # who leased the old version gets the new one
            if key in ticket.leased and core._entry(ticket, key) is old:
                old.leases -= 1
                entry.leases += 1
                ticket.in_place ^= {key}
        old.dirty = False
        core._drop(old)
