"""What the predictors share: a score per expert in, calibrated predictions out, learned from what came true.

A subclass says how it learns from an access and how it scores the experts of a layer ahead.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from moetier.access import Access, ExpertKey
from moetier.errors import ConfigError
from moetier.predictors import Prediction
from moetier.predictors.reliability import Reliability, bins_of

Scores = NDArray[np.float64]


class ScoredPredictor(ABC):
    """A predictor that gives each expert of a layer ahead a raw probability.

    The raw probabilities rank; what they are worth is learned online, by distance, layer and how many tokens share the
    access, so that `Prediction.probability` is a frequency one can set a threshold on.
    """

    nearest, farthest = 1, 1 << 30  # the distances that can be asked for
    warmup = 32  # passes through the model before its probabilities are of use
    needs = ""  # "model" or "tokens": what has to be bound, or told, before anything can be predicted

    def __init__(self, layers: int, experts: int, top_k: int):
        if min(layers, experts, top_k) < 1 or top_k > experts:
            raise ConfigError(f"a predictor needs layers, experts and 1 <= top_k <= experts, got {top_k} of {experts}")
        self.layers, self.experts, self.top_k = layers, experts, top_k
        self._reliability: dict[tuple[int, int, int], Reliability] = {}  # by distance, target layer, size of the access
        self._open: dict[int, list[tuple[Reliability, NDArray[np.int64]]]] = {}  # access due -> what is expected of it
        self._keys = [[ExpertKey(layer, expert) for expert in range(experts)] for layer in range(layers)]
        self._now = 0

    @abstractmethod
    def learn(self, access: Access, used: Scores) -> None:
        """An access was served; `used` is [experts], the share of its tokens that each expert got."""

    @abstractmethod
    def scores(self, access: Access, target: int, distance: int) -> Scores:
        """After `access`: raw probabilities [experts] that the access to layer `target` needs each expert."""

    def observe(self, access: Access, hidden: object = None) -> None:
        """See `Predictor.observe`."""
        self._now += 1
        wanted = np.fromiter((key[1] for key in access.keys), dtype=np.int64, count=len(access.keys))
        for reliability, bins in self._open.pop(self._now, ()):
            reliability.learn(bins, wanted)
        used = np.zeros(self.experts)
        if access.tokens:
            used[wanted] = np.asarray(access.tokens) / self.tokens_of(access)
        else:
            used[wanted] = min(1.0, self.top_k / max(1, len(wanted)))
        self.learn(access, used)

    def pause(self) -> None:
        """The next accesses will not be observed: what is expected of them is not to be compared with later ones."""
        self._open.clear()

    def predict(self, access: Access, distance: int = 1) -> Iterator[Prediction]:
        """See `Predictor.predict`. Lazy: read as far as it interests."""
        if not self.nearest <= distance <= self.farthest:
            name, least, most = type(self).__name__, self.nearest, self.farthest
            raise ConfigError(f"{name} predicts from {least} to {most} accesses ahead, not {distance}")
        target = (access.layer + distance) % self.layers
        raw = self.scores(access, target, distance)
        which = distance, target, self.tokens_of(access).bit_length()
        reliability = self._reliability.get(which)
        if reliability is None:
            reliability = self._reliability[which] = Reliability()
        bins = bins_of(raw)
        if distance:
            self._open.setdefault(self._now + distance, []).append((reliability, bins))
        order = np.argsort(-raw, kind="stable")
        likely = reliability.probability(bins[order]).tolist()
        keys = self._keys[target]
        return (
            Prediction(keys[expert], chance, distance) for expert, chance in zip(order.tolist(), likely, strict=True)
        )

    def tokens_of(self, access: Access) -> int:
        """How many tokens share an access, as far as it says."""
        return max(1, round(sum(access.tokens) / self.top_k))

    def union(self, access: Access, one: Scores) -> Scores:
        """From the probabilities for one token to those for as many as the access has, taken as independent."""
        tokens = self.tokens_of(access)
        return one if tokens == 1 else np.asarray(1 - (1 - np.clip(one, 0, 1)) ** tokens)


class Activity:
    """How often each expert of each layer was used lately: averages that halve with age, in accesses of the layer."""

    def __init__(self, layers: int, experts: int, half_life: float):
        if half_life <= 0:
            raise ConfigError(f"half_life must be positive, got {half_life}")
        self._keep = 0.5 ** (1 / half_life)
        self.average = np.zeros((layers, experts))

    def update(self, layer: int, used: Scores) -> None:
        """One more access of a layer."""
        row = self.average[layer]
        row *= self._keep
        row += (1 - self._keep) * used
