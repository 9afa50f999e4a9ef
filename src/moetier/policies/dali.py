"""DALI's workload-aware replacement: hot experts stay, the rest is an LRU."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterator

from moetier.access import Access, ExpertKey
from moetier.policies.parameters import within
from moetier.policies.ranking import ResidentIndex

HOT = 1 << 62  # added to a score: behind everything that is not hot


class Dali:
    """An expert is hot if the last `window` visits of its layer used it at least `share` * `window` times.

    Hot experts come last, each part in LRU order. While a layer has had fewer visits than the window, the missing ones
    count as unused.
    """

    def __init__(self, layers: int, experts: int, slots: int, window: int = 256, share: float = 0.1):
        self._experts, self._threshold = experts, within("share", share, 0.0, 1.0) * window
        within("window", window, 1, 2**20)
        self._visits: list[deque[tuple[ExpertKey, ...]]] = [deque() for _ in range(layers)]
        self._window, self._references = window, 0
        self._uses = array("q", bytes(8 * layers * experts))  # within the window
        self._residents = ResidentIndex(experts, slots, columns="q")
        self._position = self._residents.position
        self._scores = self._residents.columns[0]

    def on_access(self, access: Access) -> None:
        """Move the layer's window by one visit."""
        visits, uses, threshold = self._visits[access.layer], self._uses, self._threshold
        base = access.layer * self._experts
        visits.append(access.keys)
        for key in access.keys:
            identity = base + key[1]
            uses[identity] = count = uses[identity] + 1
            if count - 1 < threshold <= count and key in self._position:
                self._scores[self._position[key]] |= HOT
        if len(visits) > self._window:
            for key in visits.popleft():
                identity = base + key[1]
                uses[identity] = count = uses[identity] - 1
                if count < threshold <= count + 1 and key in self._position:
                    self._scores[self._position[key]] &= ~HOT

    def on_insert(self, key: ExpertKey, access: Access) -> None:
        """Start ranking the key as the most recent of its part."""
        self._touch(key, self._residents.add(key))

    def on_hit(self, key: ExpertKey, access: Access) -> None:
        """Move to the most recent of its part."""
        self._touch(key, self._position[key])

    def _touch(self, key: ExpertKey, position: int) -> None:
        self._references = reference = self._references + 1
        hot = self._uses[key[0] * self._experts + key[1]] >= self._threshold
        self._scores[position] = reference | HOT if hot else reference

    def on_remove(self, key: ExpertKey) -> None:
        """Stop ranking the key; its uses stay in the window."""
        self._residents.remove(key)

    def victims(self, access: Access) -> Iterator[ExpertKey]:
        """The least recent of those that are not hot first."""
        return self._residents.ascending(self._residents.column(0).copy())
