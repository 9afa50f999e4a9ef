"""LFRU: evict the lowest frequency over age (arXiv 2608.07911; vLLM pull request 37190)."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

import numpy as np

from moetier.access import Access, ExpertKey
from moetier.policies.ranking import ResidentIndex


class LFRU:
    """Least frequently and recently used: score = uses / (now - last + 1), lowest first; lifetime counts."""

    def __init__(self, layers: int, experts: int, slots: int):
        self._experts = experts
        self._now = 0
        self._residents = ResidentIndex(experts, slots)
        self._uses = array("d", bytes(8 * layers * experts))
        self._last = array("d", bytes(8 * layers * experts))
        self._uses_view, self._last_view = np.frombuffer(self._uses), np.frombuffer(self._last)

    def on_access(self, access: Access) -> None:
        """Note the time: an access that waited for slots may ask for victims after later ones were served."""
        self._now = access.time

    def on_insert(self, key: ExpertKey, access: Access) -> None:
        """Count a use and start ranking the key."""
        identity = self._residents.add(key)
        self._uses[identity] += 1
        self._last[identity] = access.time

    def on_hit(self, key: ExpertKey, access: Access) -> None:
        """Count a use."""
        identity = key[0] * self._experts + key[1]
        self._uses[identity] += 1
        self._last[identity] = access.time

    def on_remove(self, key: ExpertKey) -> None:
        """Stop ranking the key; its count stays."""
        self._residents.remove(key)

    def victims(self, access: Access) -> Iterator[ExpertKey]:
        """Lowest frequency over age first."""
        ids = self._residents.ids()
        age = self._now + 1.0 - self._last_view.take(ids)
        return self._residents.ascending(self._uses_view.take(ids) / age)
