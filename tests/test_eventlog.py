"""Recording the core's inputs and replaying them. Random runs are replayed in `test_residency_machine.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from moetier.access import Access, ExpertKey, Part, Phase
from moetier.errors import CapacityError, ConfigError, ReplayError
from moetier.eventlog import EventLog, Recorder, replay
from moetier.residency import Residency
from moetier.tiers import TierConfig
from test_residency_machine import Run, random_step, random_tiers

pytestmark = pytest.mark.timeout(30)


def recorded(seed: int = 3, steps: int = 150) -> Recorder:
    random = Random(seed)
    run = Run(random_tiers(random), in_place=True)
    for _ in range(steps):
        random_step(run, random)
    run.drain()
    return run.core


@pytest.mark.parametrize("seed", range(12))
def test_a_saved_log_replays_to_the_same_decisions(seed: int, tmp_path: Path) -> None:
    core = recorded(seed)
    core.log.save(tmp_path / "log")
    log = EventLog.load(tmp_path / "log")
    assert log == core.log
    again = replay(log)
    again.check()
    assert again.digest() == core.digest()
    assert again.counters() == core.counters()
    assert again.residents() == core.residents()


def test_logs_of_version_3_are_read(tmp_path: Path) -> None:
    """From before accesses said whether they write, and before write-back policies: every access might write."""
    random = Random(5)
    run = Run(random_tiers(random), in_place=True)
    run.clean = lambda key: None  # type: ignore[method-assign]
    run.core.flush = lambda: None  # type: ignore[method-assign]
    release = run.release
    run.release = lambda index, dirty, saved=False: release(index, dirty)  # type: ignore[method-assign]
    acquire = run.acquire  # nor did accesses know of steps
    run.acquire = lambda *arguments: acquire(*arguments[:4])  # type: ignore[method-assign]
    for _ in range(300):
        random_step(run, random)
    run.drain()
    core = run.core
    core.log.save(tmp_path / "log")
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    lines[0]["version"] = 3
    del lines[0]["writeback"], lines[0]["dirty_limit"]
    for event in lines[1:]:
        if event[0] == "acquire":
            del event[1][7:]
        elif event[0] == "release":
            assert event.pop() is False
    (tmp_path / "old").write_text("\n".join(map(json.dumps, lines)) + "\n")
    log = EventLog.load(tmp_path / "old")
    assert (log.writeback, log.dirty_limit) == ("evict", None)
    assert any(event[0] == "release" and event[3] for event in log.events), "something was changed"
    assert replay(log).digest() == core.digest()


def test_all_of_an_access_is_kept(tmp_path: Path) -> None:
    core = Recorder(Residency([TierConfig(2)], 2, 4))
    keys = (ExpertKey(1, 0), ExpertKey(1, 3))
    access = Access(7, 1, keys, (5, 2), Phase.PREFILL, 9, (0.5, 0.25), True, Part.UPDATE)
    core.acquire(access)
    core.log.save(tmp_path / "log")
    seen = []
    core_type = Residency.acquire
    try:
        Residency.acquire = lambda self, access: (seen.append(access), core_type(self, access))[1]  # type: ignore
        replay(EventLog.load(tmp_path / "log"))
    finally:
        Residency.acquire = core_type  # type: ignore
    assert seen == [access]


def test_digests_do_not_depend_on_the_process() -> None:
    script = (
        "from moetier import Access, ExpertKey, Residency, TierConfig\n"
        "core = Residency([TierConfig(2), TierConfig(3)], 2, 4)\n"
        "core.acquire(Access(1, 0, (ExpertKey(0, 1), ExpertKey(0, 2)))); print(core.digest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


def test_the_first_access_that_differs_is_named() -> None:
    log = recorded().log
    accesses = [index for index, event in enumerate(log.events) if event[0] == "acquire"]
    index = accesses[3]
    name, access, ticket, digest, in_place = log.events[index]
    log.events[index] = (name, access, ticket, digest + 1, in_place)
    with pytest.raises(ReplayError, match=rf"event {index + 1}: decisions differ at access 4 \(time {access[0]}, "):
        replay(log)


def test_a_call_that_cannot_be_made_is_named() -> None:
    log = recorded().log
    log.events.insert(0, ("completed", 999, True))
    with pytest.raises(ReplayError, match="event 1, after access 0: completed cannot be made"):
        replay(log)


def test_a_refused_pin_is_no_event() -> None:
    core = Recorder(Residency([TierConfig(1)], 1, 1))
    with pytest.raises(CapacityError):
        core.pin(ExpertKey(0, 0))
    assert core.log.events == []


def damaged(tmp_path: Path, line: int, text: str | None) -> Path:
    """A log whose line (from 1) is replaced, or cut off together with the rest."""
    path = tmp_path / "run.log"
    recorded().log.save(path)
    lines = path.read_text().splitlines()
    lines[line - 1 :] = [] if text is None else [text, *lines[line:]]
    path.write_text("\n".join(lines) + "\n" if lines else "")
    return path


@pytest.mark.parametrize(
    ("line", "text", "message"),
    [
        (1, None, "line 1: not an event log of moetier"),
        (1, "hello", "line 1: not an event log of moetier"),
        (1, '{"format": "other"}', "line 1: not an event log of moetier"),
        (1, "[" * 100_000, "line 1: not an event log of moetier"),
        (
            1,
            '{"format": "moetier event log", "version": 99}',
            "line 1: event log version 99; this moetier reads 3, 4, 5",
        ),
        (1, '{"format": "moetier event log", "version": 3}', "line 1: a damaged header"),
        (3, "{", "line 3: not an event"),
        (3, '["explode"]', "line 3: not an event: unknown call"),
        (3, '["completed", 1]', "line 3: not an event: completed has 2 arguments, not 1"),
        (3, '["completed", "1", true]', "line 3: not an event: '1' is not a whole number"),
        (3, '["completed", 1, 1]', "line 3: not an event: 1 is not true or false"),
        (3, '["cancel", [0, 99]]', "line 3: not an event: expert 99 of layer 0 does not exist"),
        (3, '["cancel", [0, -1]]', "line 3: not an event: -1 is negative"),
        (3, '["cancel", 5]', "line 3: not an event: 5 is not a layer and an expert"),
        (3, '["acquire", [1, 0], 1, 1, []]', "line 3: not an event: an access has nine fields"),
        (3, '["acquire", [1, 0, [1, 1], [], 1, 0, []], 1, 1, []]', "line 3: not an event: an expert is given twice"),
        (3, '["acquire", [1, 0, [], [], 7, 0, []], 1, 1, []]', "line 3: not an event: 7 is not a valid Phase"),
        (3, '["acquire", [1, 0, [2], [], 1, 0, [0.5, 1]], 1, 1, []]', "line 3: not an event: mass is one finite"),
        (3, '["acquire", [1, 9, [], [], 1, 0, []], 1, 1, []]', "line 3: not an event: there is no layer 9"),
        (3, '["acquire", [1, 0, 5, [], 1, 0, []], 1, 1, []]', "not an event: experts, tokens and mass are lists"),
        (9, None, "line 8: the log ends after 7 events, its header says"),
    ],
)
def test_a_damaged_log_is_refused(line: int, text: str | None, message: str, tmp_path: Path) -> None:
    path = damaged(tmp_path, line, text)
    with pytest.raises(ConfigError) as caught:
        EventLog.load(path)
    assert str(caught.value).startswith(str(path)) and message in str(caught.value)


def test_a_damaged_tier_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log"
    EventLog((TierConfig(2),), 1, 1).save(path)
    for field, value in (("slots", "2"), ("slots", -1), ("policy", 3), ("colour", "red")):
        header = json.loads(path.read_text())
        header["tiers"][0][field] = value
        other = tmp_path / "other"
        other.write_text(json.dumps(header))
        with pytest.raises(ConfigError, match="line 1: a damaged header"):
            EventLog.load(other)


def test_a_file_that_is_not_text_or_not_there(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="bytes, line 1: not an event log of moetier"):
        EventLog.load(tmp_path / "bytes")
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        EventLog.load(tmp_path / "absent")
