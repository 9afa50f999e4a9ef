"""What the layer used for the previous token, it will use again."""

from __future__ import annotations

import numpy as np

from moetier.access import Access
from moetier.predictors.scored import Activity, ScoredPredictor, Scores


class PreviousToken(ScoredPredictor):
    """The last selection at the layer, then the others by activity average (half-life in tokens).

    The predictor of SharpInference and of many offloading runtimes. It names experts that a cache has just used and
    so mostly still holds: high recall, little to prefetch.
    """

    def __init__(self, layers: int, experts: int, top_k: int, half_life: float = 8.0):
        super().__init__(layers, experts, top_k)
        self._last = np.zeros((layers, experts))
        self._activity = Activity(layers, experts, half_life)

    def learn(self, access: Access, used: Scores) -> None:
        """Remember the selection."""
        self._last[access.layer] = used
        self._activity.update(access.layer, used)

    def scores(self, access: Access, target: int, distance: int) -> Scores:
        """Above one half for the last selection, below for the others; by activity within both."""
        activity = self.union(access, self._activity.average[target])
        return np.asarray(0.5 * (self._last[target] > 0) + 0.499 * activity)
