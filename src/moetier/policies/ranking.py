"""Bookkeeping shared by policies that rank residents by a score: a dense set of ids and a lazy ascending order."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetier.access import Access, ExpertKey

HEAD = 32  # more than an access usually evicts; the rest is sorted only if somebody asks for it
MOST = 2**63 - 1  # no score of a policy is as high


class ResidentIndex:
    """A tier's residents, packed side by side for vectorised scoring.

    Beside each key lie its id (`layer * experts + expert`) and numbers of the policy's own, one for each type code in
    `columns` (of `array`: "d" for float64, "q" for int64).
    """

    def __init__(self, experts: int, slots: int, columns: str = ""):
        self._experts = experts
        slots = 2 * slots + 64  # staged records that could not be saved stay, and are ranked then
        self._ids = array("q", bytes(8 * slots))  # written item by item, where array is faster than numpy
        self._view = np.frombuffer(self._ids, dtype=np.int64)
        self.columns: list[array[Any]] = [array(code, bytes(8 * slots)) for code in columns]  # indexed by `position`
        self._column_views = [np.frombuffer(column, dtype=column.typecode) for column in self.columns]
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

    def column(self, index: int) -> NDArray[Any]:
        """A view of a column for all residents, aligned with `ids()`."""
        return self._column_views[index][: len(self._keys)]

    def ascending(self, scores: NDArray[Any]) -> Iterator[ExpertKey]:
        """Keys by ascending score (scores aligned with `ids()`; overwritten). Ties: first in packed order first."""
        keys, lowest = self._keys, scores.argmin
        taken = np.inf if scores.dtype.kind == "f" else MOST
        for _ in range(min(HEAD, len(keys))):
            best = lowest()  # vectorised: a handful of these is cheaper than any partition
            scores[best] = taken
            yield keys[best]
        for index in scores.argsort(kind="stable")[: max(0, len(keys) - HEAD)].tolist():
            yield keys[index]


class Ranked:
    """The hooks of a policy that ranks residents by what it learns from accesses alone."""

    def __init__(self, layers: int, experts: int, slots: int):
        self._layers, self._experts = layers, experts
        self._residents = ResidentIndex(experts, slots)
        self._layer_of = np.arange(layers * experts) // experts  # by id

    def on_insert(self, key: ExpertKey, access: Access) -> None:
        """Start ranking the key."""
        self._residents.add(key)

    def on_hit(self, key: ExpertKey, access: Access) -> None:
        """Nothing: `on_access` has already seen it."""

    def on_remove(self, key: ExpertKey) -> None:
        """Stop ranking the key; what was learnt stays."""
        self._residents.remove(key)

    def _layers_until(self, layer: int) -> NDArray[np.int64]:
        """For every layer, how many layers ahead it is of `layer`, which is itself a whole pass ahead."""
        return (np.arange(self._layers) - layer - 1) % self._layers + 1
