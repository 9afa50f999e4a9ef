"""LFU: evict the least frequently used expert, by lifetime counts."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from moetier.access import Access, ExpertKey
from moetier.policies.lfru import LFRU


class LFU(LFRU):
    """Least frequently used: lifetime counts that survive eviction ("perfect" LFU); ties go to the least recent."""

    def victims(self, access: Access) -> Iterator[ExpertKey]:
        """Fewest uses first."""
        recency = self._residents.column(1) / np.float32(self._now + 1)  # adds less than one use
        return self._residents.ascending(self._residents.column(0) + recency)
