"""What the order of the data does to a training step: step time and bytes against the length of episodes.

    python benchmarks/episodes.py [--json benchmarks/results/episodes.json] [--smoke]
    python benchmarks/episodes.py --plot benchmarks/results/episodes.json      # docs/images/episodes.svg and .png

The teacher regression of `moetier train synthetic`, a quarter of the experts in memory: for every length of episode
and number of environments in a batch a run of the same number of steps, with shuffled data and the plain in-memory loop
beside it. Every run is a process of its own; the runs of a repeat are made one after the other, then come those of the
next repeat. Of each run the first epoch warms up, the second counts, in means: the first step of an episode pays for
the others. The loss on held-out samples of all environments is reported too: what locality saves in bytes may cost in
learning.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import common
import report
from common import machine_info

ROOT = Path(__file__).resolve().parent.parent
PLOT = ROOT / "docs" / "images" / "episodes.svg"
LENGTHS = (1, 2, 4, 8, 16)
MIXES = (1, 4)  # environments in a batch
FULL: dict[str, Any] = {
    "n_experts": 64,
    "n_envs": 16,
    "top_k": 4,
    "layers": 2,
    "width": 128,
    "expert_width": 256,
    "samples_per_env": 1024,
    "batch_size": 64,
    "steps": 512,  # two epochs: in the second, every environment has been seen before
}
TINY: dict[str, Any] = {
    "n_experts": 16,
    "n_envs": 8,
    "top_k": 2,
    "layers": 1,
    "width": 16,
    "expert_width": 24,
    "samples_per_env": 16,
    "batch_size": 4,
    "steps": 8,
}
SHARE = 0.25  # of the experts that have a slot, of each kind of record

Run = dict[str, Any]


def arms(lengths: tuple[int, ...], mixes: tuple[int, ...]) -> list[Run]:
    """What is run, as settings on top of the workload's."""
    found: list[Run] = [{"arm": "memory", "sampler": "iid"}, {"arm": "iid", "sampler": "iid"}]
    for mix in mixes:
        for length in lengths:
            arm = {"arm": f"{mix} in a batch", "sampler": "episode", "episode_len": length, "envs_per_batch": mix}
            found.append(arm)
    return found


