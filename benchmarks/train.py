"""Training speed of a model whose experts do not fit: step time, memory and bytes against the same loop in memory.

    python benchmarks/train.py --json benchmarks/results/train.json --resume --minutes 5    # a piece; again until done
    python benchmarks/train.py --update-docs benchmarks/results/train.json
    python benchmarks/train.py --smoke                                                      # does it run?

A run is a fresh process that makes some steps of 4,096 tokens with AdamW, and then a commit. A part is a pair of runs,
in memory and an arm, one behind the other, which first alternating; what counts is the ratio within a pair. Right
before and after an arm the disk's own speed is measured, with plain direct reads and writes at once. This file has the
command line and the sequence; `train_tasks.py` runs the arms (`train_deepspeed.py` the one that is DeepSpeed's),
`train_disk.py` the disk, `train_report.py` writes the tables.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import common
import train_deepspeed
from common import MIB, MemoryGroup, Shape, tidy_end
from decode import failure
from report import ROOT, Pieces, say, size
from train_disk import MixedDisk
from train_report import tables, update_docs
from train_tasks import SCRIPT, Arm

# 128 experts of 6.3 MB in float32: 0.8 GB of weights, 1.6 GB of optimizer state, 0.8 GB of gradients
MODEL = Shape(512, 4, 32, 4, 1024, 8, 2, 64, vocab=2048)
TINY = Shape(64, 2, 8, 2, 64, 2, 1, 32, vocab=64, topics=4)
ARMS = ("moetier-25", "moetier-50", "moetier-100")
OTHER_ARMS = (
    "reference",
    "moetier-25-backward",
    "moetier-25-periodic",
    "moetier-25-writethrough",
    "moetier-25-recompute",
    train_deepspeed.NAME,
)
SETTINGS = ("tokens", "rows", "warm_up", "steps", "lr", "threads", "seed", "memory_limit", "smoke")


class Benchmark:
    """The sequence of pairs, and what they found."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.shape = TINY if args.smoke else MODEL
        self.work: Path = args.work.resolve()
        self.pieces = Pieces(args)
        settings = {name: getattr(args, name) for name in SETTINGS}
        fresh = {"machine": common.machine_info(ROOT), "shape": asdict(self.shape), "settings": settings, "pairs": []}
        self.found = self.pieces.open(fresh)
        self.disk = MixedDisk(self.work / "disk.bin", (16 if args.smoke else 1024) * MIB)

    def spec(self, dtype: str) -> dict[str, Any]:
        """What all children of a dtype are told."""
        args = self.args
        steps = args.warm_up + args.steps
        return {
            "folder": str(self.work / f"train-{'tiny-' * args.smoke}{dtype}"),
            "run": str(self.work / "train-run"),
            "source": str(ROOT / "src"),
            "shape": asdict(self.shape),
            "dtype": dtype,
            "tokens": [common.make_tokens(self.shape, args.tokens, args.seed + step) for step in range(steps)],
            "rows": args.rows,
            "lr": args.lr,
            "threads": args.threads,
        }

    def task(self, task: str, dtype: str, **more: Any) -> Any:
        """A child without a limit, which must succeed."""
        result, ended = common.run_child(SCRIPT, self.spec(dtype) | {"task": task} | more, self.work)
        if result is None:
            raise SystemExit(f"{task}: failed with exit status {ended.returncode}\n{ended.stderr}")
        return result

    def main(self) -> None:
        """All pairs that are missing, in order."""
        args = self.args
        if train_deepspeed.NAME in args.arms:
            self.deepspeed()
        for dtype in args.dtypes:
            self.task("make", dtype)
        if "base" not in self.found:
            self.found["base"] = self.task("base", "bfloat16", folder=str(self.work / "micro"))
        done = {(pair["round"], pair["dtype"], pair["arm"]) for pair in self.found["pairs"]}
        for number, dtype, arm in itertools.product(range(args.repeat), args.dtypes, args.arms):
            if (number, dtype, arm) in done:
                continue
            if not self.pieces.time_left():
                say("the time is over; --resume goes on")
                break
            pair = {"round": number, "dtype": dtype, "arm": arm, **self.pair(dtype, arm, number % 2 == 1)}
            self.found["pairs"].append(pair)
            self.pieces.write(self.found)
        print(tables(self.found))

    def deepspeed(self) -> None:
        """Its operators, compiled, and its version, the same in all pieces."""
        train_deepspeed.check()
        say("DeepSpeed's operators are compiled unless they are there")
        here = self.task("build", "float32")["version"]
        before = self.found.setdefault("deepspeed", here)
        if before != here:
            raise SystemExit(f"DeepSpeed was {before}, here it is {here}: pieces must be measured alike")

    def pair(self, dtype: str, arm: str, swapped: bool) -> dict[str, Any]:
        """In memory, and an arm."""
        names = [arm, "memory"] if swapped else ["memory", arm]
        runs = {}
        for name in names:
            runs["memory" if name == "memory" else "run"] = self.run(dtype, name)
            say(f"{dtype}, {describe(name, runs['memory' if name == 'memory' else 'run'], self.args.warm_up)}")
        return runs

    def run(self, dtype: str, arm: str) -> dict[str, Any]:
        """One run, with an empty page cache, between two looks at the disk if it uses it."""
        spec = self.spec(dtype) | {"task": "train", "arm": arm}
        on_disk = Arm.of(arm).on_disk
        dropped = not self.args.smoke and common.drop_page_cache()
        before = [self.bandwidth()] if on_disk else []
        with self.group() as group:
            result, ended = common.run_child(SCRIPT, spec, self.work, group)
            stats = None if group is None else group.stats()
        run: dict[str, Any] = {"cache_dropped": dropped, "cgroup": stats, "peak_anon": ended.peak_anon}
        if before:
            run["bandwidth"] = [*before, self.bandwidth()]
        return run | (result or failure(ended, stats))

    def bandwidth(self) -> float:
        """Bytes/s of plain direct reads and writes at once, now."""
        return self.disk.bandwidth((16 if self.args.smoke else 1024) * MIB)

    @contextmanager
    def group(self) -> Iterator[MemoryGroup | None]:
        """A control group that measures; it limits nothing."""
        if self.args.memory_limit == "none":
            yield None
        else:
            with common.memory_group(1 << 50) as group:
                yield group


