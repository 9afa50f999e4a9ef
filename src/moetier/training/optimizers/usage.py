"""How often each expert is used lately: what a hot-and-cold optimizer decides by.

Knows steps and experts; no tensors, no torch. An expert's share changes when it is used and at no other time, so that
it does not matter when somebody asks.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moetier.access import ExpertKey
from moetier.errors import ConfigError


class Usage:
    """Per expert, the share of recent steps that it was used in, as of its last use: 0 before the first, 1 at most.

    Steps count half after `half_life` more. An expert used at every k-th step comes to about 1/k.
    """

    def __init__(self, layers: int, experts: int, half_life: float):
        if not half_life > 0:
            raise ConfigError(f"half_life: {half_life!r} must be a number of steps above 0")
        self._keep = 0.5 ** (1.0 / half_life)
        self._share = np.zeros((layers, experts), np.float64)
        self._last = np.zeros((layers, experts), np.int64)

    def count(self, key: ExpertKey, step: int) -> float:
        """The expert is used in a step, later than all before; gives its share."""
        gap = step - int(self._last[key])
        self._share[key] = float(self._share[key]) * self._keep**gap + (1.0 - self._keep)
        self._last[key] = step
        return self.share(key)

    def share(self, key: ExpertKey) -> float:
        """The share as of the last use."""
        return float(self._share[key])

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint; exact."""
        return {"share": self._share.tolist(), "last": self._last.tolist()}

    def load(self, saved: Any) -> None:
        """Take over what `to_json` gave. Raises `ConfigError` for anything else."""
        try:
            share, last = np.array(saved["share"], np.float64), np.array(saved["last"], np.int64)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"the saved usage of experts cannot be read: {error!r}") from error
        if share.shape != self._share.shape or last.shape != self._last.shape:
            layers, experts = self._share.shape
            raise ConfigError(f"the saved usage of experts is not that of {layers} layers of {experts} experts")
        self._share, self._last = share, last
