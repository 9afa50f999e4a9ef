"""Serving accesses in tier 1, and what it means when records change there: misses of tier 0 that stay where they are,
and updates, in a tier that is for them.

Part of the residency core: plain functions over its books.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moetier.access import ExpertKey
from moetier.misses import Miss, MissPolicy
from moetier.tiers import LOADING, Entry, Ticket, classify
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
    return _lease(core, ticket, missing, chosen)


def below(core: Residency, ticket: Ticket) -> list[ExpertKey]:
    """Lease what tier 1 has for an update, which changes records there only; returns the keys that need a slot of it.

    Tier 0 has no part in it: its policy is not asked to expect such accesses.
    """
    access = ticket.access
    for tier in core._lower:
        tier.policy.on_access(access)
    keys = list(access.keys)
    core._wanted.update(keys)
    classify(core._lower, keys, access)
    return _lease(core, ticket, keys, set(keys))


def _lease(core: Residency, ticket: Ticket, keys: list[ExpertKey], chosen: set[ExpertKey]) -> list[ExpertKey]:
    """Lease those of the chosen keys that are in tier 1; returns the other keys."""
    ticket.in_place = frozenset(chosen)
    lower = core._tiers[1]
    lower.in_place += len(chosen)
    core._digest = hash((core._digest, *sorted(chosen)))
    waiting = []
    for key in keys:
        entry = lower.entries.get(key) if key in chosen else None
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
