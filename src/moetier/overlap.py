"""How much of the transfers hides behind compute, how much could, and what bounds a run.

Formulas over times that others take; docs/timeline.md explains them. Knows no model, cache or threads, and no torch.

    T_run      the time looked at: forwards of the model, or one access
    T_wait     of it: nothing to compute, an expert on its way
    T_busy     T_run − T_wait: everything else the computing thread does
    T_compute  of that: the experts' math
    T_io       the time in which at least one link had a request in flight (union over links and their threads)
    T_exposed  T_io ∩ T_wait: transfers that somebody waited for; the rest of T_wait is handing over
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moetier.access import Phase

WAITS = 0.05  # of the run: below that, waiting does not bound it
SATURATED = 0.8  # of the run: a link that is busy for longer cannot give much more


class Busy:
    """Seconds in which at least one of several things was going on: the union of their times, not the sum.

    `whole`, if given, is the union over several of these. Times are of `time.perf_counter`.
    """

    __slots__ = ("_active", "_lock", "_since", "_total", "_whole")

    def __init__(self, whole: Busy | None = None):
        self._lock = threading.Lock()
        self._active = 0
        self._since = self._total = 0.0
        self._whole = whole

    def begin(self, now: float) -> None:
        """One more is going on from `now`."""
        with self._lock:
            self._active += 1
            if self._active > 1:
                return
            self._since = now
        if self._whole is not None:
            self._whole.begin(now)

    def end(self, now: float) -> None:
        """One of them has ended at `now`."""
        with self._lock:
            self._active -= 1
            if self._active:
                return
            self._total += max(0.0, now - self._since)
        if self._whole is not None:
            self._whole.end(now)

    def seconds(self, now: float) -> float:
        """The union up to `now`, what is still going on included."""
        with self._lock:
            return self._total + (max(0.0, now - self._since) if self._active else 0.0)


@dataclass(frozen=True, slots=True)
class Clocks:
    """Seconds so far, or within a window: differences of two readings."""

    run: float = 0.0
    wait: float = 0.0
    exposed: float = 0.0
    compute: float = 0.0
    decide: float = 0.0
    io: float = 0.0
    links: tuple[float, ...] = ()  # busy time of each, union over its threads

    def __sub__(self, other: Clocks) -> Clocks:
        return self._with(other, -1)

    def __add__(self, other: Clocks) -> Clocks:
        return self._with(other, 1)

    def _with(self, other: Clocks, sign: int) -> Clocks:
        width = max(len(self.links), len(other.links))
        mine, theirs = (links + (0.0,) * (width - len(links)) for links in (self.links, other.links))
        return Clocks(
            self.run + sign * other.run,
            self.wait + sign * other.wait,
            self.exposed + sign * other.exposed,
            self.compute + sign * other.compute,
            self.decide + sign * other.decide,
            self.io + sign * other.io,
            tuple(a + sign * b for a, b in zip(mine, theirs, strict=True)),
        )


class StepClock:
    """Adds up the clocks over the forwards of a model, prefill and decode apart. A forward that raised is left out."""

    def __init__(self, read: Callable[[], Clocks]):
        self._read = read
        self._open: tuple[Phase, int, float, Clocks] | None = None
        self.steps = dict.fromkeys(Phase, 0)
        self.tokens = dict.fromkeys(Phase, 0)
        self.clocks = dict.fromkeys(Phase, Clocks())

    def begin(self, phase: Phase, tokens: int) -> None:
        """A forward of so many tokens begins."""
        self._open = (phase, tokens, time.perf_counter(), self._read())

    def end(self) -> tuple[Phase, int, float, float] | None:
        """It has ended: its phase, tokens, begin and end; None if none was begun."""
        if self._open is None:
            return None
        phase, tokens, begin, before = self._open
        self._open = None
        end = time.perf_counter()
        found = self._read() - before
        self.steps[phase] += 1
        self.tokens[phase] += tokens
        self.clocks[phase] += found + Clocks(run=end - begin)
        return phase, tokens, begin, end


@dataclass(frozen=True, slots=True)
class Overlap:
    """What the clocks of a window say. `links` are their names in the order of `clocks.links`.

    `launches_only`: the experts' math runs on another device, so that T_compute is the time of its launches.
    """

    clocks: Clocks
    links: tuple[str, ...] = ()
    launches_only: bool = False

    @property
    def busy(self) -> float:
        """T_busy, seconds."""
        return max(0.0, self.clocks.run - self.clocks.wait)

    @property
    def achieved(self) -> float | None:
        """Share of T_io that was hidden: (T_io − T_exposed) / T_io; None where nothing moved."""
        io = self.clocks.io
        return None if io <= 0 else min(1.0, max(0.0, io - self.clocks.exposed) / io)

    @property
    def attainable(self) -> float | None:
        """Share of T_io that could be hidden if every transfer began early enough: min(T_busy, T_io) / T_io."""
        io = self.clocks.io
        return None if io <= 0 else min(self.busy, io) / io

    @property
    def attainable_on_demand(self) -> float | None:
        """The same without prefetch, behind the experts' math alone: min(T_compute, T_io) / T_io."""
        io = self.clocks.io
        return None if io <= 0 else min(self.clocks.compute, io) / io

    @property
    def floor(self) -> float:
        """Seconds that the window would take with these transfers perfectly hidden: max(T_busy, T_io)."""
        return max(self.busy, self.clocks.io)

    @property
    def bound(self) -> str:
        """What bounds the run: disk, link, loads, handover, compute, model or decisions ("" for an empty window)."""
        clocks = self.clocks
        if clocks.run <= 0:
            return ""
        if clocks.wait >= WAITS * clocks.run:
            if self.busiest is not None and self.busiest[1] >= SATURATED * clocks.run:
                return "disk" if "disk" in self.busiest[0] else "link"
            return "loads" if clocks.exposed >= clocks.wait / 2 else "handover"
        rest = max(0.0, self.busy - clocks.compute - clocks.decide)
        parts = {"compute": clocks.compute, "model": rest, "decisions": clocks.decide}
        if self.launches_only:
            parts = {"compute": clocks.compute + rest, "decisions": clocks.decide}
        return max(parts, key=parts.__getitem__)

    @property
    def busiest(self) -> tuple[str, float] | None:
        """The link that was busy longest, and for how many seconds; None without any."""
        return max(zip(self.links, self.clocks.links, strict=False), key=lambda link: link[1], default=None)

    def words(self) -> str:
        """What bounds the run, for people."""
        clocks = self.clocks
        waits = f"nothing computes {_percent(clocks.wait, clocks.run)} of the time"
        name, seconds = self.busiest or ("", 0.0)
        link = f"{name} is busy {_percent(seconds, clocks.run)} of it"
        return {
            "": "nothing ran",
            "disk": f"the disk: {link}, {waits}; fewer misses, fewer bytes or a faster disk help",
            "link": f"the link {name}: {link}, {waits}; more slots on the device help",
            "loads": f"loads that begin too late: {waits}, yet {link}; prefetch or more slots help",
            "handover": f"handing over between threads: {waits}, mostly with no link busy; threads may lack a core",
            "compute": f"the experts' math: {waits}",
            "model": f"the model beside its experts (attention, norms): {waits}",
            "decisions": f"moetier's own decisions: {waits}",
        }[self.bound]

    def summary(self) -> dict[str, Any]:
        """As plain numbers: seconds and shares (None where nothing moved)."""
        clocks = self.clocks
        return {
            "run": clocks.run,
            "wait": clocks.wait,
            "exposed": clocks.exposed,
            "compute": clocks.compute,
            "decide": clocks.decide,
            "io": clocks.io,
            "links": dict(zip(self.links, clocks.links, strict=False)),
            "achieved_overlap": self.achieved,
            "attainable_overlap": self.attainable,
            "attainable_overlap_on_demand": self.attainable_on_demand,
            "floor": self.floor,
            "bound": self.bound,
        }


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %" if whole > 0 else "0 %"
