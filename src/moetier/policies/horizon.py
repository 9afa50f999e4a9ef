"""Horizon: evict the expert whose next use is farthest away, as far as the model's own structure tells.

The default policy. Layers come in a known cycle, so an expert of layer l cannot be wanted before l returns; whether it
is wanted then is estimated from how active it has been. docs/LOG.md has the measurements behind the weights.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from moetier.access import Access, ExpertKey
from moetier.policies.ranking import ResidentIndex

HALF_LIVES = (2.0, 8.0, 32.0)  # in visits of the layer, i.e. tokens while decoding
WEIGHTS = (0.30, 0.25, 0.25)  # of the averages above
FREQUENCY_WEIGHT = 0.20  # of the share of all visits so far
FLOOR = 1e-3  # an expert never seen is still possible


class Horizon:
    """Next-use distance: d = layers_until(l) / L + (1 - p) / p in passes through the model; largest goes first.

    p is the chance that the expert is wanted when its layer returns: a mix of exponential activity averages with
    half-lives of 2, 8 and 32 visits of the layer, and lifetime frequency.
    """

    def __init__(self, layers: int, experts: int, slots: int):
        self._layers, self._experts = layers, experts
        self._residents = ResidentIndex(experts, slots)
        decay = 0.5 ** (1.0 / np.array(HALF_LIVES))
        self._decay = np.append(decay, 1.0)[:, None]
        self._gain = np.append(1.0 - decay, 1.0)[:, None]
        self._activity = np.zeros((layers, len(HALF_LIVES) + 1, experts))  # the averages, and the number of uses
        self._visits = [0] * layers
        self._probability = np.full((layers, experts), FLOOR)
        self._weights = np.array([*WEIGHTS, 0.0])

    def on_access(self, access: Access) -> None:
        """One visit of the layer: every average decays, the experts in use gain."""
        layer = access.layer
        activity = self._activity[layer]
        activity *= self._decay
        activity[:, [key[1] for key in access.keys]] += self._gain
        self._visits[layer] += 1
        self._weights[-1] = FREQUENCY_WEIGHT / self._visits[layer]
        np.maximum(self._weights @ activity, FLOOR, out=self._probability[layer])

    def on_insert(self, key: ExpertKey, access: Access) -> None:
        """Start ranking the key."""
        self._residents.add(key)

    def on_hit(self, key: ExpertKey, access: Access) -> None:
        """Nothing: `on_access` has already seen it."""

    def on_remove(self, key: ExpertKey) -> None:
        """Stop ranking the key; what was learnt stays."""
        self._residents.remove(key)

    def victims(self, access: Access) -> Iterator[ExpertKey]:
        """Farthest next use first."""
        ids = self._residents.ids()
        layers_until = (ids // self._experts - access.layer - 1) % self._layers + 1
        distance = layers_until / self._layers + 1.0 / self._probability.take(ids) - 1.0
        return self._residents.ascending(-distance)
