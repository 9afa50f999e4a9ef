"""Hit rates of eviction policies when a trace's tokens are trained on: forward, backward, update, and evaluations.

    python benchmarks/training_policies.py [TRACE.parquet] [--batches 4 16 256] [--steps 60]

Without a trace, on a synthetic one (environments, 6 layers x 32 experts, top-4). Every step of `batch` tokens becomes a
training step (`moetier.trace.training`); what a cache of weights, gradients or states sees of it is run on its own.
Prints Markdown tables for docs/LOG.md. Hit rates are exact and repeatable; nothing is timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from moetier.access import Access
from moetier.simulate.config import SimulationConfig
from moetier.simulate.run import simulate_accesses
from moetier.trace.files import read_trace
from moetier.trace.synthetic import environments
from moetier.trace.training import GRADIENTS, STATES, WEIGHTS, training_steps

SIZES = (0.10, 0.25, 0.50, 0.75)
POLICIES = ("lru", "horizon", "zigzag", "belady-forced")
VIEWS = {
    "weights, updated on the way, or frozen (forward, backward)": {"parts": WEIGHTS[:3]},
    "weights, updated after backward, as below a GPU (forward, backward, update)": {"parts": WEIGHTS},
    "weights, two backwards an update": {"parts": WEIGHTS, "accumulate": 2},
    "weights, every third forward an evaluation": {"parts": WEIGHTS, "evaluate": 3},
    "gradients (backward, update)": {"parts": GRADIENTS},
    "states (update)": {"parts": STATES},
}


def forwards(arguments: argparse.Namespace) -> Iterator[tuple[str, list[Access], int, int]]:
    """Name, accesses, layers and experts of every workload."""
    for batch in arguments.batches:
        if arguments.trace is None:
            trace = environments(arguments.steps, 6, 32, 4, batch=batch, envs=16, episode=8, seed=1)
            accesses = trace.accesses()
        else:
            trace = read_trace(arguments.trace).decode_only()
            accesses = trace.accesses(batch)[: arguments.steps * trace.layers]
        yield f"{batch} tokens a step", accesses, trace.layers, trace.num_experts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace", nargs="?")
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 16, 256])
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    sizes = " | ".join(f"{size:.0%}" for size in SIZES)
    for name, accesses, layers, experts in forwards(arguments):
        for view, options in VIEWS.items():
            steps = training_steps(accesses, **options)  # type: ignore[arg-type]
            mean = sum(len(access.keys) for access in steps) / len(steps)
            print(f"\n**{name}, {view}**; {mean:.1f} of {experts} experts an access\n")
            print(f"| policy | {sizes} |\n| --- |{' ---: |' * len(SIZES)}")
            for policy in POLICIES:
                configs = [SimulationConfig(policy, round(size * layers * experts)) for size in SIZES]
                rates = [simulate_accesses(steps, layers, experts, config).hit_rate for config in configs]
                print(f"| {policy} | {' | '.join(f'{100 * rate:.1f}' for rate in rates)} |", flush=True)


if __name__ == "__main__":
    main()
