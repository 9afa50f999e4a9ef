"""Watermark credits: keep the experts whose credit per byte is above a tier's watermark (two-level-moe-cache)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from moetier.access import Access, ExpertKey
from moetier.errors import ConfigError
from moetier.policies.decay import Decayed
from moetier.policies.parameters import open_share, within
from moetier.policies.ranking import Ranked


class Watermark(Ranked):
    """Credit b = p exp(-gamma D) cost / size; the lowest goes first, and what is below the watermark is not admitted.

    - p is a moving average of use on the layer's own clock: p <- (1 - alpha) p + alpha [used], and the first visit sets
      it. With `eta` > 0 it is mixed with a predictor's: (1 - eta) p + eta q, where q is what `predict` was last told.
    - D is forward-causal: the layers from the current one to the expert's, past the end of the model if need be; 0 for
      the current layer.
    - `cost` is what a miss costs on the link below the tier, `size` the bytes of an expert, in any units: experts have
      one size, so both only set the scale of credits.
    - The watermark is the least value at which the experts with b above it fit. With `marks="exact"` it is computed
      when it is asked for (water-filling: the N-th largest credit, for N residents); with `marks="subgradient"` it
      follows lambda <- max(0, lambda + step (experts at or above lambda - slots)), one step per access.
    - Hysteresis: an expert is admitted if its credit is at least (1 + hysteresis) times the watermark and the victim's
      is not above the watermark. Admission needs staging slots; without any, everything is admitted.

    Each link has its own horizon: the defaults are for the fast one (RAM to VRAM). A tier below (NVMe to RAM) should
    look further, back and ahead: `watermark(alpha=0.1, gamma=0.005)`.
    """

    def __init__(
        self,
        layers: int,
        experts: int,
        slots: int,
        alpha: float = 0.5,
        eta: float = 0.0,
        gamma: float = 0.02,
        cost: float = 1.0,
        size: float = 1.0,
        hysteresis: float = 0.05,
        marks: str = "exact",
        step: float = 1e-4,
    ):
        super().__init__(layers, experts, slots)
        if marks not in ("exact", "subgradient"):
            raise ConfigError(f"marks must be exact or subgradient, got {marks!r}")
        self._slots, self._alpha = slots, open_share("alpha", alpha)
        self._eta = within("eta", eta, 0.0, 1.0)
        self._admit_factor = 1.0 + within("hysteresis", hysteresis, 0.0, math.inf)
        self._step = step if marks == "subgradient" else None
        self._watermark = 0.0
        self._asked: Access | None = None  # whom the exact watermark was computed for
        self._average = Decayed(layers, experts, 1.0 - alpha)
        self._visited = [False] * layers
        self._predicted = np.zeros((layers, experts))
        distances = np.arange(layers)[None, :] - np.arange(layers)[:, None]  # [current, of the expert]
        self._worth = np.exp(-gamma * (distances % layers)) * (cost / size)

    def predict(self, layer: int, probabilities: Sequence[float]) -> None:
        """A predictor's chances of use, for all experts of a layer; they count with weight `eta`."""
        self._predicted[layer] = probabilities

    def on_access(self, access: Access) -> None:
        """One visit of the layer; one step of the watermark, if it goes by steps."""
        layer, values, base = access.layer, self._average.values, access.layer * self._experts
        gain = self._average.visit(layer)
        if self._visited[layer]:
            gain *= self._alpha
        self._visited[layer] = True
        for key in access.keys:
            values[base + key[1]] += gain
        if self._step is not None:
            above = np.count_nonzero(self._all_credits(access) >= self._watermark)
            self._watermark = max(0.0, self._watermark + self._step * (above - self._slots))

    def _all_credits(self, access: Access) -> NDArray[np.float64]:
        credits = self._average.view.reshape(self._layers, self._experts) * self._average.scales[:, None]
        if self._eta:
            credits = (1.0 - self._eta) * credits + self._eta * self._predicted
        credits *= self._worth[access.layer][:, None]
        return credits.ravel()

    def _credit(self, key: ExpertKey, access: Access) -> float:
        layer, expert = key
        chance = self._average.values[layer * self._experts + expert] * self._average.scales[layer]
        if self._eta:
            chance = (1.0 - self._eta) * chance + self._eta * self._predicted[layer, expert]
        return float(chance * self._worth[access.layer, layer])

    def admit(self, incoming: ExpertKey, victim: ExpertKey, access: Access) -> bool:
        """Whether the incoming expert is clear of the watermark and the victim is not."""
        if self._step is None and self._asked is not access:
            credits = self._all_credits(access)
            rank = len(credits) - len(self._residents.position)  # the tier is full when this is asked
            self._watermark = float(np.partition(credits, rank)[rank])
            self._asked = access
        enough = self._credit(incoming, access) >= self._admit_factor * self._watermark
        return enough and self._credit(victim, access) <= self._watermark

    def victims(self, access: Access) -> Iterator[ExpertKey]:
        """Lowest credit first."""
        ids = self._residents.ids()
        layers = self._layer_of.take(ids)
        credits = self._average.view.take(ids)
        if self._eta:
            credits *= self._average.scales.take(layers)
            credits = (1.0 - self._eta) * credits + self._eta * self._predicted.take(ids)
            credits *= self._worth[access.layer].take(layers)
        else:
            credits *= (self._average.scales * self._worth[access.layer]).take(layers)
        return self._residents.ascending(credits)
