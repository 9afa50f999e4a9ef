"""FIFO: evict the expert that was inserted first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from moetier.access import Access, ExpertKey


class FIFO:
    """First in, first out: hits change nothing."""

    def __init__(self, layers: int, experts: int, slots: int):
        self._order: OrderedDict[ExpertKey, None] = OrderedDict()

    def on_access(self, access: Access) -> None:
        """Nothing to learn beyond inserts."""

    def on_insert(self, key: ExpertKey, access: Access) -> None:
        """Queue up."""
        self._order[key] = None

    def on_hit(self, key: ExpertKey, access: Access) -> None:
        """Nothing."""

    def on_remove(self, key: ExpertKey) -> None:
        """Leave the queue."""
        del self._order[key]

    def victims(self, access: Access) -> Iterator[ExpertKey]:
        """From first to last inserted."""
        return iter(self._order)
