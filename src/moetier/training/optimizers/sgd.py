"""Stochastic gradient descent, plain and with momentum, by torch's fused kernels.

Bit-identical to `torch.optim.SGD(fused=True)` on parameters of the same tensors. Half-precision parameters (without
masters) take torch's ordinary way instead: its fused CPU kernel is wrong there (torch 2.13; docs/LOG.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch.optim.sgd import sgd

from moetier.errors import ConfigError
from moetier.training.optimizers.base import ElementwiseOptimizer, Tensors
from moetier.training.optimizers.fields import HALF, Fields
from moetier.training.optimizers.settings import Hyper, Settings

BUFFER = "momentum_buffer"


@dataclass(frozen=True, slots=True, kw_only=True)
class SGDSettings(Settings):
    """Of plain SGD. `momentum` must stay 0: the state has no place for a buffer."""

    momentum: float = 0.0

    def __post_init__(self) -> None:
        Settings.__post_init__(self)
        if self.momentum != 0:
            raise ConfigError(f'momentum: {self.momentum!r}, but "sgd" has none; choose the optimizer "momentum"')


@dataclass(frozen=True, slots=True, kw_only=True)
class MomentumSettings(Settings):
    """Of SGD with momentum, as in torch.optim.SGD."""

    momentum: float = 0.9
    dampening: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        Settings.__post_init__(self)
        self._check_at_least("momentum", 0.0)
        self._check_at_least("dampening", 0.0)
        if self.momentum == 0:
            raise ConfigError('momentum: 0 means none; choose the optimizer "sgd"')
        if self.nesterov and self.dampening != 0:
            raise ConfigError(f"dampening: {self.dampening!r}, but with nesterov it must be 0")


def can_fuse(params: Tensors) -> bool:
    """Whether torch's fused kernel computes these right."""
    return all(param.device.type != "cpu" or param.dtype not in HALF for param in params)


class SGD(ElementwiseOptimizer):
    """Plain SGD, with weight decay added to the gradient. Has no state, but for masters of half-precision weights."""

    def __init__(self, lr: float = 1e-3, weight_decay: float = 0.0, masters: bool = True):
        super().__init__(SGDSettings(lr=lr, weight_decay=weight_decay), masters)

    def step(self, params: Tensors, gradients: Tensors, states: Sequence[Fields], hyper: Hyper) -> None:
        """One fused step of all fields."""
        settings = hyper.of(SGDSettings)
        sgd(
            list(params),
            list(gradients),
            [],
            fused=can_fuse(params),
            foreach=False,
            weight_decay=settings.weight_decay,
            momentum=0.0,
            lr=settings.lr,
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )

    def idles(self, hyper: Hyper) -> bool:
        """Only weight decay moves weights without a gradient: w - lr * 0 is w, its sign of zero too."""
        return hyper.weight_decay != 0

    def still(self, hyper: Hyper) -> bool:
        """As `idles`: there is no state."""
        return hyper.weight_decay == 0


class Momentum(ElementwiseOptimizer):
    """SGD with momentum, dampening and Nesterov's variant.

    At step 1 the buffer becomes the gradient itself, undamped, as torch does it.
    """

    moments = (BUFFER,)

    def __init__(
        self,
        lr: float = 1e-3,
        momentum: float = 0.9,
        dampening: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        masters: bool = True,
    ):
        super().__init__(
            MomentumSettings(
                lr=lr, weight_decay=weight_decay, momentum=momentum, dampening=dampening, nesterov=nesterov
            ),
            masters,
        )

    def step(self, params: Tensors, gradients: Tensors, states: Sequence[Fields], hyper: Hyper) -> None:
        """One fused step of all fields."""
        settings = hyper.of(MomentumSettings)
        buffers = [None if hyper.step == 1 else state[BUFFER] for state in states]
        sgd(
            list(params),
            list(gradients),
            buffers,
            fused=can_fuse(params),
            foreach=False,
            weight_decay=settings.weight_decay,
            momentum=settings.momentum,
            lr=settings.lr,
            dampening=settings.dampening,
            nesterov=settings.nesterov,
            maximize=False,
        )
        if hyper.step == 1:
            for state, made in zip(states, buffers, strict=True):
                assert made is not None  # by torch
                state[BUFFER].copy_(made)

    def idles(self, hyper: Hyper) -> bool:
        """A buffer that is not zero goes on moving the weights."""
        return True

    def still(self, hyper: Hyper) -> bool:
        """A buffer of zeros stays zeros, and moves nothing, unless weight decay makes a gradient."""
        return hyper.weight_decay == 0
