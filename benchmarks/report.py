"""What the benchmarks share: runs in pieces, tables, numbers with their noise, marks, and their places in the docs."""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import GIB

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs" / "benchmarks.md"


def say(text: str) -> None:
    """To the person who waits."""
    print(text, file=sys.stderr, flush=True)


def size(nbytes: float) -> str:
    """In GiB."""
    return f"{nbytes / GIB:.2f} GiB"


def gbs(values: Sequence[float]) -> str:
    """Median and range of bytes/s, in GB/s."""
    return f"{statistics.median(values) / 1e9:.2f} ({min(values) / 1e9:.2f}–{max(values) / 1e9:.2f})"


def table(head: list[str], rows: list[list[str]]) -> str:
    """In markdown; the first column is text."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def median_of(runs: Sequence[Any], value: Callable[[Any], float]) -> float:
    """Over runs."""
    return statistics.median(value(run) for run in runs)


def bootstrap(values: Sequence[float], level: float = 0.95, samples: int = 4000, seed: int = 0) -> tuple[float, float]:
    """An interval for the median (percentile bootstrap, Efron 1979); the ends are values of the sample."""
    source = random.Random(seed)
    medians = sorted(statistics.median(source.choices(values, k=len(values))) for _ in range(samples))
    cut = (1 - level) / 2
    return medians[int(cut * samples)], medians[int((1 - cut) * samples) - 1]


@dataclass(frozen=True)
class Mark:
    """A goal and what was measured: `value` may be at most `limit`, or with `least` must be at least that."""

    name: str
    value: float
    limit: float
    least: bool = False

    @property
    def reached(self) -> bool:
        """Whether the goal was met."""
        return self.value >= self.limit if self.least else self.value <= self.limit

    def row(self) -> list[str]:
        """Of a table: goal, mark, measured, outcome."""
        sign = "≥" if self.least else "≤"
        return [self.name, f"{sign} {self.limit:g}", f"{self.value:.2f}", "reached" if self.reached else "**missed**"]


def marks_table(marks: Sequence[Mark]) -> str:
    """Every goal."""
    return table(["goal", "mark", "measured", "outcome"], [mark.row() for mark in marks])


def machine_line(machine: dict[str, Any]) -> str:
    """Hardware, versions, date and commit."""
    versions = ", ".join(f"{name} {value}" for name, value in machine["versions"].items())
    return (
        f"{machine['cpu']} ({machine['cores']} cores, {', '.join(machine['simd']) or 'no wide SIMD'}), "
        f"{size(machine['memory'])} of memory, Linux {machine['kernel']}, Python {machine['python']}, {versions}; "
        f"{machine['date'][:10]}, commit {machine['commit']}"
    )


def write_json(path: Path | None, found: dict[str, Any]) -> None:
    """The results, if a file was asked for."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n")


class Pieces:
    """A benchmark in pieces of some minutes, whose results meet in one file.

    Each piece is a run with `--resume`: it keeps what `--json` holds and measures what is missing, until `--minutes`
    are over. What the parts are is the benchmark's business; it asks `time_left` before each.
    """

    def __init__(self, args: argparse.Namespace):
        self._path: Path | None = args.json
        self._resume: bool = args.resume
        self._end = time.monotonic() + 60 * args.minutes
        self._begun = False

    @staticmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        """The command line's."""
        parser.add_argument("--json", type=Path, help="the results, written after every part")
        parser.add_argument("--resume", action="store_true", help="keep what --json holds, measure what is missing")
        parser.add_argument(
            "--minutes", type=float, default=float("inf"), help="begin no part after these; --resume goes on"
        )

    def open(self, fresh: dict[str, Any]) -> dict[str, Any]:
        """The results so far, or `fresh`: machine, settings and whatever else makes runs comparable, results empty.

        Ends the program where the file's were measured otherwise, so that pieces could not be compared.
        """
        fresh["machine"]["command"] = without_pieces(fresh["machine"]["command"])
        if not self._resume:
            return fresh
        if self._path is None:
            raise SystemExit("--resume: needs --json with the results so far")
        if not self._path.is_file():
            return fresh
        try:
            earlier: dict[str, Any] = json.loads(self._path.read_text())
            machine = earlier["machine"]
        except (ValueError, KeyError, TypeError) as error:
            raise SystemExit(f"{self._path}: no results of a benchmark ({error!r}); give another --json") from None
        now = json.loads(json.dumps(fresh))
        pairs = [(name, earlier.get(name), now[name]) for name in now if name != "machine" and now[name]]
        pairs += [(name, machine.get(name), now["machine"][name]) for name in ("cpu", "cores", "versions")]
        for name, before, here in pairs:
            if before != here:
                raise SystemExit(
                    f"{self._path}: its {name} were {json.dumps(before)}, here they are {json.dumps(here)}: pieces "
                    "must be measured alike; give another --json, or leave --resume out to begin anew"
                )
        for name in ("commit", "command"):
            known = machine[name].split("; ")
            machine[name] = "; ".join([*known, *[now["machine"][name]] * (now["machine"][name] not in known)])
        return earlier

    def time_left(self) -> bool:
        """Whether to begin another part; the first is always begun."""
        if self._begun and time.monotonic() > self._end:
            return False
        self._begun = True
        return True

    def write(self, found: dict[str, Any]) -> None:
        """The results, if a file was asked for."""
        write_json(self._path, found)


def without_pieces(command: str) -> str:
    """A command line without what is about pieces and places only."""
    words, kept = iter(command.split(" ")), []
    for word in words:
        if word in ("--json", "--minutes", "--work"):
            next(words, None)
        elif word != "--resume" and not word.startswith(("--json=", "--minutes=", "--work=")):
            kept.append(word)
    return " ".join(kept)


def update_section(name: str, text: str, docs: Path = DOCS) -> None:
    """Replace what is between the markers of a benchmark in a page."""
    begin, end = f"<!-- {name} results: begin -->", f"<!-- {name} results: end -->"
    before, found_begin, rest = docs.read_text().partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        raise SystemExit(f"{docs}: the markers {begin} and {end} are missing")
    docs.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")
