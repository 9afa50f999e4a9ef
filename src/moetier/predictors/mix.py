"""Everything that counts can say, weighed by a small logistic model: the strongest predictor without the model."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moetier.access import Access
from moetier.predictors.layer_transition import REACH, Transitions
from moetier.predictors.scored import Activity, ScoredPredictor, Scores

_HALF_LIVES = (2.0, 8.0, 32.0, 128.0)
WEIGHTS = (  # by distance; in the order of `Mix.features`
    (1.97, 1.32, 0.21, 0.05, 0.27, 0.44, -0.50, -2.11, 0.36, 0.75),
    (1.95, 1.19, 0.32, 0.04, 0.32, 0.43, -0.50, -2.14, 0.36, 0.73),
    (1.88, 1.13, 0.48, 0.04, 0.35, 0.43, -0.51, -2.26, 0.30, 0.69),
)


class Mix(ScoredPredictor):
    """Logistic over logs of: co-activation with the experts used here and in the layer before, the same-layer
    transition from the last token, activity averages (half-lives 2, 8, 32, 128 tokens), frequency; and the last use.

    All are counted online. The weights, one set for each distance, were fitted once (logistic regression on the first
    documents of a public routing trace of gpt-oss-20b and on a small MoE of 6 layers x 64 experts; fitting to either
    alone gains at most 0.3 points on it) and are the same for every model.
    """

    def __init__(self, layers: int, experts: int, top_k: int):
        super().__init__(layers, experts, top_k)
        self._across = Transitions(layers, experts, REACH + 1, half_life=300.0)
        self._same = np.zeros((layers, experts, experts), dtype=np.float32)  # [layer, last token's, this one's]
        self._same_alone = np.zeros((layers, experts), dtype=np.float32)
        self._activity = [Activity(layers, experts, half_life) for half_life in _HALF_LIVES]
        self._used = np.zeros((layers, experts))
        self._count = np.zeros((layers, experts))
        self._seen = np.zeros(layers)
        self.farthest = min(REACH, layers)
        self._weights = np.array(WEIGHTS)

    def learn(self, access: Access, used: Scores) -> None:
        """Count."""
        layer = access.layer
        self._across.update(access, used)
        before = self._used[layer]
        rows = before.nonzero()[0]
        self._same[layer, rows] += before[rows, None] * used
        self._same_alone[layer, rows] += before[rows]
        for activity in self._activity:
            activity.update(layer, used)
        self._count[layer] += used
        self._seen[layer] += 1
        self._used[layer] = used

    def features(self, access: Access, target: int, distance: int) -> NDArray[np.float64]:
        """[experts, features] of the layer ahead; the last one is constant."""
        layer, floor = access.layer, 0.1 * self.top_k / self.experts
        frequency = (self._count[target] + self.top_k / self.experts) / (self._seen[target] + 1)
        columns = [
            _mean(self._across.given(layer, self._used[layer], distance), self._used[layer], frequency),
            frequency,
            frequency,
            *(activity.average[target] for activity in self._activity),
            frequency,
        ]
        if distance < self._across.reach and self.layers > 1:
            before = (layer - 1) % self.layers
            given = self._across.given(before, self._used[before], distance + 1)
            columns[1] = _mean(given, self._used[before], frequency)
        rows = self._used[target].nonzero()[0]
        if len(rows):
            alone = self._same_alone[target, rows] + 1
            given = (self._same[target, rows] + frequency) / alone[:, None]
            columns[2] = _mean(given, self._used[target], frequency)
        features = np.empty((self.experts, len(columns) + 2))
        np.log(np.stack(columns, axis=1) + floor, out=features[:, : len(columns)])
        features[:, -2] = self._used[target] > 0
        features[:, -1] = 1
        return features

    def scores(self, access: Access, target: int, distance: int) -> Scores:
        """The logistic model."""
        logits = self.features(access, target, distance) @ self._weights[distance - 1]
        return self.union(access, 1 / (1 + np.exp(-np.clip(logits, -30, 30))))


def _mean(given: NDArray[np.float64], used: Scores, otherwise: Scores) -> Scores:
    weights = used[used > 0]
    mean: Scores = weights @ given / weights.sum() if len(weights) else otherwise
    return mean