def child(spec: dict[str, Any]) -> dict[str, Any]:
    """One run, in a process of its own."""
    from moetier.training.synthetic_home import Home, Tiered
    from moetier.training.synthetic_run import InMemory, Settings, train

    settings = Settings(**spec["settings"])
    if spec["arm"] == "memory":
        return train(settings, InMemory)
    with tempfile.TemporaryDirectory(dir=spec["work"]) as folder:
        home = Home(Path(folder) / "run", host_slots=spec["slots"], writeback=spec["writeback"])
        return train(settings, lambda given: Tiered(given, home))


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Of the second half of a run's steps."""
    steps = found["steps"]
    half = slice(len(steps["loss"]) // 2, None)
    uses = sum(steps["uses"][half])
    return {
        "seconds": statistics.fmean(steps["seconds"][half]),
        "read_bytes": statistics.fmean(steps["read_bytes"][half]),
        "written_bytes": statistics.fmean(steps["written_bytes"][half]),
        "experts": statistics.fmean(steps["experts"][half]),
        "hit_rate": sum(steps["hits"][half]) / uses if uses else None,
        "held_out": found["loss"]["held_out"],
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    workload = TINY if options.smoke else FULL
    slots = max(1, round(SHARE * workload["n_experts"] * workload["layers"]))
    lengths, mixes = tuple(options.lengths), tuple(options.mixes)
    found: dict[str, Any] = {"machine": machine_info(ROOT), "workload": workload, "slots": slots, "runs": []}
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        for repeat in range(options.repeat):
            for arm in arms(lengths, mixes):
                settings = {**workload, **{name: arm[name] for name in arm if name != "arm"}}
                spec = {"arm": arm["arm"], "settings": settings, "slots": slots, "work": work, "task": "episodes"}
                spec |= {"threads": options.threads, "writeback": options.writeback}
                result, ended = common.run_child(Path(__file__), spec, Path(work) / "child")
                if result is None:
                    raise SystemExit(f"{arm}: the run failed\n{ended.stderr}")
                found["runs"].append({**arm, "repeat": repeat, **summary(result)})
                report.say(line(found["runs"][-1]))
                report.write_json(options.json, found)
    return found


def line(run: Run) -> str:
    """One run, for the person who waits."""
    name = run["arm"] if "episode_len" not in run else f"{run['arm']}, episodes of {run['episode_len']}"
    return (
        f"{name}: {1e3 * run['seconds']:.1f} ms a step, {run['read_bytes'] / common.MIB:.2f} MiB read, "
        f"{run['written_bytes'] / common.MIB:.2f} MiB written, {run['experts']:.1f} experts"
    )


def cells(found: dict[str, Any]) -> dict[tuple[str, int | None], list[Run]]:
    """Runs by arm and length of episode; None where there is none."""
    sorted_runs: dict[tuple[str, int | None], list[Run]] = {}
    for run in found["runs"]:
        sorted_runs.setdefault((run["arm"], run.get("episode_len")), []).append(run)
    return sorted_runs


def table(found: dict[str, Any]) -> str:
    """Medians over repeats, in markdown."""
    head = ["environments in a batch", "episode", "experts a step", "hits", "ms a step", "MiB read", "MiB written"]
    rows = []
    for (arm, length), runs in cells(found).items():
        hit_rate = runs[0]["hit_rate"]
        rows.append(
            [
                {"memory": "in memory, shuffled", "iid": "shuffled"}.get(arm, arm.removesuffix(" in a batch")),
                "" if length is None else str(length),
                f"{report.median_of(runs, lambda run: run['experts']):.1f}",
                "" if hit_rate is None else f"{100 * report.median_of(runs, lambda run: run['hit_rate']):.0f} %",
                f"{1e3 * report.median_of(runs, lambda run: run['seconds']):.1f}",
                f"{report.median_of(runs, lambda run: run['read_bytes']) / common.MIB:.2f}",
                f"{report.median_of(runs, lambda run: run['written_bytes']) / common.MIB:.2f}",
                f"{report.median_of(runs, lambda run: run['held_out']):.4f}",
            ]
        )
    return report.table([*head, "held-out loss"], rows)


def plot(found: dict[str, Any], path: Path) -> None:
    """Step time, and bytes moved, against the length of episodes; horizontal lines for what has no episodes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    by_arm: dict[str, list[tuple[int | None, list[Run]]]] = {}
    for (arm, length), runs in cells(found).items():
        by_arm.setdefault(arm, []).append((length, runs))
    panels = ((left, "seconds", 1e3), (right, "read_bytes", 1 / common.MIB))
    colours = dict(zip(by_arm, ("#7f8c8d", "#222222", "#1f77b4", "#d98032", "#4f9d69", "#7b5ea7"), strict=False))
    for axes, name, scale in panels:
        for arm, points in by_arm.items():
            values = [[scale * run[name] for run in runs] for _, runs in points]
            middles = [statistics.median(each) for each in values]
            if points[0][0] is None:
                if name == "seconds" or arm != "memory":
                    label = "in memory, shuffled" if arm == "memory" else "shuffled"
                    axes.axhline(middles[0], color=colours[arm], linestyle="--", linewidth=1.2, label=label)
                continue
            lengths = [length for length, _ in points if length is not None]
            whiskers = [
                [middle - min(each) for middle, each in zip(middles, values, strict=True)],
                [max(each) - middle for middle, each in zip(middles, values, strict=True)],
            ]
            label = arm.replace(" in a batch", " environments in a batch").replace("1 environments", "1 environment")
            axes.errorbar(lengths, middles, yerr=whiskers, color=colours[arm], marker="o", capsize=3, label=label)
        axes.set_xscale("log", base=2)
        every = sorted({length for _, length in cells(found) if length is not None})
        axes.set_xticks(every, [str(length) for length in every])
        axes.set_xlabel("steps of an episode")
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    left.set_ylabel("ms a step (mean; whiskers: all repeats)")
    right.set_ylabel("MiB read a step, all records")
    left.legend(fontsize=8)
    work = found["workload"]
    total = work["layers"] * work["n_experts"]
    title = f"{total} experts, slots for {found['slots']}; {work['n_envs']} environments, {work['batch_size']} samples"
    figure.suptitle(f"{title} a step", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path.with_suffix(".svg"))
    figure.savefig(path.with_suffix(".png"), dpi=150)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results to this file too")
    parser.add_argument("--plot", type=Path, metavar="JSON", help="measure nothing: draw the picture of these results")
    parser.add_argument("--image", type=Path, default=PLOT, help="where the picture goes, as SVG and as PNG")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--mixes", type=int, nargs="+", default=MIXES, help="environments in a batch")
    parser.add_argument("--writeback", default="evict")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, help="a folder on the disk to measure; default: that of temporary files")
    parser.add_argument("--smoke", action="store_true", help="everything, shortly: do all parts run?")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        spec = json.loads(options.child)
        Path(spec["out"]).write_text(json.dumps(child(spec)))
        return
    if options.plot:
        found = json.loads(options.plot.read_text())
    else:
        if options.smoke:
            options.repeat, options.lengths, options.mixes = 1, (1, 4), (1, 2)
        found = measure(options)
    print(table(found))
    if options.plot or options.json:
        plot(found, options.image)
        print(f"{options.image.with_suffix('.svg')}, {options.image.with_suffix('.png')}", file=sys.stderr)


if __name__ == "__main__":
    main()
