"""Averages over the visits of a layer, kept without touching the experts that a visit does not use."""

from __future__ import annotations

from array import array

import numpy as np
from numpy.typing import NDArray

SMALLEST = 1e-100  # of a scale; then it is multiplied out


class Decayed:
    """One number per expert. Every visit of a layer multiplies its experts' numbers by `decay`, as a common scale.

    The number of an expert is `values[id] * scales[layer]`; to add x to it, add x * (what `visit` returned).
    """

    def __init__(self, layers: int, experts: int, decay: float):
        self._experts, self._decay = experts, decay
        self.values = array("d", bytes(8 * layers * experts))  # by id; written item by item
        self._scales = array("d", [1.0] * layers)
        self.view: NDArray[np.float64] = np.frombuffer(self.values)
        self.scales: NDArray[np.float64] = np.frombuffer(self._scales)

    def visit(self, layer: int) -> float:
        """Decay a layer. Returns one over its scale."""
        scale = self._scales[layer] * self._decay
        if scale < SMALLEST:
            self.view[layer * self._experts : (layer + 1) * self._experts] *= scale
            scale = 1.0
        self._scales[layer] = scale
        return 1.0 / scale
