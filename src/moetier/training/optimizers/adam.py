"""Adam and AdamW by torch's fused kernels.

Bit-identical to `torch.optim.Adam(fused=True)` and `torch.optim.AdamW(fused=True)` on parameters of the same tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.adam import adam

from moetier.errors import ConfigError
from moetier.training.optimizers.base import ElementwiseOptimizer, Tensors
from moetier.training.optimizers.fields import Fields
from moetier.training.optimizers.settings import Hyper, Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamSettings(Settings):
    """Of Adam and AdamW, as in torch.optim."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        Settings.__post_init__(self)
        if not (isinstance(self.betas, tuple) and len(self.betas) == 2):
            raise ConfigError(f"betas: {self.betas!r} must be two numbers")
        for beta in self.betas:
            self._check_share("betas", beta)
        self._check_at_least("eps", 0.0)

    def _takes(self, name: str, value: Any) -> bool:
        return name != "eps" or not isinstance(value, tuple)


class AdamW(ElementwiseOptimizer):
    """AdamW: decoupled weight decay (Loshchilov and Hutter, arXiv:1711.05101). The state has two moments."""

    moments = ("exp_avg", "exp_avg_sq")
    decoupled = True

    def __init__(
        self,
        lr: float = 1e-3,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        masters: bool = True,
    ):
        super().__init__(AdamSettings(lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay), masters)

    def step(self, params: Tensors, gradients: Tensors, states: Sequence[Fields], hyper: Hyper) -> None:
        """One fused step of all fields."""
        settings = hyper.of(AdamSettings)
        before = float(hyper.step - 1)  # torch adds the one
        adam(
            list(params),
            list(gradients),
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [torch.full((), before, dtype=torch.float32, device=param.device) for param in params],
            fused=True,
            decoupled_weight_decay=self.decoupled,
            amsgrad=False,
            beta1=settings.betas[0],
            beta2=settings.betas[1],
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            eps=settings.eps,
            maximize=False,
        )

    def idles(self, hyper: Hyper) -> bool:
        """Moments that are not zero go on moving the weights."""
        return True

    def still(self, hyper: Hyper) -> bool:
        """Moments of zeros stay zeros; 0 / (0 + eps) moves nothing, unless eps is 0 too and it is not a number."""
        return hyper.weight_decay == 0 and hyper.of(AdamSettings).eps > 0


class Adam(AdamW):
    """Adam (Kingma and Ba, arXiv:1412.6980); its weight decay is added to the gradient."""

    decoupled = False

    def __init__(
        self,
        lr: float = 1e-3,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        masters: bool = True,
    ):
        super().__init__(lr, beta1, beta2, eps, weight_decay, masters)
