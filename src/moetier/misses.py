"""Which misses of tier 0 are worth a transfer: the others are served where they are, in tier 1 (math on the host).

A `MissPolicy` only chooses; the residency core leases, loads and orders. It knows keys, token counts and tiers, and
neither bytes nor devices.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from inspect import signature
from typing import Any, NamedTuple, Protocol

from moetier.access import Access, ExpertKey
from moetier.costs import Costs, Work, split
from moetier.registry import find

__all__ = ["CPU_EXPERTS", "AlwaysInPlace", "AlwaysLoad", "CostModel", "Miss", "MissPolicy", "make_miss_policy"]


class Miss(NamedTuple):
    """An expert that an access needs and tier 0 neither has nor awaits."""

    key: ExpertKey
    tokens: int  # routed to it; 1 if unknown
    source: int  # the fastest tier that has or awaits it: 1, or the number of home (2 with two tiers)


class MissPolicy(Protocol):
    """Asked once per access that misses, before anything of it moves."""

    def split(self, access: Access, misses: Sequence[Miss]) -> Collection[ExpertKey]:
        """The keys, of `misses`, to serve in tier 1; the others are loaded into tier 0.

        `misses` ascend by expert and are never empty. Where all are chosen and tier 0 has room, the core loads one
        all the same: a cache that never loads never learns.
        """


class AlwaysLoad:
    """Every miss goes to tier 0."""

    def split(self, access: Access, misses: Sequence[Miss]) -> Collection[ExpertKey]:
        """None of them."""
        return ()


class AlwaysInPlace:
    """Every miss is served in tier 1, but for the one that keeps the cache learning."""

    def split(self, access: Access, misses: Sequence[Miss]) -> Collection[ExpertKey]:
        """All of them."""
        return {miss.key for miss in misses}


class CostModel:
    """What ends soonest by the costs measured at load: see `costs.split`."""

    def __init__(self, costs: Costs):
        self.costs = costs
        self._known: dict[tuple[tuple[Work, ...], int], tuple[bool, ...]] = {}  # decoding asks the same again and again

    def split(self, access: Access, misses: Sequence[Miss]) -> Collection[ExpertKey]:
        """Those that the CPU has done by the time the link and the device have done the others."""
        work = tuple(Work(miss.tokens, miss.source > 1) for miss in misses)
        busy = len(access.keys) - len(misses)  # on the device already; tokens hardly count there
        sides = self._known.get((work, busy))
        if sides is None:
            if len(self._known) >= 4096:
                self._known.clear()
            sides = self._known[work, busy] = split(work, self.costs, busy * self.costs.device(1)).in_place
        return {miss.key for miss, here in zip(misses, sides, strict=True) if here}


CPU_EXPERTS: Mapping[str, Callable[..., Any] | str] = {
    "off": AlwaysLoad,
    "auto": CostModel,
    "always": AlwaysInPlace,
}


def make_miss_policy(name: str, costs: Costs) -> MissPolicy | None:
    """The policy of a name of `CPU_EXPERTS`, or of `"package.module:Class"`; None for what never chooses anything.

    Classes with a parameter `costs` get the measured ones. Raises `ConfigError` for a name that is neither.
    """
    factory = find("cpu_experts", name, CPU_EXPERTS)
    if factory is AlwaysLoad:
        return None
    made: MissPolicy = factory(costs=costs) if "costs" in signature(factory).parameters else factory()
    return made
