"""Horizon: evict the expert whose next use is farthest away, as far as the model's own routing tells. The default.

Layers come in a known cycle, so an expert of layer l cannot be wanted before l returns. Two logistic models
(`policies/hazard.py` has their features) say how likely it is wanted then, p, and at each later return, q. From these
follows the expected distance to the next use, in passes through the model:

    d = layers until l returns / layers + (1 - p) * (1 + (1 - q) + (1 - q)**2 + (1 - q)**3)

Largest d goes first. The sum is a geometric series broken off at `CEILING` returns: a record is unlikely to stay
longer than that, and whatever comes after its eviction does not matter. A hazard that is small at the next return but
large afterwards is common (words alternate, their context stays), hence two models.

The weights were fitted with `moetier.tuning` on half of the documents of a public routing trace of gpt-oss-20b
(AmanPriyanshu/GPT-OSS-MoE-ExpertFingerprinting, Apache-2.0) and on half of the texts of a small Qwen3-MoE (6 x 64,
top-4), with 1, 4, 8 and 16 concurrent streams; docs/LOG.md has results on the other halves. Sources: next-use distance
is Belady's rule (1966) with an estimate in place of the future; the comparison with earlier passes follows the idea
of kNN language models (Khandelwal et al., arXiv 1911.00172), on sets of experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from os import PathLike

import numpy as np

from moetier.access import Access, ExpertKey
from moetier.policies.hazard import HazardWeights, History
from moetier.policies.ranking import ResidentIndex

# Returns of a layer, as `_look_ahead` sums them. More help large caches, fewer help small ones, all by less than half
# a point.
CEILING = 4
WEIGHTS = HazardWeights(
    next=(0.1016, 0.0571, 0.3270, -0.4331, 0.0383, 0.8269, -0.0333, -0.0521),
    later=(0.0478, 0.0911, 0.2812, -0.2648, 0.0456, -0.0655, 0.7011, -0.3322),
)


class Horizon:
    """Evicts the largest expected distance to the next use; `weights` are another fit's, or the path of its file."""

    def __init__(self, layers: int, experts: int, slots: int, weights: HazardWeights | str | PathLike[str] = WEIGHTS):
        if not isinstance(weights, HazardWeights):
            weights = HazardWeights.load(weights)
        self._residents = ResidentIndex(experts, slots)
        self._history = History(layers, experts)
        self._models = np.array([weights.next, weights.later], np.float32)
        self._visited: dict[int, None] = {}  # layers whose returns are out of date; in order, for determinism
        self._nearness = np.full(layers * experts, -CEILING, np.float32)  # less the layers until
        self._layer_of = np.arange(layers * experts) // experts
        until = (np.arange(layers) - np.arange(layers)[:, None] - 1) % layers + 1
        self._approach = (-until / layers).astype(np.float32)  # by layer of the access, then of the expert

    def on_access(self, access: Access) -> None:
        """Remember the routing; what follows from it is worked out when a victim is sought."""
        if access.keys:
            self._history.observe(access.layer, [key[1] for key in access.keys])
            self._visited[access.layer] = None

    def on_insert(self, key: ExpertKey, access: Access) -> None:
        """Start ranking the key."""
        self._residents.add(key)

    def on_hit(self, key: ExpertKey, access: Access) -> None:
        """Nothing: `on_access` has already seen it."""

    def on_remove(self, key: ExpertKey) -> None:
        """Stop ranking the key; what was learnt stays."""
        self._residents.remove(key)

    def victims(self, access: Access) -> Iterator[ExpertKey]:
        """Farthest expected use first."""
        for layer in self._visited:
            self._look_ahead(layer)
        self._visited.clear()
        ids = self._residents.ids()
        nearness = self._nearness.take(ids)
        nearness += self._approach[access.layer].take(self._layer_of.take(ids))
        return self._residents.ascending(nearness)

    def _look_ahead(self, layer: int) -> None:
        """Work out the distances of a layer's experts."""
        odds = np.exp(self._models @ self._history.features(layer))
        odds += 1.0
        miss, later = np.reciprocal(odds, out=odds)  # chances to be of no use: at the next return, at one after that
        returns = later * later
        returns += 1.0
        later += 1.0
        returns *= later  # 1 + r + r**2 + r**3 = (1 + r**2) * (1 + r)
        returns *= miss
        experts = len(returns)
        np.negative(returns, out=self._nearness[layer * experts : (layer + 1) * experts])
