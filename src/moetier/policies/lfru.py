"""LFRU: evict the lowest frequency over age (arXiv 2608.07911; vLLM pull request 37190)."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

import numpy as np

from moetier.access import Access, ExpertKey
from moetier.policies.ranking import ResidentIndex


class LFRU:
    """Least frequently and recently used: score = uses / (now - last + 1), lowest first; lifetime counts.

    Equal scores go in the order of the tier's books, which is that of insertion until something is evicted.
    """

    def __init__(self, layers: int, experts: int, slots: int):
        self._experts, self._now = experts, 0
        self._residents = ResidentIndex(experts, slots, columns="dd")
        self._position = self._residents.position
        self._uses, self._last = self._residents.columns
        self._evicted_uses = array("d", bytes(8 * layers * experts))

    def on_access(self, access: Access) -> None:
        """Note the time: an access that waited for slots may ask for victims after later ones were served."""
        self._now = access.time

    def on_insert(self, key: ExpertKey, access: Access) -> None:
        """Count a use and start ranking the key."""
        position = self._residents.add(key)
        self._uses[position] = self._evicted_uses[key[0] * self._experts + key[1]] + 1.0
        self._last[position] = access.time

    def on_hit(self, key: ExpertKey, access: Access) -> None:
        """Count a use."""
        position = self._position[key]
        self._uses[position] += 1.0
        self._last[position] = access.time

    def on_remove(self, key: ExpertKey) -> None:
        """Stop ranking the key; its count stays."""
        self._evicted_uses[key[0] * self._experts + key[1]] = self._uses[self._position[key]]
        self._residents.remove(key)

    def victims(self, access: Access) -> Iterator[ExpertKey]:
        """Lowest frequency over age first."""
        age = (self._now + 1.0) - self._residents.column(1)
        return self._residents.ascending(np.divide(self._residents.column(0), age, out=age))
