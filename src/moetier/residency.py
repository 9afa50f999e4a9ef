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
from collections.abc import Iterator, Sequence

from moetier.access import Access, ExpertKey
from moetier.errors import CapacityError, ConfigError
from moetier.tiers import Copy, Entry, Kind, Place, Room, State, Ticket, Tier, TierConfig


class Residency:
    """Decides residency for `layers` x `experts` records over `tiers` (fastest first) plus home."""

    def __init__(self, tiers: Sequence[TierConfig], layers: int, experts: int):
        if not tiers:
            raise ConfigError("at least one tier is needed above home")
        self.configs, self.layers, self.experts = tuple(tiers), layers, experts
        self._tiers = [Tier(config, layers, experts) for config in tiers]
        self._top = self._tiers[0]
        self._home = Place(len(tiers), -1)
        self._copies: dict[int, Copy] = {}  # every copy not completed, ordered or blocked
        self._orders: list[Copy] = []
        self._blockers: dict[int, int] = {}  # blocked copy -> how many it waits for
        self._dependents: dict[int, list[int]] = {}  # copy -> copies that wait for it
        self._leaving: dict[int, tuple[Tier, Entry, int | None]] = {}  # write-back -> tier, record, heir copy
        self._stale: dict[ExpertKey, int] = {}  # key whose home is old until that write-back completes
        self._wanted: Counter[ExpertKey] = Counter()  # keys that wait for tier 0, and must not leave a tier below
        self._stuck: list[Ticket] = []
        self._live: dict[int, Ticket] = {}
        self._pinned: set[ExpertKey] = set()
        self.promoted: list[int] = []  # prefetches in flight that are now demanded; the mover moves them forward
        self.prefetches = self.useful_prefetches = self.wasted_prefetches = 0
        self._next_copy = self._next_ticket = 0
        self._digest = 0
        self._last = Access(0, 0, ())

    # -- the calls that a run makes, in the order it makes them ------------------------------------------------------

    def acquire(self, access: Access) -> Ticket:
        """Classify all keys at once, lease the residents, order what is missing and fits."""
        self._next_ticket += 1
        ticket = self._live[self._next_ticket] = Ticket(self._next_ticket, access)
        self._last = access
        top, layer = self._top, access.layer
        for tier in self._tiers:
            tier.policy.on_access(access)
        entries, on_hit = top.entries, top.policy.on_hit
        missing, lates = [], 0
        for key in access.keys:
            entry = entries.get(key)
            if entry is None:
                missing.append(key)
                continue
            if not entry.transient:
                on_hit(key, access)
            if entry.state is State.READY and not entry.prefetched:  # the hot path, unrolled
                entry.leases += 1
                ticket.leased.add(key)
                ticket.ready.append(key)
            else:
                lates += self._join(ticket, entry)
        top.hits[layer] += len(access.keys) - len(missing) - lates
        top.lates[layer] += lates
        if missing:
            top.misses[layer] += len(missing)
            if len(self._tiers) > 1:
                self._classify_below(missing, access)
            ticket.waiting = missing
            self._advance(ticket)
            if ticket.waiting:
                self._stuck.append(ticket)
        self._digest = hash((self._digest, access.time, layer, len(missing), lates))
        return ticket

    def release(self, ticket: Ticket, key: ExpertKey, dirty: bool = False) -> None:
        """The math is done with `key`; `dirty` if it changed the record."""
        ticket.leased.remove(key)
        entry = self._top.entries[key]
        entry.leases -= 1
        if dirty:
            entry.dirty = True
            for tier in self._tiers[1:]:  # an older version below is worthless now
                if key in tier.entries:
                    self._drop(tier, tier.entries[key])
        if entry.transient:
            self._drop_if_unused(self._top, entry)
        if not (ticket.leased or ticket.waiting):
            self._live.pop(ticket.number, None)
        if self._stuck:
            self._serve_stuck()

    def abort(self, ticket: Ticket) -> None:
        """Give up the rest of an access: after a failure, or when the caller stops early."""
        if len(self._tiers) > 1:
            self._wanted.subtract(ticket.waiting)
        ticket.waiting = []
        if ticket in self._stuck:
            self._stuck.remove(ticket)
        for key in sorted(ticket.leased):
            entry = self._top.entries[key]
            entry.leases -= 1
            if ticket in entry.tickets:
                entry.tickets.remove(ticket)
            self._drop_if_unused(self._top, entry)
        ticket.leased.clear()
        ticket.ready.clear()
        self._live.pop(ticket.number, None)
        self._serve_stuck()

    def completed(self, copy_id: int, ok: bool = True) -> None:
        """A copy ended. With `ok` false nothing arrived: whoever waits for it is told through `Ticket.failed`."""
        copy = self._copies.pop(copy_id)
        self._digest = hash((self._digest, copy_id, ok))
        if copy.kind is Kind.WRITE_BACK:
            self._wrote_back(copy, ok)
        elif ok:
            self._landed(copy)
        else:
            self._failed(copy)
        if self._dependents:
            for dependent in self._dependents.pop(copy_id, ()):
                if dependent in self._copies:
                    self._unblock(dependent)
        if self._stuck:
            self._serve_stuck()

    def take(self) -> list[Copy]:
        """The orders since the last call; demand loads before prefetches."""
        orders, self._orders = self._orders, []
        if self.prefetches:
            orders.sort(key=lambda copy: copy.kind is Kind.PREFETCH)
        return orders

    def prefetch(self, key: ExpertKey, displace: bool = False) -> bool:
        """Start loading `key` before it is demanded, into a free slot, or over a victim if `displace`."""
        if key in self._top.entries:
            return False
        depth = self._depth(key)
        rooms = [self._room(index, 1 if displace else 0, self._last) for index in range(depth)]
        offers = [room.offer(key) for room in rooms]
        if any(offer is None or offer is False for offer in offers):
            return False
        self._fill(key, depth, offers, Kind.PREFETCH, self._last)
        self._top.entries[key].prefetched = True
        self.prefetches += 1
        return True

    def cancel(self, key: ExpertKey) -> bool:
        """Undo a prefetch whose order was not taken yet and that nobody waits for."""
        entry = self._top.entries.get(key)
        if entry is None or not entry.prefetched or entry.copy not in {copy.id for copy in self._orders}:
            return False
        self._orders = [copy for copy in self._orders if copy.id != entry.copy]
        self._failed(self._copies.pop(entry.copy))
        return True

    def pin(self, key: ExpertKey) -> None:
        """Keep `key` once it is resident. Raises `CapacityError` beyond half of tier 0."""
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

    def place(self, key: ExpertKey) -> Place:
        """Where a leased key is in tier 0."""
        return Place(0, self._top.entries[key].slot)

    def residents(self, tier: int = 0) -> set[ExpertKey]:
        """Keys that are ready in a tier."""
        return {key for key, entry in self._tiers[tier].entries.items() if entry.state is State.READY}

    @property
    def busy(self) -> bool:
        """Whether a copy is ordered or in flight."""
        return bool(self._copies)

    @property
    def tickets(self) -> list[Ticket]:
        """Accesses that are not finished."""
        return list(self._live.values())

    def digest(self) -> int:
        """A number that depends on every decision so far; equal for equal inputs."""
        return self._digest

    def counters(self) -> dict[str, object]:
        """Hits, lates and misses per tier and layer, evictions, write-backs, staged loads, prefetches."""
        tiers = [
            {
                "slots": tier.config.slots,
                "policy": tier.config.policy,
                "hits": list(tier.hits),
                "lates": list(tier.lates),
                "misses": list(tier.misses),
                "evictions": tier.evictions,
                "write_backs": tier.write_backs,
                "staged": tier.staged,
            }
            for tier in self._tiers
        ]
        prefetches = {
            "issued": self.prefetches,
            "useful": self.useful_prefetches,
            "wasted": self.wasted_prefetches,
        }
        return {"tiers": tiers, "prefetches": prefetches}

    # -- serving misses -----------------------------------------------------------------------------------------------

    def _join(self, ticket: Ticket, entry: Entry) -> bool:
        """Lease an entry for a ticket; True if it is still on its way."""
        entry.leases += 1
        ticket.leased.add(entry.key)
        if entry.prefetched:
            entry.prefetched = False
            self.useful_prefetches += 1
            if entry.state is State.LOADING:
                self.promoted.append(entry.copy)
        if entry.state is State.READY:
            ticket.ready.append(entry.key)
            return False
        entry.tickets.append(ticket)
        return True

    def _classify_below(self, missing: list[ExpertKey], access: Access) -> None:
        self._wanted.update(missing)
        for tier in self._tiers[1:]:
            for key in missing:
                entry = tier.entries.get(key)
                if entry is None:
                    tier.misses[access.layer] += 1
                    continue
                counter = tier.hits if entry.state is State.READY else tier.lates
                counter[access.layer] += 1
                if not entry.transient:
                    tier.policy.on_hit(key, access)

    def _depth(self, key: ExpertKey) -> int:
        """The fastest tier that holds or awaits `key`; home if none."""
        for index in range(1, len(self._tiers)):
            if key in self._tiers[index].entries:
                return index
        return self._home.tier

    def _advance(self, ticket: Ticket) -> None:
        """Give slots to as many waiting keys as possible; the others wait for a release or a completion."""
        entries, multi = self._top.entries, len(self._tiers) > 1
        for key in [key for key in ticket.waiting if key in entries]:  # another access got it meanwhile
            ticket.waiting.remove(key)
            self._wanted[key] -= multi
            self._join(ticket, entries[key])
        rooms: list[Room] = []
        remaining: list[ExpertKey] = []
        for key in ticket.waiting:
            depth = self._depth(key)
            while len(rooms) < depth:
                rooms.append(self._room(len(rooms), len(ticket.waiting), ticket.access))
            offers = [rooms[index].offer(key) for index in range(depth)]
            if None in offers:
                remaining.append(key)
                continue
            for room, offer in zip(rooms, offers, strict=False):
                room.accept(offer)  # type: ignore[arg-type]
            if multi:
                self._wanted[key] -= 1
            entry = self._fill(key, depth, offers, Kind.LOAD, ticket.access)
            entry.leases += 1
            entry.tickets.append(ticket)
            ticket.leased.add(key)
        ticket.waiting = remaining

    def _serve_stuck(self) -> None:
        for ticket in self._stuck:
            self._advance(ticket)
        self._stuck = [ticket for ticket in self._stuck if ticket.waiting]

    def _room(self, index: int, wanted: int, access: Access) -> Room:
        """What a tier can give to a batch of misses that would displace up to `wanted` records."""
        room = Room(self._tiers[index], access)
        need = wanted - max(0, room.spare)
        if need > 0:
            room.victims = self._eligible(index, need, access)[::-1]
        return room

    def _eligible(self, index: int, need: int, access: Access) -> list[Entry]:
        """Up to `need` victims in the policy's order, the per-layer floor respected while others exist."""
        tier, floor = self._tiers[index], self._tiers[index].config.floor
        entries, pinned, wanted = tier.entries, self._pinned, self._wanted
        picked: list[Entry] = []
        below_floor: list[Entry] = []
        taken: Counter[int] = Counter()
        for key in tier.policy.victims(access):
            entry = entries[key]
            if entry.leases or entry.state is not State.READY or (pinned and key in pinned):
                continue
            if index and wanted[key] > 0:  # an access still needs it from here
                continue
            layer = key[0]
            if floor and layer != access.layer and tier.residents[layer] - taken[layer] <= floor:
                below_floor.append(entry)
                continue
            if floor:
                taken[layer] += 1
            picked.append(entry)
            if len(picked) == need:
                return picked
        return picked + below_floor[: need - len(picked)]

    def _fill(
        self, key: ExpertKey, depth: int, offers: Sequence[Entry | bool | None], kind: Kind, access: Access
    ) -> Entry:
        """Take the offered slots in tiers `depth - 1 .. 0` and order the chain of copies up to tier 0."""
        below = self._tiers[depth].entries[key] if depth < self._home.tier else None
        source = self._home if below is None else Place(depth, below.slot)
        for index in range(depth - 1, -1, -1):
            tier, offer = self._tiers[index], offers[index]
            copy_id = self._next_copy
            self._next_copy += 1
            write_back = None
            if isinstance(offer, Entry):
                slot = offer.slot
                tier.evictions += 1
                write_back = self._remove(tier, offer, heir=copy_id)
            else:
                slot = tier.free.pop()
            entry = tier.entries[key] = Entry(key, slot, copy_id, write_back)
            if offer is False:
                entry.transient = True
                tier.transients += 1
                tier.staged += 1
            else:
                tier.residents[key[0]] += 1
                tier.policy.on_insert(key, access)
            target = Place(index, slot)
            self._order(Copy(copy_id, key, source, target, kind), below, write_back)
            source, below = target, entry
        return entry

    def _order(self, copy: Copy, below: Entry | None, write_back: int | None) -> None:
        self._copies[copy.id] = copy
        self._digest = hash((self._digest, copy))
        blockers = [] if write_back is None else [write_back]
        if below is not None:
            below.leases += 1  # the source stays until the copy has read it
            if below.state is State.LOADING:
                blockers.append(below.copy)
        elif copy.key in self._stale:
            blockers.append(self._stale[copy.key])
        if not blockers:
            self._orders.append(copy)
            return
        self._blockers[copy.id] = len(blockers)
        for blocker in blockers:
            self._dependents.setdefault(blocker, []).append(copy.id)

    def _unblock(self, copy_id: int) -> None:
        self._blockers[copy_id] -= 1
        if not self._blockers[copy_id]:
            del self._blockers[copy_id]
            self._orders.append(self._copies[copy_id])

    # -- leaving slots ------------------------------------------------------------------------------------------------

    def _remove(self, tier: Tier, entry: Entry, heir: int | None) -> int | None:
        """Take a record out of its tier; its slot goes to `heir`, or is freed. Returns the write-back if it is dirty."""
        key = entry.key
        del tier.entries[key]
        if entry.transient:
            tier.transients -= 1
        else:
            tier.residents[key[0]] -= 1
            tier.policy.on_remove(key)
        if entry.prefetched:
            self.wasted_prefetches += 1
        if not entry.dirty:
            if heir is None:
                tier.free.append(entry.slot)
            return None
        entry.state = State.LEAVING
        tier.write_backs += 1
        copy_id = self._next_copy
        self._next_copy += 1
        self._leaving[copy_id] = (tier, entry, heir)
        source = Place(self._tiers.index(tier), entry.slot)
        self._stale[key] = copy_id
        copy = self._copies[copy_id] = Copy(copy_id, key, source, self._home, Kind.WRITE_BACK)
        self._digest = hash((self._digest, copy))
        self._orders.append(copy)
        return copy_id

    def _drop(self, tier: Tier, entry: Entry) -> None:
        self._remove(tier, entry, heir=None)

    def _drop_if_unused(self, tier: Tier, entry: Entry) -> None:
        if entry.transient and not entry.leases and entry.state is State.READY:
            self._drop(tier, entry)

    # -- endings of copies --------------------------------------------------------------------------------------------

    def _source_read(self, copy: Copy) -> None:
        tier = self._tiers[copy.source.tier]
        entry = tier.entries[copy.key]
        entry.leases -= 1
        self._drop_if_unused(tier, entry)

    def _landed(self, copy: Copy) -> None:
        tier = self._tiers[copy.target.tier]
        entry = tier.entries[copy.key]
        if copy.source is not self._home:
            self._source_read(copy)
        entry.state = State.READY
        entry.vacating = None
        for ticket in entry.tickets:
            ticket.ready.append(copy.key)
        entry.tickets.clear()
        if entry.transient:
            self._drop_if_unused(tier, entry)

    def _failed(self, copy: Copy) -> None:
        """Undo a load that will not arrive, and every copy that waits for it."""
        for dependent in self._dependents.pop(copy.id, ()):
            if dependent in self._copies:
                del self._blockers[dependent]
                self._failed(self._copies.pop(dependent))
        tier = self._tiers[copy.target.tier]
        entry = tier.entries.pop(copy.key)
        if copy.source is not self._home:
            self._source_read(copy)
        for ticket in entry.tickets:
            ticket.failed = copy.id
            ticket.leased.discard(copy.key)
        if entry.transient:
            tier.transients -= 1
        else:
            tier.residents[copy.key[0]] -= 1
            tier.policy.on_remove(copy.key)
        if entry.vacating is None or entry.vacating not in self._leaving:
            tier.free.append(entry.slot)

    def _wrote_back(self, copy: Copy, ok: bool) -> None:
        tier, entry, heir = self._leaving.pop(copy.id)
        if self._stale.get(copy.key) == copy.id:
            del self._stale[copy.key]
        if ok:
            if heir is None or heir not in self._copies:
                tier.free.append(entry.slot)
            return
        self._leaving[copy.id] = (tier, entry, heir)  # the slot stays taken while the heirs are undone
        for dependent in self._dependents.pop(copy.id, ()):
            if dependent in self._copies:
                del self._blockers[dependent]
                self._failed(self._copies.pop(dependent))
        del self._leaving[copy.id]
        entry.state, entry.transient = State.READY, False  # nothing is lost: the record is dirty where it was
        tier.entries[copy.key] = entry
        tier.residents[copy.key[0]] += 1
        tier.policy.on_insert(copy.key, self._last)

    def check(self) -> None:
        """Raise `AssertionError` if an invariant does not hold. For tests; reads everything."""
        from moetier.invariants import check  # kept apart: tests read it, runs never do

        check(self)

    def __iter__(self) -> Iterator[tuple[int, Entry]]:
        """(tier, entry) of every record that owns a slot, leaving ones included."""
        for index, tier in enumerate(self._tiers):
            yield from ((index, entry) for entry in tier.entries.values())
        yield from ((self._tiers.index(tier), entry) for tier, entry, _ in self._leaving.values())
