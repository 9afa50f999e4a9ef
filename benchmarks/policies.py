"""Hit rates of all eviction policies on a recorded trace: every size, scope and batch, with both oracles and noise.

    python benchmarks/policies.py TRACE.parquet --name NAME [--tokens 24000] [--other-tokens 4000] [--resume FILE]

Policies run on every other sequence; the sequences between are what fitted policies (`static`) are fitted on. Writes
`benchmarks/results/policies-NAME.json`; `python benchmarks/policies.py --tables` puts the tables of all results into
`docs/policies.md`.

Noise: the runs marked so are repeated with the sequences in another order and the experts renumbered, which changes
nothing but the history and how ties are broken.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from common import machine_info
from moetier.policies import POLICIES
from moetier.simulate.config import Result, SimulationConfig
from moetier.simulate.sweep import sweep
from moetier.trace import Trace
from moetier.trace.files import read_trace

SIZES = (0.10, 0.20, 0.30, 0.50, 0.70)
BATCHES = (1, 2, 4, 8, 16)
SCOPES = ("global", "layer")
NOISE_SEEDS = (0, 1, 2)
VARIANTS = ("lfu(memory=false)", "slru(protected=0.5)")
ORACLES = ("belady", "belady-forced")
RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent.parent / "docs" / "policies.md"
COLD_STEPS, COLD_GROUPS = 256, 8  # step-synchronous groups of streams, each on an empty cache
COLD_POLICIES = ("lru", "lfu", "ebco", "horizon", "belady")
README = Path(__file__).parent.parent / "README.md"
SUMMARY = ("gpt-oss-20b", ("fifo", "lru", "lfu", "lfru", "ebco", "mrs", "horizon", "belady"))


def policies() -> list[str]:
    return [*sorted(set(POLICIES) - set(ORACLES)), *VARIANTS, *ORACLES]


def configs(trace: Trace, batch: int, scope: str, sizes: Iterable[float] = SIZES) -> list[SimulationConfig]:
    return [
        SimulationConfig(policy, round(size * trace.records), scope=scope, batch=batch)  # type: ignore[arg-type]
        for policy in policies()
        for size in sizes
    ]


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    whole = read_trace(arguments.trace).decode_only()
    fit, test = whole.split()
    runs: list[dict[str, Any]] = []
    for batch in BATCHES:
        for scope in SCOPES:
            tokens = arguments.tokens if batch == 1 and scope == "global" else arguments.other_tokens
            runs += group(arguments, test, fit, batch, scope, tokens)
    noise = [
        run for seed in NOISE_SEEDS for run in group(arguments, test, fit, 1, "global", arguments.other_tokens, seed)
    ]
    return {
        "name": arguments.name,
        "trace": describe(whole, test),
        "machine": machine_info(Path(__file__).parent.parent),
        "date": datetime.now(UTC).date().isoformat(),
        "runs": runs,
        "noise": noise,
        "cold": cold(arguments, test),
    }


def cold(arguments: argparse.Namespace, test: Trace) -> list[dict[str, Any]]:
    """Groups of streams that start together and stop after the same number of steps, each on an empty cache."""
    sequences, counts = np.unique(test.sequence, return_counts=True)
    long = [int(sequence) for sequence in sequences[counts >= COLD_STEPS]]
    rows: list[dict[str, Any]] = []
    for batch in (4, 8, 16):
        groups = [long[first : first + batch] for first in range(0, len(long) - batch + 1, batch)][:COLD_GROUPS]
        totals: dict[tuple[str, float], list[int]] = {}
        for members in groups:
            parts = [np.flatnonzero(test.sequence == member)[:COLD_STEPS] for member in members]
            trace = test.take(np.sort(np.concatenate(parts)))
            chosen = [
                SimulationConfig(policy, round(size * trace.records), batch=batch)
                for policy in COLD_POLICIES
                for size in (0.3, 0.5)
            ]
            for result in sweep(trace, chosen, processes=arguments.jobs):
                total = totals.setdefault((result.config.policy, round(result.config.slots / trace.records, 3)), [0, 0])
                total[0] += sum(result.hits)
                total[1] += sum(result.needs)
        rows += [
            {"policy": policy, "share": share, "batch": batch, "groups": len(groups), "hit_rate": hits / needs}
            for (policy, share), (hits, needs) in totals.items()
        ]
    return rows


def group(
    arguments: argparse.Namespace, test: Trace, fit: Trace, batch: int, scope: str, tokens: int, seed: int | None = None
) -> list[dict[str, Any]]:
    """All policies at all sizes; with a seed, sequences in another order and experts renumbered."""
    trace = test.shuffled(seed or 0).first(tokens)
    if seed is not None:
        trace, fit = trace.relabelled(seed), fit.relabelled(seed)
    chosen = configs(trace, batch, scope)
    print(
        f"batch {batch}, {scope}, seed {seed}: {len(chosen)} runs, {trace.tokens} tokens", file=sys.stderr, flush=True
    )
    resume = None if arguments.resume is None else f"{arguments.resume}.{batch}.{scope}.{seed}"
    results = sweep(trace, chosen, fit=fit, processes=arguments.jobs, resume=resume)
    return [row(result, trace, seed) for result in results]


def describe(whole: Trace, test: Trace) -> dict[str, Any]:
    return {
        "model": whole.info.model,
        "source": whole.info.source,
        "layers": whole.layers,
        "experts": whole.num_experts,
        "top_k": whole.top_k,
        "tokens": whole.tokens,
        "sequences": len(whole.sequences()),
        "test_sequences": len(test.sequences()),
    }


def row(result: Result, trace: Trace, seed: int | None) -> dict[str, Any]:
    config = result.config
    return {
        "policy": config.policy,
        "slots": config.slots,
        "share": round(config.slots / trace.records, 3),
        "scope": config.scope,
        "batch": config.batch,
        "seed": seed,
        "tokens": result.tokens,
        "needs": sum(result.needs),
        "hit_rate": result.hit_rate,
        "records_per_token": sum(result.misses) / max(1, result.tokens),
        "demand_ratio": result.demand_ratio,
        "overcommitted": result.overcommitted,
        "wall_seconds": result.wall_seconds,
    }


# -- tables -----------------------------------------------------------------------------------------------------------


def tables() -> None:
    """Put the tables into the page, and the shortest of them into the README."""
    parts, summary = [], []
    for path in sorted(RESULTS.glob("policies-*.json")):
        result = json.loads(path.read_text())
        parts += trace_tables(result)
        if result["name"] == SUMMARY[0]:
            summary = summary_table(result["runs"])
    insert(PAGE, "tables", parts)
    if summary:
        insert(README, "policies-summary", summary)


def insert(path: Path, name: str, lines: list[str]) -> None:
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    head, rest = path.read_text().split(begin)
    _, tail = rest.split(end)
    path.write_text(head + begin + "\n\n" + "\n".join(lines).rstrip() + "\n\n" + end + tail)


def summary_table(runs: list[dict[str, Any]]) -> list[str]:
    chosen = [run for run in runs if (run["batch"], run["scope"]) == (1, "global")]
    shares = sorted({run["share"] for run in chosen})
    rates = {(run["policy"], run["share"]): 100 * run["hit_rate"] for run in chosen}
    lines = ["| experts resident | " + " | ".join(f"{share:.0%}" for share in shares) + " |"]
    lines.append("| --- |" + " ---: |" * len(shares))
    for policy in SUMMARY[1]:
        name = "belady (knows the future)" if policy == "belady" else f"**{policy}**" if policy == "horizon" else policy
        lines.append(f"| {name} | " + " | ".join(f"{rates[policy, share]:.1f}" for share in shares) + " |")
    return lines


def trace_tables(result: dict[str, Any]) -> list[str]:
    trace = result["trace"]
    lines = [
        f"## {result['name']}",
        "",
        f"{trace['model'] or result['name']}: {trace['layers']} layers, {trace['top_k']} of {trace['experts']} experts "
        f"({trace['source']}). {trace['test_sequences']} of {trace['sequences']} sequences are run here; `static` "
        f"is fitted on the others. {result['date']}.",
        "",
    ]
    for batch in sorted({run["batch"] for run in result["runs"]}):
        for scope in SCOPES:
            runs = [run for run in result["runs"] if (run["batch"], run["scope"]) == (batch, scope)]
            if runs:
                lines += hit_table(runs, batch, scope)
                if (batch, scope) == (1, "global"):
                    lines += noise(result["noise"])
    return lines + cold_table(result["cold"])


def cold_table(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    columns = sorted({(row["batch"], row["share"]) for row in rows})
    groups = {row["batch"]: row["groups"] for row in rows}
    many = ", ".join(f"{count} of {batch}" for batch, count in groups.items())
    lines = [
        f"**From a cold cache, global scope.** Groups of streams ({many}) that start together on an empty cache and run"
        f" {COLD_STEPS} steps side by side; hits over needs, all groups together.",
        "",
        "| policy | " + " | ".join(f"{batch} streams, {share:.0%}" for batch, share in columns) + " |",
        "| --- |" + " ---: |" * len(columns),
    ]
    for policy in COLD_POLICIES:
        rates = {(row["batch"], row["share"]): row["hit_rate"] for row in rows if row["policy"] == policy}
        lines.append(f"| {policy} | " + " | ".join(f"{100 * rates[column]:.1f}" for column in columns) + " |")
    return [*lines, ""]


def hit_table(runs: list[dict[str, Any]], batch: int, scope: str) -> list[str]:
    shares, first = sorted({run["share"] for run in runs}), runs
    rates = {(run["policy"], run["share"]): run["hit_rate"] for run in first}
    names = sorted({run["policy"] for run in first} - set(ORACLES), key=lambda name: -rates[name, shares[2]])
    one = first[0]
    needs = one["needs"] / max(1, one["tokens"])
    ratio = ", ".join(f"{next(run['demand_ratio'] for run in first if run['share'] == share):.2f}" for share in shares)
    over = ", ".join(f"{next(run['overcommitted'] for run in first if run['share'] == share):.0%}" for share in shares)
    head = " | ".join(f"{share:.0%}" for share in shares)
    lines = [
        f"**{'One stream' if batch == 1 else f'{batch} streams'}, {scope} scope.** {one['tokens']:,} tokens, "
        f"{one['needs']:,} needs ({needs:.1f} records a token). Experts needed per access ÷ slots per layer: {ratio}; "
        f"above 1 in {over} of the accesses.",
        "",
        f"| policy | {head} | gap closed at 20 % | records a token at 30 % |",
        "| --- |" + " ---: |" * (len(shares) + 2),
    ]
    bold = {share: max(rates[name, share] for name in names) for share in shares}
    for name in [*names, *ORACLES]:
        cells = []
        for share in shares:
            text = f"{100 * rates[name, share]:.1f}"
            cells.append(f"**{text}**" if name not in ORACLES and rates[name, share] == bold[share] else text)
        lru, best = rates["lru", shares[1]], rates["belady", shares[1]]
        closed = f"{100 * (rates[name, shares[1]] - lru) / (best - lru):.0f} %" if best > lru else ""
        moved = next(run["records_per_token"] for run in first if (run["policy"], run["share"]) == (name, shares[2]))
        lines.append(f"| {name} | {' | '.join(cells)} | {closed} | {moved:.1f} |")
    return [*lines, ""]


def noise(runs: list[dict[str, Any]]) -> list[str]:
    shares = sorted({run["share"] for run in runs})
    spreads: dict[float, list[float]] = {share: [] for share in shares}
    for policy in sorted({run["policy"] for run in runs}):
        for share in shares:
            values = [run["hit_rate"] for run in runs if (run["policy"], run["share"]) == (policy, share)]
            spreads[share].append(statistics.stdev(values))
    text = ", ".join(
        f"{100 * statistics.median(values):.2f} (at most {100 * max(values):.2f}) at {share:.0%}"
        for share, values in spreads.items()
    )
    seeds, tokens = len({run["seed"] for run in runs}), runs[0]["tokens"]
    return [
        f"Noise: standard deviation over {seeds} orders of the sequences and numberings of the experts (which decide "
        f"ties), {tokens:,} tokens each, median over policies, in points: {text}.",
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", nargs="?", help="a trace file")
    parser.add_argument("--name", default="trace")
    parser.add_argument("--tokens", type=int, default=24_000, help="of the table for one stream and global slots")
    parser.add_argument("--other-tokens", type=int, default=4_000, help="of the other tables, and of the noise")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--resume", help="keep finished runs in files that begin so")
    parser.add_argument("--tables", action="store_true", help="only write the tables of all results")
    arguments = parser.parse_args()
    if arguments.trace is not None:
        path = RESULTS / f"policies-{arguments.name}.json"
        path.write_text(json.dumps(measure(arguments), indent=1) + "\n")
    if arguments.tables or arguments.trace is not None:
        tables()


if __name__ == "__main__":
    main()
