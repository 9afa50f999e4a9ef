"""LFU: evict the least frequently used expert, by lifetime counts."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from moetier.access import Access, ExpertKey
from moetier.policies.ranking import ResidentIndex


class LFU:
    """Least frequently used: lifetime counts that survive eviction ("perfect" LFU); ties go to the least recent."""

    def __init__(self, layers: int, experts: int, slots: int):
        self._residents = ResidentIndex(experts, slots)
        self._uses = np.zeros(layers * experts)
        self._last = np.zeros(layers * experts)

    def on_access(self, access: Access) -> None:
        """Nothing to learn beyond hits and inserts."""

    def on_insert(self, key: ExpertKey, access: Access) -> None:
        """Count a use and start ranking the key."""
        self._residents.add(self._residents.id(key))
        self.on_hit(key, access)

    def on_hit(self, key: ExpertKey, access: Access) -> None:
        """Count a use."""
        identity = self._residents.id(key)
        self._uses[identity] += 1
        self._last[identity] = access.time

    def on_remove(self, key: ExpertKey) -> None:
        """Stop ranking the key; its count stays."""
        self._residents.remove(self._residents.id(key))

    def victims(self, access: Access) -> Iterator[ExpertKey]:
        """Fewest uses first."""
        ids = self._residents.ids()
        # recency only breaks ties: it adds less than one use
        return self._residents.ascending(self._uses[ids] + self._last[ids] / (access.time + 1.0))
