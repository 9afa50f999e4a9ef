"""What the benchmarks' reports share: tables, numbers with their noise, marks, and their places in the docs."""

from __future__ import annotations

import json
import random
import statistics
import sys
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


def update_section(name: str, text: str, docs: Path = DOCS) -> None:
    """Replace what is between the markers of a benchmark in a page."""
    begin, end = f"<!-- {name} results: begin -->", f"<!-- {name} results: end -->"
    before, found_begin, rest = docs.read_text().partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        raise SystemExit(f"{docs}: the markers {begin} and {end} are missing")
    docs.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")
