"""Gradients of experts between backward and update: summed in records of a cache of their own.

The norm of every sum is taken while it is at hand, so that a global norm needs no second pass over the gradients. Knows
nothing of optimizers; what the records spill to is a scratch file, never part of a checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from moetier.access import ExpertKey, Part
from moetier.cache import ExpertCache
from moetier.lease import Lease, WritableLease
from moetier.record import RecordLayout
from moetier.stores.scratch import ScratchStore
from moetier.training.leases import leased
from moetier.training.optimizers.clipping import squared_norm

Fields = Mapping[str, torch.Tensor]


def gradient_layout(weights: RecordLayout) -> RecordLayout:
    """Accumulators for the fields of a record: in float32, or wider if the weights are."""
    return RecordLayout.of([(f.name, torch.promote_types(f.dtype, torch.float32), f.shape) for f in weights.fields])


class Gradients:
    """Sums of gradients by expert. `squares[layer][key]` is the squared 2-norm of a sum."""

    def __init__(self, cache: ExpertCache):
        self.cache = cache
        self._scratch = cache.store if isinstance(cache.store, ScratchStore) else None
        self.squares: dict[int, dict[ExpertKey, float]] = {}

    def add(self, key: ExpertKey, gradients: Fields) -> None:
        """Add a gradient to the sum of an expert."""
        squares = self.squares.setdefault(key.layer, {})
        if self._scratch is not None:
            self._scratch.use(key)
        with leased(self.cache, key, Part.BACKWARD) as lease:
            lease.dirty = True
            for name, total in lease.fields.items():
                if key in squares:
                    total.add_(gradients[name])
                else:  # whatever is there is of another step
                    total.copy_(gradients[name])
            squares[key] = squared_norm(lease.fields.values())

    def of_layer(self, layer: int) -> list[ExpertKey]:
        """Experts of a layer that have a gradient, ascending."""
        return sorted(self.squares.get(layer, ()))

    def used(self, lease: Lease) -> None:
        """A sum was used and will not be again: its slot is given up without a write."""
        assert isinstance(lease, WritableLease)
        lease.dirty, lease.saved = False, True
        if self._scratch is not None:
            self._scratch.clear(lease.key)

    def take(self, layer: int) -> dict[ExpertKey, float]:
        """The squared norms of a layer's sums, which are the caller's from now on: to be `used`, or to be forgotten."""
        return self.squares.pop(layer)

    def forget(self, keys: Iterable[ExpertKey]) -> None:
        """Nobody will read these sums."""
        if self._scratch is not None:
            for key in keys:
                self._scratch.clear(key)

    def clear(self) -> None:
        """Forget all sums that nobody took."""
        for layer in list(self.squares):
            self.forget(self.take(layer))
