"""A strict reader of the JSON trace event format: what ui.perfetto.dev needs, and nothing that it would shrug off."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

KNOWN = {"X": {"name", "cat", "pid", "tid", "ts", "dur", "args"}, "M": {"name", "pid", "tid", "ts", "args"}}
KNOWN |= {"C": {"name", "pid", "tid", "ts", "args"}, "i": {"name", "cat", "s", "pid", "tid", "ts"}}
METADATA = {"process_name": "name", "process_sort_index": "sort_index", "thread_name": "name"}
METADATA |= {"thread_sort_index": "sort_index"}


def read_trace(path: Path) -> list[dict[str, Any]]:
    """The events of a trace file; an `AssertionError` says what is wrong with it."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        whole = json.load(file, parse_constant=_refuse)
    assert set(whole) == {"displayTimeUnit", "otherData", "traceEvents"}
    assert whole["displayTimeUnit"] in ("ms", "ns")
    events: list[dict[str, Any]] = whole["traceEvents"]
    named: set[tuple[int, int]] = set()
    processes: set[int] = set()
    last = 0.0
    for event in events:
        assert set(event) == {"ph"} | KNOWN[event["ph"]], event
        assert type(event["pid"]) is int and type(event["tid"]) is int and event["pid"] > 0 and event["tid"] >= 0
        assert isinstance(event["name"], str) and event["name"]
        assert event["ts"] >= last, "not sorted by ts"
        last = event["ts"]
        if event["ph"] == "M":
            assert list(event["args"]) == [METADATA[event["name"]]]
            named |= {(event["pid"], event["tid"])} if event["name"] == "thread_name" else set()
            processes |= {event["pid"]} if event["name"] == "process_name" else set()
        elif event["ph"] == "C":
            assert all(type(value) in (int, float) for value in event["args"].values()) and event["args"]
        elif event["ph"] == "X":
            assert event["dur"] >= 0
            assert (event["pid"], event["tid"]) in named, "a track without a name"
        else:
            assert event["s"] in ("t", "p", "g")
            assert (event["pid"], event["tid"]) in named
        assert event["pid"] in processes, "a process without a name"
    for track in named:
        _nested([event for event in events if event["ph"] == "X" and (event["pid"], event["tid"]) == track])
    return events


def _nested(spans: list[dict[str, Any]]) -> None:
    """Complete events of one track nest or follow each other; never cross. In whole nanoseconds."""
    stack: list[int] = []
    for span in sorted(spans, key=lambda span: (span["ts"], -span["dur"])):
        begin, end = round(1e3 * span["ts"]), round(1e3 * span["ts"]) + round(1e3 * span["dur"])
        while stack and stack[-1] <= begin:
            stack.pop()
        assert not stack or end <= stack[-1], "spans of a track cross"
        stack.append(end)


def _refuse(constant: str) -> Any:
    raise AssertionError(f"{constant} is no JSON")
