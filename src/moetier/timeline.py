"""A timeline of a run: what every thread computed, waited for and moved, in bounded memory.

The probe that the cache and the mover tell of accesses, waits and parts of copies, while one is set; without, they ask
one `is not None`. Only records: `perfetto.py` draws it, `overlap.py` knows the formulas. Times are of
`time.perf_counter`, in seconds. Knows keys and bytes, no tensors.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import TYPE_CHECKING, Any, NamedTuple

from moetier.access import Access, ExpertKey, Phase
from moetier.errors import ConfigError
from moetier.files import check_writable
from moetier.overlap import Busy, Clocks, Overlap
from moetier.tiers import Copy

if TYPE_CHECKING:
    from moetier.cache import ExpertCache
    from moetier.chunks import SliceCache

__all__ = ["LIMIT", "AccessSpan", "Compute", "Part", "Step", "Timeline", "Track", "Wait", "recorded"]

LIMIT = 100_000
"""Events kept of every thread, about 200 bytes each."""


class Part(NamedTuple):
    """One part of a copy went over a link."""

    begin: float
    end: float
    copy: Copy
    part: int
    nbytes: int  # 0 for one that failed, or was not worth moving after another had


class AccessSpan(NamedTuple):
    """One access, from its decisions to its last result; the seconds are those within it."""

    begin: float
    end: float
    access: Access
    hits: tuple[ExpertKey, ...]
    wait: float
    exposed: float
    compute: float
    io: float

    @property
    def overlap(self) -> Overlap:
        """What the formulas say of this access alone."""
        run = self.end - self.begin
        decide = max(0.0, run - self.wait - self.compute)
        return Overlap(Clocks(run, self.wait, self.exposed, self.compute, decide, self.io))


class Wait(NamedTuple):
    """Nothing to compute, an expert on its way."""

    begin: float
    end: float


class Compute(NamedTuple):
    """The caller worked on these experts."""

    begin: float
    end: float
    keys: tuple[ExpertKey, ...]


class Step(NamedTuple):
    """One forward of the model."""

    begin: float
    end: float
    phase: Phase
    tokens: int
    number: int


Event = Part | AccessSpan | Wait | Compute | Step


class Track:
    """What one thread did: the last `limit` events, in the order they ended, and how many there were."""

    __slots__ = ("events", "group", "name", "seen")

    def __init__(self, group: str, name: str, limit: int):
        self.group, self.name = group, name
        self.events: deque[Any] = deque(maxlen=limit)
        self.seen = 0

    def add(self, event: Event) -> None:
        """Called by its own thread only."""
        self.seen += 1
        self.events.append(event)

    @property
    def dropped(self) -> int:
        """Events that were pushed out by later ones."""
        return self.seen - len(self.events)


COMPUTE = "compute"  # the group of threads that run the model


class Timeline:
    """The probe itself, and what it has seen. `io` is the union clock of all links.

    `enqueued` are links whose copies go on behind the thread that orders them: their parts are the ordering only.

    Several threads may tell it things at once; each has a track of its own, so that none waits for another.
    """

    def __init__(self, io: Busy, links: Sequence[str] = (), limit: int = LIMIT, enqueued: Sequence[str] = ()):
        if limit < 1:
            raise ConfigError(f"a timeline keeps at least 1 event of every thread, got limit {limit}")
        self.io, self.links, self.limit = io, tuple(links), limit
        self.enqueued = frozenset(enqueued)
        self.begin = time.perf_counter()
        self.end: float | None = None  # while it records
        self.tracks: list[Track] = []
        self._steps = 0
        self._mine = threading.local()

    # -- told by the engine ------------------------------------------------------------------------------------------

    def opened(self, access: Access, ready: Iterable[ExpertKey], begin: float) -> AccessProbe:
        """An access began at `begin`, and these keys were there."""
        return AccessProbe(self, access, tuple(ready), begin)

    def part(self, link: str, copy: Copy, part: int, begin: float, end: float, nbytes: int) -> None:
        """A part of a copy went over a link, in the calling thread."""
        self.track(link).add(Part(begin, end, copy, part, nbytes))

    def stepped(self, phase: Phase, tokens: int, begin: float, end: float) -> None:
        """A forward of the model has ended."""
        self._steps += 1
        self.track(COMPUTE).add(Step(max(begin, self.begin), end, phase, tokens, self._steps))

    def track(self, group: str) -> Track:
        """The calling thread's own of a group."""
        mine: dict[str, Track] | None = getattr(self._mine, "tracks", None)
        if mine is None:
            mine = self._mine.tracks = {}
        track = mine.get(group)
        if track is None:
            track = mine[group] = Track(group, threading.current_thread().name, self.limit)
            self.tracks.append(track)
        return track

    # -- asked afterwards --------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Nothing more is told; the events stay."""
        if self.end is None:
            self.end = time.perf_counter()

    @property
    def dropped(self) -> int:
        """Events that did not fit: the oldest of their threads."""
        return sum(track.dropped for track in self.tracks)

    def events(self, kind: type[Any]) -> list[Any]:
        """All that are kept of a kind (`AccessSpan`, `Part`, `Wait`, `Compute`, `Step`), by their begin."""
        found = (event for track in list(self.tracks) for event in list(track.events) if isinstance(event, kind))
        return sorted(found, key=lambda event: (event.begin, -event.end))

    def accesses(self) -> list[AccessSpan]:
        """Every access that is kept, with its T_wait, T_compute and T_io; `.overlap` has the shares."""
        return self.events(AccessSpan)

    def save(self, path: str | PathLike[str]) -> None:
        """Write it as a Chrome trace, for ui.perfetto.dev; compressed if the name ends with .gz. Whole or not at all.

        Raises `ConfigError` where the file cannot be written.
        """
        from moetier.perfetto import write_trace

        write_trace(self, path)


