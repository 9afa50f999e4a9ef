"""What a miss costs on either side, and the split of an access's misses that finishes soonest.

Numbers in, a choice out: measuring the costs is `calibration`, carrying out the choice is the engine's. The model:
records go over the link one after the other, the device computes each when it is there, and the CPU computes the
others from host memory meanwhile, slower while the link takes its share of the memory bandwidth. What is at home
comes off the disk first, whichever side computes it.

Sources: the idea is Fiddler's (arXiv 2402.07033), the makespan instead of a sum DALI's and HybriMoE's, the shared
memory bandwidth FreeToken's: with records of equal size and one token each, `split` fetches q* = m · B_link / B_memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, NamedTuple

from moetier.errors import ConfigError

POLISHED = 16  # misses up to which single ones are moved from side to side after the split


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds of an expert's math for n tokens: max(floor, fixed + per_token · n).

    Below the knee the weights have to be read and the tokens are free; above it every token counts.
    """

    floor: float
    fixed: float = 0.0
    per_token: float = 0.0

    def __call__(self, tokens: int) -> float:
        """Seconds for so many tokens."""
        return max(self.floor, self.fixed + self.per_token * tokens)

    @classmethod
    def fit(cls, points: Sequence[tuple[int, float]]) -> Cost:
        """The cost that is nearest, in relative terms, to measured (tokens, seconds).

        Every knee is tried: the points up to it are the floor, those from it on the line. Raises `ConfigError` for
        fewer than two points.
        """
        if len(points) < 2:
            raise ConfigError(f"a cost needs two measured points or more, got {len(points)}")
        points = sorted(points)
        found = [cls._with_knee(points, knee) for knee in range(len(points))]
        return min(found, key=lambda cost: sum((cost(tokens) / seconds - 1) ** 2 for tokens, seconds in points))

    @classmethod
    def _with_knee(cls, points: Sequence[tuple[int, float]], knee: int) -> Cost:
        flat, line = points[: knee + 1], points[knee:]
        floor = sum(seconds for _, seconds in flat) / len(flat)
        if len(line) < 2:
            return cls(floor)
        weights = [1 / seconds**2 for _, seconds in line]  # relative errors
        total = sum(weights)
        mean_n = sum(w * n for w, (n, _) in zip(weights, line, strict=True)) / total
        mean_t = sum(w * t for w, (_, t) in zip(weights, line, strict=True)) / total
        spread = sum(w * (n - mean_n) ** 2 for w, (n, _) in zip(weights, line, strict=True))
        slope = sum(w * (n - mean_n) * (t - mean_t) for w, (n, t) in zip(weights, line, strict=True)) / spread
        slope = max(0.0, slope)  # noise: more tokens are never less work
        return cls(floor, mean_t - slope * mean_n, slope)


@dataclass(frozen=True, slots=True)
class Costs:
    """What one machine was found to need for one model's experts; seconds, per expert unless said otherwise.

    `link` and `disk` are seconds of a record: on the bus, and between two records off a busy disk; `disk_latency` comes
    before the first. `contention` is the share by which CPU math takes longer while the link copies: a copy reads the
    memory that the math reads. `in_place` is spent once per access that computes anything on the CPU: rows to the host,
    results back.
    """

    cpu: Cost
    device: Cost = Cost(0.0)
    link: float = 0.0
    disk: float = 0.0
    disk_latency: float = 0.0
    contention: float = 0.0
    in_place: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class Work(NamedTuple):
    """An expert that is not on the device: the tokens it has, and whether it is at home (else in host memory)."""

    tokens: int
    at_home: bool = False


class Split(NamedTuple):
    """Per miss, whether the CPU computes it where it is; and the seconds until the last result is there."""

    in_place: tuple[bool, ...]
    seconds: float


def makespan(misses: Sequence[Work], in_place: Sequence[bool], costs: Costs, device_busy: float = 0.0) -> float:
    """Seconds until all are computed; `device_busy` is the device's work on what it has already.

    Each side takes what is in host memory first, then what comes off the disk, in the order it comes: for given sides
    no order ends sooner.
    """
    device, cpu, cpu_work, off_disk = device_busy, 0.0, 0.0, costs.disk_latency
    link = 0.0
    late: list[tuple[float, float]] = []  # (there at, seconds of CPU) of what the disk gives
    for (tokens, at_home), here in sorted(zip(misses, in_place, strict=True), key=_from_home):
        there = 0.0
        if at_home:
            off_disk += costs.disk
            there = off_disk
        if not here:
            link = max(link, there) + costs.link
            device = max(device, link) + costs.device(tokens)
        elif at_home:
            late.append((there, costs.cpu(tokens)))
        else:
            cpu_work += costs.cpu(tokens)
    if cpu_work or late:
        shared = 1 + costs.contention
        cpu = _busy(costs.in_place, cpu_work, link, shared)
        for there, seconds in late:
            cpu = _busy(max(cpu, there), seconds, link, shared)
    return max(device, cpu)


def _from_home(item: tuple[Work, bool]) -> bool:
    return item[0].at_home


def _busy(begin: float, work: float, until: float, slower: float) -> float:
    """When `work` seconds of math that begin at `begin` end, if until `until` all takes `slower` times as long."""
    beside = max(0.0, until - begin) / slower  # what can be done before the link is quiet
    return begin + work * slower if work <= beside else begin + work + beside * (slower - 1)


def split(misses: Sequence[Work], costs: Costs, device_busy: float = 0.0) -> Split:
    """Which misses the CPU should compute in place, so that the access ends soonest; one at least is fetched.

    A record costs the link the same whatever its tokens, so the link takes those with most tokens: of each source, all
    divisions along that order are tried, and for a few misses then every single move. Exact where all are in host
    memory; `tests/test_costs.py` compares it with trying everything. A tie fetches more: the cache learns from it.
    """
    order = sorted(range(len(misses)), key=lambda i: (misses[i].at_home, -misses[i].tokens, i))
    if len(order) < 2:
        return Split((False,) * len(misses), makespan(misses, (False,) * len(misses), costs, device_busy))
    hosts = sum(not miss.at_home for miss in misses)
    best, best_seconds = [False] * len(misses), makespan(misses, [False] * len(misses), costs, device_busy)

    def consider(sides: list[bool]) -> bool:
        nonlocal best, best_seconds
        seconds = makespan(misses, sides, costs, device_busy)
        if all(sides) or seconds >= best_seconds * (1 - 1e-9):
            return False
        best, best_seconds = sides, seconds
        return True

    for fetched_hosts, fetched_homes in _divisions(hosts, len(order) - hosts):
        sides = [True] * len(misses)
        for i in (*order[:fetched_hosts], *order[hosts : hosts + fetched_homes]):
            sides[i] = False
        consider(sides)
    if len(order) <= POLISHED:
        while any(consider([side != (i == moved) for i, side in enumerate(best)]) for moved in order):
            pass
    return Split(tuple(best), best_seconds)


def _divisions(hosts: int, homes: int) -> Sequence[tuple[int, int]]:
    """How many of each source are fetched; with many misses the same share of both, most fetched first."""
    if hosts + homes <= POLISHED:
        return [(a, b) for a, b in product(range(hosts, -1, -1), range(homes, -1, -1)) if a or b]
    steps = max(hosts, homes)
    return [(hosts * i // steps, homes * i // steps) for i in range(steps, -1, -1) if hosts * i // steps or homes * i]
