"""LFU: evict the least frequently used expert, by lifetime counts."""

from __future__ import annotations

from collections.abc import Iterator

from moetier.access import Access, ExpertKey
from moetier.policies.lfru import LFRU


class LFU(LFRU):
    """Least frequently used: lifetime counts that survive eviction ("perfect" LFU); ties go to the least recent."""

    def victims(self, access: Access) -> Iterator[ExpertKey]:
        """Fewest uses first."""
        ids = self._residents.ids()
        recency = self._last_view.take(ids) / (self._now + 1.0)  # adds less than one use
        return self._residents.ascending(self._uses_view.take(ids) + recency)
