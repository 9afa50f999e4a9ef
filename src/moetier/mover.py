"""The real mover: threads that carry out copy orders and report them, nothing more.

Guarantees: workers never decide and never die; a failed copy is reported like any other end, with its exception.
Demand loads overtake prefetches. Ends are pushed to `done` under the caller's condition, so a waiter cannot miss one.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Iterable

from moetier.access import ExpertKey
from moetier.arenas import DeviceArena, HostArena
from moetier.errors import MoetierError, StoreError
from moetier.stores import ExpertStore
from moetier.tiers import Copy, Kind


class Flight:
    """A copy under way: the parts not yet picked up, those not yet finished, and the first error."""

    __slots__ = ("copy", "error", "next_part", "parts", "unfinished")

    def __init__(self, copy: Copy, parts: int):
        self.copy = copy
        self.parts = parts
        self.next_part = 0
        self.unfinished = parts
        self.error: BaseException | None = None


class Link:
    """A path between two neighbouring tiers: its queues, its threads, and what it moved."""

    def __init__(self, name: str, threads: int):
        self.name = name
        self.threads = threads
        self.condition = threading.Condition()
        self.demand: deque[Flight] = deque()
        self.prefetch: deque[Flight] = deque()
        self.nbytes = 0
        self.busy_seconds = 0.0  # summed over threads
        self.copies = 0


class ThreadMover:
    """Moves records home → host with a pool of readers, and host → device with one copier."""

    def __init__(
        self,
        store: ExpertStore,
        host: HostArena,
        device: DeviceArena | None,
        done: threading.Condition,
        readers: int = 4,
    ):
        self._store, self._host, self._device = store, host, device
        self._done_condition = done
        self.done: deque[Flight] = deque()  # ended copies; read it holding `done`
        self._disk = Link("disk→host", readers)
        self._h2d = Link("host→device", 1)
        self.links = [self._disk] if device is None else [self._disk, self._h2d]
        self._home = 1 if device is None else 2
        self._threads: list[threading.Thread] = []
        self._pid: int | None = None
        self._closed = False

    def start(self, orders: Iterable[Copy]) -> None:
        """Queue orders. Threads start with the first one."""
        if self._pid != os.getpid():
            self._launch()
        for copy in orders:
            if copy.kind is Kind.WRITE_BACK:
                flight = Flight(copy, 0)
                flight.error = StoreError(
                    f"{copy.key}: this store is read-only, a changed expert cannot be written back"
                )
                self._finish(flight)
                continue
            from_home = copy.source.tier == self._home
            link = self._disk if from_home else self._h2d
            flight = Flight(copy, self._store.segments(copy.key) if from_home else 1)
            with link.condition:
                (link.prefetch if copy.kind is Kind.PREFETCH else link.demand).append(flight)
                link.condition.notify(min(flight.parts, link.threads))

    def promote(self, copy_ids: Iterable[int]) -> None:
        """Treat queued prefetches as demand loads from now on."""
        wanted = set(copy_ids)
        for link in self.links:
            with link.condition:
                for flight in [flight for flight in link.prefetch if flight.copy.id in wanted]:
                    link.prefetch.remove(flight)
                    link.demand.append(flight)

    def close(self) -> None:
        """Stop the threads after the copies they are in."""
        self._closed = True
        for link in self.links:
            with link.condition:
                link.condition.notify_all()
        if self._pid == os.getpid():
            for thread in self._threads:
                thread.join()
        self._threads.clear()

    def _launch(self) -> None:
        if self._pid is not None:
            raise MoetierError(
                "this process was forked from one that uses moetier; load the model in the child instead"
            )
        if self._closed:
            raise MoetierError("the expert cache is closed")
        self._pid = os.getpid()
        for link in self.links:
            work = self._read if link is self._disk else self._copy_to_device
            for number in range(link.threads):
                thread = threading.Thread(
                    target=self._run, args=(link, work), name=f"moetier {link.name} {number}", daemon=True
                )
                thread.start()
                self._threads.append(thread)

    def _run(self, link: Link, work: object) -> None:
        while True:
            with link.condition:
                while not (link.demand or link.prefetch or self._closed):
                    link.condition.wait()
                if self._closed:
                    return
                queue = link.demand or link.prefetch
                flight = queue[0]
                part = flight.next_part
                flight.next_part += 1
                if flight.next_part >= flight.parts:
                    queue.popleft()
            begin = time.perf_counter()
            nbytes = 0
            try:
                if flight.error is None:  # after a failed part the rest is not worth reading
                    nbytes = work(flight.copy, part)  # type: ignore[operator]
            except BaseException as error:
                flight.error = error
            elapsed = time.perf_counter() - begin
            with link.condition:
                link.nbytes += nbytes
                link.busy_seconds += elapsed
                flight.unfinished -= 1
                ended = flight.unfinished == 0
                link.copies += ended
            if ended:
                self._finish(flight)

    def _finish(self, flight: Flight) -> None:
        with self._done_condition:
            self.done.append(flight)
            self._done_condition.notify_all()

    def _read(self, copy: Copy, part: int) -> int:
        key: ExpertKey = copy.key
        nbytes = self._store.layout(key.layer).nbytes
        into = self._host.memory(copy.target.slot, self._store.phase(key), nbytes)
        return self._store.read(key, part, into)

    def _copy_to_device(self, copy: Copy, part: int) -> int:
        assert self._device is not None
        key: ExpertKey = copy.key
        nbytes = self._store.layout(key.layer).nbytes
        self._device.fill(copy.target.slot, self._host.record(copy.source.slot, self._store.phase(key), nbytes))
        return nbytes
