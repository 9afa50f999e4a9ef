"""The report of the decode benchmark: tables, marks and the plot, all from the JSON of its runs."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from arms import ENGINES, split
from common import DEFAULT_THREADS, GIB, Shape
from report import ROOT, Mark, gbs, machine_line, marks_table, median_of, size, table, update_section

PLOT = ROOT / "docs" / "images" / "decode.png"
Run = dict[str, Any]
Cells = dict[tuple[str, Any], list[Run]]  # (arm, threads) -> its successful runs
MAPPED = ("mmap", "mmap-fused")


def by_cell(runs: list[Run]) -> Cells:
    """The successful runs of each arm and number of threads, in the order they were first run."""
    cells: Cells = {}
    for run in runs:
        cells.setdefault((run["arm"], run.get("threads", 1)), []).extend([] if "failed" in run else [run])
    return {cell: found for cell, found in cells.items() if found}


def title(arm: str) -> str:
    """An arm in words."""
    kind, share = split(arm)
    return {
        "memory": "in memory",
        "moetier": f"moetier, {share} % of the experts",
        "foundation": f"foundation, {share} % of the experts",
        "mmap": f"mapped shards, limit of moetier {share} %",
        "mmap-fused": f"mapped, experts stacked, limit of moetier {share} %",
        "accelerate": f"accelerate, limit of moetier {share} %",
        "llamacpp": f"llama.cpp, limit of moetier {share} %",
    }[kind]


def rates(runs: list[Run]) -> list[float]:
    """Decoded tokens per second of each run."""
    return [len(run["steps"]) / sum(run["steps"]) for run in runs]


def disk_summary(disk: dict[str, Any]) -> tuple[float, str, dict[str, float]]:
    """The disk's limit (best median over thread counts), its thread count, and moetier's medians."""
    medians = {threads: statistics.median(values) for threads, values in disk["raw"].items()}
    best = max(medians, key=lambda threads: medians[threads])
    return medians[best], best, {kind: statistics.median(values) for kind, values in disk["moetier"].items()}


# -- what the machine would allow --------------------------------------------------------------------------------------


def compute_seconds(cells: Cells, arm: str, threads: Any) -> float | None:
    """A step of an arm that reads nothing: the median over its runs of the mean step."""
    runs = cells.get((arm, threads))
    return median_of(runs, lambda run: statistics.mean(run["steps"])) if runs else None


def over_bound(runs: list[Run], compute: float | None) -> float | None:
    """Step / max(compute, bytes read / the disk's bandwidth around that very run): the median over runs."""
    if compute is None or not runs or any("engine" not in run or "bandwidth" not in run for run in runs):
        return None
    ratios = []
    for run in runs:
        reading = run["engine"]["read_bytes"] / len(run["steps"]) / statistics.mean(run["bandwidth"])
        ratios.append(statistics.mean(run["steps"]) / max(compute, reading))
    return statistics.median(ratios)


def prefill_over_bound(runs: list[Run], number: int, compute: float | None) -> float | None:
    """The same for one of the prefills, with all bytes of the experts needed and not there."""
    if compute is None or any("link_bytes" not in run["passes"][number] for run in runs):
        return None
    ratios = []
    for run in runs:
        one = run["passes"][number]
        ratios.append(one["seconds"] / max(compute, one["link_bytes"] / statistics.mean(run["bandwidth"])))
    return statistics.median(ratios)


def marks(found: dict[str, Any]) -> list[Mark]:
    """The goals, for every number of threads that was run."""
    cells, prefills = by_cell(found["runs"]), by_cell(found.get("prefill_runs", []))
    marks: list[Mark] = []
    for threads in dict.fromkeys(threads for _, threads in (*cells, *prefills)):
        marks += decode_marks(cells, threads) + prefill_marks(prefills, threads)
    return marks


def decode_marks(cells: Cells, threads: Any) -> list[Mark]:
    """Of one number of threads."""
    found, label = [], threads_label(threads)
    compute = compute_seconds(cells, "memory", threads)
    for share, limit in ((50, 1.15), (25, 1.25)):
        ratio = over_bound(cells.get((f"moetier-{share}", threads), []), compute)
        if ratio is not None:
            found.append(Mark(f"{share} % of the experts, {label}: step ÷ bound", ratio, limit))
    own = cells.get(("moetier-50", threads))
    if own:
        speed = statistics.median(rates(own))
        rivals = {arm: statistics.median(rates(runs)) for (arm, count), runs in cells.items() if count == threads}
        mapped = [rivals[f"{kind}-50"] for kind in MAPPED if f"{kind}-50" in rivals]
        goals = (("foundation's engine", rivals.get("foundation-50"), 1.5),)
        goals += (("accelerate", rivals.get("accelerate-50"), 10),)
        goals += (("the faster mapped model", max(mapped, default=None), 3),)
        for name, rival, limit in goals:
            if rival:
                found.append(Mark(f"50 %, {label}: tokens/s ÷ {name}", speed / rival, limit, least=True))
    return found


def prefill_marks(prefills: Cells, threads: Any) -> list[Mark]:
    """Of one number of threads."""
    found, label = [], threads_label(threads)
    runs, plain = prefills.get(("moetier-25", threads), []), prefills.get(("memory", threads), [])
    for number in range(len(runs[0]["passes"]) if runs else 0):
        which = f"prefill {number + 1} of {runs[0]['prompt']} tokens at 25 %, {label}"
        if plain:
            ratio = prefill_over_bound(runs, number, pass_seconds(plain, number))
            if ratio is not None:
                found.append(Mark(f"{which}: time ÷ bound", ratio, 1.2))
        most = max(run["passes"][number]["most_reads"] for run in runs)
        bytes_ratio = max(run["passes"][number]["link_bytes"] / run["passes"][number]["needed_bytes"] for run in runs)
        found.append(Mark(f"{which}: most reads of an expert in its layer pass", most, 1))
        found.append(Mark(f"{which}: bytes read ÷ bytes of the experts needed", bytes_ratio, 1))
    return found


def pass_seconds(runs: list[Run], number: int) -> float:
    """The median over runs of a prefill's time."""
    return median_of(runs, lambda run: run["passes"][number]["seconds"])


# -- tables ------------------------------------------------------------------------------------------------------------


def threads_label(threads: Any) -> str:
    """A number of threads in words."""
    if threads == DEFAULT_THREADS:
        return "no threads set"
    return f"{threads} thread{'' if threads == 1 else 's'}"


def named(cell: tuple[str, Any]) -> list[str]:
    """The first two columns."""
    return [title(cell[0]), "not set" if cell[1] == DEFAULT_THREADS else str(cell[1])]


def speed_table(cells: Cells) -> str:
    """Tokens per second, and the same as ratios to the rivals of the same number of threads and share."""
    medians = {cell: statistics.median(rates(runs)) for cell, runs in cells.items()}
    rows = []
    for cell, runs in cells.items():
        (arm, threads), values = cell, rates(runs)
        share = split(arm)[1]
        mapped = [medians[rival] for kind in MAPPED if (rival := (f"{kind}-{share}", threads)) in medians]
        rivals = [
            medians.get(("memory", threads)),
            medians.get((f"foundation-{share}", threads)),
            max(mapped, default=None),
            medians.get((f"accelerate-{share}", threads)),
            medians.get((f"llamacpp-{share}", threads)),
        ]
        rows.append(
            [
                *named(cell),
                "none" if runs[0]["limit"] is None else size(runs[0]["limit"]),
                f"**{medians[cell]:.2f}** ({min(values):.2f}–{max(values):.2f})",
                *(f"{medians[cell] / rival:.2f}" if rival else "" for rival in rivals),
                f"{median_of(runs, lambda run: run['prompt'] / run['prefill_seconds']):.1f}",
                f"{median_of(runs, lambda run: run['read_bytes'] / len(run['steps'])) / 1e6:.0f}",
            ]
        )
    head = ["arm", "threads", "memory limit", "decode, tokens/s (min–max)", "÷ in memory", "÷ foundation"]
    head += [
        "÷ mapped, same limit",
        "÷ accelerate, same limit",
        "÷ llama.cpp, same limit",
        "prefill, tokens/s",
        "read, MB/token",
    ]
    return table(head, rows)


def memory_table(found: dict[str, Any], cells: Cells) -> str:
    """Peaks, and the plan against them."""
    rows = []
    for cell, runs in cells.items():
        peak = median_of(runs, lambda run: run["memory"]["VmHWM"])
        plan = runs[0].get("plan_nbytes")
        expected = plan + found["base"]["VmHWM"] if plan else 0
        group = "" if runs[0]["cgroup"] is None else size(median_of(runs, lambda run: run["cgroup"]["peak"]))
        rows.append(
            [
                *named(cell),
                size(peak),
                size(median_of(runs, lambda run: run["peak_anon"])),
                group,
                size(expected) if plan else "",
                f"{100 * (peak / expected - 1):+.1f} %" if plan else "",
            ]
        )
    head = ["arm", "threads", "peak resident", "of it anonymous", "control group's peak, with page cache"]
    return table([*head, "plan + interpreter", "peak against it"], rows)


def time_table(cells: Cells) -> str:
    """Where a moetier step's time goes, and what the machine would allow."""
    rows = []
    for cell, runs in cells.items():
        arm, threads = cell
        if split(arm)[0] not in ENGINES:
            continue
        step = 1 / statistics.median(rates(runs))
        cells_ = [*named(cell), f"{1e3 * step:.0f}", *engine_cells(runs, step)]
        if all("bandwidth" in run for run in runs):
            disk = median_of(runs, lambda run: statistics.mean(run["bandwidth"]))
            read = median_of(runs, lambda run: run["engine"]["read_bytes"] / len(run["steps"])) / disk
            cells_ += [f"{disk / 1e9:.2f}", f"{1e3 * read:.0f}"]
        else:
            cells_ += ["", ""]
        for reference in ("memory", "moetier-100"):
            compute = compute_seconds(cells, reference, threads)
            ratio = over_bound(runs, compute)
            cells_.append("" if ratio is None or compute is None else f"**{ratio:.2f}** ({1e3 * compute:.0f} ms)")
        rows.append(cells_)
    head = ["arm", "threads", "step, ms", "computing experts, ms", "waiting, ms", "deciding, ms (share)"]
    head += ["of it the core", "hits", "disk then, GB/s", "its reads at that speed, ms"]
    return table([*head, "step ÷ bound (compute in memory)", "step ÷ bound (compute of moetier 100 %)"], rows)


def engine_cells(runs: list[Run], step: float) -> list[str]:
    """The engine's own counters, per step."""

    def per_step(key: str) -> float:
        return median_of(runs, lambda run: run["engine"][key] / len(run["steps"]))

    hits = per_step("hits")
    asked = hits + per_step("lates") + per_step("misses")
    core = per_step("core") if all("core" in run["engine"] for run in runs) else None
    return [
        f"{1e3 * per_step('compute'):.0f}",
        f"{1e3 * per_step('wait'):.0f}",
        f"{1e3 * per_step('decide'):.1f} ({100 * per_step('decide') / step:.1f} %)",
        "" if core is None else f"{1e3 * core:.1f} ({100 * core / step:.1f} %)",
        f"{100 * hits / asked:.0f} %" if asked else "",
    ]


def prefill_table(cells: Cells) -> str:
    """The separate prefill runs."""
    rows = []
    for cell, runs in cells.items():
        plain = cells.get(("memory", cell[1]))
        for number in range(len(runs[0]["passes"])):
            times = [run["passes"][number]["seconds"] for run in runs]
            row = [
                *named(cell),
                str(number + 1),
                f"**{statistics.median(times):.2f}** ({min(times):.2f}–{max(times):.2f})",
            ]
            first = runs[0]["passes"][number]
            if "link_bytes" in first:
                ratio = prefill_over_bound(runs, number, pass_seconds(plain, number) if plain else None)
                read = median_of(runs, lambda run, n=number: run["passes"][n]["link_bytes"])  # type: ignore[misc]
                row += [f"{read / 1e9:.2f}", f"{first['experts_needed']}", f"{first['experts_read']}"]
                row += [str(max(run["passes"][number]["most_reads"] for run in runs))]
                row += ["" if ratio is None else f"{ratio:.2f}"]
            else:
                row += [""] * 5
            rows.append(row)
    head = ["arm", "threads", "prefill", "s (min–max)", "read, GB", "experts needed", "experts read"]
    return table([*head, "most reads of one", "time ÷ bound"], rows)


def disk_table(found: dict[str, Any]) -> str:
    """Bandwidths, and moetier's share of the limit."""
    disk = found["disk"]
    limit, _, engine = disk_summary(disk)
    rows = []
    for threads, values in disk["raw"].items():
        name = f"`preadv`, direct, 1 MiB, {threads} thread{'' if threads == '1' else 's'}"
        rows.append([name, gbs(values), f"{statistics.median(values) / limit:.2f}"])
    names = {
        "layer": "moetier, accesses of a whole layer (prefill)",
        "token": "moetier, accesses of one token's experts",
    }
    rows += [[names[kind], gbs(disk["moetier"][kind]), f"{engine[kind] / limit:.2f}"] for kind in names]
    between = [value for run in found["runs"] for value in run.get("bandwidth", ())]
    if between:
        rows.append(["`preadv`, before and after the runs of the arms", gbs(between), ""])
    return table(["reader", "GB/s (min–max)", "÷ best"], rows)


# -- text --------------------------------------------------------------------------------------------------------------


def skew_text(skew: dict[str, Any]) -> str:
    """How the text was routed."""
    uniform = skew["uniform"]
    return (
        f"Routing of this text ({skew['tokens']} tokens, mean over layers; in brackets, what uniform routing gives): "
        f"the more popular half of a layer's experts gets {100 * skew['top_half_share']:.0f} % "
        f"({100 * uniform['top_half_share']:.0f} %) of the routed (token, expert) pairs; the previous "
        f"token's set holds "
        f"{100 * skew['recall_of_previous']:.0f} % ({100 * uniform['recall_of_previous']:.0f} %) of a token's experts; "
        f"{skew['experts_used']:.0f} ({uniform['experts_used']:.0f}) experts are used at all."
    )


def machine_text(found: dict[str, Any]) -> str:
    """The machine and the settings."""
    machine, settings = found["machine"], found["settings"]
    dropped = all(run["cache_dropped"] for run in found["runs"])
    extra = [f"moetier's store: {settings['store']}"] if settings.get("store") else []
    extra += [f"moetier's prefetch: {settings['prefetch']}"] if settings.get("prefetch") else []
    return (
        f"{machine_line(machine)}. {settings['prompt']} prompt tokens, "
        f"{settings['warm_up']} warm-up tokens, {settings['tokens']} measured ones; medians of {settings['repeat']} "
        f"interleaved runs; page cache {'dropped' if dropped else 'NOT dropped'} before each; "
        f"{''.join(text + '; ' for text in extra)}`python benchmarks/{machine['command']}`."
    )


def same_outputs(runs: list[Run]) -> str:
    """Whether all arms chose the same next tokens as the first."""
    good = [run for run in runs if "failed" not in run]
    first = good[0]["chosen"]  # a run may have been shorter
    other = dict.fromkeys(
        title(run["arm"]) for run in good if any(a != b for a, b in zip(run["chosen"], first, strict=False))
    )
    if not other:
        return "All arms chose the same next tokens."
    return f"Not the same next tokens as the first arm (sums in another order): {', '.join(other)}."


def tables(found: dict[str, Any]) -> str:
    """The whole report in markdown."""
    cells, prefills = by_cell(found["runs"]), by_cell(found.get("prefill_runs", []))
    parts = [machine_text(found)]
    goals = marks(found)
    if found["settings"].get("smoke"):
        parts.append("A smoke run: its speeds mean nothing.")
    if goals:
        parts.append(marks_table(goals))
    if cells:
        parts += [speed_table(cells), same_outputs(found["runs"]), time_table(cells)]
    if prefills:
        parts += [prefill_table(prefills), same_outputs(found["prefill_runs"])]
    if cells:
        base = found["base"]
        parts += [
            memory_table(found, cells),
            f"The interpreter and its libraries alone: {size(base['VmHWM'])} resident, {size(base['RssAnon'])} "
            f"anonymous (merely imported: {size(base['imported'])} resident).",
        ]
    failed = [run for run in (*found["runs"], *found.get("prefill_runs", [])) if "failed" in run]
    parts += [f"Failed: {run['arm']}, {threads_label(run['threads'])}: {run['failed']}" for run in failed]
    if "disk" in found:
        parts.append(disk_table(found))
    if "skew" in found:
        parts.append(skew_text(found["skew"]))
    return "\n\n".join(parts)


def update_docs(found: dict[str, Any]) -> None:
    """Replace what is between the markers, and draw the plot."""
    update_section("decode", f"![Decode speed of each arm](images/{PLOT.name})\n\n{tables(found)}")
    plot(found, PLOT)


COLOURS = {"memory": "#7f8c8d", "moetier": "#1f77b4", "foundation": "#9ecae1"}
COLOURS |= {"accelerate": "#d98032", "llamacpp": "#4f9d69"}
COLOURS |= dict.fromkeys(MAPPED, "#7b5ea7")


def plot(found: dict[str, Any], path: Path) -> None:
    """Median tokens/s per arm, with whiskers from the slowest to the fastest run; of the first number of threads."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cells = by_cell(found["runs"])
    threads = next(iter(cells))[1]
    arms = {arm: runs for (arm, count), runs in cells.items() if count == threads}
    figure, axes = pyplot.subplots(figsize=(8, 0.55 * len(arms) + 1.4), layout="constrained")
    for row, (arm, runs) in enumerate(arms.items()):
        values = rates(runs)
        middle = statistics.median(values)
        axes.barh(row, middle, 0.62, color=COLOURS[split(arm)[0]])
        whiskers = [[middle - min(values)], [max(values) - middle]]
        axes.errorbar(middle, row, xerr=whiskers, color="#222222", capsize=4, linewidth=1.2)
        axes.annotate(f"{middle:.2f}", (max(values), row), (8, 0), textcoords="offset points", va="center", fontsize=10)
    axes.set_yticks(range(len(arms)), [f"{title(arm)}\n{limit_text(runs)}" for arm, runs in arms.items()], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * max(max(rates(runs)) for runs in arms.values()))
    axes.set_xlabel(f"tokens/s, {threads_label(threads)} (median; whiskers: all runs)")
    shape = found["shape"]
    axes.set_title(
        f"{shape['layers']} layers × {shape['experts']} experts, top {shape['top_k']}, "
        f"{Shape(**shape).experts_nbytes / GIB:.1f} GiB of experts in bf16, on a CPU",
        fontsize=10,
    )
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def limit_text(runs: list[Run]) -> str:
    """Under an arm's name."""
    return "no memory limit" if runs[0]["limit"] is None else f"limit {size(runs[0]['limit'])}"
