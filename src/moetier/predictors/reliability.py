"""Online calibration: from a predictor's raw estimate to the frequency with which such estimates came true."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_BINS = 32
_LOGITS = np.linspace(-8.0, 8.0, _BINS - 1)  # what lies beyond shares the outer bins
_EDGES = 1 / (1 + np.exp(-_LOGITS))
_EDGE_LIST: list[float] = _EDGES.tolist()
_CENTRES = np.concatenate(([0.0], (_EDGES[1:] + _EDGES[:-1]) / 2, [1.0]))
_PRIOR = 8.0  # how many observations a bin's own estimate is worth
_REFRESH = 64  # outcomes (accesses) between two looks at the counts


class Reliability:
    """A histogram over the logit of the raw estimate, made monotone (pool adjacent violators).

    Before anything is known an estimate stands for itself. Histogram binning after Zadrozny and Elkan (2001).
    """

    def __init__(self) -> None:
        self._tried = np.full(_BINS, _PRIOR)
        self._came = _PRIOR * _CENTRES
        self._table: NDArray[np.float64] = self._came / self._tried
        self._outcomes = 0

    def probability(self, bins: NDArray[np.int64]) -> NDArray[np.float64]:
        """Calibrated estimates for raw ones, given by their bins; in the same order, ties apart."""
        table: NDArray[np.float64] = self._table[bins]
        return table

    def learn(self, bins: NDArray[np.int64], came: NDArray[np.int64]) -> None:
        """What became of the estimates of one access: `came` are the positions of those that came true."""
        self._tried += np.bincount(bins, minlength=_BINS)
        self._came += np.bincount(bins[came], minlength=_BINS)
        self._outcomes += 1
        if self._outcomes % _REFRESH == 0:
            self._table = _monotone(self._came, self._tried)


class Frequencies:
    """`Reliability` for a handful of estimates at a time: lists, where arrays would cost more than they do."""

    def __init__(self) -> None:
        self._tried = [_PRIOR] * _BINS
        self._came: list[float] = (_PRIOR * _CENTRES).tolist()
        self._table: list[float] = _CENTRES.tolist()
        self._outcomes = 0

    def bin(self, raw: float) -> int:
        """The bin of a raw estimate."""
        return bisect_left(_EDGE_LIST, raw)

    def probability(self, number: int) -> float:
        """The calibrated estimate for a bin."""
        return self._table[number]

    def learn(self, bins: Sequence[int], came: Sequence[bool]) -> None:
        """What became of the estimates of one access."""
        for number, true in zip(bins, came, strict=True):
            self._tried[number] += 1
            self._came[number] += true
        self._outcomes += 1
        if self._outcomes % _REFRESH == 0:
            self._table = _monotone(np.array(self._came), np.array(self._tried)).tolist()


def bins_of(raw: NDArray[np.floating]) -> NDArray[np.int64]:
    """The bin of each raw estimate."""
    return np.searchsorted(_EDGES, raw)


def _monotone(came: NDArray[np.float64], tried: NDArray[np.float64]) -> NDArray[np.float64]:
    """The closest table of rates that never falls (isotonic regression)."""
    pools: list[tuple[float, float, int]] = []
    for hits, total in zip(came.tolist(), tried.tolist(), strict=True):
        pool = (hits, total, 1)
        while pools and pools[-1][0] * pool[1] > pool[0] * pools[-1][1]:
            last = pools.pop()
            pool = (last[0] + pool[0], last[1] + pool[1], last[2] + pool[2])
        pools.append(pool)
    return np.repeat([hits / total for hits, total, _ in pools], [bins for _, _, bins in pools])
