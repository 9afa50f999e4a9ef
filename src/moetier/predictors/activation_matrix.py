"""Which earlier sequence was like this one: activation matrices, by the paper's intent."""

from __future__ import annotations

import numpy as np

from moetier.access import Access, Phase
from moetier.errors import ConfigError
from moetier.predictors.scored import ScoredPredictor, Scores


class ActivationMatrix(ScoredPredictor):
    """Expert activation matrices of MoE-Infinity (Xue et al. 2024, arXiv 2401.14361).

    A sequence's matrix counts the tokens routed to each expert, [layers, experts]. A collection keeps those of the last
    sequences, at most `capacity`; a full one loses the matrix that was matched least. The current sequence is compared
    with all of them on the rows it has so far (mean cosine of the rows); the best match's row of a layer ahead, as
    shares of a token's experts, is the estimate. Until the collection has a matrix the current one is used.

    The released code overwrites the very rows it should compare, so that every match is as good as any other; this is
    the method as the paper means it. The paper's decay with layer distance orders keys of several layers; that is done
    by `moetier.prefetch`. A new sequence begins when the accesses say so, or with a prefill after decoding.
    """

    def __init__(self, layers: int, experts: int, top_k: int, capacity: int = 1000):
        if isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 1:
            raise ConfigError(f"activation-matrix: capacity must be a whole number from 1, got {capacity}")
        super().__init__(layers, experts, top_k)
        self._capacity = capacity
        self._stored = np.zeros((layers, 0, experts))  # rows of unit length
        self._shares = np.zeros((layers, 0, experts))  # rows that sum to top_k
        self._matched = np.zeros(0, dtype=np.int64)
        self._current = np.zeros((layers, experts))
        self._cosines = np.zeros((layers, 0))
        self._rows: set[int] = set()
        self._sum = np.zeros(0)  # of the cosines of the rows so far
        self._sequence, self._phase = 0, Phase.PREFILL

    def learn(self, access: Access, used: Scores) -> None:
        """Count, and compare the row that changed."""
        fresh = access.phase is Phase.PREFILL and self._phase is Phase.DECODE
        if access.sequence != self._sequence or fresh:
            self._end_sequence()
        self._sequence, self._phase = access.sequence, access.phase
        layer = access.layer
        row = self._current[layer]
        row += used * self.tokens_of(access)
        self._rows.add(layer)
        if len(self._matched):
            cosines = self._stored[layer] @ (row / max(1e-9, float(np.sqrt(row @ row))))
            self._sum += cosines - self._cosines[layer]
            self._cosines[layer] = cosines

    def scores(self, access: Access, target: int, distance: int) -> Scores:
        """The best match's row."""
        if len(self._matched):
            best = int(self._sum.argmax())
            self._matched[best] += 1
            return self.union(access, self._shares[target, best])
        row = self._current[target]
        return self.union(access, row * (self.top_k / max(1.0, float(row.sum()))))

    def _end_sequence(self) -> None:
        if len(self._rows) == self.layers:  # a sequence that ended within its first token tells nothing
            length = np.sqrt((self._current**2).sum(axis=1, keepdims=True))
            total = self._current.sum(axis=1, keepdims=True)
            unit, shares = self._current / length, self.top_k * self._current / total
            if len(self._matched) < self._capacity:
                self._stored = np.concatenate((self._stored, unit[:, None]), axis=1)
                self._shares = np.concatenate((self._shares, shares[:, None]), axis=1)
                self._matched = np.append(self._matched, 0)
            else:
                place = int(self._matched.argmin())
                self._stored[:, place], self._shares[:, place], self._matched[place] = unit, shares, 0
        self._current = np.zeros((self.layers, self.experts))
        self._cosines = np.zeros((self.layers, len(self._matched)))
        self._rows, self._sum = set(), np.zeros(len(self._matched))
