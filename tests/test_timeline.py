"""The timeline: what it records, the file it writes, its bounds, and the formulas of overlap."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moetier.access import Access, ExpertKey, Phase
from moetier.errors import ConfigError
from moetier.overlap import Busy, Clocks, Overlap, StepClock
from moetier.perfetto import prefetch_outcomes, trace_events, write_trace
from moetier.tiers import Copy, Kind, Place
from moetier.timeline import AccessSpan, Compute, Part, Step, Timeline, Wait
from tracefile import read_trace

NAME = "qwen3_moe"
HOME, TOP = Place(1, -1), Place(0, 0)
TIMES = st.integers(0, 10**7).map(lambda microseconds: microseconds / 1e6)
SHARES = st.floats(0, 1)


def copy(number: int, expert: int, kind: Kind = Kind.LOAD) -> Copy:
    return Copy(number, ExpertKey(0, expert), HOME, TOP, kind)


def timeline(limit: int = 1000) -> Timeline:
    made = Timeline(Busy(), ["disk→host"], limit)
    made.begin = 0.0
    return made


def in_thread(name: str, work: Callable[[], object]) -> None:
    thread = threading.Thread(target=work, name=name)
    thread.start()
    thread.join()


def access(made: Timeline, begin: float, end: float, experts: tuple[int, ...], hits: tuple[int, ...]) -> AccessSpan:
    keys = tuple(ExpertKey(0, expert) for expert in experts)
    there = tuple(ExpertKey(0, expert) for expert in hits)
    span = AccessSpan(begin, end, Access(1, 0, keys), there, 0.0, 0.0, 0.0, 0.0)
    made.track("compute").add(span)
    return span


# -- the union of busy times -------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 60), st.integers(0, 20)), max_size=12))
@settings(derandomize=True, deadline=None)
def test_busy_is_the_union_of_intervals(intervals: list[tuple[int, int, int]]) -> None:
    """Of each link, and of all links together."""
    whole = Busy()
    links = [Busy(whole) for _ in range(3)]
    moments = sorted(
        [(begin, 0, link) for link, begin, _ in intervals]
        + [(begin + length, 1, link) for link, begin, length in intervals]
    )
    for when, ends, link in moments:
        (links[link].end if ends else links[link].begin)(float(when))
    covered = [{t for link, b, n in intervals if link == number for t in range(b, b + n)} for number in range(3)]
    assert [link.seconds(1e3) for link in links] == [len(moments) for moments in covered]
    assert whole.seconds(1e3) == len(set().union(*covered))


def test_what_is_still_busy_counts() -> None:
    busy = Busy()
    assert busy.seconds(5.0) == 0.0
    busy.begin(1.0)
    busy.begin(2.0)
    assert busy.seconds(4.0) == 3.0
    busy.end(4.5)
    assert busy.seconds(5.0) == 4.0
    busy.end(6.0)
    assert busy.seconds(99.0) == 5.0


# -- formulas ----------------------------------------------------------------------------------------------------------


@given(TIMES, TIMES, TIMES, SHARES, SHARES)
@settings(derandomize=True, deadline=None)
def test_nobody_hides_more_than_could_be(busy: float, io: float, waiting: float, exposed: float, math: float) -> None:
    """For any times that can be: transfers that nobody waits for run while something computes."""
    shown = io * exposed
    hidden = min(io - shown, busy)
    io = shown + hidden
    wait = shown + waiting
    overlap = Overlap(Clocks(busy + wait, wait, shown, busy * math, 0.0, io, (io,)), ("disk→host",))
    achieved, attainable, on_demand = overlap.achieved, overlap.attainable, overlap.attainable_on_demand
    if achieved is None or attainable is None or on_demand is None:
        assert io == 0
        return
    if io >= 1e-6:  # what a clock can tell
        assert 0 <= achieved <= attainable + 1e-6 <= 1 + 2e-6
        assert on_demand <= attainable + 1e-6
    assert overlap.floor <= overlap.clocks.run + 1e-9


@pytest.mark.parametrize(
    ("clocks", "bound", "word"),
    [
        (Clocks(10, 6, 5.5, 3, 0.5, 9, (9,)), "disk", "disk→host is busy 90 %"),
        (Clocks(10, 6, 5.5, 3, 0.5, 6, (6,)), "loads", "too late: nothing computes 60 % of the time"),
        (Clocks(10, 6, 1, 3, 0.5, 3, (3,)), "handover", "lack a core"),
        (Clocks(10, 0.1, 0.1, 8, 0.5, 9, (9,)), "compute", "the experts' math"),
        (Clocks(10, 0.1, 0.1, 1, 0.5, 9, (9,)), "model", "beside its experts"),
        (Clocks(10, 0.1, 0.1, 1, 6, 9, (9,)), "decisions", "own decisions"),
        (Clocks(), "", "nothing ran"),
    ],
)
def test_what_bounds_a_run(clocks: Clocks, bound: str, word: str) -> None:
    overlap = Overlap(clocks, ("disk→host",))
    assert overlap.bound == bound
    assert word in overlap.words()


def test_the_link_to_a_device_bounds_a_run() -> None:
    overlap = Overlap(Clocks(10, 6, 6, 3, 0.5, 9, (2, 9)), ("disk→host", "host→device"), launches_only=True)
    assert (overlap.bound, overlap.busiest) == ("link", ("host→device", 9))
    computing = Overlap(Clocks(10, 0, 0, 1, 2, 9, (2, 9)), ("disk→host", "host→device"), launches_only=True)
    assert computing.bound == "compute"  # launches are short; what follows waits for the device


def test_shares_of_nothing_are_none() -> None:
    summary = Overlap(Clocks(run=1.0, compute=1.0)).summary()
    assert summary["achieved_overlap"] is None and summary["attainable_overlap"] is None
    json.dumps(summary, allow_nan=False)


def test_steps_are_added_up_by_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    read = [Clocks(links=(0.0,))]
    clock = StepClock(lambda: read[0])
    assert clock.end() is None
    for phase, tokens, seconds, wait in (
        (Phase.PREFILL, 7, 2.0, 1.0),
        (Phase.DECODE, 1, 0.5, 0.25),
        (Phase.DECODE, 1, 0.5, 0.0),
    ):
        clock.begin(phase, tokens)
        now[0] += seconds
        read[0] += Clocks(wait=wait, io=wait, links=(wait,))
        assert clock.end() is not None
        now[0] += 10  # between steps
        read[0] += Clocks(wait=3.0)
    clock.begin(Phase.DECODE, 1)  # raises, say: begun again
    now[0] += 5
    clock.begin(Phase.DECODE, 1)
    assert (clock.steps[Phase.PREFILL], clock.tokens[Phase.PREFILL], clock.steps[Phase.DECODE]) == (1, 7, 2)
    assert clock.clocks[Phase.PREFILL] == Clocks(run=2.0, wait=1.0, io=1.0, links=(1.0,))
    assert clock.clocks[Phase.DECODE] == Clocks(run=1.0, wait=0.25, io=0.25, links=(0.25,))


# -- a real run --------------------------------------------------------------------------------------------------------


def test_a_recorded_run(tiered: Callable[..., Any], tmp_path: Path) -> None:
    """Every access, wait and part of the run is in the file, at its place, and agrees with the counters."""
    model = tiered(NAME, slots=6)
    ids = torch.tensor([[5, 6, 7, 8]])
    with model.moetier.timeline(tmp_path / "run.json") as made:
        output = model(input_ids=ids, use_cache=True)
        for token in (9, 10):
            output = model(input_ids=torch.tensor([[token]]), past_key_values=output.past_key_values, use_cache=True)
        model.moetier.cache.settle()
    stats = model.moetier.stats()
    layers = len(stats["tiers"][0]["hits"])
    spans = made.accesses()
    assert [(span.access.layer, span.access.phase) for span in spans] == [
        (layer, phase) for phase in (Phase.PREFILL, Phase.DECODE, Phase.DECODE) for layer in range(layers)
    ]
    assert sum(len(span.hits) for span in spans) == sum(stats["tiers"][0]["hits"])
    assert sum(part.nbytes for part in made.events(Part)) == stats["links"]["disk→host"]["bytes"]
    assert [step.phase for step in made.events(Step)] == [Phase.PREFILL, Phase.DECODE, Phase.DECODE]
    assert sum(wait.end - wait.begin for wait in made.events(Wait)) == pytest.approx(stats["seconds"]["wait"])
    assert sum(c.end - c.begin for c in made.events(Compute)) == pytest.approx(stats["seconds"]["compute"])
    for span in spans:
        assert {key for c in made.events(Compute) if span.begin <= c.begin < span.end for key in c.keys} == set(
            span.access.keys
        )
        assert span.wait + span.compute <= span.end - span.begin
        assert span.exposed <= min(span.wait, span.io) + 1e-6
        achieved, attainable = span.overlap.achieved, span.overlap.attainable
        assert achieved is None or attainable is None or 0 <= achieved <= attainable + 1e-3 <= 1.002
    phases = stats["phases"]
    assert (phases["prefill"]["steps"], phases["prefill"]["tokens"], phases["decode"]["steps"]) == (1, 4, 2)
    assert sum(phase["wait"] for phase in phases.values()) == pytest.approx(stats["seconds"]["wait"])
    for link in stats["links"].values():
        assert 0 < link["union_seconds"] <= link["busy_seconds"] + 1e-9
    assert stats["seconds"]["io"] == pytest.approx(stats["links"]["disk→host"]["union_seconds"])

    events = read_trace(tmp_path / "run.json")
    names = {event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert names == {"compute", "disk→host"}
    by_category = {name: [e for e in events if e.get("cat") == name] for name in ("access", "step", "wait", "demand")}
    assert len(by_category["access"]) == len(spans) and len(by_category["step"]) == 3
    assert sum(event["args"]["bytes"] for event in by_category["demand"]) == stats["links"]["disk→host"]["bytes"]
    depth = [event["args"]["in flight"] for event in events if event["name"] == "in flight"]
    assert depth[-1] == 0 and 1 <= max(depth) <= 4 and min(depth) == 0
    rates = [event for event in events if event["name"] == "GB/s"]
    moved = sum(now["args"]["GB/s"] * (after["ts"] - now["ts"]) * 1e3 for now, after in pairwise(rates))
    assert moved == pytest.approx(stats["links"]["disk→host"]["bytes"], rel=0.05)  # the curve holds all the bytes


def test_recording_ends_with_its_block(tiered: Callable[..., Any], tmp_path: Path) -> None:
    model = tiered(NAME, slots=6)
    file = tmp_path / "t.json.gz"
    with pytest.raises(KeyboardInterrupt), model.moetier.timeline(file) as made:
        model(input_ids=torch.tensor([[5, 6]]))
        with pytest.raises(ConfigError, match="already"), model.moetier.timeline():
            pass
        raise KeyboardInterrupt
    count = len(made.accesses())
    assert read_trace(file) and count
    model(input_ids=torch.tensor([[9, 6]]))
    assert len(made.accesses()) == count and model.moetier.cache.probe is None
    with model.moetier.timeline() as again:
        model(input_ids=torch.tensor([[9, 6]]))
    assert len(again.accesses()) == count
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.json.gz"]


def test_outputs_do_not_change(tiered: Callable[..., Any]) -> None:
    model = tiered(NAME, slots=6)
    ids = torch.tensor([[5, 6, 7, 8]])
    plain = model(input_ids=ids).logits
    with model.moetier.timeline():
        assert torch.equal(model(input_ids=ids).logits, plain)


def test_a_file_that_cannot_be_written(tiered: Callable[..., Any], tmp_path: Path) -> None:
    model = tiered(NAME, slots=6)
    for wrong in (tmp_path, tmp_path / "none" / "t.json"):
        with pytest.raises(ConfigError, match=str(wrong)), model.moetier.timeline(wrong):
            raise AssertionError("not reached")
    assert model.moetier.cache.probe is None
    with pytest.raises(ConfigError, match="at least 1"), model.moetier.timeline(limit=0):
        raise AssertionError("not reached")
    assert model.moetier.cache.probe is None


# -- bounds and the file -----------------------------------------------------------------------------------------------


def test_memory_is_bounded_and_the_file_says_what_is_missing(tmp_path: Path) -> None:
    made = timeline(limit=10)
    for number in range(25):
        made.part("disk→host", copy(number, 0), 0, float(number), number + 0.5, 7)
    assert made.dropped == 15
    assert [part.copy.id for part in made.events(Part)] == list(range(15, 25))  # the last ones
    write_trace(made, tmp_path / "t.json")
    about = json.loads((tmp_path / "t.json").read_text())["otherData"]
    assert about["events_kept_of_every_thread"] == 10
    assert about["dropped_events"] == {f"disk→host, {threading.current_thread().name}": 15}
    read_trace(tmp_path / "t.json")


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "t.json"
    file.write_text("old")
    made = timeline()
    made.stepped(Phase.DECODE, 1, 0.0, 1.0)
    monkeypatch.setattr("moetier.perfetto.trace_events", lambda _: iter([{}, {1: object()}]))
    with pytest.raises(TypeError):
        made.save(file)
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20), st.booleans()), max_size=25))
@settings(derandomize=True, deadline=None, max_examples=60)
def test_any_spans_become_a_valid_file(
    tmp_path_factory: pytest.TempPathFactory, spans: list[tuple[int, int, bool]]
) -> None:
    """Spans that cross (two accesses open in one thread) move to a track of their own."""
    made = timeline()
    for number, (begin, length, wait) in enumerate(spans):
        if wait:
            made.track("compute").add(Wait(begin / 1e3, (begin + length) / 1e3))
        else:
            made.track("compute").add(Part(begin / 1e3, (begin + length) / 1e3, copy(number, 1), 0, 5))
    file = tmp_path_factory.mktemp("t") / "t.json"
    write_trace(made, file)
    assert sum(event["ph"] == "X" for event in read_trace(file)) == len(spans)


def test_every_thread_has_its_track() -> None:
    made = timeline()
    for number in range(3):
        in_thread(f"reader {number}", lambda n=number: made.part("disk→host", copy(n, n), 0, n, n + 2.0, 10))  # type: ignore[misc]
    events = list(trace_events(made))
    threads = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert threads == {"reader 0", "reader 1", "reader 2"}
    depth = [(event["ts"], event["args"]["in flight"]) for event in events if event["name"] == "in flight"]
    assert depth == [(0.0, 1), (1e6, 2), (3e6, 1), (4e6, 0)]  # at 2 s one ends and one begins


def test_copies_that_a_gpu_makes_are_shown_as_enqueued(tmp_path: Path) -> None:
    """Their spans are the ordering only: no rate is made of them, and they are no part of the compute track."""
    made = Timeline(Busy(), ["disk→host", "host→device"], 10, ["host→device"])
    made.begin = 0.0
    made.track("compute").add(Wait(0.0, 1.0))
    made.part("host→device", copy(1, 1), 0, 0.25, 0.5, 1000)
    write_trace(made, tmp_path / "t.json")
    events = read_trace(tmp_path / "t.json")
    (span,) = [event for event in events if event["name"] == "enqueue layer 0 expert 1"]
    (wait,) = [event for event in events if event["name"] == "wait"]
    assert span["pid"] != wait["pid"] and span["args"]["GB/s"] is None and span["args"]["bytes"] == 1000
    assert not [event for event in events if event["ph"] == "C"]


# -- prefetches --------------------------------------------------------------------------------------------------------


def test_what_became_of_prefetches(tmp_path: Path) -> None:
    made = timeline()
    fetched = {1: (0.0, 1.0), 2: (1.0, 2.0), 3: (2.0, 3.0), 4: (3.0, 4.0), 5: (4.0, 4.5), 6: (5.5, 7.0)}
    for expert, (begin, end) in fetched.items():
        made.part("disk→host", copy(expert, expert, Kind.PREFETCH), 0, begin, end, 0 if expert == 5 else 8)
    access(made, 2.5, 3.5, (1, 3), (1,))  # 1 was there, 3 on its way
    access(made, 5.0, 8.0, (2, 6, 9), ())  # 2 was gone, 6 queued, 9 nobody foresaw
    made.part("disk→host", copy(12, 2), 0, 5.1, 6.0, 8)
    made.part("disk→host", copy(19, 9), 0, 5.2, 6.5, 8)
    outcomes = {key.expert: outcome for _, outcome, key in prefetch_outcomes(made)}
    assert outcomes == {1: "useful", 2: "wasted", 3: "late", 5: "wasted", 6: "late"}  # of 4 nothing is known yet
    write_trace(made, tmp_path / "t.json")
    events = read_trace(tmp_path / "t.json")
    markers = {event["name"]: event["cat"] for event in events if event["ph"] == "i"}
    assert markers["useful layer 0 expert 1"] == "useful" and len(markers) == 5
    lates = [event["args"]["late"] for event in events if event.get("cat") == "access"]
    misses = [event["args"]["misses"] for event in events if event.get("cat") == "access"]
    assert (lates, misses) == ([1, 1], [0, 2])


def test_many_threads_at_once() -> None:
    """Tracks are made and filled without losing an event."""
    made = Timeline(Busy(), ["disk→host"], 10_000)

    def work(seed: int) -> None:
        draw = random.Random(seed)
        for number in range(500):
            begin = draw.random()
            made.part("disk→host", copy(number, seed), 0, begin, begin + 0.1, 1)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made.events(Part)) == 4000 and len(made.tracks) == 8
