"""Results put in order: traces, panels (scope and batch), policies by sizes, means and spreads over seeds; and what
follows from them in words. Knows nothing of tables and pictures (`report`, `html`).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from moetier.policies import find_policy, parse_policy
from moetier.simulate.config import Result
from moetier.simulate.workers import Failure
from moetier.trace import Trace

__all__ = [
    "BASELINE",
    "Cell",
    "Measure",
    "Panel",
    "TraceSummary",
    "all_results",
    "is_oracle",
    "measures",
    "panels",
    "percent",
]

BASELINE = "lru"  # the gap is measured from here
ORACLES = ("belady", "belady-forced")  # and to the first of these that was simulated

SATURATED = 0.9  # share of a layer's experts that an access needs, from which on no policy has a choice
ALIKE = 0.005  # hit rates closer than this, or than twice the spread over seeds, are not ranked


@dataclass(frozen=True)
class Cell:
    """One policy at one size: a result for every seed."""

    policy: str
    slots: int
    results: tuple[Result, ...]

    def values(self, what: Callable[[Result], float | None]) -> list[float]:
        """A number of every result that has it."""
        return [value for value in map(what, self.results) if value is not None]

    @cached_property
    def hit_rate(self) -> float:
        """Mean over seeds."""
        return statistics.fmean(result.hit_rate for result in self.results)

    @cached_property
    def spread(self) -> float:
        """Standard deviation of the hit rate over seeds; 0 for one seed."""
        return spread([result.hit_rate for result in self.results])

    def per_layer(self) -> list[float]:
        """Hit rate of every layer, mean over seeds; a layer that nothing needed has 0."""
        rates = [
            [hits / max(1, needs) for hits, needs in zip(result.hits, result.needs, strict=True)]
            for result in self.results
        ]
        return [statistics.fmean(layer) for layer in zip(*rates, strict=True)]


def spread(values: Sequence[float]) -> float:
    """Standard deviation of a sample; 0 for one value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def percent(share: float) -> str:
    """A share as people say it: whole percents where slots are rounded from them."""
    value = 100 * share
    return f"{value:.0f} %" if abs(value - round(value)) < 0.2 and round(value) else f"{value:.3g} %"


@dataclass(frozen=True)
class Panel:
    """What can be compared: one scope and batch, policies by sizes. Some cells may be missing."""

    scope: str
    batch: int | None
    records: int  # experts over all layers
    num_experts: int
    layers: int
    cells: dict[tuple[str, int], Cell]

    @property
    def title(self) -> str:
        """`global scope, batch 4`."""
        batch = "steps as recorded" if self.batch is None else f"batch {self.batch}"
        return f"{self.scope} scope, {batch}" if self.scope == "global" else f"per-layer scope, {batch}"

    @cached_property
    def sizes(self) -> list[int]:
        """Slots, ascending."""
        return sorted({slots for _, slots in self.cells})

    @cached_property
    def policies(self) -> list[str]:
        """Best first by mean hit rate over the sizes; oracles before all others."""
        names = {policy for policy, _ in self.cells}

        def rank(name: str) -> tuple[bool, float, str]:
            rates = [cell.hit_rate for (policy, _), cell in self.cells.items() if policy == name]
            return not is_oracle(name), -statistics.fmean(rates), name

        return sorted(names, key=rank)

    def share(self, slots: int) -> float:
        """Slots as a share of all experts."""
        return slots / self.records

    def cells_of(self, policy: str) -> list[Cell]:
        """Of one policy, by ascending size."""
        return [self.cells[policy, slots] for slots in self.sizes if (policy, slots) in self.cells]

    def oracle(self, slots: int) -> Cell | None:
        """The oracle that gaps are measured to, at a size."""
        return next((self.cells[name, slots] for name in ORACLES if (name, slots) in self.cells), None)

    def gap_closed(self, policy: str, slots: int) -> list[float]:
        """Of the distance between LRU and the oracle, the share that a policy closes, for every seed.

        Empty where one of the three is missing, or where there is no distance worth the name.
        """
        cell, low, high = self.cells.get((policy, slots)), self.cells.get((BASELINE, slots)), self.oracle(slots)
        if (
            cell is None
            or low is None
            or high is None
            or not len(cell.results) == len(low.results) == len(high.results)
        ):
            return []
        triples = zip(cell.results, low.results, high.results, strict=True)
        rates = [(own.hit_rate, bottom.hit_rate, top.hit_rate) for own, bottom, top in triples]
        return [(own - bottom) / (top - bottom) for own, bottom, top in rates if top - bottom > ALIKE]

    @cached_property
    def needed(self) -> float:
        """Mean experts that an access needs."""
        cell = next(iter(self.cells.values()))
        return statistics.fmean(sum(result.needs) / max(1, result.accesses) for result in cell.results)

    @cached_property
    def touched(self) -> float:
        """Mean experts that a step (all layers) needs."""
        cell = next(iter(self.cells.values()))
        return statistics.fmean(sum(result.needs) / max(1, result.steps) for result in cell.results)

    @cached_property
    def saturated(self) -> bool:
        """Whether an access needs nearly all experts of its layer."""
        return self.needed >= SATURATED * self.num_experts

    def contenders(self, slots: int) -> list[Cell]:
        """The policies without knowledge of the future, best first."""
        cells = [cell for (name, size), cell in self.cells.items() if size == slots and not is_oracle(name)]
        return sorted(cells, key=lambda cell: -cell.hit_rate)

    def alike(self, slots: int) -> bool:
        """Whether the policies do not differ enough to be ranked."""
        cells = self.contenders(slots)
        if len(cells) < 2:
            return False
        noise = max(cell.spread for cell in cells)
        return cells[0].hit_rate - cells[-1].hit_rate <= max(ALIKE, 2 * noise)

    def leaders(self, slots: int) -> list[str]:
        """The best policy and all that cannot be told from it; none where nothing is to be ranked."""
        cells = self.contenders(slots)
        if len(cells) < 2 or self.saturated or self.alike(slots):
            return []
        best = cells[0]
        margin = max(ALIKE / 5, 2 * max(best.spread, 1e-9))
        return [cell.policy for cell in cells if best.hit_rate - cell.hit_rate <= max(margin, 2 * cell.spread)]

    def remarks(self) -> list[str]:
        """What a reader should know before comparing numbers."""
        found = []
        if self.saturated:
            found.append(
                f"Saturated: an access needs {self.needed:.1f} of the {self.num_experts} experts of its layer on "
                "average. No policy can then hit more than the share of experts that is resident; differences between "
                "policies here say nothing about how well they predict routing, and no policy is ranked."
            )
        cliff = [slots for slots in self.sizes if slots < self.touched]
        if self.scope == "global" and cliff and not self.saturated:
            found.append(
                f"Below {self.touched:.0f} slots ({100 * self.touched / self.records:.0f} %) the cache is smaller than "
                "what one step touches over all layers: policies by recency alone (LRU, FIFO) evict every expert just "
                "before its layer returns."
            )
        same = [slots for slots in self.sizes if self.alike(slots)]
        if same and not self.saturated:
            where = ", ".join(percent(self.share(slots)) for slots in same)
            found.append(
                f"At {where} of the experts the policies lie within {100 * ALIKE:.1f} points, or within twice the "
                "spread over seeds: they are not ranked there."
            )
        # a share that rounds to nothing is no remark
        tight = [cell for cell in self.cells.values() if cell.results[0].overcommitted >= 0.005]
        if tight:
            worst = max(tight, key=lambda cell: cell.results[0].overcommitted)
            above = 100 * worst.results[0].overcommitted
            found.append(
                f"At {worst.slots} slots {above:.0f} % of the accesses need more experts than a layer's share of the "
                f"slots ({worst.slots / self.layers:.1f})."
            )
        return found


