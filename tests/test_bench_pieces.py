"""Benchmarks in pieces: what is kept, what is missing, what is refused; and the turns of the lossy levers."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import lossy
import moetier
import report
from conftest import family_class
from families import VOCAB
from moetier.evaluation import evaluate, windows_of
from moetier.levers import Levers

TEXTS = [torch.randint(3, VOCAB, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (13, 6)]
MACHINE = {"cpu": "one", "cores": 2, "versions": {"torch": "2"}, "commit": "aaa", "date": "2026-01-01"}


def fresh(command: str = "b.py --tokens 9", commit: str = "aaa", tokens: int = 9) -> dict[str, Any]:
    machine = MACHINE | {"commit": commit, "command": command}
    return {"machine": machine, "settings": {"tokens": tokens, "sizes": (1, 2)}, "runs": []}


def pieces(path: Path | None, resume: bool = True, minutes: float = 1e9) -> report.Pieces:
    return report.Pieces(argparse.Namespace(json=path, resume=resume, minutes=minutes))


def test_a_piece_goes_on_where_another_ended(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    found = pieces(path).open(fresh("b.py --resume --tokens 9 --minutes 3 --work=/tmp --json r.json"))
    assert found["runs"] == [] and found["machine"]["command"] == "b.py --tokens 9"
    found["runs"].append(1)
    pieces(path).write(found)
    again = pieces(path).open(fresh(commit="bbb"))
    assert again["runs"] == [1] and again["machine"]["commit"] == "aaa; bbb"
    assert again["machine"]["command"] == "b.py --tokens 9"
    pieces(path).write(again)
    assert pieces(path).open(fresh(commit="bbb"))["machine"]["commit"] == "aaa; bbb"
    assert pieces(path, resume=False).open(fresh())["runs"] == []


def test_pieces_that_cannot_be_compared(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    pieces(path).write(fresh())
    with pytest.raises(SystemExit, match=r"r.json: its settings were .*9.* here they are .*8.*measured alike"):
        pieces(path).open(fresh(tokens=8))
    other = fresh()
    other["machine"]["cpu"] = "two"
    with pytest.raises(SystemExit, match=r'its cpu were "one", here they are "two"'):
        pieces(path).open(other)
    path.write_text("[]")
    with pytest.raises(SystemExit, match="no results of a benchmark"):
        pieces(path).open(fresh())
    with pytest.raises(SystemExit, match="needs --json"):
        pieces(None).open(fresh())


def test_a_piece_begins_at_least_one_part() -> None:
    over, unlimited = pieces(None, minutes=0), pieces(None)
    assert [over.time_left(), over.time_left()] == [True, False]
    assert all(unlimited.time_left() for _ in range(3))


# -- lossy levers ------------------------------------------------------------------------------------------------------


@pytest.fixture
def load(checkpoint: Any) -> Callable[[Levers], Any]:
    @contextmanager
    def open_model(levers: Levers) -> Iterator[Any]:
        model = moetier.from_pretrained(
            checkpoint("mixtral", torch.float32),
            slots=6,
            context=64,
            model_class=family_class("mixtral"),
            prefetch="off",
            **levers.to_dict(),
        )
        yield model
        model.moetier.close()

    return open_model


def test_turns_find_what_one_after_another_finds(load: Any) -> None:
    settings = [Levers(), Levers(cache_prior=0.6), Levers(drop_misses=1.0)]
    windows = windows_of(TEXTS, 24, 9)
    rows = lossy.take_turns(load, windows, settings, turn=4)
    assert [row["name"] for row in rows] == ["exact", "exact again", "cache_prior=0.6", "drop_misses=1"]
    for row, outcome in zip(rows, evaluate(load, windows, settings), strict=True):
        alone = outcome.to_dict()
        for name in (
            "nll",
            "kl",
            "agreement",
            "predicted",
            "tokens",
            "hit_rate",
            "bytes_per_token",
            "overlap",
            "dropped",
        ):
            assert row[name] == alone[name], (row["name"], name)
        assert len(row["speed"]) == 3 + 1 + 2 and min(row["speed"]) > 0  # turns of windows of 9, 4 and 6 tokens
    assert set(rows[0]["speed"]) == {1.0}


def test_the_order_of_turns_changes() -> None:
    class Counted:
        seconds = 0.0

        def __init__(self, name: str):
            self.name = name

        def step(self, token: int) -> str:
            calls.append(self.name)
            self.seconds += 1 + token
            return f"{self.name}{token}"

    for number, order in ((0, "aabbcc"), (1, "bbccaa"), (2, "ccaabb"), (3, "aabbcc")):
        calls: list[str] = []
        seconds, logits = lossy.one_round([Counted(name) for name in "abc"], [0, 1], number)
        assert "".join(calls) == order
        assert seconds == [3.0] * 3 and logits == [[f"{name}0", f"{name}1"] for name in "abc"]


@pytest.fixture
def main(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The program on a tiny model instead of the demo model."""
    (tmp_path / "code-1.txt").write_text("def main(): pass")
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- lossy results: begin -->\nold\n<!-- lossy results: end -->\nb\n")
    monkeypatch.setattr(lossy, "loader", lambda *_: load)
    monkeypatch.setattr(lossy, "DOCS", page)
    monkeypatch.setattr(torch, "set_num_interop_threads", lambda _: None)  # can be set once in a process

    class Tokenizer:
        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [3 + ord(letter) % 90 for letter in text]}

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda _: Tokenizer())

    def run(*arguments: str) -> Any:
        out = tmp_path / "lossy.json"
        words = ["lossy.py", str(tmp_path), "--tokens", "7", "--turn", "3", "--json", str(out), *arguments]
        monkeypatch.setattr(sys, "argv", words)
        lossy.main()
        return json.loads(out.read_text())

    return run


