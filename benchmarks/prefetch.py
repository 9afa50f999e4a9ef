"""Prefetching on against off: never slower, and faster where the disk would be idle?

    python benchmarks/prefetch.py --json benchmarks/results/prefetch.json       # about forty minutes
    python benchmarks/prefetch.py --json benchmarks/results/prefetch.json --resume --minutes 5    # a piece of it
    python benchmarks/prefetch.py --update-docs benchmarks/results/prefetch.json

Pairs of runs, one with prefetching and one without, over recorded workloads: two models, several texts, shares of the
experts and numbers of sequences, prefill included. Each run is a fresh process with an empty page cache; the two of a
pair follow each other, and which comes first alternates. What counts is the ratio within a pair: the machine drifts.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import common
from common import BIG, MIB, TINY, Shape
from decode import failure, parse_threads
from engines import source_of
from readpath import shards_of
from report import (
    ROOT,
    Mark,
    Pieces,
    bootstrap,
    machine_line,
    marks_table,
    median_of,
    say,
    table,
    update_section,
)
from tasks import SCRIPT

DEMO = ROOT / "src" / "moetier" / "demo_model"
TEXTS = Path(__file__).parent / "texts"
SLOWER = 1.02  # what prefetching may cost
IDLE = 0.5  # a disk busy for less than this share of the time is called idle


@dataclass(frozen=True)
class Workload:
    """What is run: a model, the texts (seeds, or names of files), the share of the experts, and how many tokens."""

    model: str  # big or demo
    texts: tuple[int | str, ...]
    share: int
    prompt: int = 64
    tokens: int = 64
    warm_up: int = 0

    @property
    def name(self) -> str:
        """One line of a table."""
        texts = ", ".join(str(text) for text in self.texts)
        return f"{self.model}, text {texts}, {self.share} %, {self.prompt} + {self.tokens} tokens"


WORKLOADS = (
    *(Workload("big", (0,), share) for share in (25, 50, 75, 90)),
    Workload("big", (7,), 50),
    Workload("big", (1, 2, 3, 4), 50, tokens=24),
    Workload("big", (5,), 25, prompt=512, tokens=32),
    *(Workload("demo", (text,), share, tokens=128) for text, share in (("code", 25), ("prose", 50), ("german", 75))),
    Workload("demo", ("handbook",), 90, tokens=128),
    Workload("demo", ("letters", "records", "french", "manual"), 50, tokens=96),
)


class Comparison:
    """The sequence of runs, and what they found."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.shape: Shape = TINY if args.smoke else BIG
        self.work: Path = args.work.resolve()
        self.folders = {"big": self.work / ("tiny" if args.smoke else "big"), "demo": DEMO}
        self.pieces = Pieces(args)
        settings = {name: getattr(args, name) for name in ("threads", "prefetch", "smoke")}
        self.found = self.pieces.open(
            {
                "machine": common.machine_info(ROOT),
                "shape": asdict(self.shape),
                "settings": settings,
                "workloads": [],
            }
        )

    def main(self) -> dict[str, Any]:
        """What is missing, round by round, so that a slow minute of the machine does not fall on one workload alone."""
        chosen = [WORKLOADS[number] for number in self.args.workloads]
        if any(workload.model == "big" for workload in chosen):
            common.make_checkpoint(self.folders["big"], self.shape)
        specs = [self.spec(workload) for workload in chosen]
        for number in range(self.args.pairs):
            for workload, spec in zip(chosen, specs, strict=True):
                if len(self.entry(workload)["pairs"]) > number:
                    continue
                if not self.pieces.time_left():
                    say("the time is over; --resume goes on")
                    return self.found
                order = ("off", self.args.prefetch) if number % 2 == 0 else (self.args.prefetch, "off")
                pair: dict[str, Any] = {"bandwidth": self.bandwidth(workload), "first": order[0]}
                pair |= {"off" if way == "off" else "on": self.run(spec, way) for way in order}
                self.entry(workload)["pairs"].append(pair)
                say(f"[{number + 1}/{self.args.pairs}] {workload.name}: {describe(pair)}")
                self.pieces.write(self.found)
        return self.found

    def entry(self, workload: Workload) -> dict[str, Any]:
        """The workload's place in the results."""
        entries: list[dict[str, Any]] = self.found["workloads"]
        known = [entry for entry in entries if entry["name"] == workload.name]
        if not known:
            known = [{"name": workload.name, **asdict(workload), "pairs": []}]
            entries += known
        return known[0]

    def spec(self, workload: Workload) -> dict[str, Any]:
        """For the child."""
        prompt, count = workload.prompt, workload.tokens
        if self.args.smoke:
            prompt, count = 12, 6
        length = prompt + workload.warm_up + count
        return {
            "task": "arm",
            "kind": "moetier",
            "folder": str(self.folders[workload.model]),
            "share": workload.share,
            "threads": self.args.threads,
            "source": str(source_of("moetier", self.work)),
            "prompt": prompt,
            "warm_up": workload.warm_up,
            "context": length,
            "tokens": [self.text(workload.model, text, length) for text in workload.texts],
        }

    def text(self, model: str, text: int | str, length: int) -> list[int]:
        """Token ids of a made-up text (a seed) or of a file, repeated if it is too short."""
        if model == "big":
            return common.make_tokens(self.shape, length, int(text))
        from tokenizers import Tokenizer

        ids: list[int] = (
            Tokenizer.from_file(str(DEMO / "tokenizer.json")).encode((TEXTS / f"{text}.txt").read_text()).ids
        )
        return (ids * (length // len(ids) + 1))[:length]

    def bandwidth(self, workload: Workload) -> float:
        """Bytes/s of plain direct reads of the workload's files."""
        folder = self.folders[workload.model]
        files = shards_of(folder) or sorted(folder.glob("*.safetensors"))
        return common.raw_bandwidth(files, 4, 8 * MIB if self.args.smoke else 256 * MIB)

    def run(self, spec: dict[str, Any], prefetch: str) -> dict[str, Any]:
        """One run."""
        if not self.args.smoke:
            common.drop_page_cache()
        options = {"options": {"prefetch": prefetch}}
        result, ended = common.run_child(SCRIPT, spec | options, self.work)
        if result is None:
            raise SystemExit(f"prefetch {prefetch}: {failure(ended, None)['failed']}")
        return dict(result)


# -- the report --------------------------------------------------------------------------------------------------------


def whole(run: dict[str, Any]) -> float:
    """Seconds of the whole workload: prefill and every step."""
    return float(run["prefill_seconds"] + sum(run["warm_up_steps"]) + sum(run["steps"]))


def decoding(run: dict[str, Any]) -> float:
    """Seconds of the steps."""
    return float(sum(run["steps"]))


def ratios(pairs: list[dict[str, Any]], seconds: Any) -> list[float]:
    """Time with prefetching / time without, of every pair."""
    return [seconds(pair["on"]) / seconds(pair["off"]) for pair in pairs]


def disk_busy(pair: dict[str, Any]) -> float:
    """The share of the decoding time without prefetching in which the disk, at its full speed, would be reading."""
    off = pair["off"]
    return float(off["engine"]["read_bytes"] / pair["bandwidth"] / decoding(off))


def decision(run: dict[str, Any]) -> str:
    """The controller's, in its own words, with what became of the prefetches."""
    found = run.get("prefetches") or {}
    outcome = f"{found.get('issued', 0)} issued, {found.get('useful', 0)} useful, {found.get('wasted', 0)} wasted"
    words = (found.get("controller") or {}).get("words")
    return f"{words}; {outcome}" if words else outcome


def describe(pair: dict[str, Any]) -> str:
    """A pair in a line."""
    ratio = whole(pair["on"]) / whole(pair["off"])
    return f"on ÷ off {ratio:.3f} (decoding {decoding(pair['on']) / decoding(pair['off']):.3f}); {decision(pair['on'])}"


def measured(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The workloads that were run, in their own order, whichever piece came first."""
    names = [workload.name for workload in WORKLOADS]
    entries = [entry for entry in found["workloads"] if entry["pairs"]]
    return sorted(entries, key=lambda entry: names.index(entry["name"]) if entry["name"] in names else len(names))


def marks(found: dict[str, Any]) -> list[Mark]:
    """Never slower by more than 2 %, and faster where the disk is idle."""
    goals = []
    for entry in measured(found):
        ratio = statistics.median(ratios(entry["pairs"], whole))
        goals.append(Mark(f"{entry['name']}: time with prefetching ÷ without", ratio, SLOWER))
        read = median_of(entry["pairs"], lambda pair: pair["off"]["engine"]["read_bytes"])
        if read and median_of(entry["pairs"], disk_busy) < IDLE:
            ratio = statistics.median(ratios(entry["pairs"], decoding))
            goals.append(Mark(f"{entry['name']}: disk mostly idle, decoding with ÷ without", ratio, 1.0))
    return goals


def tables(found: dict[str, Any]) -> str:
    """Ratios with their noise, and the controller's decisions."""
    settings, rows = found["settings"], []
    for entry in measured(found):
        pairs = entry["pairs"]
        row = [entry["name"], f"{100 * median_of(pairs, disk_busy):.0f} %"]
        for seconds in (whole, decoding, lambda run: run["prefill_seconds"]):
            values = ratios(pairs, seconds)
            low, high = bootstrap(values)
            row.append(f"{statistics.median(values):.3f} ({low:.3f}–{high:.3f})")
        row.append(f"{1e3 * median_of(pairs, lambda pair: statistics.mean(pair['off']['steps'])):.0f}")
        same = all(pair["on"]["chosen"] == pair["off"]["chosen"] for pair in pairs)
        rows.append([*row, "yes" if same else "**no**", decision(pairs[-1]["on"])])
    counts = sorted({len(entry["pairs"]) for entry in measured(found)})
    pairs = "–".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))
    head = ["workload", "disk busy without", "whole run, on ÷ off", "decoding", "prefill", "step without, ms"]
    return "\n\n".join(
        [
            f"{machine_line(found['machine'])}. Threads: {settings['threads']}; pairs of runs per workload: {pairs}; "
            f"on is `prefetch={settings['prefetch']}`; medians of the pairs' ratios, in brackets their 95 % interval "
            f"(bootstrap); `python benchmarks/{found['machine']['command']}`.",
            marks_table(marks(found)),
            table([*head, "same tokens", "prefetches of the last pair"], rows),
        ]
    )


def main() -> None:
    """Measure, or write the docs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    listed = "; ".join(f"{number}: {workload.name}" for number, workload in enumerate(WORKLOADS)).replace("%", "%%")
    add("--workloads", type=int, nargs="+", choices=range(len(WORKLOADS)), metavar="NUMBER", help=listed)
    add("--pairs", type=int, default=5, help="runs with and without, of each workload")
    add("--prefetch", default="auto", help="what is on: auto, or the name of a predictor")
    add("--threads", type=parse_threads, default=1)
    add("--work", type=Path, default=Path(__file__).parent / "work")
    Pieces.add_options(parser)
    add("--smoke", action="store_true", help="a tiny model, two workloads, one pair: does it run?")
    add("--update-docs", type=Path, metavar="JSON", help="write results into docs/benchmarks.md")
    args = parser.parse_args()
    if args.update_docs:
        update_section("prefetch", tables(json.loads(args.update_docs.read_text())))
        return
    if args.prefetch == "off":
        parser.error("--prefetch: off is what it is compared with")
    if args.smoke:
        args.pairs, args.workloads = 1, args.workloads or [1, 7]
    args.workloads = args.workloads or list(range(len(WORKLOADS)))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the child
    print(tables(Comparison(args).main()))


if __name__ == "__main__":
    main()
