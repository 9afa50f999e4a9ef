"""Clipping by norm: how long the gradients are, and what they are multiplied by.

Knows tensors and numbers; knows no experts, caches or optimizers. Sums are exact (`math.fsum`), so that a norm depends
on its gradients alone: not on their order, on what was resident, on how many threads there were, or on who was idle.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, get_args

import torch

from moetier.errors import ConfigError

Clip = Literal["global", "per-expert"]

ROW = 4096  # elements that one kernel adds up, in fp32; below what torch shares out among threads
GUARD = 1e-6  # added to the norm that is divided by, as torch.nn.utils.clip_grad_norm_ does


def squared_norm(tensors: Iterable[torch.Tensor]) -> float:
    """The sum of the squares of all elements; not a number or infinite if an element is, or if fp32 does not hold it.

    Rows of `ROW` elements are added up in fp32 (fp64 for fp64), the rows exactly. Off by less than 1e-6 relative.
    """
    squares: list[float] = []
    for tensor in tensors:
        flat = tensor.reshape(-1)
        dtype = torch.float64 if flat.dtype == torch.float64 else torch.float32
        whole = flat.numel() // ROW * ROW
        norms = [torch.linalg.vector_norm(flat[:whole].view(-1, ROW), dim=1, dtype=dtype)] if whole else []
        if whole < flat.numel():
            norms.append(torch.linalg.vector_norm(flat[whole:], dtype=dtype).view(1))
        for norm in norms:
            squares += norm.double().square_().tolist()
    return exact_sum(squares)


def exact_sum(numbers: Iterable[float]) -> float:
    """The correctly rounded sum, whatever the order; infinite where it does not fit."""
    try:
        return math.fsum(numbers)
    except OverflowError:  # of finite numbers
        return math.inf


def norm_of(squares: Iterable[float]) -> float:
    """The global norm, from the `squared_norm` of every group of gradients. Groups without a gradient add nothing."""
    return math.sqrt(exact_sum(squares))


def coefficient(norm: float, max_norm: float) -> float:
    """What gradients of this norm are multiplied by: max_norm / (norm + 1e-6), at most 1.

    As torch's: 0 for an infinite norm, not a number for one that is not a number.
    """
    if math.isnan(norm):
        return math.nan
    return min(1.0, max_norm / (norm + GUARD))


def scale_(tensors: Iterable[torch.Tensor], factor: float) -> None:
    """Multiply in place; the factor is rounded to what the tensors compute in. By 1 nothing is done."""
    if factor != 1.0:
        for tensor in tensors:
            tensor.mul_(factor)


def group_max_norm(max_norm: float, elements: int, total: int) -> float:
    """The share of `max_norm` that a group of `elements` of the `total` trained ones may have: by their square root.

    Groups that each keep to theirs together keep to `max_norm`, so that no group has to wait for the others. Thresholds
    per group: He et al., arXiv:2212.01539; a bound on each group's root mean square: Lv et al., arXiv:2310.10195.
    """
    return max_norm * math.sqrt(elements / total)


def check_clipping(clip: str, max_norm: float | None) -> None:
    """Raise `ConfigError` for what cannot be used; None is no clipping."""
    if clip not in get_args(Clip):
        raise ConfigError(f"clip: {clip!r} is unknown; choose one of: {', '.join(get_args(Clip))}")
    if max_norm is not None and not (math.isfinite(max_norm) and max_norm > 0):
        raise ConfigError(f"max_grad_norm: {max_norm!r} must be a number above 0, or None for no clipping")
