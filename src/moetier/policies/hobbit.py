"""HOBBIT's mix of recency, frequency, use in high precision and layer distance (arXiv 2411.01433)."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

import numpy as np

from moetier.access import Access, ExpertKey
from moetier.policies.parameters import within
from moetier.policies.ranking import Ranked


class Hobbit(Ranked):
    """Priority = lru R/T + lfu F/T + lhu H/T + fld (1 - ((layer - current layer) mod L) / L), lowest evicted first.

    In the running sequence, T counts its tokens (forward passes), R is the last one that used the expert, F is how many
    accesses used it and H how many would have used it in high precision: in descending order of gate mass, those with
    at most `precise` of the mass ahead of them, hence always the first. Without known masses every use is one. A new
    sequence resets T, R, F and H. A pass begins when the layer does not come after that of the access before.

    The four weights are meant to be calibrated on traces of the model; the defaults only weigh all terms alike.
    """

    def __init__(
        self,
        layers: int,
        experts: int,
        slots: int,
        lru: float = 0.25,
        lfu: float = 0.25,
        lhu: float = 0.25,
        fld: float = 0.25,
        precise: float = 0.6,
    ):
        super().__init__(layers, experts, slots)
        self._lru, self._lfu, self._lhu, self._fld = lru, lfu, lhu, fld
        self._precise = within("precise", precise, 0.0, 1.0)
        self._records = [array("q", bytes(8 * layers * experts)) for _ in range(3)]  # R, F, H by id
        self._views = [np.frombuffer(record, dtype=np.int64) for record in self._records]
        self._mixed = array("d", bytes(8 * layers * experts))  # T times the first three terms
        self._mixed_view = np.frombuffer(self._mixed)
        self._sequence: int | None = None
        self._layer, self._token = -1, 0

    def on_access(self, access: Access) -> None:
        """Record one visit of the layer."""
        if access.sequence != self._sequence:
            for view in (*self._views, self._mixed_view):
                view.fill(0)
            self._sequence, self._layer, self._token = access.sequence, -1, 0
        if access.layer <= self._layer or not self._token:
            self._token += 1
        self._layer = access.layer
        precise = self._high_precision(access)
        token, base, mixed = self._token, access.layer * self._experts, self._mixed
        lru, lfu, lhu = self._lru, self._lfu, self._lhu
        recency, frequency, high = self._records
        for key, is_high in zip(access.keys, precise, strict=True):
            identity = base + key[1]
            recency[identity] = token
            frequency[identity] = uses = frequency[identity] + 1
            high[identity] = highs = high[identity] + is_high
            mixed[identity] = lru * token + lfu * uses + lhu * highs

    def _high_precision(self, access: Access) -> list[bool]:
        """Which keys have little enough of the gate mass ahead of them."""
        mass = access.mass
        if not mass:
            return [True] * len(access.keys)
        allowed, ahead = self._precise * sum(mass), 0.0
        precise = [False] * len(mass)
        for index in sorted(range(len(mass)), key=mass.__getitem__, reverse=True):
            precise[index] = ahead <= allowed
            ahead += mass[index]
        return precise

    def victims(self, access: Access) -> Iterator[ExpertKey]:
        """Lowest priority first."""
        ids = self._residents.ids()
        nearness = 1.0 - (np.arange(self._layers) - access.layer) % self._layers / self._layers
        scores = self._mixed_view.take(ids)
        scores /= max(1, self._token)
        scores += (self._fld * nearness).take(self._layer_of.take(ids))
        return self._residents.ascending(scores)
