"""Writing changed records home: when (`WRITEBACKS`), and how they are *cleaned*: written while they stay in their slot.

A record leaves only when it is home; that is the core's business. Here records are written before anybody needs their
slot, the longest changed first, a few at a time. A write is a copy like others: the record keeps its slot, and can be
used meanwhile, but not changed. An access that `writes` gets it when the write is over, and what such an access holds
is not written. So a write never sees a record change, and the last write of a record is its newest version.
Part of the residency core: uses its books, decides like it, knows no bytes and no time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from moetier.access import ExpertKey
from moetier.errors import ConfigError, MoetierError
from moetier.registry import build
from moetier.tiers import READY, Copy, Entry, Kind, Ticket

if TYPE_CHECKING:
    from moetier.residency import Residency

DEPTH = 4  # records being cleaned at once: enough for the writers, few enough to leave at once what a demand needs


class WriteBackPolicy(Protocol):
    """When a changed record is written home although nobody needs its slot.

    Constructed as `Policy(slots, **parameters)` with the slots of tier 0. Accesses are numbered from 1.
    """

    def due(self, since: int, now: int, dirty: int) -> bool:
        """Whether to write the record that was changed first, in access `since`.

        `now` is the running access, `dirty` how many changed records nobody writes yet. Pure; asked after every call of
        the core while records are dirty, longest changed first, until it says no.
        """


class OnEviction:
    """Only when the slot is needed: the fewest writes."""

    def __init__(self, slots: int):
        pass

    def due(self, since: int, now: int, dirty: int) -> bool:
        """Never."""
        return False


class Periodic:
    """What was changed before the last multiple of `every` accesses; and the oldest beyond a `share` of the slots."""

    def __init__(self, slots: int, every: int = 256, share: float = 0.5):
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ConfigError(f"periodic: every must be a whole number of accesses, at least 1, got {every!r}")
        if not 0 <= share <= 1:
            raise ConfigError(f"periodic: share must be between 0 and 1, got {share!r}")
        self._every, self._most = every, share * slots

    def due(self, since: int, now: int, dirty: int) -> bool:
        """By age, or because there are too many."""
        return since <= now - now % self._every or dirty > self._most


class WriteThrough:
    """As soon as its user has released it: the least to lose, and the least to do at a commit."""

    def __init__(self, slots: int):
        pass

    def due(self, since: int, now: int, dirty: int) -> bool:
        """Always."""
        return True


WRITEBACKS: dict[str, Callable[..., WriteBackPolicy]] = {
    "evict": OnEviction,
    "periodic": Periodic,
    "writethrough": WriteThrough,
}


def make_writeback(text: str, slots: int) -> WriteBackPolicy:
    """Build a policy by registry name, `"periodic(every=64)"`; `ConfigError` for what there is not."""
    policy: WriteBackPolicy = build("write-back policy", text, WRITEBACKS, slots)
    return policy


class WriteBacks:
    """The changed records of a core. `limit` bounds those that nobody writes yet, whatever the policy says."""

    def __init__(self, core: Residency, policy: str, limit: int | None):
        if limit is not None and limit < 1:
            raise ConfigError(f"dirty_limit must be at least 1 record, got {limit}")
        self.core, self.name, self.limit = core, policy, limit
        self.policy = make_writeback(policy, core.configs[0].slots)
        self.dirty: dict[ExpertKey, int] = {}  # home is out of date -> access of the first change; the oldest first
        self.running: dict[ExpertKey, int] = {}  # being cleaned -> the copy
        self.flushing: set[ExpertKey] = set()  # to be written whatever the policy says
        self.failed: set[ExpertKey] = set()  # could not be written; not tried again until changed, flushed or evicted
        self.updates = self.written = self.cleaned = self.failures = 0

    # -- what happens to records ---------------------------------------------------------------------------------------

    def changed(self, ticket: Ticket, key: ExpertKey, saved: bool) -> None:
        """A user has changed a record, and home as well if it is `saved`.

        Raises `MoetierError` if its access did not say that it would.
        """
        if not ticket.access.writes:
            raise MoetierError(f"{key} was changed by an access that only reads; give its Access writes=True")
        if self.core.updates_below and key not in ticket.in_place:
            raise MoetierError(
                f"{key} was changed in tier 0, but updates are made in tier 1; give its Access Part.UPDATE"
            )
        self.updates += 1
        self.failed.discard(key)
        if saved:
            self.dirty.pop(key, None)
            self.flushing.discard(key)
        else:
            self.dirty.setdefault(key, self.core._next_ticket)

    def home(self, key: ExpertKey) -> None:
        """The newest version is home."""
        del self.dirty[key]
        self.flushing.discard(key)
        self.failed.discard(key)
        self.written += 1

    def not_home(self, key: ExpertKey) -> None:
        """It could not be written, and is as dirty as before."""
        self.failures += 1
        self.flushing.discard(key)
        self.failed.add(key)

    def ended(self, copy: Copy, ok: bool) -> None:
        """A record was cleaned, or not: those who will change it can have it now."""
        core, key = self.core, copy.key
        del self.running[key]
        entry = core._tiers[copy.source.tier].entries[key]
        entry.leases -= 1
        if ok:
            entry.dirty = False
            self.cleaned += 1
            self.home(key)
        else:
            self.not_home(key)
        for tier in core._tiers:
            waiting = tier.entries.get(key)
            if waiting is not None and waiting.state is READY:
                self.tell(waiting)

    # -- who may have a record while it is written ---------------------------------------------------------------------

    def hold(self, ticket: Ticket) -> None:
        """Of an access that writes, just begun: what is being written becomes ready later, and is written first."""
        for key in [key for key in ticket.ready if key in self.running]:
            ticket.ready.remove(key)
            self.core._entry(ticket, key).tickets.append(ticket)
            self.core.promoted.append(self.running[key])

    def tell(self, entry: Entry) -> None:
        """A record is there, or written: hand it to those who wait and may have it."""
        waiting, held = entry.tickets, entry.key in self.running
        entry.tickets = [ticket for ticket in waiting if ticket.access.writes] if held else []
        for ticket in waiting:
            if not (held and ticket.access.writes):
                ticket.ready.append(entry.key)

    # -- cleaning ------------------------------------------------------------------------------------------------------

    def clean(self, key: ExpertKey) -> bool:
        """Order that a record is written home and stays. False if it is not dirty, or somebody is at it."""
        core = self.core
        if key not in self.dirty or key in self.running or key in core._leaving:
            return False
        if any(ticket.access.writes and key in ticket.leased for ticket in core._live.values()):
            return False
        entry = next(entry for tier in core._tiers if (entry := tier.entries.get(key)) is not None and entry.dirty)
        if entry.transient:  # goes home when it leaves, which is soon
            return False
        core._next_copy += 1
        copy = Copy(core._next_copy, key, entry.place, core._home, Kind.CLEAN)
        core._digest = hash((core._digest, copy))
        entry.leases += 1
        self.running[key] = copy.id
        core._orders.add(copy, ())
        return True

    def go(self) -> None:
        """Order what is due, as far as there is room. Called when anything has happened while records are dirty."""
        room = DEPTH - len(self.running)
        if room <= 0:
            return
        now, leaving = self.core._next_ticket, self.core._leaving
        left = len(self.dirty) - len(self.running) - len(leaving)
        limit = left if self.limit is None else self.limit
        for key, since in self.dirty.items():
            if key in self.running or key in leaving:
                continue
            if key in self.failed:
                left -= 1
                continue
            if not (left > limit or key in self.flushing or self.policy.due(since, now, left)):
                return
            left -= 1
            if self.clean(key):
                room -= 1
                if not room:
                    return

    def flush(self) -> None:
        """Everything that is dirty now is due, what failed before too."""
        self.flushing = set(self.dirty)
        self.failed.clear()
        self.go()

    @property
    def throttled(self) -> bool:
        """Whether more is dirty than the limit allows, and less will be when a write that runs has ended."""
        return self.limit is not None and len(self.dirty) > self.limit and bool(self.running or self.core._leaving)

    def counters(self) -> dict[str, object]:
        """What is dirty, in records; what was written. `amplification`: record writes ÷ record updates."""
        return {
            "policy": self.name,
            "limit": self.limit,
            "dirty": len(self.dirty),
            "updates": self.updates,
            "written": self.written,
            "cleaned": self.cleaned,  # of these: stayed
            "failed": self.failures,
            "amplification": self.written / self.updates if self.updates else 0.0,
        }
