"""Gradients of experts between backward and update: summed in records of a cache of their own.

The norm of every sum is taken while it is at hand, so that a global norm needs no second pass over the gradients. Knows
nothing of optimizers; what the records spill to is a scratch file, never part of a checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from moetier.access import ExpertKey
from moetier.cache import ExpertCache
from moetier.record import RecordLayout
from moetier.training.leases import leased

Fields = Mapping[str, torch.Tensor]


def gradient_layout(weights: RecordLayout, trained: Sequence[str]) -> RecordLayout:
    """Accumulators for the trained fields of a record: in float32, or wider if the weights are."""
    tensors = [(f.name, torch.promote_types(f.dtype, torch.float32), f.shape) for f in weights.fields]
    return RecordLayout.of([tensor for tensor in tensors if tensor[0] in trained])


class Gradients:
    """Sums of gradients by expert. `norms[key]` are the 2-norms of the fields of a sum, in the order of the fields."""

    def __init__(self, cache: ExpertCache):
        self.cache = cache
        self.norms: dict[ExpertKey, list[torch.Tensor]] = {}

    def add(self, key: ExpertKey, gradients: Fields) -> None:
        """Add a gradient to the sum of an expert."""
        first = key not in self.norms
        with leased(self.cache, key) as lease:
            for name, total in lease.fields.items():
                if first:
                    total.copy_(gradients[name])
                else:
                    total.add_(gradients[name])
            lease.dirty = True
            self.norms[key] = field_norms(lease.fields)

    def of_layer(self, layer: int) -> list[ExpertKey]:
        """Experts of a layer that have a gradient, ascending."""
        return sorted(key for key in self.norms if key.layer == layer)

    def clear(self, keys: Sequence[ExpertKey] | None = None) -> None:
        """Forget these sums, or all."""
        for key in list(self.norms) if keys is None else keys:
            self.norms.pop(key, None)


def field_norms(fields: Fields) -> list[torch.Tensor]:
    """The 2-norm of every field, as scalars."""
    return [torch.linalg.vector_norm(field) for field in fields.values()]