class AccessProbe:
    """Told of one access while it runs, in the thread that computes it."""

    __slots__ = ("_access", "_begin", "_compute", "_exposed", "_hits", "_io", "_timeline", "_track", "_wait")

    def __init__(self, timeline: Timeline, access: Access, hits: tuple[ExpertKey, ...], begin: float):
        self._timeline, self._access, self._hits, self._begin = timeline, access, hits, begin
        self._track = timeline.track(COMPUTE)
        self._io = timeline.io.seconds(begin)
        self._wait = self._exposed = self._compute = 0.0

    def waited(self, begin: float, end: float, exposed: float) -> None:
        """Nothing was ready; a link was busy for `exposed` seconds of it."""
        self._wait += end - begin
        self._exposed += exposed
        self._track.add(Wait(begin, end))

    def computed(self, begin: float, end: float, keys: Iterable[ExpertKey]) -> None:
        """The caller worked on these experts."""
        self._compute += end - begin
        self._track.add(Compute(begin, end, tuple(keys)))

    def closed(self) -> None:
        """The access is over, done or not."""
        end = time.perf_counter()
        io = min(max(0.0, self._timeline.io.seconds(end) - self._io), end - self._begin)
        times = (self._wait, self._exposed, self._compute, io)
        self._track.add(AccessSpan(self._begin, end, self._access, self._hits, *times))


@contextmanager
def recorded(
    cache: ExpertCache | SliceCache, path: str | PathLike[str] | None = None, limit: int = LIMIT
) -> Iterator[Timeline]:
    """Record what a cache does within, and save it to `path` at the end, also when an exception ends it.

    Raises `ConfigError` for a file that cannot be written, and where the cache is being recorded already.
    """
    if cache.probe is not None:
        raise ConfigError("a timeline of this model is being recorded already; end that one first")
    if path is not None:
        check_writable(path)
    mover = cache.mover
    enqueued = [link.name for link in mover.links if link.clock is not None]
    timeline = Timeline(mover.io, [link.name for link in mover.links], limit, enqueued)
    cache.probe = mover.probe = timeline
    try:
        yield timeline
    finally:
        cache.probe = mover.probe = None
        timeline.stop()
        if path is not None:
            timeline.save(path)
