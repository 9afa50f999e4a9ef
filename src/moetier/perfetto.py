"""A timeline as a Chrome trace (JSON trace event format), which ui.perfetto.dev and chrome://tracing open.

One process per group (the threads that compute, then each link), one track per thread, counters per link. Spans of a
track nest or follow each other, as the format demands; one that would cross another moves to a track of its own.
Written as a stream: the file needs no second copy of the events in memory. Format: Google's "Trace Event Format".
"""

from __future__ import annotations

import gzip
import heapq
import json
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator
from os import PathLike
from typing import IO, Any

from moetier.access import ExpertKey
from moetier.files import whole_file
from moetier.overlap import Overlap
from moetier.tiers import Kind
from moetier.timeline import COMPUTE, AccessSpan, Compute, Part, Step, Timeline, Track, Wait

Spans = list[tuple[float, float, Any]]
_KINDS = {
    Kind.LOAD: "demand",
    Kind.PREFETCH: "prefetch",
    Kind.WRITE_BACK: "write back",
    Kind.DEMOTE: "demote",
    Kind.CLEAN: "clean",
}
_PREFETCHES = "prefetch outcomes"
_BUCKETS = 4000  # of a bandwidth curve at most
_BUCKET_SECONDS = 1e-3  # at least


def write_trace(timeline: Timeline, path: str | PathLike[str]) -> None:
    """Write the file, whole or not at all; compressed if its name ends with .gz. Raises `ConfigError`."""
    with whole_file(path) as draft:
        opened = gzip.open if str(path).endswith(".gz") else open
        with opened(draft, "wt", encoding="utf-8") as file:
            _write(timeline, file)


def _write(timeline: Timeline, file: IO[str]) -> None:
    file.write('{"displayTimeUnit": "ms", "otherData": ')
    file.write(json.dumps(_about(timeline)))
    file.write(', "traceEvents": [')
    for number, event in enumerate(trace_events(timeline)):
        file.write(",\n" if number else "\n")
        file.write(json.dumps(event, separators=(",", ":")))
    file.write("\n]}\n")


def _about(timeline: Timeline) -> dict[str, Any]:
    from moetier import __version__

    return {
        "moetier": __version__,
        "events_kept_of_every_thread": timeline.limit,
        "dropped_events": {f"{track.group}, {track.name}": track.dropped for track in timeline.tracks if track.dropped},
    }


def trace_events(timeline: Timeline) -> Iterator[dict[str, Any]]:
    """The trace events: names of processes and tracks, then everything by its time."""
    tracks = list(timeline.tracks)
    groups = [COMPUTE, *timeline.links]
    groups += sorted({track.group for track in tracks} - set(groups))
    pids = {group: pid for pid, group in enumerate([*groups, _PREFETCHES], 1)}
    outcomes = prefetch_outcomes(timeline)
    lanes: list[tuple[int, int, str, Spans]] = []  # pid, tid, name, spans
    next_tid = dict.fromkeys(pids.values(), 1)
    for track in sorted(tracks, key=lambda track: (pids[track.group], track.name)):
        for number, spans in enumerate(_lanes(track, timeline.begin)):
            pid = pids[track.group]
            name = track.name if not number else f"{track.name} ({number + 1})"
            lanes.append((pid, next_tid[pid], name, spans))
            next_tid[pid] += 1
    used = {pid for pid, *_ in lanes} | ({pids[_PREFETCHES]} if outcomes else set())
    for group, pid in pids.items():
        if pid in used:
            yield _meta(pid, 0, "process_name", name=group)
            yield _meta(pid, 0, "process_sort_index", sort_index=pid)
    for pid, tid, name, _ in lanes:
        yield _meta(pid, tid, "thread_name", name=name)
        yield _meta(pid, tid, "thread_sort_index", sort_index=tid)
    if outcomes:
        yield _meta(pids[_PREFETCHES], 1, "thread_name", name="useful, late, wasted")
    lates, behind = _lates(timeline), {pids[link] for link in timeline.enqueued}
    streams: list[Iterable[dict[str, Any]]] = [
        _complete(pid, tid, spans, lates, pid in behind) for pid, tid, _, spans in lanes
    ]
    by_link: dict[str, list[Part]] = defaultdict(list)
    for track in tracks:
        by_link[track.group] += [event for event in list(track.events) if isinstance(event, Part)]
    for link, parts in by_link.items():
        if parts and link not in timeline.enqueued:
            streams += [_bandwidth(pids[link], parts, timeline), _in_flight(pids[link], parts, timeline)]
    streams.append(
        {
            "ph": "i",
            "name": f"{outcome} {_name(key)}",
            "cat": outcome,
            "s": "t",
            "pid": pids[_PREFETCHES],
            "tid": 1,
            "ts": _microseconds(when - timeline.begin),
        }
        for when, outcome, key in outcomes
    )
    yield from heapq.merge(*streams, key=lambda event: event["ts"])


