"""Which misses of tier 0 are worth a transfer: the others are served where they are, in tier 1 (math on the host).

A `MissPolicy` only chooses; the residency core leases, loads and orders. It knows keys, token counts and tiers, and
neither bytes nor devices.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple, Protocol

from moetier.access import Access, ExpertKey

__all__ = ["AlwaysInPlace", "AlwaysLoad", "Miss", "MissPolicy"]


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
