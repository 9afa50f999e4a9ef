"""AdamW whose moments take one byte per element: block-wise dynamic quantization, by torchao.

Dettmers et al., arXiv:2110.02861. Bit-identical to `torchao.optim.AdamW8bit` on parameters of the same tensors, run
eagerly (`torch.compiler.set_stance("force_eager")`); torchao would compile it, which rounds otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from moetier.errors import ConfigError
from moetier.record import Field
from moetier.training.optimizers.adam import AdamSettings
from moetier.training.optimizers.base import FieldwiseOptimizer, Part
from moetier.training.optimizers.fields import Fields
from moetier.training.optimizers.settings import Hyper

MOMENTS = {"exp_avg": True, "exp_avg_sq": False}  # whether it has a sign
BLOCK = 256  # elements that share a scale, torchao's own for 8 bits
SMALLEST = 4096  # elements; what is smaller, or no whole number of blocks, torchao keeps as it is


class AdamW8bit(FieldwiseOptimizer):
    """AdamW with 8-bit moments: a quarter of AdamW's, for a rounding error at every step.

    Raises `ConfigError` where torchao is not installed.
    """

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
        self._adam, self._moment = _torchao()
        self._maps: dict[tuple[torch.device, bool], torch.Tensor] = {}

    def parts(self, field: Field, dtype: torch.dtype) -> list[Part]:
        """Codes and scales per moment, or the plain moments of a field that is too small or odd."""
        elements = torch.Size(field.shape).numel()
        if elements < SMALLEST or elements % BLOCK:
            return [(moment, dtype, field.shape) for moment in MOMENTS]
        return [
            part
            for moment in MOMENTS
            for part in (
                (f"{moment}.codes", torch.uint8, field.shape),
                (f"{moment}.scale", torch.float32, (elements // BLOCK,)),
            )
        ]

    def step(self, param: torch.Tensor, gradient: torch.Tensor, state: Fields, hyper: Hyper) -> None:
        """One step of a field."""
        settings = hyper.of(AdamSettings)
        moments = [self._wrapped(moment, param, state) for moment in MOMENTS]
        number, rate = (torch.tensor(value, dtype=torch.float32) for value in (float(hyper.step), settings.lr))
        decay, eps = settings.weight_decay, settings.eps
        self._adam(param, gradient, number, *moments, None, rate, *settings.betas, decay, eps, True, False)

    def idles(self, hyper: Hyper) -> bool:
        """Moments that are not zero go on moving the weights."""
        return True

    def catch_up(self, param: torch.Tensor, state: Fields, missed: Sequence[Hyper]) -> bool:
        """Every step in full: even zeros change their codes, and a weight of -0.0 its sign."""
        zeros = torch.zeros_like(param)
        for hyper in missed:
            self.step(param, zeros, state, hyper)
        return True

    def _wrapped(self, moment: str, param: torch.Tensor, state: Fields) -> torch.Tensor:
        if moment in state:
            return state[moment]
        signed = MOMENTS[moment]
        kind = (param.device, signed)
        if kind not in self._maps:
            self._maps[kind] = self._moment.zeros((BLOCK,), signed, BLOCK, param.device).qmap
        codes, scale = state[f"{moment}.codes"], state[f"{moment}.scale"]
        wrapped: torch.Tensor = self._moment(codes, scale, self._maps[kind], signed, dtype=param.dtype)
        return wrapped


def _torchao() -> tuple[Callable[..., None], Any]:
    """torchao's update of one parameter, and its 8-bit moment."""
    try:
        from torchao.optim.adam import single_param_adam
        from torchao.optim.subclass_8bit import OptimState8bit
    except ImportError as error:
        raise ConfigError(
            f'optimizer "adamw8bit" needs torchao ({error}); install it with: pip install "moetier[lowbit]"'
        ) from error
    return single_param_adam, OptimState8bit
