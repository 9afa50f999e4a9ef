"""The tables and marks of the training benchmark. Reads results; measures nothing."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import train_deepspeed
from report import DOCS, Mark, gbs, machine_line, marks_table, size, table, update_section
from train_tasks import Arm

Pair = dict[str, Any]
Run = dict[str, Any]

BOUND, PLAN = 1.3, 0.05  # goals: step time against its bound, peak memory against the plan
WHOLE_TITLES = {
    "memory": "in memory",
    "reference": "in memory, moetier's arithmetic",
    train_deepspeed.NAME: "DeepSpeed, optimizer on the disk",
}
NAMES = {"float32": "fp32", "bfloat16": "bf16, fp32 masters"}


def steps_of(found: dict[str, Any], run: Run) -> list[dict[str, Any]]:
    """The measured steps."""
    steps: list[dict[str, Any]] = run["steps"][found["settings"]["warm_up"] :]
    return steps


def mean(found: dict[str, Any], run: Run, name: str) -> float:
    """Of a number of the measured steps."""
    return statistics.mean(step[name] for step in steps_of(found, run))


def moved(found: dict[str, Any], run: Run, name: str) -> float:
    """Mean of one of the caches' counters over the measured steps."""
    return statistics.mean(step["moved"].get(name, 0) for step in steps_of(found, run))


def disk_seconds(found: dict[str, Any], run: Run) -> float:
    """What the disk needs at least for a step's bytes, at the speed it had beside the run; 0 in memory."""
    if "bandwidth" not in run:
        return 0.0
    return (mean(found, run, "read") + mean(found, run, "written")) / statistics.mean(run["bandwidth"])


def over_bound(found: dict[str, Any], pair: Pair) -> float:
    """Step time ÷ the larger of the step in memory, right beside it, and the disk's time for the bytes."""
    run, memory = pair["run"], pair["memory"]
    return mean(found, run, "seconds") / max(mean(found, memory, "seconds"), disk_seconds(found, run))


def over_plan(found: dict[str, Any], run: Run) -> float:
    """Peak resident ÷ (plan + what the interpreter and its libraries take)."""
    peak: int = run["memory"]["VmHWM"]
    return peak / (run["plan_nbytes"] + found["base"]["VmHWM"])


def amplification(found: dict[str, Any], run: Run) -> float:
    """Bytes written for weights and states ÷ bytes of the weights and states that the steps changed."""
    written = sum(moved(found, run, f"{name}, host→disk") for name in ("weights", "state"))
    return written / mean(found, run, "changed_nbytes")


def pairs_of(found: dict[str, Any]) -> dict[tuple[str, str], list[Pair]]:
    """By dtype and arm, without those in which a run failed."""
    kept: dict[tuple[str, str], list[Pair]] = {}
    for pair in found["pairs"]:
        if "failed" not in pair["memory"] and "failed" not in pair["run"]:
            kept.setdefault((pair["dtype"], pair["arm"]), []).append(pair)
    return kept


def marks(found: dict[str, Any]) -> list[Mark]:
    """The goals: at 25 % the step against its bound, and every plan."""
    made = []
    for (dtype, arm), pairs in pairs_of(found).items():
        name = f"{NAMES[dtype]}, {title(arm)}"
        if Arm.of(arm).share == 25:
            ratio = statistics.median(over_bound(found, pair) for pair in pairs)
            made.append(Mark(f"{name}: step ÷ max(step in memory, bytes ÷ bandwidth)", ratio, BOUND))
        if Arm.of(arm).kind == "moetier":
            off = max(abs(over_plan(found, pair["run"]) - 1) for pair in pairs)
            made.append(Mark(f"{name}: peak memory off the plan", off, PLAN))
    return made


