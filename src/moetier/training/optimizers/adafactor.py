"""Adafactor: a second moment kept as row and column factors, a few kilobytes where Adam keeps two whole tensors.

Shazeer and Stern, arXiv:1804.04235, as `torch.optim.Adafactor` does it: bit-identical to that on parameters of the same
tensors. The update is scaled by norms of the whole tensor, so it cannot be made in chunks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moetier.errors import ConfigError
from moetier.record import Field
from moetier.training.optimizers.base import FieldwiseOptimizer, Part, Tensors
from moetier.training.optimizers.fields import Fields, chunks, untouched
from moetier.training.optimizers.settings import Hyper, Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class AdafactorSettings(Settings):
    """Of Adafactor, as in torch.optim: `lr` is the largest relative step; eps[0] None is the dtype's own."""

    beta2_decay: float = -0.8
    eps: tuple[float | None, float] = (None, 1e-3)
    d: float = 1.0

    def __post_init__(self) -> None:
        Settings.__post_init__(self)
        self._check_at_least("d", 1.0)
        if not (
            isinstance(self.beta2_decay, (int, float)) and math.isfinite(self.beta2_decay) and self.beta2_decay <= 0
        ):
            raise ConfigError(f"beta2_decay: {self.beta2_decay!r} must be a number of at most 0")
        if not (isinstance(self.eps, tuple) and len(self.eps) == 2 and self.eps[1] is not None):
            raise ConfigError(f"eps: {self.eps!r} must be a number or None, and a number")
        for eps in self.eps:
            if eps is not None and not (math.isfinite(eps) and eps >= 0):
                raise ConfigError(f"eps: {self.eps!r} must not be negative")

    def _takes(self, name: str, value: Any) -> bool:
        return name != "eps" or isinstance(value, tuple)


class Adafactor(FieldwiseOptimizer):
    """Adafactor. The state of a matrix is a row and a column, that of a vector its second moment."""

    def __init__(
        self,
        lr: float = 1e-2,
        beta2_decay: float = -0.8,
        eps1: float | None = None,
        eps2: float = 1e-3,
        d: float = 1.0,
        weight_decay: float = 0.0,
        masters: bool = True,
    ):
        settings = AdafactorSettings(lr=lr, beta2_decay=beta2_decay, eps=(eps1, eps2), d=d, weight_decay=weight_decay)
        super().__init__(settings, masters)

    def parts(self, field: Field, dtype: torch.dtype) -> list[Part]:
        """Row and column factors along the last two dimensions, or the variance of a vector."""
        if len(field.shape) < 2:
            return [("variance", dtype, field.shape)]
        *batch, rows, columns = field.shape
        return [("row_var", dtype, (*batch, rows, 1)), ("col_var", dtype, (*batch, 1, columns))]

    def step(self, params: Tensors, gradients: Tensors, states: Sequence[Fields], hyper: Hyper) -> None:
        """One step of all fields by torch's optimizer; the functional form of this one is private to torch."""
        settings = hyper.of(AdafactorSettings)
        targets = [param.detach() for param in params]  # views of their own, to carry the gradients
        optimizer = torch.optim.Adafactor(
            targets,
            lr=settings.lr,
            beta2_decay=settings.beta2_decay,
            eps=settings.eps,
            d=settings.d,
            weight_decay=settings.weight_decay,
        )
        for target, gradient, state in zip(targets, gradients, states, strict=True):
            target.grad = gradient
            optimizer.state[target] = {"step": torch.tensor(hyper.step - 1, dtype=torch.float32), **state}
        optimizer.step()  # type: ignore[no-untyped-call]

    def idles(self, hyper: Hyper) -> bool:
        """The second moment fades."""
        return True

    def catch_up(self, param: torch.Tensor, state: Fields, missed: Sequence[Hyper]) -> bool:
        """Fade the factors and decay the weights; whole steps only where 0 / eps would not be 0."""
        settings = [hyper.of(AdafactorSettings) for hyper in missed]
        decays = any(each.weight_decay != 0 for each in settings)
        floored = all(_floor(each, param.dtype) > 0 for each in settings)
        if not (floored and all(bool(torch.isfinite(factor).all()) for factor in state.values())):
            zeros = torch.zeros_like(param)
            for hyper in missed:
                self.step([param], [zeros], [state], hyper)
            return True
        if untouched(state) and not decays:
            return False
        for factor in state.values():
            zeros = torch.zeros_like(factor)
            for hyper, each in zip(missed, settings, strict=True):
                factor.lerp_(zeros, float(hyper.step) ** each.beta2_decay)
        if decays:
            for (chunk,) in chunks([param]):
                for each in settings:
                    if each.weight_decay != 0:
                        chunk.mul_(1 - each.lr * each.weight_decay)
        return True


def _floor(settings: AdafactorSettings, dtype: torch.dtype) -> float:
    """The least that the estimate of the variance can be in a dtype; 0 if it underflows."""
    eps = torch.finfo(dtype).eps if settings.eps[0] is None else settings.eps[0]
    return min(torch.tensor(value, dtype=dtype).item() for value in (eps, eps * eps))
