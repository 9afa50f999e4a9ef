"""Which experts of a layer follow those of a layer before it: online co-activation counts."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moetier.access import Access
from moetier.errors import ConfigError
from moetier.predictors.scored import ScoredPredictor, Scores

REACH = 3  # layers ahead that are counted


class Transitions:
    """For each distance 1..reach and layer: how often expert j was used there when expert i was used here.

    An access of several tokens does not tell which token used what; it counts with the shares of its tokens, which is
    the truth mixed with independence. Rows are normalised when read.
    """

    def __init__(self, layers: int, experts: int, reach: int, half_life: float, prior: float = 1.0):
        self.reach = min(reach, layers)
        self._layers = layers
        self._keep = 1.0 if half_life == 0 else 0.5 ** (1 / half_life)
        self._joint = np.zeros(
            (self.reach, layers, experts, experts), dtype=np.float32
        )  # [distance - 1, layer here, i, j]
        self._alone = np.zeros((self.reach, layers, experts), dtype=np.float32)
        self._marginal = np.zeros((layers, experts))  # of each layer, shares of tokens
        self._seen = np.zeros(layers)
        self._prior = prior
        self._recent: list[tuple[int, int, Scores]] = []  # (layer, sequence, used), newest last

    def update(self, access: Access, used: Scores) -> None:
        """One more access: count it with those before it."""
        for distance in range(1, min(self.reach, len(self._recent)) + 1):
            layer, sequence, before = self._recent[-distance]
            if (layer + distance) % self._layers != access.layer or sequence != access.sequence:
                break  # not the pass, or the text, that came before
            rows = before.nonzero()[0]
            joint, alone = self._joint[distance - 1, layer], self._alone[distance - 1, layer]
            if self._keep < 1:
                joint[rows] *= self._keep
                alone[rows] *= self._keep
            joint[rows] += before[rows, None] * used
            alone[rows] += before[rows]
        self._marginal[access.layer] += used
        self._seen[access.layer] += 1
        self._recent.append((access.layer, access.sequence, used))
        del self._recent[: -self.reach]

    def given(self, layer: int, used: Scores, distance: int) -> NDArray[np.float64]:
        """Per expert used here, the probabilities [rows, experts] of those `distance` layers ahead."""
        rows = used.nonzero()[0]
        target = (layer + distance) % self._layers
        expected = (self._marginal[target] + 0.5 / len(used)) / (self._seen[target] + 1)
        joint, alone = self._joint[distance - 1, layer, rows], self._alone[distance - 1, layer, rows]
        smoothed: NDArray[np.float64] = (joint + self._prior * expected) / (alone + self._prior)[:, None]
        return smoothed


class LayerTransition(ScoredPredictor):
    """Mean over the experts used here of how often each expert ahead followed them; distances 1 to 3.

    `half_life` forgets: in uses of an expert, 0 never. Forgetting follows the text: 1.5 points on real routing.
    """

    def __init__(self, layers: int, experts: int, top_k: int, half_life: float = 300.0):
        if half_life < 0:
            raise ConfigError(f"half_life must not be negative, got {half_life}")
        super().__init__(layers, experts, top_k)
        self._transitions = Transitions(layers, experts, REACH, half_life)
        self.farthest = self._transitions.reach
        self._used = np.zeros(experts)

    def learn(self, access: Access, used: Scores) -> None:
        """Count."""
        self._transitions.update(access, used)
        self._used = used

    def scores(self, access: Access, target: int, distance: int) -> Scores:
        """The mean of what the experts of this access lead to."""
        rows = self._transitions.given(access.layer, self._used, distance)
        if not len(rows):
            return np.zeros(self.experts)
        weights = self._used[self._used > 0]
        return self.union(access, weights @ rows / weights.sum())