def names(found: dict[str, Any]) -> dict[str, list[str]]:
    return {share: [row["name"] for row in rows] for share, rows in found["runs"].items()}


def test_lossy_in_pieces(main: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ("--settings", "14", "cache_prior=0.6", "3", "--at-once", "2", "--resume")
    first = main(*chosen, "--minutes", "0")
    assert names(first) == {"25": ["exact", "drop_misses=0.5", "cache_prior=0.6"]}
    second = main(*chosen, "--minutes", "0")
    assert second["runs"]["25"] == first["runs"]["25"] and names(second)["50"] == names(first)["25"]
    third = main(*chosen, "--update-docs")
    assert names(third)["25"] == ["exact", "drop_misses=0.5", "cache_prior=0.6", "cache_prior=0.5"]
    assert third["runs"]["25"][:3] == first["runs"]["25"]
    assert main(*chosen) == third  # nothing is missing
    page = (tmp_path / "page.md").read_text()
    rows = [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| ")]
    assert [row for row in rows if row[2:3] in "*`"] == [
        "| **exact**", "| `cache_prior=0.5`", "| `drop_misses=0.5`", "| `cache_prior=0.6`"
    ] * 2  # fmt: skip
    assert "the first 7 of each of 1 held-out texts (code)" in page and "took turns with the others every 3" in page
    with pytest.raises(SystemExit, match="its settings were"):
        main("--resume", "--turn", "2")


def test_another_exact_model_is_refused(main: Any, tmp_path: Path) -> None:
    main("--settings", "0", "--shares", "25")
    path = tmp_path / "lossy.json"
    found = json.loads(path.read_text())
    found["runs"]["25"][0]["nll"] += 0.1
    path.write_text(json.dumps(found))
    with pytest.raises(SystemExit, match="the exact model came out as"):
        main("--settings", "1", "--shares", "25", "--resume")


@pytest.mark.parametrize(("said", "answer"), [("18", "the last number is 17"), ("speed=1", "is no lever")])
def test_settings_that_do_not_exist(said: str, answer: str, main: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main("--settings", said)
    assert answer in capsys.readouterr().err