def title(arm: str) -> str:
    """An arm for people."""
    parsed = Arm.of(arm)
    if parsed.share is None:
        return WHOLE_TITLES[arm]
    way = "updates in backward" if parsed.update == "backward" else parsed.writeback
    way = "nothing kept for backward" if parsed.recompute else way
    return f"moetier, {parsed.share} % of the slots" + ("" if way == "evict" else f", {way}")


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median and range."""
    middle = statistics.median(values)
    if len(values) == 1:
        return f"{middle:.{digits}f}"
    return f"{middle:.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def time_table(found: dict[str, Any]) -> str:
    """Step times against their bounds."""
    rows = []
    for (dtype, arm), pairs in pairs_of(found).items():
        runs, memory = [pair["run"] for pair in pairs], [pair["memory"] for pair in pairs]

        def middle(name: str, runs: list[Run] = runs) -> float:
            return statistics.median(mean(found, run, name) for run in runs)

        tokens = found["settings"]["tokens"] / middle("seconds")
        row = [f"{NAMES[dtype]}, {title(arm)}", spread([mean(found, run, "seconds") for run in memory])]
        row.append(f"**{spread([mean(found, run, 'seconds') for run in runs])}**")
        row += [f"{middle(part):.2f}" for part in ("forward", "backward", "update")]
        row.append(f"{tokens:.0f}")
        disk = [disk_seconds(found, run) for run in runs]
        ratios = [mean(found, pair["run"], "seconds") / mean(found, pair["memory"], "seconds") for pair in pairs]
        row += [spread(disk) if any(disk) else "", spread(ratios)]
        row.append(f"**{spread([over_bound(found, pair) for pair in pairs])}**")
        rows.append(row)
    head = ["arm", "the step in memory beside it, s", "step, s", "forward", "backward", "update", "tokens/s"]
    return table([*head, "disk's time for the bytes, s", "÷ in memory", "÷ bound"], rows)


def bytes_table(found: dict[str, Any]) -> str:
    """What is read and written a step, and by whom."""
    rows = []
    for (dtype, arm), pairs in pairs_of(found).items():
        if not Arm.of(arm).on_disk:
            continue
        runs = [pair["run"] for pair in pairs]

        def middle(value: Any, runs: list[Run] = runs) -> float:
            return statistics.median(value(run) for run in runs)

        row = [f"{NAMES[dtype]}, {title(arm)}"]
        row += [f"**{middle(lambda run, n=name: mean(found, run, n)) / 1e9:.2f}**" for name in ("read", "written")]
        if Arm.of(arm).kind != "moetier":  # which has no such counters
            rows.append([*row, *[""] * 7, gbs([speed for run in runs for speed in run["bandwidth"]])])
            continue
        for name in ("weights", "state", "gradients"):
            read, written = (
                middle(lambda run, n=f"{name}, {link}": moved(found, run, n)) / 1e9
                for link in ("disk→host", "host→disk")
            )
            row.append(f"{read:.2f} / {written:.2f}")
        row.append(f"{middle(lambda run: mean(found, run, 'changed_nbytes')) / 1e9:.2f}")
        row.append(f"{middle(lambda run: amplification(found, run)):.2f}")
        row += [
            f"{middle(lambda run, n=n: run['commit'][n]) / unit:.2f}" for n, unit in (("seconds", 1), ("written", 1e9))
        ]
        row.append(gbs([speed for run in runs for speed in run["bandwidth"]]))
        rows.append(row)
    head = ["arm", "read, GB/step", "written, GB/step", "weights: read / written", "state", "gradients"]
    head += ["changed weights and states, GB/step", "written ÷ changed", "commit after the last step, s"]
    return table([*head, "written by it, GB", "disk then, reads and writes at once, GB/s"], rows)


def memory_table(found: dict[str, Any]) -> str:
    """Peaks against plans."""
    rows = []
    base = found["base"]["VmHWM"]
    seen = set()
    for (dtype, arm), pairs in pairs_of(found).items():
        if dtype not in seen:
            seen.add(dtype)
            peak = statistics.median(pair["memory"]["memory"]["VmHWM"] for pair in pairs)
            rows.append([f"{NAMES[dtype]}, in memory", size(peak), "", ""])
        peaks = [pair["run"]["memory"]["VmHWM"] for pair in pairs]
        row = [f"{NAMES[dtype]}, {title(arm)}", size(statistics.median(peaks)), "", ""]
        if "plan_nbytes" in pairs[0]["run"]:
            row[2] = size(pairs[0]["run"]["plan_nbytes"] + base)
            row[3] = f"{100 * (statistics.median(over_plan(found, pair['run']) for pair in pairs) - 1):+.1f} %"
        rows.append(row)
    return table(["arm", "peak resident", "plan + interpreter", "peak against it"], rows)


def losses(run: Run) -> tuple[float, ...]:
    """Of all steps."""
    return tuple(step["loss"] for step in run["steps"])


def apart(some: Iterable[Sequence[float]], others: Iterable[Sequence[float]]) -> float:
    """The largest difference of two steps' losses, relative."""
    pairs = ((a, b) for mine, theirs in itertools.product(some, others) for a, b in zip(mine, theirs, strict=True))
    return max(abs(a - b) / b for a, b in pairs)


