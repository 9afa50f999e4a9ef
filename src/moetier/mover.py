"""The real mover: threads that carry out copy orders and report them, nothing more.

Guarantees: workers never decide and never die; a failed copy is reported like any other end, with its exception.
Demand loads overtake prefetches. Ends are pushed to `done` under the caller's condition, so a waiter cannot miss one.
A write-back is reported when its bytes are written, all of them or with an error; what must not start before, the core
does not order before. Write-backs that were ordered are finished before `close` returns.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from moetier.arenas import DeviceArena, HostArena, HostTierArena
from moetier.errors import MoetierError, StoreError
from moetier.overlap import Busy
from moetier.stores import ExpertStore, WritableStore
from moetier.tiers import BACKGROUND, HOMEWARD, Copy, Kind

if TYPE_CHECKING:
    from moetier.timeline import Timeline


class Flight:
    """A copy under way: the parts not yet picked up, those not yet finished, and the first error.

    A write-back from a device goes over two links one after the other; `slot` is its slot in the bounce arena between.
    """

    __slots__ = ("copy", "ended", "error", "next_part", "parts", "slot", "unfinished")

    def __init__(self, copy: Copy, parts: int):
        self.copy = copy
        self.error: BaseException | None = None
        self.slot = -1
        self.ended = 0.0  # when, by `time.perf_counter`
        self.begin(parts)

    def begin(self, parts: int) -> None:
        """Start over a link, in so many parts."""
        self.parts = self.unfinished = parts
        self.next_part = 0


Work = Callable[[Flight, int], int]  # one part of a copy; its bytes


class Link:
    """A path between two neighbouring tiers: its queues, its threads, and what it moved.

    `latencies`, if it is a list, gets the seconds of every operation (one part of a copy), and `ends`, if it is one,
    the time (of `time.perf_counter`) at which every copy was through (to a GPU: enqueued).
    """

    def __init__(self, name: str, threads: int, work: Work, drains: bool = False, whole: Busy | None = None):
        self.name, self.threads, self.work, self.drains = name, threads, work, drains
        self.workers: list[threading.Thread] = []
        self.condition = threading.Condition()
        self.demand: deque[Flight] = deque()
        self.prefetch: deque[Flight] = deque()
        self.nbytes = 0
        self.thread_seconds = 0.0  # at work, summed over threads
        self.busy = Busy(whole)  # the time in which any thread was at work
        self.copies = 0
        self.operations = 0
        self.clock: Callable[[], float] | None = None  # where copies go on behind their threads
        self.latencies: list[float] | None = None
        self.ends: list[float] | None = None

    @property
    def busy_seconds(self) -> float:
        """Seconds of work, summed over threads; of a link to a GPU, seconds with a copy under way."""
        return self.thread_seconds if self.clock is None else self.clock()

    def union_seconds(self, now: float) -> float:
        """Seconds with at least one request under way, up to `now`; of a link to a GPU, of the copies that ended."""
        return self.busy.seconds(now) if self.clock is None else self.clock()


class ThreadMover:
    """Moves records home → host with a pool of readers, host ↔ device with a copier each way, and changed ones home.

    To a GPU, a demanded record is enqueued by the thread that orders it; a prefetched one by the copier thread, which
    keeps little in the queue. Both are reported when they are enqueued: see `docs/gpu.md`.

    The way home has links only where the store can be written; from a device it leads through a few bounce slots in
    host memory.
    """

    def __init__(
        self,
        store: ExpertStore,
        host: HostArena,
        device: DeviceArena | HostTierArena | None,
        done: threading.Condition,
        readers: int = 4,
        writers: int = 2,
    ):
        self._store, self._host, self._device = store, host, device
        self._done_condition = done
        self.done: deque[Flight] = deque()  # ended copies; read it holding `done`
        self.io = Busy()  # T_io: the time in which any link was busy
        self.probe: Timeline | None = None  # told of every part
        self._disk = Link("disk→host", readers, self._read, whole=self.io)
        self._h2d = Link("host→device", 1, self._copy_to_device, whole=self.io)
        self._d2h = Link("device→host", 1, self._copy_from_device, drains=True, whole=self.io)
        self._write = Link("host→disk", writers, self._write_home, drains=True, whole=self.io)
        self.links = [self._disk] if device is None else [self._disk, self._h2d, self._d2h]
        self._writable = store if isinstance(store, WritableStore) else None
        self._bounce: HostArena | None = None
        self._bounce_free: list[int] = []
        self._bounce_condition = threading.Condition()
        if self._writable is not None:
            self.links.append(self._write)
            if device is not None:
                self._bounce = HostArena(writers + 1, store.slot_nbytes, host.page_locked)
                self._bounce_free = list(range(writers + 1))
        self._home = 1 if device is None else 2
        self._enqueues = isinstance(device, DeviceArena) and host.page_locked  # else enqueueing a copy takes as long
        if isinstance(device, DeviceArena):
            self._h2d.clock = device.busy_seconds
        self._threads: list[threading.Thread] = []
        self._pid: int | None = None
        self._closed: set[Link] = set()

    def start(self, orders: Iterable[Copy]) -> None:
        """Queue orders. Threads start with the first one."""
        if self._pid != os.getpid():
            self._launch()
        for copy in orders:
            if copy.kind in HOMEWARD:
                self._start_write_back(copy)
                continue
            from_home = copy.source.tier == self._home
            link = self._disk if from_home else self._d2h if copy.kind is Kind.DEMOTE else self._h2d
            flight = Flight(copy, self._store.segments(copy.key) if from_home else 1)
            if link is self._h2d and self._enqueues and copy.kind not in BACKGROUND:
                self._enqueue(flight)
            else:
                self._queue(link, flight, copy.kind in BACKGROUND)

    def _start_write_back(self, copy: Copy) -> None:
        if self._writable is None:
            flight = Flight(copy, 0)
            flight.error = StoreError(f"{copy.key}: this store is read-only, a changed expert cannot be written back")
            self._finish(flight)
        elif self._device is not None and copy.source.tier == 0:
            self._queue(self._d2h, Flight(copy, 1), copy.kind in BACKGROUND)
        else:
            self._queue(self._write, Flight(copy, self._store.segments(copy.key)), copy.kind in BACKGROUND)

    def _queue(self, link: Link, flight: Flight, prefetch: bool = False) -> None:
        with link.condition:
            (link.prefetch if prefetch else link.demand).append(flight)
            link.condition.notify(min(flight.parts, link.threads))

    def _enqueue(self, flight: Flight) -> None:
        """Hand a copy to the device, and report it: events order the rest, so that no thread has to wait for it."""
        begin = time.perf_counter()
        nbytes = 0
        try:
            nbytes = self._copy_to_device(flight, 0)
        except BaseException as error:
            flight.error = error
        probe = self.probe
        if probe is not None:
            probe.part(self._h2d.name, flight.copy, 0, begin, time.perf_counter(), nbytes)
        with self._h2d.condition:
            self._h2d.nbytes += nbytes
            self._h2d.operations += 1
            self._h2d.copies += 1
            if self._h2d.ends is not None:
                self._h2d.ends.append(time.perf_counter())
        self._finish(flight)

    def clocks(self) -> tuple[float, tuple[float, ...]]:
        """T_io so far, and the busy seconds of each link, both unions.

        The copies of a GPU have a clock of their own; with them T_io is a lower bound.
        """
        now = time.perf_counter()
        links = tuple(link.union_seconds(now) for link in self.links)
        return max(self.io.seconds(now), *links), links

    def promote(self, copy_ids: Iterable[int]) -> None:
        """Treat queued background copies as demanded ones from now on."""
        wanted = set(copy_ids)
        for link in self.links:
            with link.condition:
                for flight in [flight for flight in link.prefetch if flight.copy.id in wanted]:
                    link.prefetch.remove(flight)
                    link.demand.append(flight)

    def withdraw(self, copy_ids: Iterable[int]) -> list[int]:
        """Drop those of the copies that nobody has begun, and say which. They are not reported any more."""
        unwanted, withdrawn = set(copy_ids), []
        for link in self.links:
            with link.condition:
                for flight in [flight for flight in link.prefetch if flight.copy.id in unwanted]:
                    if flight.next_part == 0:
                        link.prefetch.remove(flight)
                        withdrawn.append(flight.copy.id)
        return withdrawn

    def close(self) -> None:
        """Stop the threads: loads after the copies they are in, write-backs when all that were ordered are done."""
        for link in self.links:
            with link.condition:
                self._closed.add(link)
                link.condition.notify_all()
            if self._pid == os.getpid():  # a link feeds the one after it, so they end in order
                for thread in link.workers:
                    thread.join()
        self._threads.clear()
        if self._bounce is not None:
            self._bounce.close()

    def _launch(self) -> None:
        if self._pid is not None:
            raise MoetierError(
                "this process was forked from one that uses moetier; load the model in the child instead"
            )
        if self._closed:
            raise MoetierError("the expert cache is closed")
        self._pid = os.getpid()
        for link in self.links:
            for number in range(link.threads):
                name = f"moetier {link.name} {number}"
                thread = threading.Thread(target=self._run, args=(link,), name=name, daemon=True)
                thread.start()
                link.workers.append(thread)
                self._threads.append(thread)

    def _run(self, link: Link) -> None:
        while True:
            with link.condition:
                while not (link.demand or link.prefetch or link in self._closed):
                    link.condition.wait()
                # a record half written is worse than an old one: the last link finishes what is in the background too
                left = link.demand or (link.prefetch if link is self._write else None)
                if link in self._closed and not (link.drains and left):
                    return
                queue = link.demand or link.prefetch
                flight = queue[0]
                part = flight.next_part
                flight.next_part += 1
                if flight.next_part >= flight.parts:
                    queue.popleft()
            begin = time.perf_counter()
            link.busy.begin(begin)
            nbytes = 0
            try:
                if flight.error is None:  # after a failed part the rest is not worth moving
                    nbytes = link.work(flight, part)
            except BaseException as error:
                flight.error = error
            elapsed = time.perf_counter() - begin
            link.busy.end(begin + elapsed)
            probe = self.probe
            if probe is not None:
                probe.part(link.name, flight.copy, part, begin, begin + elapsed, nbytes)
            with link.condition:
                link.nbytes += nbytes
                link.thread_seconds += elapsed
                link.operations += 1
                if link.latencies is not None:
                    link.latencies.append(elapsed)
                flight.unfinished -= 1
                ended = flight.unfinished == 0
                link.copies += ended
                if ended and link.ends is not None:
                    link.ends.append(begin + elapsed)
            flight.ended = begin + elapsed
            if ended and link is self._d2h and flight.copy.kind in HOMEWARD and flight.error is None:
                flight.begin(self._store.segments(flight.copy.key))
                self._queue(self._write, flight)  # it holds a bounce slot by now: no more waiting behind others
            elif ended:
                self._finish(flight)

    def _finish(self, flight: Flight) -> None:
        if flight.slot >= 0:
            with self._bounce_condition:
                self._bounce_free.append(flight.slot)
                self._bounce_condition.notify()
        with self._done_condition:
            self.done.append(flight)
            self._done_condition.notify_all()

    # -- work: one part of a copy --------------------------------------------------------------------------------------

    def _read(self, flight: Flight, part: int) -> int:
        copy, key = flight.copy, flight.copy.key
        nbytes = self._store.layout(key.layer).nbytes
        self._host.wait_unread(copy.target.slot)
        into = self._host.memory(copy.target.slot, self._store.phase(key), nbytes)
        return self._store.read(key, part, into)

    def _copy_to_device(self, flight: Flight, part: int) -> int:
        assert self._device is not None
        copy, key = flight.copy, flight.copy.key
        nbytes = self._store.layout(key.layer).nbytes
        source = self._host.record(copy.source.slot, self._store.phase(key), nbytes)
        if isinstance(self._device, DeviceArena):
            behind = copy.kind in BACKGROUND or not self._enqueues
            fill = self._device.fill_behind if behind else self._device.fill
            self._host.hold(copy.source.slot, fill(copy.target.slot, source))
        else:
            self._device.fill(copy.target.slot, source)
        return nbytes

    def _copy_from_device(self, flight: Flight, part: int) -> int:
        assert self._device is not None
        copy, key = flight.copy, flight.copy.key
        if copy.kind is Kind.DEMOTE:
            nbytes = self._store.layout(key.layer).nbytes
            self._host.wait_unread(copy.target.slot)
            self._device.save(copy.source.slot, self._host.record(copy.target.slot, self._store.phase(key), nbytes))
            return nbytes
        assert self._bounce is not None
        with self._bounce_condition:
            while not self._bounce_free:
                self._bounce_condition.wait()
            flight.slot = self._bounce_free.pop()
        nbytes = self._store.layout(key.layer).nbytes
        self._device.save(copy.source.slot, self._bounce.record(flight.slot, self._store.phase(key), nbytes))
        return nbytes

    def _write_home(self, flight: Flight, part: int) -> int:
        assert self._writable is not None
        key = flight.copy.key
        arena, slot = (self._host, flight.copy.source.slot) if flight.slot < 0 else (self._bounce, flight.slot)
        assert arena is not None
        nbytes = self._store.layout(key.layer).nbytes
        return self._writable.write(key, part, arena.memory(slot, self._store.phase(key), nbytes))
