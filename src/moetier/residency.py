"""The residency core: which expert is where, who uses it, what must move. All decisions live here, all effects outside.

Rule 1: method calls in, copy orders out (`take`). The core is a deterministic function of the calls it gets, the order
of completions included: it never sleeps, reads a clock, touches bytes, starts threads or imports torch.
Rule 2: it does not know what a tier is made of. Tier 0 is where the math runs, `home` (below the last tier) is complete
and holds every record, unless a newer version is dirty in exactly one place.

Guarantees, checked by `check()`:
- a slot is free or owned by one record; loading, leaving, leased and pinned records are never victims;
- one flight into a tier per key; later demands join it (*late*);
- a dirty record is written home before its slot is reused, and that slot stays reserved for the key that caused it;
- progress: as long as leases are released and copies complete, every access with one usable slot finishes.

The caller serialises calls (one lock); `docs/architecture.md` has the picture.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from moetier import endings, in_place, prefetching
from moetier.access import Access, ExpertKey, Part
from moetier.errors import CapacityError, ConfigError
from moetier.exclusive import Exclusive
from moetier.misses import MissPolicy
from moetier.tiers import (
    LEAVING,
    LOADING,
    READY,
    STAGING,
    Copy,
    Entry,
    Grant,
    Kind,
    Orders,
    Place,
    Room,
    Ticket,
    Tier,
    TierConfig,
    classify,
)
from moetier.victims import room_in
from moetier.writeback import WriteBacks


class Residency:
    """Decides residency for `layers` x `experts` records over `tiers` (fastest first) plus home.

    `misses` chooses the misses of tier 0 that are served in tier 1, in place; nothing is if it is None. `writeback`
    says when changed records are written home, at the latest beyond `dirty_limit` of them (`writeback.py`).
    """

    def __init__(
        self,
        tiers: Sequence[TierConfig],
        layers: int,
        experts: int,
        misses: MissPolicy | None = None,
        writeback: str = "evict",
        dirty_limit: int | None = None,
    ):
        if not tiers:
            raise ConfigError("at least one tier is needed above home")
        if misses is not None and len(tiers) < 2:
            raise ConfigError("a miss can be served in place only where there is a second tier to serve it in")
        self.misses = misses
        self.configs, self.layers, self.experts = tuple(tiers), layers, experts
        self._tiers = [Tier(index, config, layers, experts) for index, config in enumerate(tiers)]
        self._top, self._lower = self._tiers[0], self._tiers[1:]
        self._home = Place(len(tiers), -1)
        self._exclusive: Exclusive | None = None
        if any(tier.config.exclusive for tier in self._lower):
            self._exclusive = Exclusive(self, self._top, self._tiers[1])
        self.updates_below = any(tier.config.updates for tier in self._lower)
        self._orders = Orders()
        self.writing = WriteBacks(self, writeback, dirty_limit)
        self._dirty = self.writing.dirty
        self._leaving: dict[ExpertKey, Entry] = {}  # dirty records on their way home; until then home is out of date
        self._wanted: Counter[ExpertKey] = Counter()  # keys that wait for tier 0, and must not leave a tier below
        self._stuck: list[Ticket] = []  # accesses that wait for slots
        self._live: dict[int, Ticket] = {}
        self._pinned: set[ExpertKey] = set()
        self.promoted: list[int] = []  # background copies in flight that are now demanded; the mover moves them forward
        self.second_chances: set[int] = set()  # promoted copies: if one fails, it is made once more
        self.obsolete: list[int] = []  # prefetches taken that nobody wants; the mover drops what it has not begun
        self.prefetches = self.useful_prefetches = self.late_prefetches = self.wasted_prefetches = 0
        self._next_copy = self._next_ticket = 0
        self._digest = 0
        self._last = Access(0, 0, ())
        self._round = 0  # passes through the layers

    # -- the calls that a run makes, in the order it makes them ------------------------------------------------------

    def acquire(self, access: Access) -> Ticket:
        """Classify all keys at once, lease the residents, order what is missing and fits."""
        self._next_ticket += 1
        ticket = Ticket(self._next_ticket, access)
        if access.keys:
            self._live[ticket.number] = ticket
        top, layer = self._top, access.layer
        keys, waiting = access.keys, []
        if self.updates_below and access.part is Part.UPDATE:
            keys, waiting = (), in_place.below(self, ticket)
        else:
            self._round += layer <= self._last.layer
            self._last = access
            for tier in self._tiers:
                tier.policy.on_access(access)
        entries, on_hit = top.entries, top.policy.on_hit
        missing, lates = [], 0
        for key in keys:
            entry = entries.get(key)
            if entry is None:
                missing.append(key)
                continue
            if not entry.transient:
                on_hit(key, access)
            if entry.state is READY and not entry.prefetched:  # the hot path, unrolled
                entry.leases += 1
                ticket.leased.add(key)
                ticket.ready.append(key)
            else:
                lates += self._join(ticket, entry)
        top.hits[layer] += len(keys) - len(missing) - lates
        top.lates[layer] += lates
        if missing:
            top.misses[layer] += len(missing)
            if self._lower:
                self._wanted.update(missing)
                classify(self._lower, missing, access)
            if self._exclusive is not None:
                self._exclusive.due = True
            waiting = missing if self.misses is None else in_place.split(self, ticket, missing, self.misses)
        if waiting:
            ticket.waiting = waiting
            self._advance(ticket)
            if ticket.waiting:
                self._stuck.append(ticket)
        if self._dirty:
            if access.writes:
                self.writing.hold(ticket)
            self.writing.go()
        self._digest = hash((self._digest, access.time, layer, len(missing), lates))
        return ticket

    def release(self, ticket: Ticket, key: ExpertKey, dirty: bool = False, saved: bool = False) -> None:
        """The math is done with `key`; `dirty` if it changed the record, `saved` if it made home the same as the slot.

        Only an access that `writes` may do either.
        """
        if dirty or saved:
            self.writing.changed(ticket, key, saved)
        ticket.leased.remove(key)
        entry = self._entry(ticket, key)
        entry.leases -= 1
        if dirty or saved:
            entry.dirty = not saved
            if self._lower:
                in_place.supersede(self, entry)
        if entry.transient:
            self._drop_if_unused(entry)
        if self._stuck:
            self._serve_stuck()
        if not ticket.leased and ticket.done:
            del self._live[ticket.number]
            if self._exclusive is not None:
                self._exclusive.after(ticket.access)
        if self._dirty:
            self.writing.go()

    def abort(self, ticket: Ticket) -> None:
        """Give up the rest of an access: after a failure, or when the caller stops early."""
        if self._lower:
            self._wanted.subtract(ticket.waiting)
        ticket.waiting = []
        for key in sorted(ticket.leased):
            entry = self._entry(ticket, key)
            entry.leases -= 1
            if ticket in entry.tickets:
                entry.tickets.remove(ticket)
            self._drop_if_unused(entry)
        ticket.leased.clear()
        ticket.ready.clear()
        self._live.pop(ticket.number, None)
        self._serve_stuck()
        if self._exclusive is not None:
            self._exclusive.after(ticket.access)
        self.writing.go()

    def completed(self, copy_id: int, ok: bool = True) -> None:
        """A copy ended. With `ok` false nothing arrived: whoever waits for it is told through `Ticket.failed`."""
        copy = self._orders.copies.pop(copy_id)
        self._digest = hash((self._digest, copy_id, ok))
        if copy.kind is Kind.WRITE_BACK:
            endings.wrote_back(self, copy, ok)
        elif copy.kind is Kind.CLEAN:
            self.writing.ended(copy, ok)
        elif ok:
            endings.landed(self, copy)
        else:
            endings.failed(self, copy)
            if copy.kind is Kind.DEMOTE:  # nothing is lost yet: it was copied, not moved
                self._top.entries[copy.key].lost = True
        if self._orders.dependents:
            self._orders.unblock(copy_id)
        if self._stuck:
            self._serve_stuck()
        if self._dirty:
            self.writing.go()

    def take(self) -> list[Copy]:
        """The orders since the last call; demand loads before prefetches."""
        return self._orders.take()

    def prefetch(self, key: ExpertKey, displace: bool = False, staged: bool = False) -> bool:
        """Start loading `key` before it is demanded: into a free slot, or over a victim if `displace`.

        A `staged` one takes a staging slot, displaces nothing, and is gone after its first use. No prefetch evicts what
        is live or just loaded (`prefetching.py`).
        """
        return prefetching.prefetch(self, key, displace, staged)

    def cancel(self, key: ExpertKey) -> bool:
        """Undo a prefetch that nobody waits for; True if nothing of it will reach tier 0.

        Orders that were taken already are put into `obsolete`; a mover that has not begun them answers `cancelled`.
        """
        return prefetching.cancel(self, key)

    def cancelled(self, copy_id: int) -> None:
        """The mover had not begun a copy that is `obsolete`, and will not."""
        prefetching.cancelled(self, copy_id)

    def clean(self, key: ExpertKey) -> bool:
        """Start writing a changed record home; it stays. False if it is not dirty, or leased by who may change it."""
        return self.writing.clean(key)

    def flush(self) -> None:
        """Write home every record that is dirty now; `writing.flushing` are those still to be written."""
        self.writing.flush()

    def pin(self, key: ExpertKey) -> None:
        """Keep `key` in tier 0 once it is resident there. Raises `CapacityError` beyond half of the tier."""
        if key not in self._pinned and len(self._pinned) >= self._top.config.slots // 2:
            raise CapacityError(
                f"pins may take at most half of the {self._top.config.slots} slots of tier 0",
                minimum_slots=2 * (len(self._pinned) + 1),
            )
        self._pinned.add(key)

    def unpin(self, key: ExpertKey) -> None:
        """Allow `key` to be evicted again."""
        self._pinned.discard(key)
        self._serve_stuck()

    # -- what others may ask ------------------------------------------------------------------------------------------

    def place(self, key: ExpertKey, ticket: Ticket | None = None) -> Place:
        """Where a key that a ticket has leased is: in tier 1 if the ticket is served there, else in tier 0."""
        return (self._top.entries[key] if ticket is None else self._entry(ticket, key)).place

    def residents(self, tier: int = 0) -> set[ExpertKey]:
        """Keys that are ready in a tier."""
        return {key for key, entry in self._tiers[tier].entries.items() if entry.state is READY}

    def holds(self, key: ExpertKey) -> bool:
        """Whether `key` is in tier 0 or on its way there."""
        return key in self._top.entries

    def holding(self, keys: Sequence[ExpertKey], all_tiers: bool = False) -> list[bool]:
        """`holds` of many keys at once; or whether any tier holds them."""
        if all_tiers:
            return [any(key in tier.entries for tier in self._tiers) for key in keys]
        return list(map(self._top.entries.__contains__, keys))

    @property
    def busy(self) -> bool:
        """Whether a copy is ordered or in flight."""
        return bool(self._orders.copies)

    @property
    def tickets(self) -> list[Ticket]:
        """Accesses that are not finished."""
        return list(self._live.values())

    def digest(self) -> int:
        """A number that depends on every decision so far; equal for equal inputs."""
        return self._digest

    def counters(self) -> dict[str, object]:
        """Hits, lates and misses per tier and layer, evictions, staged loads; prefetches; dirty records and writes."""
        prefetches = {
            "issued": self.prefetches,
            "useful": self.useful_prefetches,  # demanded before they were evicted
            "late": self.late_prefetches,  # of these: still on their way
            "wasted": self.wasted_prefetches,
        }
        tiers = [tier.counters() for tier in self._tiers]
        return {"tiers": tiers, "prefetches": prefetches, "writebacks": self.writing.counters()}

    # -- serving misses -----------------------------------------------------------------------------------------------

    def _entry(self, ticket: Ticket, key: ExpertKey) -> Entry:
        """The record that a ticket has leased."""
        return self._tiers[key in ticket.in_place].entries[key]

    def _join(self, ticket: Ticket, entry: Entry) -> bool:
        """Lease an entry for a ticket; True if it is still on its way."""
        entry.leases += 1
        ticket.leased.add(entry.key)
        if entry.prefetched:
            entry.prefetched = False
            self.useful_prefetches += 1
            self.late_prefetches += entry.state is LOADING
        if entry.state is READY:
            ticket.ready.append(entry.key)
            return False
        self._promote(entry.key, entry.place.tier)
        entry.tickets.append(ticket)
        return True

    def _promote(self, key: ExpertKey, first: int = 0) -> None:
        """What nobody waited for is demanded now in tier `first`: every load of the chain to it that has not ended."""
        for tier in self._tiers[first:]:
            entry = tier.entries.get(key)
            if entry is not None and entry.state is LOADING:
                copy = self._orders.copies[entry.copy]
                if copy.kind is Kind.PREFETCH:
                    self._orders.copies[entry.copy] = copy._replace(kind=Kind.LOAD)
                    self.promoted.append(entry.copy)
                    self.second_chances.add(entry.copy)

    def _depth(self, key: ExpertKey) -> int:
        """The fastest tier below tier 0 that holds or awaits `key`; home if none."""
        for index, tier in enumerate(self._lower, 1):
            if key in tier.entries:
                return index
        return self._home.tier

    def _advance(self, ticket: Ticket) -> None:
        """Give slots to as many waiting keys as possible; the others wait for a release or a completion."""
        waiting, ticket.waiting = ticket.waiting, []
        rooms: list[Room] = []
        for key in waiting:
            first = 1 if key in ticket.in_place else 0  # the tier that serves it
            depth = self._depth(key) if self._lower else 1
            while len(rooms) < depth:
                above = rooms[-1] if rooms else None
                rooms.append(room_in(self, self._tiers[len(rooms)], len(waiting), ticket.access, above))
            grants = self._grants(key, rooms[first:depth])
            if not grants:
                ticket.waiting.append(key)
                continue
            entry = self._fill(key, grants, Kind.LOAD, ticket.access, first)
            entry.leases += 1
            entry.tickets.append(ticket)
            ticket.leased.add(key)
            if self._lower:
                self._wanted[key] -= 1

    def _grants(self, key: ExpertKey, rooms: list[Room]) -> list[Grant]:
        """A slot from every room, or none at all."""
        grants: list[Grant] = []
        for room in rooms:
            grant = room.grant(key)
            if grant is None:
                for other, given in zip(rooms, grants, strict=False):
                    other.take_back(given)
                return []
            grants.append(grant)
        return grants

    def _serve_stuck(self) -> None:
        for ticket in self._stuck:
            self._advance(ticket)
        self._stuck = [ticket for ticket in self._stuck if ticket.waiting]

    def _fill(self, key: ExpertKey, grants: list[Grant], kind: Kind, access: Access, first: int = 0) -> Entry:
        """Take a granted slot in tiers `first` and below, down to the one that has `key`; order the copies up."""
        depth = first + len(grants)
        source = self._tiers[depth].entries[key] if depth < self._home.tier else None
        if source is not None and source.state is LOADING and kind is Kind.LOAD:
            self._promote(key)
        for index in range(depth - 1, first - 1, -1):
            entry = self._occupy(self._tiers[index], key, grants[index - first], access)
            blockers = [] if entry.after is None else [entry.after.copy]
            if source is not None:
                source.leases += 1  # it stays until the copy has read it
                if source.state is LOADING:
                    blockers.append(source.copy)
            elif key in self._leaving:
                blockers.append(self._leaving[key].copy)
            copy = Copy(entry.copy, key, self._home if source is None else source.place, entry.place, kind)
            self._digest = hash((self._digest, copy))
            self._orders.add(copy, blockers)
            source = entry
            entry.prefetched = kind is Kind.PREFETCH and not index
            if self._stuck and index < 2:
                self._share(entry)
        return entry

    def _occupy(self, tier: Tier, key: ExpertKey, grant: Grant, access: Access) -> Entry:
        """Enter `key` into a granted slot; `after` it has who must be home first."""
        self._next_copy += 1
        if isinstance(grant, Entry):
            entry = Entry(tier, key, grant.place, self._next_copy, self._round)
            entry.transient = grant.transient  # a staged prefetch gives way
            tier.evictions += not grant.transient
            self._evict(grant)
            if grant.dirty:
                grant.heir, entry.after = entry, grant
        else:
            entry = Entry(tier, key, tier.free.pop(), self._next_copy, self._round)
            entry.transient = grant is STAGING
        tier.staged += entry.transient
        tier.insert(entry, access)
        return entry

    def _share(self, entry: Entry) -> None:
        """Accesses that wait for a slot for this very record do not need one any more."""
        key = entry.key
        for ticket in self._stuck:
            if key in ticket.waiting and (entry.tier is self._top or key in ticket.in_place):
                ticket.waiting.remove(key)
                if entry.tier is self._top:
                    ticket.in_place -= {key}
                if self._lower:
                    self._wanted[key] -= 1
                self._join(ticket, entry)

    # -- leaving slots ------------------------------------------------------------------------------------------------

    def _evict(self, entry: Entry) -> None:
        """Take a record out of its tier, and send it home if it is dirty; its slot is the caller's to give."""
        entry.tier.remove(entry)
        if self._exclusive is not None and entry.place.tier < 2:
            self._exclusive.gone(entry)
        self.wasted_prefetches += entry.prefetched
        if entry.dirty and not self.updates_below and entry.tier is not self._top and entry.key in self._top.entries:
            self._top.entries[entry.key].dirty, entry.dirty = True, False  # the same version stays above
        if entry.dirty:
            entry.state = LEAVING
            entry.tier.write_backs += 1
            self._next_copy += 1
            entry.copy = self._next_copy
            self._leaving[entry.key] = entry
            copy = Copy(entry.copy, entry.key, entry.place, self._home, Kind.WRITE_BACK)
            self._digest = hash((self._digest, copy))
            self._orders.add(copy, ())

    def _drop(self, entry: Entry) -> None:
        """Evict for nobody: the slot becomes free, at once or when the record is home."""
        self._evict(entry)
        if not entry.dirty:
            entry.tier.free.append(entry.place)

    def _drop_if_unused(self, entry: Entry) -> None:
        if entry.transient and not entry.leases and entry.state is READY and (entry.lost or not entry.prefetched):
            self._drop(entry)

    def check(self) -> None:
        """Raise `AssertionError` if an invariant does not hold. For tests; reads everything."""
        from moetier.invariants import check  # kept apart: tests read it, runs never do

        check(self)
