"""Activation matrices: evict by what the most similar earlier sequence did (MoE-Infinity, arXiv 2401.14361)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from moetier.access import Access, ExpertKey
from moetier.policies.parameters import within
from moetier.policies.ranking import Ranked


class ActivationMatrix(Ranked):
    """Priority = matched activation ratio x decay with layer distance; lowest evicted first.

    The running sequence's matrix counts, per layer and expert, the tokens routed. At layer l its rows 0..l are compared
    with those of a library of finished sequences: distance = 1 - mean of the rows' cosines. An expert's priority is
    (its share of its row in the nearest matrix + 1e-8) x (1 - d / (L + 1)), d being the layers until its own is run
    again, 1..L. With an empty library the running matrix stands in.

    A change of `Access.sequence` ends a sequence. Its matrix takes a free place of the library, or that of the matrix
    that was matched least often (the oldest of these); `library` places, 128 by default: 1000 are published, and cost
    eight times the time and memory.

    This follows the paper. The released code overwrites the rows that it compares, which makes all distances equal.
    """

    def __init__(self, layers: int, experts: int, slots: int, library: int = 128):
        super().__init__(layers, experts, slots)
        self._capacity = int(within("library", library, 1, 2**20))
        self._running = np.zeros((layers, experts))
        self._sequence: int | None = None
        self._units = np.zeros((layers, self._capacity, experts))  # rows of the library, of Euclidean length one
        self._sums = np.zeros((layers, self._capacity))  # of the elements of such a row: one over it makes shares
        self._cosines = np.zeros((layers, self._capacity))  # of the running rows with the library's
        self._sum = np.zeros(self._capacity)  # of the cosines of rows 0..`_summed`
        self._summed = -1
        self._matched: list[int] = []  # how often, by place
        self._best = -1

    def on_access(self, access: Access) -> None:
        """Count, and match anew."""
        if access.sequence != self._sequence:
            if self._sequence is not None:
                self._store()
            self._sequence = access.sequence
        layer, row, tokens = access.layer, self._running[access.layer], access.tokens
        row[[key[1] for key in access.keys]] += tokens or 1.0
        filled = len(self._matched)
        if not filled:
            return
        cosines = self._units[layer, :filled] @ row
        cosines /= np.sqrt(row @ row) or 1.0
        self._cosines[layer, :filled] = cosines
        if layer and layer == self._summed + 1:
            self._sum[:filled] += cosines  # the rows before are as they were one access ago
        else:
            self._sum[:filled] = np.add.reduce(self._cosines[: layer + 1, :filled], axis=0)
        self._summed = layer
        self._best = int(self._sum[:filled].argmax())
        self._matched[self._best] += 1

    def _store(self) -> None:
        """Put the finished matrix into the library."""
        if len(self._matched) < self._capacity:
            place = len(self._matched)
            self._matched.append(0)
        else:
            place = self._matched.index(min(self._matched))
            self._matched[place] = 0
        lengths = np.sqrt(np.square(self._running).sum(axis=1))
        self._units[:, place] = self._running / np.where(lengths, lengths, 1.0)[:, None]
        self._sums[:, place] = self._units[:, place].sum(axis=1)
        self._running.fill(0.0)
        self._cosines.fill(0.0)
        self._summed = -1

    def victims(self, access: Access) -> Iterator[ExpertKey]:
        """Lowest priority first."""
        ids = self._residents.ids()
        layers = self._layer_of.take(ids)
        if self._matched:
            places = ids + layers * (self._units.shape[1] - 1) * self._experts  # in the matrices, end to end by layer
            places += self._best * self._experts
            ratios, sums = self._units.take(places), self._sums[:, self._best]
        else:
            ratios, sums = self._running.take(ids), self._running.sum(axis=1)
        ratios /= np.where(sums, sums, 1.0).take(layers)
        ratios += 1e-8
        ratios *= (1.0 - self._layers_until(access.layer) / (self._layers + 1)).take(layers)
        return self._residents.ascending(ratios)
