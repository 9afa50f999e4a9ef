"""Exclusive residency: tiers 0 and 1 keep a record once when both are full, so that together they hold more of them.

Lazily: a load leaves its copy in tier 1 as ever. Such a *double* costs nothing to drop, so doubles go first when
tier 1 needs a slot, and what leaves tier 0 while it has one leaves for nothing. A record without a double is copied
down first (*demotion*) and stays in tier 0 until it has arrived: a demotion that fails loses nothing. The next victims
are copied ahead, after an access, so that a demand finds slots that can be left at once.

Where the two tiers together have room for all records and one more, a demand waits for the demotion it needs, and
nothing is ever read from home again. Elsewhere it does not wait: what has no double is lost.
Part of the residency core: uses its books, decides like it, knows no bytes and no time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moetier.access import Access, ExpertKey
from moetier.tiers import READY, STAGING, Copy, Entry, Grant, Kind, Room, Tier
from moetier.victims import eligible, is_new, room_in

if TYPE_CHECKING:
    from moetier.residency import Residency


class Exclusive:
    """Of tier 1 (`lower`) towards tier 0 (`upper`)."""

    def __init__(self, core: Residency, upper: Tier, lower: Tier):
        self.core, self.upper, self.lower = core, upper, lower
        kept = sum(tier.config.slots - tier.config.staging for tier in (upper, lower))
        self.fits = kept > core.layers * core.experts and not lower.config.refill
        self.doubles: dict[ExpertKey, None] = {}  # kept and ready in both tiers, the newest last
        self.ahead: set[ExpertKey] = set()  # of these, those that leave tier 0 next
        self.due = False  # an access missed: slots were given away
        self._left: list[ExpertKey] = []  # left tier 0 without a double

    # -- the core tells ------------------------------------------------------------------------------------------------

    def landed(self, key: ExpertKey, demoted: bool) -> None:
        """A record is ready in one of the tiers."""
        above, below = self.upper.entries.get(key), self.lower.entries.get(key)
        if above is None or below is None or above.state is not READY or below.state is not READY:
            return
        if not above.transient and not below.transient:
            self.doubles[key] = None
            if demoted:
                self.ahead.add(key)

    def gone(self, entry: Entry) -> None:
        """A record leaves one of the tiers."""
        self.ahead.discard(entry.key)
        if self.doubles.pop(entry.key, 0) == 0 and entry.tier is self.upper and not (entry.dirty or entry.transient):
            self._left.append(entry.key)

    # -- who goes ------------------------------------------------------------------------------------------------------

    def leavers(self, need: int, access: Access, background: bool) -> list[Entry]:
        """Who leaves tier 0, best first: up to `need` of those that can go now, in the policy's order.

        After them those that were chosen when the last access ended, and then, for a demand, those without a double:
        where all records fit only if there is no way to keep them.
        """
        victims = eligible(self.core, self.upper, need, access, background)
        free = [entry for entry in victims if entry.key in self.doubles or entry.dirty]
        if len(free) < need and self.ahead:
            chosen = {entry.key for entry in free}
            reserve = [key for key in sorted(self.ahead - chosen) if self._may_leave(key)]
            if background:
                reserve = [key for key in reserve if not is_new(self.core, self.upper.entries[key])]
            free += [self.upper.entries[key] for key in reserve[: need - len(free)]]
        if background or len(free) >= need:
            return free
        stuck = [entry for entry in victims if entry.key not in self.doubles and not entry.dirty][: need - len(free)]
        if self.fits:
            keep = [entry for entry in stuck if not entry.lost]
            promised = Room(self.upper, access)
            promised.victims = free
            self._demote(keep, promised, access, urgent=True)
            if free or self._room_is_coming():
                stuck = [entry for entry in stuck if entry.lost]
        return free + stuck

    def places(self, need: int, access: Access, above: Room | None, background: bool = False) -> list[Entry]:
        """Who makes room in tier 1, best first: doubles, then the policy's order.

        `above` has promised that some records leave tier 0: their doubles are spared. Where all records fit nothing
        else goes: a demand waits if room is coming, or has it from promises that are taken back.
        """
        entries, leaving = self.lower.entries, {entry.key for entry in above.victims} if above is not None else set()
        found = [entry for entry in self.spare_doubles() if entry.key not in leaving]
        if not background:
            reserve = (key for key in sorted(self.ahead - leaving) if self._may_leave(key))
            found += [entries[key] for key in reserve if not entries[key].leases]
        if len(found) >= need or (background and self.fits):
            return found[:need]
        if self.fits:
            if above is not None:
                found += self._taken_back(above, len(found))
            if found or self._room_is_coming():
                return found[:need]
        found += eligible(self.core, self.lower, need - len(found), access, background)
        if not background:
            found += [entries[key] for key in leaving if key in self.doubles and not entries[key].leases]
        return found[:need]

    def spare_doubles(self) -> list[Entry]:
        """Of tier 1, the newest first, without those whose records leave tier 0 next."""
        entries, ahead = self.lower.entries, self.ahead
        doubles = (key for key in reversed(self.doubles) if not (key in ahead and self._may_leave(key)))
        return [entries[key] for key in doubles if not entries[key].leases]

    def _taken_back(self, above: Room, found: int) -> list[Entry]:
        """The doubles of records that may stay in tier 0 after all: a miss needs a slot of both tiers."""
        doubles: list[Entry] = []
        for entry in above.victims[:]:  # the best is last
            if len(above.victims) + max(0, above.spare) <= found + len(doubles) + 1:
                break
            double = self.lower.entries[entry.key] if entry.key in self.doubles else None
            if double is not None and not double.leases:
                above.victims.remove(entry)
                doubles.append(double)
        return doubles

    def _may_leave(self, key: ExpertKey) -> bool:
        return not self.upper.entries[key].leases and key not in self.core._pinned

    def _room_is_coming(self) -> bool:
        """Whether something under way will let a slot be left, in tier 0 or, for a demotion, in tier 1."""
        for copy in self.core._orders.copies.values():
            if copy.kind is Kind.DEMOTE:
                return True
            if copy.target.tier == 0 and copy.source.tier == 1 and not self.upper.entries[copy.key].transient:
                return True
        leaving = self.core._leaving.values()
        return any(entry.heir is None for entry in leaving) or any(
            self.lower.entries[key].leases for key in self.doubles
        )

    # -- demotions and refills -----------------------------------------------------------------------------------------

    def after(self, access: Access) -> None:
        """An access has ended: copy down who leaves next, or read again who has left."""
        if not self.due:
            return
        self.due = False
        left, self._left = self._left, []
        if self.lower.config.refill:
            for key in left:
                self._refill(key, access)
            return
        config = self.upper.config
        idle = len(self.upper.free) - (config.staging - self.upper.transients)
        spare = self.lower.config.spare - max(0, idle)
        victims = eligible(self.core, self.upper, spare, access) if spare > 0 else []
        self.ahead = {entry.key for entry in victims if entry.key in self.doubles}
        alone = [entry for entry in victims if entry.key not in self.doubles and not entry.dirty and not entry.lost]
        self._demote(alone, None, access)

    def _demote(self, victims: list[Entry], leaving: Room | None, access: Access, urgent: bool = False) -> None:
        """Copy records of tier 0 down, the best victim first, as far as there are places for them."""
        if not victims:
            return
        core, lower = self.core, self.lower
        room = room_in(core, lower, len(victims), access, leaving, background=True)
        for entry in victims:
            grant = room.grant(entry.key)
            if grant is None or grant is STAGING:
                return
            if isinstance(grant, Entry) and not self._admits(entry, grant, access):
                return
            copy = self._copy_down(entry, grant, access)
            lower.demotions += 1
            if urgent:
                core.promoted.append(copy)

    def _copy_down(self, above: Entry, grant: Grant, access: Access) -> int:
        """Copy a record of tier 0 down into a granted slot of tier 1; the number of the copy."""
        core = self.core
        entry = core._occupy(self.lower, above.key, grant, access)
        blockers = [] if entry.after is None else [entry.after.copy]
        above.leases += 1
        copy = Copy(entry.copy, above.key, above.place, entry.place, Kind.DEMOTE)
        core._digest = hash((core._digest, copy))
        core._orders.add(copy, blockers)
        return copy.id

    def _admits(self, entry: Entry, victim: Entry, access: Access) -> bool:
        """Whether a record may go down over another. Asked here even without staging: it can always be dropped."""
        return victim.key in self.doubles or self.lower.admission.admit(entry.key, victim.key, access)

    def _refill(self, key: ExpertKey, access: Access) -> None:
        """Read a record that left tier 0 again from where it is now, into tier 1, if nobody minds."""
        core = self.core
        if core._depth(key) == 1 or key in self.upper.entries or key in core._leaving:
            return
        rooms = [room_in(core, tier, 1, access, background=True) for tier in core._tiers[1 : core._depth(key)]]
        grants = core._grants(key, rooms)
        if grants and STAGING not in grants:
            core._fill(key, grants, Kind.PREFETCH, access, first=1)
            self.lower.refills += 1
