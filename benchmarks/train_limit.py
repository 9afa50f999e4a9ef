"""Training of a model that does not fit: records of three times the memory limit and more, in a control group.

    python benchmarks/train_limit.py --json benchmarks/results/train-limit.json     # some minutes; wants root
    python benchmarks/train_limit.py --update-docs benchmarks/results/train-limit.json
    python benchmarks/train_limit.py --smoke --memory-limit none

A child trains with moetier within a memory limit that counts everything: interpreter, libraries, page cache. Its
`host_memory` is the limit without what the interpreter takes. Shown are the limit, the bytes of the experts' weights
and optimizer states, the peak, and the losses. Nothing is timed.
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
from common import MIB, Shape, tidy_end
from decode import failure
from report import ROOT, Mark, machine_line, marks_table, say, size, table, update_section, without_pieces, write_json
from train import TINY
from train_tasks import SCRIPT

# 160 experts of 6.3 MB in float32: 1.0 GB of weights and 2.0 GB of optimizer state
MODEL = Shape(512, 4, 40, 2, 1024, 8, 2, 64, vocab=2048)
LIMIT = 800 * MIB
TIMES = 3.0  # the goal: records ÷ limit


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One child within the limit."""
    shape = TINY if args.smoke else MODEL
    work: Path = args.work.resolve()
    spec: dict[str, Any] = {
        "folder": str(work / ("train-tiny-float32" if args.smoke else "train-limit-float32")),
        "run": str(work / "train-limit-run"),
        "source": str(ROOT / "src"),
        "shape": asdict(shape),
        "dtype": "float32",
        "arm": "moetier-25",  # of which only the kind counts: `host_memory` says how much memory there is
        "tokens": [common.make_tokens(shape, args.tokens, args.seed + step) for step in range(args.steps)],
        "rows": args.rows,
        "lr": args.lr,
        "threads": args.threads,
        "max_grad_norm": 1.0,
    }

    def task(task: str, **more: Any) -> Any:
        result, ended = common.run_child(SCRIPT, spec | {"task": task} | more, work)
        if result is None:
            raise SystemExit(f"{task}: failed with exit status {ended.returncode}\n{ended.stderr}")
        return result

    task("make")
    base = task("base", folder=str(work / "micro"), dtype="bfloat16")
    limit = LIMIT if args.memory_limit == "auto" else 0 if args.memory_limit == "none" else int(args.memory_limit)
    host = (limit or LIMIT) - base["VmHWM"] - args.slack
    say(f"limit {size(limit)}, interpreter and libraries {size(base['VmHWM'])}, host_memory {size(host)}")
    common.drop_page_cache()
    with ExitStack() as stack:
        group = stack.enter_context(common.memory_group(limit)) if limit else None
        result, ended = common.run_child(SCRIPT, spec | {"task": "train", "host_memory": host}, work, group)
        stats = None if group is None else group.stats()
    found: dict[str, Any] = {"machine": common.machine_info(ROOT), "shape": asdict(shape), "settings": settings(args)}
    found |= {"base": base, "limit": limit, "host_memory": host, "cgroup": stats, "peak_anon": ended.peak_anon}
    found["run"] = result or failure(ended, stats)
    found["machine"]["command"] = without_pieces(found["machine"]["command"])
    return found


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What makes a run."""
    return {name: getattr(args, name) for name in ("tokens", "rows", "steps", "lr", "threads", "seed", "smoke")}


def tables(found: dict[str, Any]) -> str:
    """In Markdown."""
    run, limit = found["run"], found["limit"]
    line = f"{machine_line(found['machine'])}; `python benchmarks/{found['machine']['command']}`."
    if "failed" in run:
        return f"{line}\n\nFailed: {run['failed']}"
    records = run["record_nbytes"]["weights"] + run["record_nbytes"]["state"]
    budget = limit or found["host_memory"]
    plan = run["plan_nbytes"] + found["base"]["VmHWM"]
    peak = run["memory_after_commit"]["VmHWM"]
    losses = [step["loss"] for step in run["steps"]]
    part = max(1, len(losses) // 4)
    first, last = (sum(some) / part for some in (losses[:part], losses[-part:]))
    marks = [
        Mark("experts' weights and optimizer states ÷ memory limit", records / budget, TIMES, least=True),
        Mark("peak resident off the plan", abs(peak / plan - 1), 0.05),
        Mark("mean loss of the last quarter ÷ that of the first", last / first, 1.0),
    ]
    rows = [
        ["memory limit of the process, page cache included", size(limit) if limit else "none"],
        ["experts' weights, fp32", size(run["record_nbytes"]["weights"])],
        ["their optimizer states (AdamW)", size(run["record_nbytes"]["state"])],
        ["their gradients", size(run["record_nbytes"]["gradients"])],
        ["slots: weights, states and gradients together", size(sum(run["slot_nbytes"].values()))],
        ["plan + interpreter", size(plan)],
        ["peak resident, with a commit", size(peak)],
    ]
    if found["cgroup"]:
        rows.append(["control group's peak, with page cache", size(found["cgroup"]["peak"])])
    read, written = (sum(step[name] for step in run["steps"]) for name in ("read", "written"))
    rows.append(["read and written in all", f"{read / 1e9:.1f} GB and {written / 1e9:.1f} GB"])
    shown = ", ".join(f"{loss:.3f}" for loss in losses)
    s = found["settings"]
    made = f"{s['steps']} steps of {s['tokens']} tokens, AdamW, clipping by the global norm. Losses: {shown}."
    return "\n\n".join([line, marks_table(marks), table(["", "measured"], rows), made])


def main() -> None:
    """Measure, or write the docs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--steps", type=int, default=8)
    add("--tokens", type=int, default=512, help="of a step")
    add("--rows", type=int, default=4, help="sequences of a step")
    add("--lr", type=float, default=1e-3)
    add("--threads", type=int, default=1)
    add("--seed", type=int, default=0)
    add("--memory-limit", default="auto", help="auto, none, or bytes")
    add("--slack", type=int, default=64 * MIB, help="bytes of the limit that are left to the page cache")
    add("--work", type=Path, default=Path(__file__).parent / "work", help="folder for checkpoint and run (10 GB)")
    add("--json", type=Path, help="where to write the results")
    add("--smoke", action="store_true", help="a tiny model: does it run?")
    add("--update-docs", type=Path, metavar="JSON", help="write results into docs/benchmarks.md")
    args = parser.parse_args()
    if args.update_docs:
        update_section("train-limit", tables(json.loads(args.update_docs.read_text())))
        return
    if args.memory_limit not in ("auto", "none") and not args.memory_limit.isdigit():
        parser.error("--memory-limit: auto, none, or a number of bytes")
    if args.smoke:
        args.tokens, args.rows, args.steps = 32, 2, 4
    with tidy_end():
        found = measure(args)
    write_json(args.json, found)
    print(tables(found))


if __name__ == "__main__":
    main()
