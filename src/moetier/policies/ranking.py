"""Bookkeeping shared by policies that rank residents by a score: a dense set of ids and a lazy ascending order."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from moetier.access import ExpertKey

HEAD = 32  # more than an access usually evicts; the rest is sorted only if somebody asks for it


class ResidentIndex:
    """A tier's residents, packed side by side for vectorised scoring.

    Beside each key lie its id (`layer * experts + expert`) and `columns` numbers of the policy's own, in float32: half
    the bytes to look at, exact for counts and times up to 2**24.
    """

    def __init__(self, experts: int, slots: int, columns: int = 0):
        self._experts = experts
        self._ids = array("q", bytes(8 * slots))  # written item by item, where array is faster than numpy
        self._view = np.frombuffer(self._ids, dtype=np.int64)
        self.columns = [array("f", bytes(4 * slots)) for _ in range(columns)]  # indexed by `position`
        self._column_views = [np.frombuffer(column, dtype=np.float32) for column in self.columns]
        self._keys: list[ExpertKey] = []
        self.position: dict[ExpertKey, int] = {}

    def add(self, key: ExpertKey) -> int:
        """Insert a key that is not present; returns its position, whose columns are to be set."""
        position = self.position[key] = len(self._keys)
        self._keys.append(key)
        self._ids[position] = key[0] * self._experts + key[1]
        return position

    def remove(self, key: ExpertKey) -> None:
        """Remove a key; the last one takes its place."""
        hole = self.position.pop(key)
        moved = self._keys.pop()
        last = len(self._keys)
        if hole != last:
            self._keys[hole] = moved
            self.position[moved] = hole
            self._ids[hole] = self._ids[last]
            for column in self.columns:
                column[hole] = column[last]

    def ids(self) -> NDArray[np.int64]:
        """A view of the ids of all residents."""
        return self._view[: len(self._keys)]

    def column(self, index: int) -> NDArray[np.float32]:
        """A view of a column for all residents, aligned with `ids()`."""
        return self._column_views[index][: len(self._keys)]

    def ascending(self, scores: NDArray[np.floating]) -> Iterator[ExpertKey]:
        """Keys by ascending score (scores aligned with `ids()`; overwritten). Ties: first in packed order first."""
        keys, taken, lowest = self._keys, np.inf, scores.argmin
        for _ in range(min(HEAD, len(keys))):
            best = lowest()  # vectorised: a handful of these is cheaper than any partition
            scores[best] = taken
            yield keys[best]
        for index in scores.argsort(kind="stable")[: max(0, len(keys) - HEAD)].tolist():
            yield keys[index]
