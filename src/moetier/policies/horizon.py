"""Horizon: evict the expert whose next use is farthest away, as far as the model's own structure tells.

The default policy. Layers come in a known cycle, so an expert of layer l cannot be wanted before l returns; whether it
is wanted then is estimated from how active it has been. docs/LOG.md has the measurements behind the weights.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

import numpy as np

from moetier.access import Access, ExpertKey
from moetier.policies.ranking import ResidentIndex

HALF_LIVES = (2.0, 8.0, 32.0)  # in visits of the layer, i.e. tokens while decoding
WEIGHTS = (0.30, 0.25, 0.25)  # of the averages above
FREQUENCY_WEIGHT = 0.20  # of the share of all visits so far
LONGEST_PAUSE = 1023  # visits; nothing is left of any average after so many
FLOOR = 1e-3  # an expert never seen is still possible


class Horizon:
    """Next-use distance: d = layers_until(l) / L + (1 - p) / p in passes through the model; largest goes first.

    p is the chance that the expert is wanted when its layer returns: a mix of exponential activity averages with
    half-lives of 2, 8 and 32 visits of the layer, and lifetime frequency.
    """

    def __init__(self, layers: int, experts: int, slots: int):
        self._layers, self._experts = layers, experts
        self._residents = ResidentIndex(experts, slots)
        self._decays = [0.5 ** (1.0 / half_life) for half_life in HALF_LIVES]
        # written item by item on every access, read as vectors only when a victim is sought
        self._activity = [array("d", bytes(8 * layers * experts)) for _ in HALF_LIVES]  # each as of `_seen`
        self._seen = array("q", bytes(8 * layers * experts))  # the visit of its layer that last used the expert
        self._uses = array("d", bytes(8 * layers * experts))
        self._visits = array("q", bytes(8 * layers))
        self._activity_views = [np.frombuffer(activity) for activity in self._activity]
        self._seen_view = np.frombuffer(self._seen, dtype=np.int64)
        self._uses_view = np.frombuffer(self._uses)
        self._visits_view = np.frombuffer(self._visits, dtype=np.int64)
        self._layer_of = np.arange(layers * experts) // experts
        pauses = np.arange(LONGEST_PAUSE + 1)
        self._weighted_decay = [w * decay**pauses for w, decay in zip(WEIGHTS, self._decays, strict=True)]

    def on_access(self, access: Access) -> None:
        """One visit of the layer: the experts in use gain; that all others decay is worked out when it is asked."""
        base = access.layer * self._experts
        visit = self._visits[access.layer] = self._visits[access.layer] + 1
        seen, uses = self._seen, self._uses
        for key in access.keys:
            identity = base + key[1]
            pause = visit - seen[identity]
            for activity, decay in zip(self._activity, self._decays, strict=True):
                activity[identity] = activity[identity] * decay**pause + (1.0 - decay)
            seen[identity] = visit
            uses[identity] += 1.0

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
        layers = self._layer_of.take(ids)
        layers_until = (np.arange(self._layers) - access.layer - 1) % self._layers + 1
        frequency_per_use = FREQUENCY_WEIGHT / np.maximum(self._visits_view, 1)
        probability = self._uses_view.take(ids) * frequency_per_use.take(layers)
        pause = np.minimum(self._visits_view.take(layers) - self._seen_view.take(ids), LONGEST_PAUSE)
        for activity, weighted_decay in zip(self._activity_views, self._weighted_decay, strict=True):
            probability += activity.take(ids) * weighted_decay.take(pause)
        nearness = 1.0 - 1.0 / np.maximum(probability, FLOOR) - (layers_until / self._layers).take(layers)
        return self._residents.ascending(nearness)