# -- spans -------------------------------------------------------------------------------------------------------------


def _lanes(track: Track, origin: float) -> list[Spans]:
    """The events of a track as spans from its origin, in lanes within which spans nest or follow each other."""
    spans = [(max(event.begin - origin, 0.0), max(event.end - origin, 0.0), event) for event in list(track.events)]
    spans.sort(key=lambda span: (span[0], -span[1]))
    lanes: list[Spans] = []
    stacks: list[list[float]] = []  # ends of the spans that are open in each lane
    for span in spans:
        for stack in stacks:
            while stack and stack[-1] <= span[0]:
                stack.pop()
        number = next((n for n, stack in enumerate(stacks) if not stack or span[1] <= stack[-1]), len(lanes))
        if number == len(lanes):
            lanes.append([])
            stacks.append([])
        lanes[number].append(span)
        stacks[number].append(span[1])
    return lanes


def _complete(
    pid: int, tid: int, spans: Spans, lates: dict[int, int], behind: bool = False
) -> Iterator[dict[str, Any]]:
    """`behind`: the copies go on after their spans, which say nothing of the link's rate."""
    for begin, end, event in spans:
        start = _nanoseconds(begin)
        name, category, args = _described(event, lates)
        if behind:
            name, args["GB/s"] = f"enqueue {name}", None
        yield {
            "ph": "X",
            "name": name,
            "cat": category,
            "pid": pid,
            "tid": tid,
            "ts": start / 1e3,
            "dur": (_nanoseconds(end) - start) / 1e3,
            "args": args,
        }


def _described(event: Any, lates: dict[int, int]) -> tuple[str, str, dict[str, Any]]:
    """Name, category and details of a span."""
    if isinstance(event, Part):
        key, seconds = event.copy.key, event.end - event.begin
        kind = _KINDS[event.copy.kind]
        args = {"layer": key.layer, "expert": key.expert, "kind": kind, "copy": event.copy.id, "part": event.part}
        rate = round(event.nbytes / seconds / 1e9, 3) if seconds > 0 else None
        return _name(key), kind, {**args, "bytes": event.nbytes, "GB/s": rate}
    if isinstance(event, Compute):
        experts = [key.expert for key in event.keys]
        return f"compute {_experts(len(experts))}", "compute", {"experts": experts}
    if isinstance(event, Wait):
        return "wait", "wait", {}
    if isinstance(event, Step):
        name = f"{event.phase.name.lower()} {event.number}"
        return name, "step", {"tokens": event.tokens}
    assert isinstance(event, AccessSpan)
    access, late = event.access, lates.get(id(event), 0)
    missed = len(access.keys) - len(event.hits) - late
    return (
        f"layer {access.layer}: {len(event.hits)} of {_experts(len(access.keys))} there",
        "access",
        {
            "access": access.time,
            "phase": access.phase.name.lower(),
            "experts": [key.expert for key in access.keys],
            "hits": [key.expert for key in event.hits],
            "late": late,
            "misses": missed,
            **_overlap(event.overlap),
        },
    )


def _overlap(overlap: Overlap) -> dict[str, Any]:
    clocks = overlap.clocks
    times = {"T_wait": clocks.wait, "T_exposed": clocks.exposed, "T_compute": clocks.compute, "T_io": clocks.io}
    found: dict[str, Any] = {f"{name} ms": round(1e3 * seconds, 4) for name, seconds in times.items()}
    for name, share in (("achieved overlap", overlap.achieved), ("attainable overlap", overlap.attainable)):
        if share is not None:
            found[name] = round(share, 4)
    return found


# -- counters ----------------------------------------------------------------------------------------------------------


def _bandwidth(pid: int, parts: list[Part], timeline: Timeline) -> Iterator[dict[str, Any]]:
    """GB/s of a link, in buckets; the bytes of a part are spread evenly over its time."""
    begin = min(part.begin for part in parts)
    width = max(_BUCKET_SECONDS, (max(part.end for part in parts) - begin) / _BUCKETS)
    buckets: dict[int, float] = defaultdict(float)
    for part in parts:
        first, last = int((part.begin - begin) / width), int((part.end - begin) / width)
        rate = part.nbytes / max(part.end - part.begin, 1e-9)
        for bucket in range(first, last + 1):
            inside = min(part.end, begin + (bucket + 1) * width) - max(part.begin, begin + bucket * width)
            buckets[bucket] += rate * max(0.0, inside)
    previous = 0.0
    for bucket in sorted(buckets.keys() | {bucket + 1 for bucket in buckets}):
        value = round(buckets.get(bucket, 0.0) / width / 1e9, 4)
        if value != previous:
            previous = value
            yield _counter(pid, "GB/s", begin + bucket * width - timeline.begin, value)


