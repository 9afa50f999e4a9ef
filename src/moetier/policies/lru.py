"""LRU: evict the least recently used expert."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from moetier.access import Access, ExpertKey


class LRU:
    """Least recently used. A model visits its layers in a loop: with less than one token's cycle of slots, no hits."""

    def __init__(self, layers: int, experts: int, slots: int):
        self._order: OrderedDict[ExpertKey, None] = OrderedDict()

    def on_access(self, access: Access) -> None:
        """Nothing to learn beyond hits and inserts."""

    def on_insert(self, key: ExpertKey, access: Access) -> None:
        """Insert as most recent."""
        self._order[key] = None

    def on_hit(self, key: ExpertKey, access: Access) -> None:
        """Move to most recent."""
        self._order.move_to_end(key)

    def on_remove(self, key: ExpertKey) -> None:
        """Forget."""
        del self._order[key]

    def victims(self, access: Access) -> Iterator[ExpertKey]:
        """From least to most recent."""
        return iter(self._order)
