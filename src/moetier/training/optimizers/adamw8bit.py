"""AdamW whose moments take one byte per element: block-wise dynamic quantization, by bitsandbytes.

Dettmers et al., arXiv:2110.02861. Bit-identical to `bitsandbytes.optim.AdamW8bit` on parameters of the same tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from moetier.errors import ConfigError
from moetier.record import Field
from moetier.training.optimizers.adam import AdamSettings
from moetier.training.optimizers.base import FieldwiseOptimizer, Part, Tensors
from moetier.training.optimizers.fields import Fields, untouched
from moetier.training.optimizers.settings import Hyper

BLOCK = 256  # elements that share a scale, as bitsandbytes has it
SMALLEST = 4096  # elements; bitsandbytes keeps the moments of smaller fields in fp32


class AdamW8bit(FieldwiseOptimizer):
    """AdamW with 8-bit moments: a quarter of AdamW's, for a rounding error at every step.

    Raises `ConfigError` where bitsandbytes is not installed.
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
        self._kernels = _bitsandbytes()
        self._maps: dict[torch.device, list[torch.Tensor]] = {}

    def parts(self, field: Field, dtype: torch.dtype) -> list[Part]:
        """Codes and scales of both moments, or the plain moments of a small field."""
        if dtype == torch.float64:
            raise ConfigError(f'field {field.name!r} of the experts is float64, which "adamw8bit" does not train')
        elements = torch.Size(field.shape).numel()
        if elements < SMALLEST:
            return [("state1", torch.float32, field.shape), ("state2", torch.float32, field.shape)]
        codes: list[Part] = [(name, torch.uint8, field.shape) for name in ("state1", "state2")]
        scales: list[Part] = [(name, torch.float32, (-(-elements // BLOCK),)) for name in ("absmax1", "absmax2")]
        return [*codes, *scales]

    def step(self, params: Tensors, gradients: Tensors, states: Sequence[Fields], hyper: Hyper) -> None:
        """One step, field by field."""
        settings = hyper.of(AdamSettings)
        betas, eps, decay, number, rate = settings.betas, settings.eps, settings.weight_decay, hyper.step, settings.lr
        for param, gradient, state in zip(params, gradients, states, strict=True):
            first, second = state["state1"], state["state2"]
            if "absmax1" not in state:
                plain = (betas[0], eps, number, rate, second, betas[1], 0.0, 0.0, decay)
                self._kernels.optimizer_update_32bit("adam", gradient, param, first, *plain)
                continue
            scales = (state["absmax1"], state["absmax2"])
            rest = (*betas, 0.0, 0.0, eps, number, rate, *self._codebooks(param.device), *scales, decay)
            self._kernels.optimizer_update_8bit_blockwise("adam", gradient, param, first, second, *rest)

    def idles(self, hyper: Hyper) -> bool:
        """Moments that are not zero go on moving the weights."""
        return True

    def catch_up(self, param: torch.Tensor, state: Fields, missed: Sequence[Hyper]) -> bool:
        """Every step in full; of a new state without decay the last: the first gives zeros their codes, that is all."""
        zeros = torch.zeros_like(param)
        settings = [hyper.of(AdamSettings) for hyper in missed]
        same = param.device.type == "cpu" and all(each.weight_decay == 0 and each.eps > 0 for each in settings)
        for hyper in missed[-1:] if same and untouched(state) else missed:
            self.step([param], [zeros], [state], hyper)
        return True

    def _codebooks(self, device: torch.device) -> list[torch.Tensor]:
        if device not in self._maps:
            self._maps[device] = [self._kernels.create_dynamic_map(signed=each).to(device) for each in (True, False)]
        return self._maps[device]


def _bitsandbytes() -> Any:
    """The functions of bitsandbytes."""
    try:
        import bitsandbytes.functional as functional
    except ImportError as error:
        raise ConfigError(
            f'optimizer "adamw8bit" needs bitsandbytes ({error}); install it with: pip install "moetier[lowbit]"'
        ) from error
    return functional
