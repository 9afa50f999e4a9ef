"""How fast the simulator is: every policy, LRU curves for all sizes, the virtual clock, and a sweep.

    python benchmarks/simulate.py [--json benchmarks/results/simulate.json] [--smoke]

The trace is synthetic (Zipf + Markov): 48 layers of 64 experts, 8 a token, 3,072 experts in all. Speeds are *needs*
(one expert of one access) a second on one core, from a trace in memory to a result: the accesses are made within that
time. "decisions" is the serving alone, as in a sweep that makes the accesses once. Best of `--repeat` runs, by the
clock on the wall; the CPU's clock is given beside it, for machines that are not quiet.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import machine_info
from moetier.policies import POLICIES, find_policy
from moetier.simulate.config import SimulationConfig, Timing
from moetier.simulate.mattson import lru_curve
from moetier.simulate.run import simulate
from moetier.simulate.sweep import sweep
from moetier.trace import Trace
from moetier.trace.needs import needs_of
from moetier.trace.synthetic import zipf_markov

LAYERS, EXPERTS, TOP_K = 48, 64, 8
SLOTS = 800  # for hit rates of 50 to 70 %
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7)
SWEEP_POLICIES = "activation-matrix,dali,ebco,fifo,hobbit,horizon,least-stale,lfru,lfu,lru,mrs,slru"
MARKS = {"lru": 500_000, "lfru": 500_000}  # needs a second; every other online policy 100,000
MARK = 100_000
CURVE_MARK, SWEEP_MARK = 5_000_000, 180.0


def best_of(repeat: int, work: Callable[[], Any]) -> tuple[float, float, Any]:
    """Wall and CPU seconds of the fastest of some runs, and what it returned."""
    best: tuple[float, float, Any] | None = None
    for _ in range(repeat):
        wall, cpu = time.perf_counter(), time.process_time()
        outcome = work()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        if best is None or wall < best[0]:
            best = (wall, cpu, outcome)
    assert best is not None
    return best


def measure_policies(trace: Trace, fit: Trace, names: list[str], repeat: int) -> dict[str, dict[str, Any]]:
    rows = {}
    print(f"{'policy':20}{'hit rate':>9}{'needs/s':>12}{'per CPU s':>12}{'decisions/s':>13}{'mark':>10}")
    for name in names:
        config = SimulationConfig(name, SLOTS)
        fitted = fit if hasattr(find_policy(name), "fit") else None
        wall, cpu, result = best_of(repeat, lambda config=config, fitted=fitted: simulate(trace, config, fit=fitted))
        needs = sum(result.needs)
        offline = hasattr(find_policy(name), "foresee") or fitted is not None
        row = rows[name] = {
            "hit_rate": result.hit_rate,
            "needs_per_second": needs / wall,
            "needs_per_cpu_second": needs / cpu,
            "decided_per_second": needs / result.wall_seconds,
            "online": not offline,
            "mark": None if offline else MARKS.get(name, MARK),
        }
        print(
            f"{name:20}{row['hit_rate']:9.3f}{row['needs_per_second']:12,.0f}{row['needs_per_cpu_second']:12,.0f}"
            f"{row['decided_per_second']:13,.0f}{verdict(row['needs_per_second'], row['mark']):>10}",
            flush=True,
        )
    return rows


def verdict(value: float, mark: float | None) -> str:
    return "" if mark is None else "reached" if value >= mark else "missed"


def measure_curve(trace: Trace, repeat: int) -> dict[str, Any]:
    needs = needs_of(trace)
    wall, cpu, _ = best_of(1, lambda: lru_curve(needs, trace.records))
    print(f"\nLRU curve, all {trace.records} sizes: first call {wall:.2f} s (it compiles)", end="; ")
    wall, cpu, curve = best_of(repeat, lambda: lru_curve(needs, trace.records))
    speed = len(needs.record) / wall
    print(f"then {speed:,.0f} needs/s ({len(needs.record) / cpu:,.0f} per CPU s): {verdict(speed, CURVE_MARK)}")
    sizes = [int(trace.records * share) for share in SHARES]
    gaps = []
    for slots in sizes:
        run = simulate(trace.first(1000), SimulationConfig("lru", slots))
        short = lru_curve(needs_of(trace.first(1000)), trace.records)
        gaps.append(abs(short.hit_rate(slots) - run.hit_rate))
    print(f"largest difference to runs of policy lru, 1000 tokens, {sizes} slots: {100 * max(gaps):.3f} points")
    return {
        "needs": len(needs.record),
        "needs_per_second": speed,
        "needs_per_cpu_second": len(needs.record) / cpu,
        "mark": CURVE_MARK,
        "hit_rates": {str(slots): curve.hit_rate(slots) for slots in sizes},
        "largest_difference_to_policy_lru": max(gaps),
    }


def measure_clock(trace: Trace, repeat: int) -> dict[str, float]:
    """The real core behind the virtual clock, with LRU."""
    timing = Timing(2_000_000, layer_seconds=1e-3, expert_seconds=1e-4)
    variants: dict[str, dict[str, Any]] = {
        "one tier": {},
        "two tiers": {"host_slots": 2 * SLOTS},
        "prefetch": {"predictor": "previous-token", "prefetch_confidence": 0.2, "prefetch_displace": True},
    }
    speeds = {}
    for name, options in variants.items():
        config = SimulationConfig("lru", SLOTS, timing=timing, **options)
        wall, _, result = best_of(repeat, lambda config=config: simulate(trace, config))
        speeds[name] = sum(result.needs) / wall
        print(f"virtual clock, {name}: {speeds[name]:,.0f} needs/s")
    return speeds


def measure_sweep(trace: Trace, policies: list[str], processes: int) -> dict[str, Any]:
    configs = [SimulationConfig(policy, int(trace.records * share)) for policy in policies for share in SHARES]
    needs = len(needs_of(trace).record)
    begin = time.perf_counter()
    results = sweep(trace, configs, processes=processes)
    seconds = time.perf_counter() - begin
    mark = SWEEP_MARK if len(policies) >= 12 and needs >= 10**6 else None
    print(
        f"\nsweep of {len(policies)} policies x {len(SHARES)} sizes over {needs:,} needs on {processes} processes: "
        f"{seconds:.1f} s {verdict(-seconds, None if mark is None else -mark)}"
    )
    assert len(results) == len(configs)
    return {
        "policies": policies,
        "shares": SHARES,
        "needs": needs,
        "processes": processes,
        "seconds": seconds,
        "mark": mark,
        "hit_rates": {f"{result.config.policy} {result.config.slots}": result.hit_rate for result in results},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the result to this file too")
    parser.add_argument("--policies", default=",".join(sorted(POLICIES)), help="comma-separated, of the speed table")
    parser.add_argument("--sweep-policies", default=SWEEP_POLICIES, help="comma-separated, of the sweep")
    parser.add_argument("--tokens", type=int, default=2605, help="2605 tokens are a million needs")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2, help="of the sweep")
    parser.add_argument("--no-sweep", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="everything, shortly: do all parts run?")
    options = parser.parse_args()
    if options.smoke:
        options.tokens, options.repeat = 60, 1
    trace = zipf_markov(options.tokens, LAYERS, EXPERTS, TOP_K, seed=0)
    fit = zipf_markov(max(50, options.tokens // 4), LAYERS, EXPERTS, TOP_K, seed=1)
    report: dict[str, Any] = {
        "machine": machine_info(Path(__file__).parent.parent),
        "load": os.getloadavg(),
        "trace": {"layers": LAYERS, "experts": EXPERTS, "top_k": TOP_K, "tokens": options.tokens, "slots": SLOTS},
    }
    report["policies"] = measure_policies(trace, fit, options.policies.split(","), options.repeat)
    long = trace if options.smoke else zipf_markov(4 * options.tokens, LAYERS, EXPERTS, TOP_K, seed=2)
    report["lru_curve"] = measure_curve(long, options.repeat)
    report["virtual_clock"] = measure_clock(trace.first(600), options.repeat)
    if not options.no_sweep:
        report["sweep"] = measure_sweep(trace, options.sweep_policies.split(","), options.processes)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
