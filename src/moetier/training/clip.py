"""Clipping by the global norm, as `torch.nn.utils.clip_grad_norm_` does it, over parameters and experts together.

The norm of an expert's gradient is known before the update starts (`gradients.Gradients.norms`), so the norm is exact
and costs no pass over the gradients. Order of the sum: the parameters as their groups have them, then the experts by
layer, expert and field.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def global_norm(norms: Sequence[torch.Tensor]) -> torch.Tensor:
    """The 2-norm of what has these 2-norms; a scalar."""
    if not norms:
        return torch.zeros(())
    device = norms[0].device
    return torch.linalg.vector_norm(torch.stack([norm.to(device) for norm in norms]))


def clip_factor(total: torch.Tensor, max_norm: float) -> torch.Tensor:
    """What every gradient is multiplied by: max_norm / (total + 1e-6), at most 1."""
    return torch.clamp(max_norm / (total + 1e-6), max=1.0)