def describe(arm: str, run: dict[str, Any], warm_up: int) -> str:
    """A run in a line."""
    if "failed" in run:
        return f"{arm}: {run['failed']}"
    steps = run["steps"][warm_up:]
    seconds, read, written = (sum(step[name] for step in steps) / len(steps) for name in ("seconds", "read", "written"))
    parts = ", ".join(f"{name} {sum(step[name] for step in steps) / len(steps):.2f}" for name in PARTS)
    text = f"{arm}: {seconds:.2f} s a step ({parts}), {read / 1e9:.2f} GB read, {written / 1e9:.2f} GB written"
    text += f", peak {size(run['memory']['VmHWM'])}, loss {run['steps'][0]['loss']:.3f} → {steps[-1]['loss']:.3f}"
    return text


PARTS = ("forward", "backward", "update")


def arm_name(text: str) -> str:
    """An arm that exists."""
    try:
        Arm.of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    names = ", ".join((*ARMS, *OTHER_ARMS))
    add("--arms", nargs="+", type=arm_name, default=list(ARMS), metavar="ARM", help=f"such as {names}")
    add("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32"], help="of the experts")
    add("--repeat", type=int, default=2, help="pairs of each arm, interleaved")
    add("--tokens", type=int, default=4096, help="of a step")
    add("--rows", type=int, default=8, help="sequences of a step")
    add("--warm-up", type=int, default=2, help="steps before the measured ones; in the second, files get their size")
    add("--steps", type=int, default=2, help="measured steps")
    add("--lr", type=float, default=1e-3)
    add("--threads", type=int, default=2, help="of torch")
    add("--seed", type=int, default=0, help="of the text")
    add("--memory-limit", choices=("measure", "none"), default="measure", help="measure in control groups, or none")
    add("--work", type=Path, default=Path(__file__).parent / "work", help="folder for checkpoints and runs (10 GB)")
    Pieces.add_options(parser)
    add("--smoke", action="store_true", help="a tiny model and few tokens: do all arms run?")
    add("--update-docs", type=Path, metavar="JSON", help="write results into docs/benchmarks.md")
    args = parser.parse_args()
    if args.smoke:
        args.tokens, args.rows, args.steps, args.repeat = 64, 2, 2, 1
    if args.tokens % args.rows:
        parser.error(f"--tokens {args.tokens} must be a multiple of --rows {args.rows}")
    return args


def main() -> None:
    """The docs, or everything."""
    args = parse()
    if args.update_docs:
        update_docs(json.loads(args.update_docs.read_text()))
        return
    with tidy_end():
        Benchmark(args).main()


if __name__ == "__main__":
    main()
