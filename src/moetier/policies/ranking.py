"""Bookkeeping shared by policies that rank residents by a score: a dense set of ids and a lazy ascending order."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from moetier.access import ExpertKey

HEAD = 32  # more than an access usually evicts; the rest is sorted only if somebody asks for it


class ResidentIndex:
    """The ids `layer * experts + expert` of a tier's residents, packed side by side for vectorised scoring."""

    def __init__(self, experts: int, slots: int):
        self._experts = experts
        self._ids = array("q", bytes(8 * slots))  # written item by item, where array is faster than numpy
        self._view = np.frombuffer(self._ids, dtype=np.int64)
        self._position: dict[int, int] = {}

    def add(self, identity: int) -> None:
        """Insert an id that is not present."""
        position = self._position[identity] = len(self._position)
        self._ids[position] = identity

    def remove(self, identity: int) -> None:
        """Remove an id; the last one takes its place."""
        hole = self._position.pop(identity)
        last = len(self._position)
        if hole != last:
            moved = self._ids[hole] = self._ids[last]
            self._position[moved] = hole

    def ids(self) -> NDArray[np.int64]:
        """A view of the ids of all residents."""
        return self._view[: len(self._position)]

    def ascending(self, scores: NDArray[np.float64]) -> Iterator[ExpertKey]:
        """Keys by ascending score (scores aligned with `ids()`; overwritten). Ties: first in packed order first."""
        ids, experts = self._ids, self._experts
        for _ in range(min(HEAD, len(scores))):
            best = int(scores.argmin())  # vectorised: a handful of these is cheaper than any partition
            scores[best] = np.inf
            yield ExpertKey(*divmod(ids[best], experts))
        order = scores.argsort(kind="stable")[: max(0, len(scores) - HEAD)]
        for identity in self.ids()[order].tolist():
            yield ExpertKey(*divmod(identity, experts))
