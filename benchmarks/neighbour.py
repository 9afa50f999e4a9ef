"""Decode with a busy neighbour: another program that computes without pause on the same cores.

    python benchmarks/neighbour.py --json benchmarks/results/neighbour.json       # about half an hour
    python benchmarks/neighbour.py --json benchmarks/results/neighbour.json --resume --minutes 5    # a piece of it
    python benchmarks/neighbour.py --update-docs benchmarks/results/neighbour.json

torch's threads wait for each other at the end of every product. One that cannot run, because another program has its
core, makes all of them wait. Here the plain model in memory and moetier decode the same text with and without such a
neighbour, with set numbers of threads and with none set, each in a fresh process. A run alone and one beside the
neighbour follow each other, and what counts is the ratio within such a pair; the pairs are interleaved.
"""

from __future__ import annotations

import argparse
import itertools
import json
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import common
from arms import ENGINES, split
from common import BIG, DEFAULT_THREADS, TINY
from decode import failure, parse_threads
from decode_report import by_cell, threads_label, title
from engines import source_of
from report import ROOT, Pieces, machine_line, median_of, say, table, update_section
from tasks import SCRIPT

ARMS = ("memory", "moetier-50", "foundation-50")
SPIN = "while True: pass"


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """So many processes that only compute, for as long as the block lasts."""
    running = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that is missing, in order."""
    shape = TINY if args.smoke else BIG
    work: Path = args.work.resolve()
    folder = work / ("tiny" if args.smoke else "big")
    common.make_checkpoint(folder, shape)
    length = args.prompt + args.warm_up + args.tokens
    spec = {
        "task": "arm",
        "folder": str(folder),
        "prompt": args.prompt,
        "warm_up": args.warm_up,
        "context": length,
        "tokens": common.make_tokens(shape, length, args.seed),
    }
    pieces, names = Pieces(args), ("prompt", "warm_up", "tokens", "seed", "neighbours", "smoke")
    settings = {name: getattr(args, name) for name in names}
    found = pieces.open(
        {"machine": common.machine_info(ROOT), "shape": asdict(shape), "settings": settings, "runs": []}
    )
    done = {(run["round"], run["threads"], run["arm"]) for run in found["runs"]}
    for number, threads, arm in itertools.product(range(args.repeat), args.threads, args.arms):
        if (number, threads, arm) in done:
            continue
        if not pieces.time_left():
            say("the time is over; --resume goes on")
            break
        for count in (0, args.neighbours):
            run = {"round": number} | run_arm(spec, arm, threads, count, work, drop=not args.smoke)
            found["runs"].append(run)
            say(f"[{number + 1}/{args.repeat}] {describe(run)}")
        pieces.write(found)
    return found


def run_arm(spec: dict[str, Any], arm: str, threads: int | str, count: int, work: Path, drop: bool) -> dict[str, Any]:
    """One run beside `count` neighbours."""
    kind, share = split(arm)
    more: dict[str, Any] = {"kind": kind, "share": share or 100, "threads": threads}
    more["source"] = str(source_of(kind if kind in ENGINES else "moetier", work))
    if drop:
        common.drop_page_cache()
    with neighbours(count):
        result, ended = common.run_child(SCRIPT, spec | more, work)
    return {"arm": arm, "threads": threads, "neighbours": count} | (result or failure(ended, None))


def describe(run: dict[str, Any]) -> str:
    """A run in a line."""
    name = f"{run['arm']}, {threads_label(run['threads'])}, {run['neighbours']} neighbours"
    return f"{name}: {run['failed']}" if "failed" in run else f"{name}: {1e3 * step_of(run):.0f} ms a step"


def step_of(run: dict[str, Any]) -> float:
    """The median step of a run, in seconds: a mean would be the worst steps'."""
    return statistics.median(run["steps"])


def pairs_of(runs: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Runs of one cell alone, and those of the same round beside neighbours; without those whose other one failed."""
    alone = {run["round"]: run for run in runs if not run["neighbours"]}
    return [(alone[run["round"]], run) for run in runs if run["neighbours"] and run["round"] in alone]


def spread(values: Sequence[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})"


def tables(found: dict[str, Any]) -> str:
    """Steps alone and beside the neighbour."""
    settings = found["settings"]
    rows = []
    for (arm, threads), runs in by_cell(found["runs"]).items():
        pairs = pairs_of(runs)
        if not pairs:
            continue
        alone, beside = zip(*pairs, strict=True)
        ratios = [step_of(after) / step_of(before) for before, after in pairs]
        before, after = median_of(alone, step_of), median_of(beside, step_of)
        tail = median_of(beside, lambda run: max(run["steps"]))
        used = sorted({str(run["torch_threads"]) for run in runs})
        row = [title(arm), threads_label(threads), ", ".join(used)]
        rows.append([*row, f"{1e3 * before:.0f}", f"{1e3 * after:.0f}", f"{1e3 * tail:.0f}", f"{spread(ratios)}"])
    head = ["arm", "threads asked for", "torch's threads in the run", "step alone, ms", "beside the neighbour, ms"]
    rounds = 1 + max(run["round"] for run in found["runs"])
    lines = [
        f"{machine_line(found['machine'])}. {settings['neighbours']} neighbour"
        f"{'' if settings['neighbours'] == 1 else 's'}; {settings['prompt']} prompt tokens, {settings['tokens']} "
        f"measured ones; median steps, and their medians over {rounds} interleaved pairs of runs; "
        f"`python benchmarks/{found['machine']['command']}`.",
        table([*head, "its slowest step, ms", "beside ÷ alone (min–max)"], rows),
    ]
    lines += [f"Failed: {describe(run)}" for run in found["runs"] if "failed" in run]
    return "\n\n".join(lines)


def main() -> None:
    """Measure, or write the docs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM")
    add("--threads", type=parse_threads, nargs="+", default=[1, 2, DEFAULT_THREADS])
    add("--neighbours", type=int, default=1, help="processes that compute without pause")
    add("--repeat", type=int, default=3)
    add("--prompt", type=int, default=64)
    add("--warm-up", type=int, default=4)
    add("--tokens", type=int, default=16, help="measured tokens")
    add("--seed", type=int, default=0, help="of the text")
    add("--work", type=Path, default=Path(__file__).parent / "work")
    Pieces.add_options(parser)
    add("--smoke", action="store_true", help="a tiny model, one run: does it run?")
    add("--update-docs", type=Path, metavar="JSON", help="write results into docs/benchmarks.md")
    args = parser.parse_args()
    if args.update_docs:
        update_section("neighbour", tables(json.loads(args.update_docs.read_text())))
        return
    if args.smoke:
        args.prompt, args.warm_up, args.tokens, args.repeat = 8, 1, 3, 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the child and the neighbours
    print(tables(compare(args)))


if __name__ == "__main__":
    main()
