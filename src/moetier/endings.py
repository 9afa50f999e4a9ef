"""What the end of a copy means: a record has arrived, has not, or is home.

Part of the residency core: plain functions over its books.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moetier.tiers import READY, Copy, Kind

if TYPE_CHECKING:
    from moetier.residency import Residency


def source_read(core: Residency, copy: Copy) -> None:
    """A copy needs its source no longer."""
    if copy.source != core._home:
        entry = core._tiers[copy.source.tier].entries[copy.key]
        entry.leases -= 1
        core._drop_if_unused(entry)


def landed(core: Residency, copy: Copy) -> None:
    """A record is there: tell who waits for it."""
    entry = core._tiers[copy.target.tier].entries[copy.key]
    core.second_chances.discard(copy.id)
    demoted = copy.kind is Kind.DEMOTE
    if entry.stale and demoted:  # the record was changed meanwhile: it goes home when it leaves
        failed(core, copy)
        return
    if entry.stale:  # its source was changed while it was read: once more
        entry.stale = False
        again(core, copy)
        return
    source_read(core, copy)
    entry.state = READY
    core.writing.tell(entry)
    if core._exclusive is not None:
        core._exclusive.landed(copy.key, demoted)
    core._drop_if_unused(entry)


def again(core: Residency, copy: Copy) -> None:
    """Order a copy that has ended once more."""
    entry = core._tiers[copy.target.tier].entries[copy.key]
    core._next_copy += 1
    entry.copy = core._next_copy
    again = copy._replace(id=entry.copy)
    core._digest = hash((core._digest, again))
    core._orders.again(copy.id, again)


def failed(core: Residency, copy: Copy) -> None:
    """Undo a load that will not arrive, and every copy that waits for it.

    One that began as a prefetch and is demanded by now is made once more: only a demanded read may fail an access.
    """
    if copy.id in core.second_chances:
        core.second_chances.remove(copy.id)
        again(core, copy)
    else:
        _undo(core, copy)


def _undo(core: Residency, copy: Copy) -> None:
    core.second_chances.discard(copy.id)
    for dependent in core._orders.undo_dependents(copy.id):
        _undo(core, dependent)
    entry = core._tiers[copy.target.tier].entries[copy.key]
    entry.tier.remove(entry)
    core.wasted_prefetches += entry.prefetched
    for ticket in entry.tickets:
        ticket.failed = copy.id
        ticket.leased.remove(copy.key)
    if entry.after is None:
        entry.tier.free.append(entry.place)
    else:
        entry.after.heir = None
    source_read(core, copy)  # last: a source that goes now must not find the record it did not make


def wrote_back(core: Residency, copy: Copy, ok: bool) -> None:
    """A changed record is home, or back where it was."""
    entry = core._leaving.pop(copy.key)
    if not ok:  # nothing is lost: the record stays where it was, dirty
        for dependent in core._orders.undo_dependents(copy.id):
            _undo(core, dependent)
        entry.state, entry.transient = READY, False
        entry.tier.insert(entry, core._last)
        core.writing.not_home(copy.key)
        core._share(entry)
        return
    core.writing.home(copy.key)
    if entry.heir is None:
        entry.tier.free.append(entry.place)
    else:
        entry.heir.after = None
