"""Bookkeeping shared by policies that rank residents by a score: a dense set of ids and a lazy ascending order."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from moetier.access import ExpertKey

HEAD = 32  # more than an access usually evicts; the rest is sorted only if somebody asks for it


class ResidentIndex:
    """A tier's residents, packed side by side with their ids (`layer * experts + expert`) for vectorised scoring."""

    def __init__(self, experts: int, slots: int):
        self._experts = experts
        self._ids = array("q", bytes(8 * slots))  # written item by item, where array is faster than numpy
        self._view = np.frombuffer(self._ids, dtype=np.int64)
        self._keys: list[ExpertKey] = []
        self._position: dict[ExpertKey, int] = {}

    def add(self, key: ExpertKey) -> int:
        """Insert a key that is not present; returns its id."""
        position = self._position[key] = len(self._keys)
        self._keys.append(key)
        identity = self._ids[position] = key[0] * self._experts + key[1]
        return identity

    def remove(self, key: ExpertKey) -> None:
        """Remove a key; the last one takes its place."""
        hole = self._position.pop(key)
        moved = self._keys.pop()
        if hole != len(self._keys):
            self._keys[hole] = moved
            self._position[moved] = hole
            self._ids[hole] = self._ids[len(self._keys)]

    def ids(self) -> NDArray[np.int64]:
        """A view of the ids of all residents."""
        return self._view[: len(self._keys)]

    def ascending(self, scores: NDArray[np.float64]) -> Iterator[ExpertKey]:
        """Keys by ascending score (scores aligned with `ids()`; overwritten). Ties: first in packed order first."""
        keys, taken = self._keys, np.inf
        for _ in range(min(HEAD, len(keys))):
            best = scores.argmin()  # vectorised: a handful of these is cheaper than any partition
            scores[best] = taken
            yield keys[best]
        for index in scores.argsort(kind="stable")[: max(0, len(keys) - HEAD)].tolist():
            yield keys[index]