def _in_flight(pid: int, parts: list[Part], timeline: Timeline) -> Iterator[dict[str, Any]]:
    """Requests in flight on a link: its queue depth as the disk or the bus sees it."""
    changes: dict[float, int] = defaultdict(int)
    for part in parts:
        changes[max(part.begin, timeline.begin)] += 1
        changes[max(part.end, timeline.begin)] -= 1
    depth = 0
    for when in sorted(changes):
        if changes[when]:
            depth += changes[when]
            yield _counter(pid, "in flight", when - timeline.begin, depth)


def _counter(pid: int, name: str, seconds: float, value: float) -> dict[str, Any]:
    return {"ph": "C", "name": name, "pid": pid, "tid": 0, "ts": _microseconds(seconds), "args": {name: value}}


# -- prefetches --------------------------------------------------------------------------------------------------------


class _Flight:
    """A copy into the fastest tier, put together from its parts."""

    def __init__(self, part: Part):
        self.copy, self.begin, self.end = part.copy, part.begin, part.end
        self.failed = False

    def add(self, part: Part) -> None:
        self.begin, self.end = min(self.begin, part.begin), max(self.end, part.end)
        self.failed |= part.nbytes == 0


def _flights(timeline: Timeline) -> dict[ExpertKey, list[_Flight]]:
    """Copies into the fastest tier, per key, by their begin."""
    found: dict[int, _Flight] = {}
    for part in timeline.events(Part):
        if part.copy.target.tier == 0 and part.copy.kind in (Kind.LOAD, Kind.PREFETCH):
            found.setdefault(part.copy.id, _Flight(part)).add(part)
    by_key: dict[ExpertKey, list[_Flight]] = defaultdict(list)
    for flight in sorted(found.values(), key=lambda flight: flight.begin):
        by_key[flight.copy.key].append(flight)
    return by_key


def prefetch_outcomes(timeline: Timeline) -> list[tuple[float, str, ExpertKey]]:
    """When, what and which: useful (there when demanded), late (on its way), wasted (gone, or failed), by time.

    Found from the recorded copies and accesses: one that nobody demanded yet and that was not loaded again is left out.
    """
    flights = _flights(timeline)
    demands: dict[ExpertKey, list[AccessSpan]] = defaultdict(list)
    for access in timeline.accesses():
        for key in access.access.keys:
            if key in flights:
                demands[key].append(access)
    found = []
    for key, of_key in flights.items():
        for flight in of_key:
            if flight.copy.kind is Kind.PREFETCH:
                outcome = _outcome(flight, of_key, demands[key])
                if outcome is not None:
                    found.append((*outcome, key))
    return sorted(found)


def _outcome(flight: _Flight, flights: list[_Flight], demands: list[AccessSpan]) -> tuple[float, str] | None:
    if flight.failed:
        return flight.end, "wasted"
    key = flight.copy.key
    after = bisect_right(demands, flight.begin, key=lambda access: access.begin)
    if after:  # demanded while it was queued?
        before = demands[after - 1]
        if before.end >= flight.end and key not in before.hits:
            return before.begin, "late"
    later = bisect_right(flights, flight.end, key=lambda other: other.begin)
    if after < len(demands):
        access = demands[after]
        if access.begin < flight.end:
            return access.begin, "late"
        if key in access.hits:
            return access.begin, "useful"
    return (flights[later].begin, "wasted") if later < len(flights) else None


def _lates(timeline: Timeline) -> dict[int, int]:
    """Of every access, by its identity: keys that a prefetch was bringing when they were demanded."""
    flights = _flights(timeline)
    found: dict[int, int] = {}
    for access in timeline.accesses():
        late = 0
        for key in set(access.access.keys) - set(access.hits):
            of_key = flights.get(key, [])
            served = bisect_left(of_key, access.begin, key=lambda flight: flight.end)  # one flight of a key at a time
            late += served < len(of_key) and of_key[served].copy.kind is Kind.PREFETCH
        if late:
            found[id(access)] = late
    return found


# -- small things ------------------------------------------------------------------------------------------------------


def _meta(pid: int, tid: int, what: str, **args: Any) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "ts": 0, "args": args}


def _name(key: ExpertKey) -> str:
    return f"layer {key.layer} expert {key.expert}"


def _experts(count: int) -> str:
    return f"{count} expert{'' if count == 1 else 's'}"


def _nanoseconds(seconds: float) -> int:
    return round(max(0.0, seconds) * 1e9)


def _microseconds(seconds: float) -> float:
    return _nanoseconds(seconds) / 1e3
