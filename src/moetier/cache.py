"""The expert cache: `stream(access)` yields leases on experts as they become ready. The one hot-path primitive.

It joins the residency core (decisions) with the mover (bytes) under one lock that is never held while bytes move. The
thread that waits for an expert is the one that tells the core what has arrived; there is no dispatcher.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

from moetier.access import Access, ExpertKey
from moetier.arenas import DeviceArena, HostArena, HostTierArena
from moetier.errors import CapacityError, MoetierError
from moetier.lease import Lease, WritableLease
from moetier.mover import ThreadMover
from moetier.overlap import Clocks
from moetier.residency import Residency
from moetier.stores import ExpertStore
from moetier.tiers import HOMEWARD, Kind, Ticket

if TYPE_CHECKING:
    from moetier.eventlog import Recorder
    from moetier.pinning import WarmPinning
    from moetier.prefetch_engine import Prefetching
    from moetier.profile import Profile
    from moetier.stream_ahead import Ahead
    from moetier.timeline import AccessProbe, Timeline


class ExpertCache:
    """Experts of one store, cached in a host arena and, if given, a device arena above it."""

    def __init__(
        self,
        store: ExpertStore,
        core: Residency | Recorder,
        host: HostArena,
        device: DeviceArena | HostTierArena | None = None,
        readers: int = 4,
    ):
        self.store, self.core, self.host, self.device = store, core, host, device
        self._condition = threading.Condition()  # re-entrant: the mover may end a copy at once
        self.readers = readers
        self.mover = ThreadMover(store, host, device, self._condition, readers)
        self.pinning: WarmPinning | None = None  # told of every access, with the core's lock held
        self.profile: Profile | None = None  # counts every access
        self.probe: Timeline | None = None  # records a timeline of every access
        self.ahead: Ahead | None = None  # starts the next layer of a prefill, or of a training step
        self._prefetching: Prefetching | None = None
        self._errors: dict[int, BaseException] = {}
        self._unsaved: dict[ExpertKey, BaseException] = {}  # changed records that could not be written home
        self._owners: dict[int, int] = {}  # live ticket -> thread
        self._to_foresee: dict[int, Ticket] = {}  # thread -> its access, if the next ones are to be foreseen
        self._closed = False
        self._time = 0
        self.wait_seconds = 0.0  # T_wait: nothing to compute, an expert is on its way
        self.exposed_seconds = 0.0  # of it: a link was busy
        self.compute_seconds = 0.0  # T_compute: the caller works on a lease (on a GPU: launches)
        self.decide_seconds = 0.0  # in the core and the queues

    def stream(self, access: Access) -> Iterator[Lease]:
        """Yield a lease on every expert of the access exactly once, in the order they become ready.

        Residents come first, so their math overlaps the loads of the others. A lease ends when the next one is asked
        for. Raises `StoreError` if an expert cannot be read; the cache stays usable.
        """
        for (lease,) in self.batches(access, limit=1):
            yield lease

    def batches(
        self, access: Access, limit: int | None = None, aside: bool = False
    ) -> Generator[list[Lease], None, None]:
        """Like `stream`, but yield all leases that are ready at once (at most `limit`): fewer, larger steps of math.

        While experts wait for a slot (waves), leases come one by one, so that each slot is refilled as soon as its
        expert is done. Leases in place come in batches of their own, when the device has all it can have. With `aside`
        the caller may call `foresee` while others work on its leases; what it leaves is done before it has to wait.
        """
        clock = time.perf_counter
        begin = clock()
        ticket, hits, foresee = self._open(access)
        probe = None if self.probe is None else self.probe.opened(ticket.access, ticket.ready, begin)
        idle = hits == len(access.keys)  # the links have nothing to do: now is the time
        if foresee:
            self._to_foresee[threading.get_ident()] = ticket
        held: list[Lease] = []
        try:
            while True:
                if foresee and ((idle and not aside) or not ticket.ready):
                    self.foresee()
                with self._condition:
                    for lease in held:
                        self._release(ticket, lease)
                    held = []
                    if not ticket.ready:
                        self.decide_seconds += clock() - begin
                        if ticket.done:
                            return
                        begin = self._timed_wait(ticket, probe)
                    most = self._device_first(ticket, limit) if ticket.in_place else limit
                    count = 1 if ticket.waiting else min(most or len(ticket.ready), len(ticket.ready))
                    held = [self._lease(ticket, ticket.ready.popleft()) for _ in range(count)]
                now = clock()
                self.decide_seconds += now - begin
                yield held
                begin = clock()
                self.compute_seconds += begin - now
                if probe is not None:
                    probe.computed(now, begin, [lease.key for lease in held])
        finally:
            self._to_foresee.pop(threading.get_ident(), None)
            with self._condition:
                self._owners.pop(ticket.number, None)
                if not self._owners:
                    self._errors.clear()  # nobody is left to be told
                for lease in held:
                    if self.device is not None:
                        self._mark_used(self.device, lease)
                    if lease.dirty or lease.saved:  # half done or not: what is in the slot is the newest there is
                        self.core.release(ticket, lease.key, lease.dirty, lease.saved)
                stopped = bool(held) or not ticket.done
                if not ticket.done:
                    self.core.abort(ticket)
                if stopped:
                    self._start_orders()
                    self._condition.notify_all()
                self._count(ticket.access, hits)
            if probe is not None:
                probe.closed()

    def _open(self, access: Access) -> tuple[Ticket, int, bool]:
        with self._condition:
            if self._closed:
                raise MoetierError("the expert cache is closed")
            if self.mover.done:  # what failed for an earlier access must not fail this one
                self._drain()
            if access.writes and self.core.writing.throttled:
                self._throttle()
            if access.time <= self._time:  # another thread was faster: time must not run backwards for the policies
                access = replace(access, time=self._time + 1)
            self._time = access.time
            foresee = self._prefetching is not None and self._prefetching.begin(access, time.perf_counter())
            ticket = self.core.acquire(access)
            hits = len(ticket.ready)
            self._owners[ticket.number] = threading.get_ident()
            if self.ahead is not None:
                self.ahead.demanded(access)
            self._start_orders()
            return ticket, hits, foresee

    def foresee(self) -> None:
        """Prefetch for what comes after this thread's access, once. Predicts without the lock: it may take long."""
        ticket = self._to_foresee.get(threading.get_ident())
        if ticket is None or ticket.waiting:
            return
        del self._to_foresee[threading.get_ident()]
        assert self._prefetching is not None
        access, begin = ticket.access, time.perf_counter()
        wanted = self._prefetching.predict(access)
        if wanted:
            with self._condition:
                if self._prefetching.issue(wanted, time.perf_counter()):
                    self._start_orders()
        self._prefetching.asked(time.perf_counter() - begin)

    @property
    def prefetching(self) -> Prefetching | None:
        """What prefetches beside the accesses; None: nothing."""
        return self._prefetching

    @prefetching.setter
    def prefetching(self, prefetching: Prefetching | None) -> None:
        self._prefetching = prefetching
        if prefetching is not None:
            prefetching.withdraw = self.mover.withdraw

    def stats(self) -> dict[str, Any]:
        """Counters of the core, bytes and time per link, and where the time of the streams went (seconds)."""
        with self._condition:
            counters: dict[str, Any] = dict(self.core.counters())
        now = time.perf_counter()
        counters["links"] = {
            link.name: {
                "bytes": link.nbytes,
                "busy_seconds": link.busy_seconds,
                "union_seconds": link.union_seconds(now),
                "copies": link.copies,
            }
            for link in self.mover.links
        }
        counters["seconds"] = {
            "wait": self.wait_seconds,
            "exposed": self.exposed_seconds,
            "io": self.mover.io.seconds(now),
            "compute": self.compute_seconds,
            "decide": self.decide_seconds,
        }
        if self._prefetching is not None:
            with self._condition:
                counters["prefetches"] = self._prefetching.report()
        if self.pinning is not None:
            counters["pinning"] = self.pinning.report()
        counters["writebacks"]["dirty_bytes"] = self.dirty_nbytes
        return counters

    @property
    def dirty_nbytes(self) -> int:
        """Bytes of the records whose newest version is not home."""
        with self._condition:
            return sum(self.store.layout(key.layer).nbytes for key in self.core.writing.dirty)

    def clocks(self) -> Clocks:
        """Where the time went so far, in seconds; a window is the difference of two readings."""
        times = (self.wait_seconds, self.exposed_seconds, self.compute_seconds, self.decide_seconds)
        return Clocks(0.0, *times, *self.mover.clocks())

    def holding(self, keys: Sequence[ExpertKey], all_tiers: bool = False) -> list[bool]:
        """Which of these are in the fastest tier, or in any, or on their way there."""
        with self._condition:
            return self.core.holding(keys, all_tiers)

    def prefetch(self, keys: Iterable[ExpertKey], displace: bool = False, most: int | None = None) -> int:
        """Begin to load those of `keys` that are not there, in this order, at most `most`; how many loads began.

        Into free slots, or with `displace` also over what the policy would evict; see `Residency.prefetch`.
        """
        began = 0
        with self._condition:
            if self._closed:
                raise MoetierError("the expert cache is closed")
            self._drain()  # a slot whose record has been written home takes the load that waits for it
            for key in keys:
                if began == most:
                    break
                began += not self.core.holds(key) and self.core.prefetch(key, displace)
            self._start_orders()
        return began

    def pin(self, keys: Iterable[ExpertKey], instead_of: Iterable[ExpertKey] = ()) -> None:
        """Keep `keys` in the fastest tier once they are there, and let `instead_of` leave again.

        Raises `CapacityError` beyond half of the tier.
        """
        with self._condition:
            for key in instead_of:
                self.core.unpin(key)
            for key in keys:
                self.core.pin(key)
            self._start_orders()

    def settle(self) -> None:
        """Wait until every copy ordered so far has ended: loads that nobody waits for, and write-backs.

        Raises what a write-back that failed met; its record stays where it was, changed. Failed reads are not raised:
        who wanted them was told, and nothing is lost.
        """
        with self._condition:
            while True:
                self._drain()
                if not self.core.busy:
                    break
                self._condition.wait()
            failed, self._unsaved = self._unsaved, {}
        for error in failed.values():
            raise error

    def flush(self) -> None:
        """Write every record that is changed now home; all of them stay, clean.

        Raises `StoreError` for the first that cannot be written; it and its like stay changed, and the next flush tries
        again. Records that others change meanwhile may or may not be included.
        """
        with self._condition:
            self._unsaved = {}  # they are tried again
            self.core.flush()
            self._start_orders()
            while True:
                self._drain()
                if not self.core.writing.flushing:
                    break
                if self._closed:
                    raise MoetierError("the expert cache is closed")
                if not self.core.busy and set(self._owners.values()) == {threading.get_ident()}:
                    raise MoetierError("a flush waits for records that this thread leases for writing; end that stream")
                self._condition.wait()
            failed, self._unsaved = self._unsaved, {}
        for error in failed.values():
            raise error

    def close(self) -> None:
        """Stop the threads and close the files. Streams asked for afterwards raise."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()
        self.mover.close()
        if isinstance(self.device, DeviceArena):
            self.device.close()
        self.store.close()
        self.host.close()

    def __enter__(self) -> ExpertCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- all below: holding the condition -----------------------------------------------------------------------------

    def _start_orders(self) -> None:
        orders = self.core.take()
        if orders:
            if self._prefetching is not None:
                self._prefetching.orders(orders, time.perf_counter())
            self.mover.start(orders)
        if self.core.promoted:
            self.mover.promote(self.core.promoted)
            self.core.promoted.clear()
        if self.core.obsolete:
            withdrawn = self.mover.withdraw(self.core.obsolete)
            self.core.obsolete.clear()
            for copy_id in withdrawn:
                self.core.cancelled(copy_id)
            if withdrawn:  # their slots may serve somebody
                self._start_orders()

    def _count(self, access: Access, hits: int) -> None:
        if self.profile is not None:
            self.profile.add(access)
        if self.pinning is not None:
            self.pinning.observe(access, hits)
            self._start_orders()  # what is unpinned may serve an access that waits for a slot

    def _mark_used(self, device: DeviceArena | HostTierArena, lease: Lease) -> None:
        """What is queued by now uses the slot; and after a change in place, the older copy that the device gives up."""
        if not lease.in_place:
            device.used(lease.slot)
        elif (lease.dirty or lease.saved) and self.core.holds(lease.key):
            device.used(self.core.place(lease.key).slot)

    def _release(self, ticket: Ticket, lease: Lease) -> None:
        if self.device is not None:
            self._mark_used(self.device, lease)
        if ticket.access.writes:
            self.core.release(ticket, lease.key, lease.dirty, lease.saved)
        else:
            self.core.release(ticket, lease.key)
        if self.ahead is not None and not ticket.waiting:
            self.ahead.released(ticket.access)
        self._start_orders()
        if len(self._owners) > 1:  # another stream may wait for this slot
            self._condition.notify_all()

    def _drain(self) -> None:
        while True:
            while self.mover.done:
                flight = self.mover.done.popleft()
                ok = flight.error is None
                self.core.completed(flight.copy.id, ok)
                if self._prefetching is not None:
                    self._prefetching.ended(flight.copy, ok, flight.ended)
                if flight.copy.kind in HOMEWARD:
                    if flight.error is None:
                        self._unsaved.pop(flight.copy.key, None)
                    else:
                        self._unsaved[flight.copy.key] = flight.error
                if flight.error is not None and flight.copy.kind not in (Kind.PREFETCH, Kind.CLEAN):  # nobody waits
                    self._errors[flight.copy.id] = flight.error
            self._start_orders()
            if not self.mover.done:  # a copy that is only enqueued ends while it is started
                return

    def _throttle(self) -> None:
        """Before more records change: wait for writes that run while more are dirty than there may be."""
        begin = time.perf_counter()
        while self.core.writing.throttled and not self._closed:
            self._condition.wait()
            self._drain()
        self.wait_seconds += time.perf_counter() - begin

    def _wait(self, ticket: Ticket) -> None:
        """Until the ticket has a ready expert."""
        while True:
            self._drain()
            if ticket.failed is not None:
                raise self._error(ticket.failed)
            if ticket.ready:
                return
            if self._closed:
                raise MoetierError("the expert cache is closed")
            if not self.core.busy and set(self._owners.values()) == {threading.get_ident()}:
                raise CapacityError(
                    "all slots are leased by streams that this thread left open; finish them first, or give more slots",
                    minimum_slots=self.core.configs[0].slots + len(ticket.waiting),
                )
            self._condition.wait()

    def _timed_wait(self, ticket: Ticket, probe: AccessProbe | None) -> float:
        """`_wait`, accounted for; returns when it ended."""
        begin = time.perf_counter()
        io = self.mover.io.seconds(begin)
        self._wait(ticket)
        end = time.perf_counter()
        exposed = min(self.mover.io.seconds(end) - io, end - begin)
        self.wait_seconds += end - begin
        self.exposed_seconds += exposed
        if probe is not None:
            probe.waited(begin, end, exposed)
        return end

    def _error(self, copy_id: int) -> BaseException:
        error = self._errors.get(copy_id)
        if error is None:  # it waited for another: the last one that failed
            error = next(reversed(self._errors.values()), None)
        return error if error is not None else MoetierError(f"copy {copy_id} was not made because one before it failed")

    def _device_first(self, ticket: Ticket, limit: int | None) -> int:
        """Bring the ready experts that the device has to the front; how many of the front to lease at once.

        The device works behind the caller's back, so it gets its share before the CPU begins. An expert that the CPU
        computes keeps the caller busy: while others are on their way, it looks after them between any two.
        """
        if self.mover.done:
            self._drain()
        ready, in_place = ticket.ready, ticket.in_place
        here = [key for key in ready if key in in_place]
        if len(here) == len(ready):
            return min(limit or len(ready), len(ready) if len(ticket.leased) == len(ready) else 1)
        ticket.ready = deque([key for key in ready if key not in in_place] + here)
        return min(limit or len(ready), len(ready) - len(here))

    def _lease(self, ticket: Ticket, key: ExpertKey) -> Lease:
        place, layout = self.core.place(key, ticket), self.store.layout(key.layer)
        kind = WritableLease if ticket.access.writes else Lease
        if self.device is not None and place.tier == 0:
            return kind(key, self.device.views(place.slot, layout), place.slot)
        fields = self.host.views(place.slot, layout, self.store.phase(key))
        return kind(key, fields, place.slot, self.device is not None)