@dataclass(frozen=True)
class TraceSummary:
    """All results over one trace, and what is known of it."""

    name: str
    trace: Trace
    fingerprint: str
    panels: list[Panel]
    fit: str  # where fitted policies learnt, in words
    failures: list[Failure] = field(default_factory=list)
    limit: int | None = None


def all_results(summary: TraceSummary) -> list[Result]:
    """Of all panels."""
    return [result for panel in summary.panels for cell in panel.cells.values() for result in cell.results]


def panels(results: Sequence[Result], trace: Trace) -> list[Panel]:
    """Results grouped by scope and batch, then by policy and size; seeds together."""
    grouped: dict[tuple[str, int | None], dict[tuple[str, int], list[Result]]] = {}
    for result in results:
        config = result.config
        cells = grouped.setdefault((config.scope, config.batch), {})
        cells.setdefault((config.policy, config.slots), []).append(result)
    order = sorted(grouped, key=lambda key: (key[0] != "global", key[1] or 0))
    return [
        Panel(
            scope,
            batch,
            trace.records,
            trace.num_experts,
            trace.layers,
            {
                (policy, slots): Cell(policy, slots, tuple(sorted(found, key=lambda result: result.config.seed or 0)))
                for (policy, slots), found in grouped[scope, batch].items()
            },
        )
        for scope, batch in order
    ]


def is_oracle(policy: str) -> bool:
    """Whether a policy is shown the future."""
    return hasattr(find_policy(parse_policy(policy)[0]), "foresee")


@dataclass(frozen=True)
class Measure:
    """A number of a result, for tables and plots: `of` gives it in `unit`, or None where there is none."""

    name: str
    unit: str
    of: Callable[[Result], float | None]
    digits: int = 1
    caption: str = ""

    def values(self, cell: Cell) -> list[float]:
        """For every seed."""
        return cell.values(self.of)


def measures(results: Sequence[Result], record_nbytes: int | None) -> list[Measure]:
    """The measures that these results have."""
    timed = any(result.config.timing is not None for result in results)
    known = record_nbytes or next((r.config.timing.record_nbytes for r in results if r.config.timing), None)
    found = [Measure("Hit rate", "%", lambda result: 100 * result.hit_rate)]

    def moved(result: Result) -> float:
        records = sum(result.bytes_moved.values())
        nbytes = records if result.config.timing is not None else records * (known or 1)
        return nbytes / max(1, result.tokens) / (1e6 if known else 1)

    what = "demand loads and prefetches, over all links"
    unit = "MB per token" if known else "experts per token"
    found.append(Measure("Traffic", unit, moved, 2 if known else 1, f"Total traffic: {what}."))
    if any(result.config.host_slots for result in results):
        said = "What the first tier misses and the second has, or has on its way; the rest is read from disk."
        found.append(Measure("Host hit rate", "% of the first tier's misses", host_hit_rate, caption=said))
    if timed:
        said = "Tokens of all sequences per second of the virtual machine described below."
        found.append(Measure("Speed", "tokens/s", lambda result: result.tokens_per_second, 2, said))
        said = "Share of the virtual time in which there was nothing to compute and an expert was on its way."
        found.append(Measure("Waiting", "% of the time", wait_share, caption=said))
    return found


def host_hit_rate(result: Result) -> float | None:
    """Of what the second tier was asked for, in percent."""
    asked = sum(result.host_hits) + sum(result.host_misses)
    return 100 * sum(result.host_hits) / asked if asked else None


def wait_share(result: Result) -> float | None:
    """Waiting, of the virtual time, in percent."""
    total = result.seconds.get("total")
    return 100 * result.seconds["wait"] / total if total else None
