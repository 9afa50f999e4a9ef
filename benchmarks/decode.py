"""Decode speed of a model whose experts do not fit: in memory, with moetier, with its foundation, and with its peers.

    python benchmarks/decode.py --json benchmarks/results/decode.json     # everything, about an hour and a half
    python benchmarks/decode.py --update-docs benchmarks/results/decode.json
    python benchmarks/decode.py --smoke                                   # do all arms run? some minutes

Each arm runs in a fresh process, in a memory control group of its own. See docs/benchmarks.md for the method. This file
has the command line and the sequence of runs; `arms.py` loads the models, `tasks.py` runs them, `decode_report.py`
writes the tables.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import common
import llamacpp
from arms import ENGINES, PEERS, split
from common import BIG, DEFAULT_THREADS, GIB, MIB, TINY, Ended, MemoryGroup, tidy_end
from decode_report import disk_summary, tables, update_docs
from engines import source_of
from readpath import shards_of
from report import ROOT, say, size, write_json
from tasks import SCRIPT, SHARES

ARMS = (
    "memory",
    *(f"moetier-{share}" for share in SHARES),
    *(f"{kind}-{share}" for share in (25, 50) for kind in ("foundation",)),
    *(f"{kind}-50" for kind in PEERS if kind != "llamacpp" or llamacpp.installed()),
)
OTHER_ARMS = (
    *(f"foundation-{share}" for share in (75, 100)),
    *(f"{kind}-{share}" for share in (25, 50, 75) for kind in PEERS if f"{kind}-{share}" not in ARMS),
)
PREFILL_ARMS = ("memory", "moetier-25", "foundation-25")
WITH_DEFAULTS = ("memory", *ENGINES)  # what is also run without any setting of threads
SETTINGS = ("prompt", "warm_up", "tokens", "repeat", "seed", "memory_limit", "prefill", "store", "prefetch", "smoke")


class Benchmark:
    """The sequence of children, and what they found."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.shape = TINY if args.smoke else BIG
        self.work: Path = args.work.resolve()
        self.folder = self.work / ("tiny" if args.smoke else "big")
        length = args.prompt + args.warm_up + args.tokens
        packed = self.folder.with_name(self.folder.name + "-packed")
        self.options = {} if args.prefetch is None else {"prefetch": args.prefetch}
        if args.store is not None:
            self.options["store"] = {"packed": str(packed), "checkpoint": "none"}[args.store]
        self.spec = {
            "folder": str(self.folder),
            "offload": str(self.folder.with_name(self.folder.name + "-accelerate")),
            "packed": str(packed),
            "gguf": str(self.folder.with_suffix(".gguf")),
            "source": str(ROOT / "src"),
            "prompt": args.prompt,
            "warm_up": args.warm_up,
            "context": length,
            "tokens": common.make_tokens(self.shape, length, args.seed),
            "time_core": args.time_core,
        }
        self.found: dict[str, Any] = {
            "machine": common.machine_info(ROOT),
            "shape": asdict(self.shape),
            "settings": {"threads": args.threads, **{key: getattr(args, key) for key in SETTINGS}},
            "runs": [],
            "prefill_runs": [],
        }
        self.samples = 0  # of the disk's bandwidth

    def task(self, task: str, **more: Any) -> Any:
        """A child without a limit, which must succeed."""
        result, ended = common.run_child(SCRIPT, self.spec | {"task": task} | more, self.work)
        if result is None:
            raise SystemExit(f"{task}: failed with exit status {ended.returncode}\n{ended.stderr}")
        return result

    def prepare(self) -> None:
        """Files, plans and the interpreter's own memory."""
        kinds = {split(arm)[0] for arm in self.all_arms()}
        say(f"checkpoint: {self.folder}")
        self.task("make", shape=asdict(self.shape))
        if kinds & {"accelerate", "mmap-fused"}:
            self.make_once("offload", Path(self.spec["offload"]) / "offload.json", "accelerate's offload folder")
        if "llamacpp" in kinds:
            self.make_once("gguf", Path(self.spec["gguf"]), "llama.cpp's file")
        if self.args.store == "packed":
            say("the packed store")
            self.task("pack")
        for kind in kinds & set(ENGINES):
            source_of(kind, self.work)
        self.found["plans"] = self.task("plan", options=self.options)
        if self.args.prefill:
            self.found["prefill_plans"] = self.task("plan", options=self.options, context=self.args.prefill)
        self.found["base"] = self.task("base", folder=str(self.work / "micro"))
        base = self.found["base"]
        say(f"interpreter and libraries: {size(base['VmHWM'])}, {size(base['RssAnon'])} of it anonymous")
        if not self.args.no_skew:
            self.found["skew"] = self.task("skew")
            say(f"routing: {self.found['skew']}")

    def make_once(self, task: str, file: Path, name: str) -> None:
        """Have a task make a file, unless it is there and newer than the checkpoint."""
        if not file.is_file() or file.stat().st_mtime < (self.folder / "shape.json").stat().st_mtime:
            say(name)
            self.task(task)

    def all_arms(self) -> list[str]:
        """Of decoding and of the prefills."""
        return [*self.args.arms, *(self.args.prefill_arms if self.args.prefill else ())]

    def limit_of(self, arm: str, plans: dict[str, Any]) -> int | None:
        """Bytes for an arm's control group: moetier's plan for the share and the interpreter; None for no limit."""
        _, share = split(arm)
        if self.args.memory_limit == "none" or share in (None, 100):
            return None
        if self.args.memory_limit != "auto":
            return int(self.args.memory_limit)
        return int(self.found["base"]["VmHWM"] + plans[str(share)]["total"])

    def measure_disk(self) -> None:
        """The disk's limit, and moetier's read path against it."""
        say("disk")
        nbytes = 8 * MIB if self.args.smoke else GIB
        if not self.args.smoke:
            common.drop_page_cache()
        self.found["disk"] = self.task("disk", nbytes=nbytes, rounds=self.args.disk_rounds, top_k=self.shape.top_k)
        raw, best, engine = disk_summary(self.found["disk"])
        say(f"  plain direct reads {raw / 1e9:.2f} GB/s ({best} threads), moetier: {engine}")

    def bandwidth(self) -> float:
        """Bytes/s of plain direct reads now, with the number of threads that was best at the start."""
        threads = int(disk_summary(self.found["disk"])[1]) if "disk" in self.found else 4
        nbytes = 8 * MIB if self.args.smoke else 512 * MIB
        self.samples += 1
        return common.raw_bandwidth(shards_of(self.folder), threads, nbytes, self.samples * (nbytes // MIB))

    def run_arm(self, task: str, arm: str, threads: int | str, plans: dict[str, Any], **more: Any) -> dict[str, Any]:
        """One run of one arm, with an empty page cache, between two looks at the disk if it is one of ours."""
        kind, share = split(arm)
        limit = self.limit_of(arm, plans)
        dropped = not self.args.smoke and common.drop_page_cache()
        more |= {"task": task, "kind": kind, "share": share or 100, "threads": threads}
        if kind == "moetier":
            more["options"] = self.options
        if kind in ENGINES:
            more["source"] = str(source_of(kind, self.work))
        if kind == "accelerate":
            more["resident"] = self.resident(share)
        before = [self.bandwidth()] if kind in ENGINES else []
        with ExitStack() as stack:
            group: MemoryGroup | None = None
            if self.args.memory_limit != "none":  # without a limit the group still measures
                group = stack.enter_context(common.memory_group(limit if limit is not None else 1 << 50))
            result, ended = common.run_child(SCRIPT, self.spec | more, self.work, group)
            stats = group.stats() if group is not None else None
        run: dict[str, Any] = {"arm": arm, "threads": threads, "limit": limit, "cache_dropped": dropped}
        run |= {"cgroup": stats, "peak_anon": ended.peak_anon}
        if before:
            run["bandwidth"] = [*before, self.bandwidth()]
        if kind == "accelerate":
            run["resident_layers"] = more["resident"]
        return run | (result or failure(ended, stats))

    def resident(self, share: int | None) -> int:
        """Layers whose experts accelerate keeps in memory."""
        if self.args.accelerate_resident is not None:
            return int(self.args.accelerate_resident)
        return int(self.shape.layers * (share or 100) / 100)

    def matrix(self, arms: list[str]) -> list[tuple[int | str, str]]:
        """Every arm with every number of threads; without any setting, those whose users would run them so."""
        return [
            (threads, arm)
            for threads in self.args.threads
            for arm in arms
            if threads != DEFAULT_THREADS or split(arm)[0] in WITH_DEFAULTS
        ]

    def main(self) -> None:
        """Everything, in order."""
        self.prepare()
        for arm in self.args.arms:
            limit = self.limit_of(arm, self.found["plans"])
            say(f"  {arm}: {'no limit' if limit is None else size(limit)}")
        if not self.args.no_disk:
            self.measure_disk()
        texts = [common.make_tokens(self.shape, self.args.prefill, self.args.seed + 1 + n) for n in range(2)]
        for number in range(self.args.repeat):
            for threads, arm in self.matrix(self.args.arms):
                run = self.run_arm("arm", arm, threads, self.found["plans"])
                self.keep("runs", run, number)
            for threads, arm in self.matrix(self.args.prefill_arms) if self.args.prefill else []:
                plans = self.found["prefill_plans"]
                run = self.run_arm("prefill", arm, threads, plans, texts=texts, context=self.args.prefill)
                self.keep("prefill_runs", run, number)
        print(tables(self.found))

    def keep(self, kind: str, run: dict[str, Any], number: int) -> None:
        """Tell of a run, and save what there is."""
        self.found[kind].append(run)
        say(f"[{number + 1}/{self.args.repeat}] {describe(run)}")
        write_json(self.args.json, self.found)


def failure(ended: Ended, stats: dict[str, int] | None) -> dict[str, Any]:
    """What to note of a run that gave nothing."""
    killed = bool(stats and stats["killed"])
    text = "killed: more than its memory limit" if killed else ended.stderr[-500:]
    return {"failed": f"exit status {ended.returncode}: {text}"}


def describe(run: dict[str, Any]) -> str:
    """A run in a line."""
    name = f"{run['arm']}, threads {run['threads']}"
    if "failed" in run:
        return f"{name}: {run['failed']}"
    if "passes" in run:
        passes = ", ".join(f"{one['seconds']:.2f} s" for one in run["passes"])
        return f"{name}: prefills of {run['prompt']} tokens in {passes}"
    steps = run["steps"]
    text = (
        f"{name}: {len(steps) / sum(steps):.2f} tokens/s, prefill {run['prefill_seconds']:.1f} s, "
        f"load {run['load_seconds']:.1f} s, {run['read_bytes'] / len(steps) / 1e6:.0f} MB/token, "
        f"peak {size(run['memory']['VmHWM'])} (anonymous {size(run['peak_anon'])}"
    )
    if run["cgroup"]:
        text += f", group {size(run['cgroup']['peak'])}, limit hit {run['cgroup']['limit_hits']} times"
    if "engine" in run:
        parts = {key: run["engine"][key] for key in ("wait", "compute", "decide", "core") if key in run["engine"]}
        text += "; " + ", ".join(f"{key} {1e3 * value / len(steps):.1f} ms" for key, value in parts.items())
    return text + ")"


def parse_threads(text: str) -> int | str:
    """A number of torch's threads, or `default`."""
    if text == DEFAULT_THREADS:
        return text
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: a number of threads, or {DEFAULT_THREADS}")
    return int(text)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--arms", nargs="*", choices=(*ARMS, *OTHER_ARMS), default=list(ARMS), metavar="ARM")
    add("--repeat", type=int, default=3, help="runs of each arm, interleaved")
    add(
        "--threads",
        type=parse_threads,
        nargs="+",
        default=[1, 2, DEFAULT_THREADS],
        help="torch threads; default: set none (in memory and moetier only)",
    )
    add("--prompt", type=int, default=64, help="tokens of the prefill")
    add("--warm-up", type=int, default=4, help="decoded tokens before the measured ones")
    add("--tokens", type=int, default=32, help="measured tokens")
    add("--prefill", type=int, default=512, help="tokens of the separate prefill runs; 0 for none")
    choices = [arm for arm in (*ARMS, *OTHER_ARMS) if split(arm)[0] != "llamacpp"]
    add("--prefill-arms", nargs="+", choices=choices, default=list(PREFILL_ARMS), metavar="ARM")
    add("--seed", type=int, default=0, help="of the text")
    add("--store", choices=("checkpoint", "packed"), help="what moetier reads; by default what it finds")
    add("--prefetch", help="moetier's option of that name: off, auto, or a predictor; by default its own default")
    add("--time-core", action="store_true", help="also time the residency core (costs some time itself)")
    add("--memory-limit", default="auto", help="auto (by moetier's plan), none, or bytes for the 25, 50 and 75 %% arms")
    add("--accelerate-resident", type=int, help="layers whose experts accelerate keeps in memory")
    add("--work", type=Path, default=Path(__file__).parent / "work", help="folder for checkpoints (8 GB)")
    add("--json", type=Path, help="where to write the results")
    add("--disk-rounds", type=int, default=5)
    add("--no-disk", action="store_true", help="skip the disk measurement")
    add("--no-skew", action="store_true", help="skip the routing measurement")
    add("--smoke", action="store_true", help="a tiny model and few tokens: do all arms run?")
    add("--update-docs", type=Path, metavar="JSON", help="write results into docs/benchmarks.md and draw the plot")
    args = parser.parse_args()
    if args.smoke:
        args.prompt, args.warm_up, args.tokens, args.repeat = 16, 2, 4, 1
        args.prefill = min(args.prefill, 32)
        args.disk_rounds = min(args.disk_rounds, 2)
    if args.memory_limit not in ("auto", "none") and not args.memory_limit.isdigit():
        parser.error("--memory-limit: auto, none, or a number of bytes")
    return args


def main() -> None:
    """The docs, or everything."""
    args = parse()
    if args.update_docs:
        update_docs(json.loads(args.update_docs.read_text()))
    else:
        with tidy_end():
            Benchmark(args).main()


if __name__ == "__main__":
    main()
