"""EBCO: evict the expert that occurs least together with those in use (eviction based on co-occurrence)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from moetier.access import Access, ExpertKey
from moetier.policies.parameters import open_share
from moetier.policies.ranking import Ranked

SMALLEST = 1e-100  # of a scale; then it is multiplied out


class EBCO(Ranked):
    """Co-occurrence within a layer: G <- decay G + (1 - decay) C, where C[a, b] = 1 if the access uses both a and b.

    The diagonal is zero. A resident m scores the sum of G[m, a] over the active set A; the lowest goes first. An access
    tells the union of what a batch needs, not who needs it: it counts as one row of P in C = P'P.

    Where layers share the slots, an expert is scored against the latest active set of its own layer: co-occurrence is
    not defined across layers, while the values of all layers are shares of visits, and so comparable.
    """

    def __init__(self, layers: int, experts: int, slots: int, decay: float = 0.99):
        super().__init__(layers, experts, slots)
        self._decay = open_share("decay", decay)
        self._joint = np.zeros((layers, experts, experts))  # G, divided by the scale of the layer
        self._scales = [1.0] * layers
        self._active = [np.zeros(0, dtype=np.int64) for _ in range(layers)]
        self._scores = np.zeros(layers * experts)
        self._outdated: set[int] = set()  # layers visited since their experts were scored

    def on_access(self, access: Access) -> None:
        """Update the co-occurrence of the layer."""
        layer, joint = access.layer, self._joint[access.layer]
        scale = self._scales[layer] * self._decay
        if scale < SMALLEST:
            joint *= scale
            scale = 1.0
        self._scales[layer] = scale
        self._active[layer] = active = np.array([key[1] for key in access.keys], dtype=np.int64)
        joint[active[:, None], active] += (1.0 - self._decay) / scale
        joint[active, active] = 0.0
        self._outdated.add(layer)

    def victims(self, access: Access) -> Iterator[ExpertKey]:
        """Lowest co-occurrence with the active set of its layer first."""
        experts = self._experts
        for layer in self._outdated:
            scores = self._scores[layer * experts : (layer + 1) * experts]
            np.add.reduce(self._joint[layer].take(self._active[layer], axis=0), axis=0, out=scores)
            scores *= self._scales[layer]
        self._outdated.clear()
        return self._residents.ascending(self._scores.take(self._residents.ids()))
