"""Bookkeeping shared by policies that rank residents by a score: a dense set of ids and a lazy ascending order."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from moetier.access import ExpertKey

HEAD = 64  # more than an access usually evicts; the rest is sorted only if somebody asks for it


class ResidentIndex:
    """The ids `layer * experts + expert` of a tier's residents, packed for vectorised scoring."""

    def __init__(self, experts: int, slots: int):
        self._experts = experts
        self._ids = np.zeros(slots, dtype=np.int64)
        self._position: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._position)

    def id(self, key: ExpertKey) -> int:
        """The flat id of a key."""
        return key[0] * self._experts + key[1]

    def add(self, identity: int) -> None:
        """Insert; must not be present."""
        count = len(self._position)
        if count == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros(max(8, count), dtype=np.int64)])
        self._ids[count] = identity
        self._position[identity] = count

    def remove(self, identity: int) -> None:
        """Remove; the last id takes its place."""
        hole = self._position.pop(identity)
        last = len(self._position)
        if hole != last:
            moved = int(self._ids[last])
            self._ids[hole] = moved
            self._position[moved] = hole

    def ids(self) -> NDArray[np.int64]:
        """A view of the ids of all residents, in no particular order."""
        return self._ids[: len(self._position)]

    def ascending(self, scores: NDArray[np.float64]) -> Iterator[ExpertKey]:
        """Keys by ascending score (scores aligned with `ids()`), ties by id, so that runs repeat exactly."""
        ids = self.ids()
        if len(ids) > 4 * HEAD:
            # everything up to the HEAD-th smallest score, ties included, is a correct prefix of the full order
            bound = np.partition(scores, HEAD)[HEAD]
            head = np.flatnonzero(scores <= bound)
            order = head[np.lexsort((ids[head], scores[head]))]
            yield from self._keys(ids[order])
            rest = np.flatnonzero(scores > bound)
            order = rest[np.lexsort((ids[rest], scores[rest]))]
            yield from self._keys(ids[order])
        else:
            yield from self._keys(ids[np.lexsort((ids, scores))])

    def _keys(self, ids: NDArray[np.int64]) -> Iterator[ExpertKey]:
        experts = self._experts
        for identity in ids.tolist():
            yield ExpertKey(identity // experts, identity % experts)
