"""The virtual mover: copy orders carried out in virtual time over links with a bandwidth, a latency and a depth.

It stands where `ThreadMover` stands in a real run: orders in, ends out, demand before prefetches, queued prefetches
promoted when somebody wants them. It decides nothing and knows no core.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from heapq import heappop, heappush

from moetier.errors import ConfigError
from moetier.simulate.config import Link, Timing
from moetier.tiers import BACKGROUND, HOMEWARD, Copy, Kind

Order = tuple[int, int]  # the cache that ordered it, the id of the copy

FREE = Link(float("inf"))
INSTANT = Timing(1, FREE, FREE, FREE, FREE)  # every copy ends when it begins; counts records instead of bytes


class VirtualLink:
    """A path between two tiers. A copy takes the latency, then its bytes; `depth` copies are under way at a time.

    Latencies of copies under way overlap; their bytes go through one after the other, at the full bandwidth, in the
    order in which they were begun (as readers that share the parts of the first record in the queue do). `latencies`,
    if it is a list, gets the seconds of every copy.
    """

    def __init__(self, name: str, link: Link, nbytes: int):
        if not (link.gbps > 0 and link.latency >= 0 and link.depth >= 1):
            raise ConfigError(
                f"{name}: needs a bandwidth above 0, a latency of 0 or more, a depth of 1 or more: {link}"
            )
        self.name, self.latency, self.depth = name, link.latency, link.depth
        self.seconds = nbytes / (link.gbps * 1e9)  # of one record's bytes
        self.demand: deque[Flight] = deque()
        self.prefetch: deque[Flight] = deque()
        self.latencies: list[float] | None = None
        self.running = self.copies = 0
        self._busy = self._free_at = self._since = 0.0

    def begin(self, now: float) -> tuple[float, Flight] | None:
        """Begin the next copy, if there is one and a place for it: when it will end, and which it is."""
        queue = self.demand or self.prefetch
        if not queue or self.running >= self.depth:
            return None
        if not self.running:
            self._since = now
        self.running += 1
        self._free_at = max(now + self.latency, self._free_at) + self.seconds
        if self.latencies is not None:
            self.latencies.append(self._free_at - now)
        return self._free_at, queue.popleft()

    def end(self, now: float) -> None:
        """A copy has ended."""
        self.running -= 1
        self.copies += 1
        if not self.running:
            self._busy += now - self._since

    def busy_until(self, now: float) -> float:
        """Seconds with at least one copy under way."""
        return self._busy + (now - self._since if self.running else 0.0)


class Flight:
    """A copy under way, and the links it has to go through after the present one."""

    __slots__ = ("order", "path")

    def __init__(self, order: Order, path: list[VirtualLink]):
        self.order = order
        self.path = path  # last link first


class VirtualMover:
    """Moves records between `tiers` tiers and home."""

    def __init__(self, timing: Timing, tiers: int):
        if timing.record_nbytes < 1:
            raise ConfigError(f"timing: record_nbytes must be at least 1, got {timing.record_nbytes}")
        size = timing.record_nbytes
        self._disk_read = VirtualLink("disk_read", timing.disk_read, size)
        self._disk_write = VirtualLink("disk_write", timing.disk_write, size)
        self._h2d = VirtualLink("h2d", timing.h2d, size)
        self._d2h = VirtualLink("d2h", timing.d2h, size)
        self.links = (self._disk_read, self._disk_write, self._h2d, self._d2h)
        self.done: deque[Order] = deque()  # copies that have ended, in order
        self.times: deque[float] = deque()  # when they did
        self._home = tiers
        self._events: list[tuple[float, int, VirtualLink, Flight]] = []
        self._begun = 0

    def start(self, cache: int, copies: Iterable[Copy], now: float) -> None:
        """Queue orders of a cache."""
        for copy in copies:
            path = self._path(copy)
            link = path.pop()
            flight = Flight((cache, copy.id), path)
            (link.prefetch if copy.kind in BACKGROUND else link.demand).append(flight)
            self._begin(link, now)

    def promote(self, cache: int, copy_ids: Iterable[int]) -> None:
        """Treat queued background copies as demand from now on."""
        wanted = {(cache, copy_id) for copy_id in copy_ids}
        for link in self.links:
            for flight in [flight for flight in link.prefetch if flight.order in wanted]:
                link.prefetch.remove(flight)
                link.demand.append(flight)

    def withdraw(self, cache: int, copy_ids: Iterable[int]) -> list[int]:
        """Drop those of the copies that have not begun, and say which."""
        unwanted = {(cache, copy_id) for copy_id in copy_ids}
        withdrawn = []
        for link in self.links:
            for flight in [flight for flight in link.prefetch if flight.order in unwanted]:
                link.prefetch.remove(flight)
                withdrawn.append(flight.order[1])
        return withdrawn

    def run_until(self, now: float) -> None:
        """Carry out what happens up to and including `now`."""
        events = self._events
        while events and events[0][0] <= now:
            time, _, link, flight = heappop(events)
            link.end(time)
            if flight.path:
                following = flight.path.pop()
                following.demand.append(flight)
                self._begin(following, time)
            else:
                self.done.append(flight.order)
                self.times.append(time)
            self._begin(link, time)

    @property
    def busy(self) -> bool:
        """Whether a copy is under way."""
        return bool(self._events)

    def next_event(self) -> float | None:
        """When something happens next; None if nothing is under way."""
        return self._events[0][0] if self._events else None

    def _path(self, copy: Copy) -> list[VirtualLink]:
        """The links of a copy, the last one first."""
        if copy.kind in HOMEWARD:  # from a device through host memory
            from_host = copy.source.tier == self._home - 1
            return [self._disk_write] if from_host else [self._disk_write, self._d2h]
        if copy.kind is Kind.DEMOTE:
            return [self._d2h]
        return [self._disk_read] if copy.source.tier == self._home else [self._h2d]

    def _begin(self, link: VirtualLink, now: float) -> None:
        while (begun := link.begin(now)) is not None:
            self._begun += 1
            heappush(self._events, (begun[0], self._begun, link, begun[1]))
