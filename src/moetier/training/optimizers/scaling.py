"""Loss scaling: taking the scale out of gradients, and seeing whether they overflowed.

Knows tensors; the scale itself is chosen by `torch.amp.GradScaler`, or by hand.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch


def inverse_scale(scale: float | torch.Tensor) -> float:
    """What scaled gradients are multiplied by: the reciprocal in fp64, rounded to fp32, as in GradScaler."""
    exact = 1.0 / float(scale)
    return torch.tensor(exact, dtype=torch.float64).float().item()


def unscale_(tensors: Iterable[torch.Tensor], inverse: float) -> bool:
    """Multiply in place by `inverse`; False if an element was infinite or not a number: then skip the step.

    The same bits and the same answer as `GradScaler.unscale_`.
    """
    finite = True
    for tensor in tensors:
        finite = all_finite([tensor]) and finite
        if inverse != 1.0:
            tensor.mul_(inverse)
    return finite


def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether every element is a finite number. The largest magnitude tells; no mask is made."""
    for tensor in tensors:
        if tensor.numel() and not math.isfinite(torch.linalg.vector_norm(tensor, math.inf).item()):
            return False
    return True
