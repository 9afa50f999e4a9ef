"""Which experts a training run keeps in memory on purpose, because its routers are to favour them.

What a cache happens to hold depends on which reads ended first, and after a resume it holds nothing. So routing in
training does not ask the cache: it favours the experts kept here, which are pinned. They are those that the routers
have wanted most lately, by their own choice, and they change only when the optimizer steps. All of it follows from the
tokens of the steps, and goes into a checkpoint. Knows no model, no cache and no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetier.access import ExpertKey

__all__ = ["KeptExperts", "quota_of"]

MEMORY = 0.8  # how much of an expert's count stays at a step


def quota_of(slots: int, counts: Sequence[int]) -> list[int]:
    """How many experts of each layer are kept where there are so many slots: half of them, as pins may take no more.

    All experts, where all have a slot.
    """
    if slots >= sum(counts):
        return list(counts)
    each, more = divmod(slots // 2, len(counts))
    return [min(count, each + (layer < more)) for layer, count in enumerate(counts)]


class KeptExperts:
    """At most `quota` experts of each layer, of which there are `counts`; none before the first step.

    Where all of a layer have room, all are kept from the beginning.
    """

    def __init__(self, counts: Sequence[int], quota: Sequence[int]):
        self._counts, self._quota = list(counts), list(quota)
        self._wanted = [np.zeros(count) for count in counts]  # tokens, of which MEMORY stays at every step
        self._tokens = [np.zeros(count, np.int64) for count in counts]  # in this step
        self._kept: list[list[int]] = [
            list(range(count)) if count <= room else [] for count, room in zip(counts, quota, strict=True)
        ]

    def mask(self, layer: int) -> NDArray[np.bool_]:
        """Which experts of a layer are kept, [E]. The same until `turn`."""
        mask = np.zeros(self._counts[layer], np.bool_)
        mask[self._kept[layer]] = True
        return mask

    def keys(self) -> list[ExpertKey]:
        """All experts that are kept, layer by layer."""
        return [ExpertKey(layer, expert) for layer, kept in enumerate(self._kept) for expert in kept]

    def wanted(self, layer: int, own: NDArray[np.int64]) -> None:
        """A layer's router wanted these experts by itself, [T, K]."""
        self._tokens[layer] += np.bincount(own.reshape(-1), minlength=self._counts[layer])

    def turn(self) -> None:
        """A step is made: keep those wanted most lately, of those that are kept or were wanted in this step.

        Such an expert is updated before anybody else uses it, so it is loaded anyway. Where counts are equal, the first
        stay.
        """
        for layer, room in enumerate(self._quota):
            tokens, count = self._tokens[layer], self._wanted[layer]
            count *= MEMORY
            count += tokens
            if room >= self._counts[layer]:
                tokens[:] = 0
                continue
            may = self.mask(layer) | (tokens > 0)
            best = np.argsort(np.where(may, -count, np.inf), kind="stable")[: min(room, int(may.sum()))]
            self._kept[layer] = sorted(best.tolist())
            tokens[:] = 0

    def to_json(self) -> dict[str, Any]:
        """Everything, for a checkpoint."""
        return {
            "quota": self._quota,
            "kept": self._kept,
            "wanted": [count.tolist() for count in self._wanted],
            "tokens": [tokens.tolist() for tokens in self._tokens],
        }

    def load(self, saved: dict[str, Any]) -> None:
        """Go on from what `to_json` gave, quota included: that of the memory that the run began with."""
        self._quota = [int(room) for room in saved["quota"]]
        self._kept = [[int(expert) for expert in kept] for kept in saved["kept"]]
        self._wanted = [np.array(count, np.float64) for count in saved["wanted"]]
        self._tokens = [np.array(tokens, np.int64) for tokens in saved["tokens"]]
