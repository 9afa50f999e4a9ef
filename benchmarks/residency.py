"""What a decision costs: median microseconds per access in the residency core, for every eviction policy.

    python benchmarks/residency.py [--json FILE] [--policies lru,lfru] [--accesses 2000]

All-hit: 8 experts that are resident. All-miss: 8 experts that are not, in a full tier, so each displaces a victim.
"acquire" is the call alone (victims and orders included); "cycle" adds take, the completions and the releases.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from pathlib import Path

import numpy as np

from moetier.access import Access, ExpertKey
from moetier.policies import POLICIES
from moetier.residency import Residency
from moetier.tiers import TierConfig

LAYERS, EXPERTS, SLOTS, NEED = 48, 128, 2000, 8


class Driver:
    """Serves accesses at once: every copy completes as soon as it is ordered."""

    def __init__(self, policy: str):
        self.core = Residency([TierConfig(SLOTS, policy)], LAYERS, EXPERTS)
        self.random = random.Random(0)
        self.time = 0
        self.owner: dict[
            int, ExpertKey
        ] = {}  # of each slot; asking the core for its residents costs more than an access
        self.resident: list[set[int]] = [set() for _ in range(LAYERS)]

    def next_access(self, resident: bool | None) -> Access:
        """In the next layer with enough experts: only resident ones, only missing ones, or any."""
        while True:
            self.time += 1
            layer = self.time % LAYERS
            pool = range(EXPERTS) if resident is None else self.resident[layer]
            if resident is False:
                pool = [expert for expert in range(EXPERTS) if expert not in self.resident[layer]]
            if len(pool) >= NEED:
                experts = sorted(self.random.sample(sorted(pool), NEED))
                return Access(self.time, layer, tuple(ExpertKey(layer, expert) for expert in experts))

    def timed(self, access: Access) -> tuple[float, float]:
        """Microseconds of `acquire`, and of the whole cycle."""
        core = self.core
        begin = time.perf_counter()
        ticket = core.acquire(access)
        middle = time.perf_counter()
        orders = core.take()
        for copy in orders:
            core.completed(copy.id)
        while ticket.ready:
            core.release(ticket, ticket.ready.popleft())
        end = time.perf_counter()
        for copy in orders:
            slot, key = copy.target.slot, copy.key
            if slot in self.owner:
                self.resident[self.owner[slot].layer].remove(self.owner[slot].expert)
            self.owner[slot] = key
            self.resident[key.layer].add(key.expert)
        return 1e6 * (middle - begin), 1e6 * (end - begin)


def measure(policy: str, accesses: int) -> dict[str, float]:
    driver = Driver(policy)
    for _ in range(2 * SLOTS // NEED):  # fill, and give the policy something to go by
        driver.timed(driver.next_access(None))
    result = {}
    for name, resident in (("hit", True), ("miss", False)):
        samples = [driver.timed(driver.next_access(resident)) for _ in range(accesses)]
        result[f"{name}_acquire"], result[f"{name}_cycle"] = map(statistics.median, zip(*samples, strict=True))
    return result


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the result to this file too")
    parser.add_argument("--policies", default=",".join(sorted(POLICIES)), help="comma-separated registry names")
    parser.add_argument("--accesses", type=int, default=1000, help="samples per number")
    options = parser.parse_args()
    print(f"{'µs, median':12}{'hit: acquire':>14}{'cycle':>9}{'miss: acquire':>16}{'cycle':>9}")
    results: dict[str, dict[str, float]] = {}
    for policy in options.policies.split(","):
        row = results[policy] = measure(policy, options.accesses)
        hit, miss = (row["hit_acquire"], row["hit_cycle"]), (row["miss_acquire"], row["miss_cycle"])
        print(f"{policy:12}{hit[0]:14.1f}{hit[1]:9.1f}{miss[0]:16.1f}{miss[1]:9.1f}")
    report = {
        "unit": "median microseconds per access",
        "experts_per_access": NEED,
        "slots": SLOTS,
        "layers": LAYERS,
        "experts": EXPERTS,
        "accesses": options.accesses,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "cpu": cpu_model(),
        "policies": results,
    }
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