def losses_line(found: dict[str, Any]) -> str:
    """Whether the arms computed the same thing."""
    lines = []
    for dtype in dict.fromkeys(pair["dtype"] for pair in found["pairs"]):
        pairs = [pair for (kind, _), some in pairs_of(found).items() if kind == dtype for pair in some]
        plain = [losses(pair["memory"]) for pair in pairs]
        tiered = {losses(pair["run"]) for pair in pairs if Arm.of(pair["arm"]).share}
        if tiered:
            same = "the same losses in all runs, bit for bit" if len(tiered) == 1 else "**different losses**"
            first = next(iter(tiered))
            lines.append(
                f"{NAMES[dtype]}: moetier's arms had {same} ({first[0]:.4f} → {first[-1]:.4f}); they are within "
                f"{apart(tiered, plain):.1e} of those in memory."
            )
        peer = {losses(pair["run"]) for pair in pairs if pair["arm"] == train_deepspeed.NAME}
        if peer:
            name = f"{NAMES[dtype]}: the losses of DeepSpeed {found['deepspeed']}"
            lines.append(f"{name} are within {apart(peer, plain):.1e} of those in memory.")
    return " ".join(lines)


def tables(found: dict[str, Any]) -> str:
    """Everything, in Markdown."""
    if not pairs_of(found):
        return "Nothing measured yet."
    settings, shape = found["settings"], found["shape"]
    rounds = 1 + max(pair["round"] for pair in found["pairs"])
    lines = [
        f"{machine_line(found['machine'])}. {shape['layers']} layers of {shape['experts']} experts ({shape['top_k']} "
        f"per token), hidden {shape['hidden']}, intermediate {shape['intermediate']}; AdamW, {settings['tokens']} "
        f"tokens a step in {settings['rows']} sequences, {settings['threads']} threads; means of {settings['steps']} "
        f"steps after {settings['warm_up']}, medians over {rounds} interleaved pair{'s' * (rounds > 1)} of runs; "
        f"`python benchmarks/{found['machine']['command']}`.",
        marks_table(marks(found)),
        time_table(found),
        bytes_table(found),
        memory_table(found),
        f"The interpreter and its libraries, training a model of a few kilobytes: {size(found['base']['VmHWM'])}.",
        losses_line(found),
    ]
    for pair in found["pairs"]:
        lines += [
            f"Failed: {NAMES[pair['dtype']]}, {title(name)}: {run['failed']}"
            for name, run in ((pair["arm"], pair["run"]), ("memory", pair["memory"]))
            if "failed" in run
        ]
    return "\n\n".join(line for line in lines if line)


def update_docs(found: dict[str, Any], docs: Path = DOCS) -> None:
    """Write the tables into docs/benchmarks.md."""
    update_section("train", tables(found), docs)
