"""LFU: evict the least frequently used expert, by lifetime counts or by counts within the cache."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from moetier.access import Access, ExpertKey
from moetier.policies.ranking import ResidentIndex

BITS = 40  # of a score, for the number of the latest use; the count is above them
LOW = (1 << BITS) - 1


class LFU:
    """Least frequently used; ties go to the least recently used.

    With `memory` counts survive eviction ("perfect" LFU); without, an expert starts again at one when it comes back
    ("LFU in cache", what general cache libraries call LFU).
    """

    def __init__(self, layers: int, experts: int, slots: int, memory: bool = True):
        self._experts, self._memory = experts, memory
        self._references = 0
        self._residents = ResidentIndex(experts, slots, columns="q")
        self._position = self._residents.position
        self._scores = self._residents.columns[0]  # uses, then the number of the latest one
        self._evicted = array("q", bytes(8 * layers * experts))  # scores at eviction

    def on_access(self, access: Access) -> None:
        """Nothing to learn beyond hits and inserts."""

    def on_insert(self, key: ExpertKey, access: Access) -> None:
        """Count a use and start ranking the key."""
        self._references = reference = self._references + 1
        before = self._evicted[key[0] * self._experts + key[1]] if self._memory else 0
        self._scores[self._residents.add(key)] = (before | LOW) + 1 + reference

    def on_hit(self, key: ExpertKey, access: Access) -> None:
        """Count a use."""
        self._references = reference = self._references + 1
        position = self._position[key]
        self._scores[position] = (self._scores[position] | LOW) + 1 + reference

    def on_remove(self, key: ExpertKey) -> None:
        """Stop ranking the key; with memory its count stays."""
        self._evicted[key[0] * self._experts + key[1]] = self._scores[self._position[key]]
        self._residents.remove(key)

    def victims(self, access: Access) -> Iterator[ExpertKey]:
        """Fewest uses first."""
        return self._residents.ascending(self._residents.column(0).copy())
