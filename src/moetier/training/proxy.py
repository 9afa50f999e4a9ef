"""The proxy of a layer's experts: one ordinary parameter that stands for all of them.

The experts of a tiered model are no parameters: they are records in a store. Yet much of what is done in training is
done to parameters: they are frozen (`requires_grad`), sorted into groups with learning rates, clipped, unscaled. A
proxy makes all of that reach the experts. Its value means nothing; its gradient is the norm of the gradient of the
layer's experts, so that

- a global norm over all parameters is the true one, and what clipping or unscaling does to the proxy's gradient, the
  factor between before and after, is done to the experts' gradients;
- a gradient that is not finite makes it not finite;
- a proxy with `requires_grad_(False)` freezes its layer's experts.

Knows nothing of caches and records.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from moetier.errors import ConfigError

NAME = "proxy"


class Proxy(torch.nn.Module):
    """The parameter `weight`, a float32 scalar, that stands for a layer's experts. Never part of a state dict."""

    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros((), dtype=torch.float32, device=device))
        self._norm: float | None = None

    @property
    def trains(self) -> bool:
        """Whether the layer's experts are trained."""
        return self.weight.requires_grad

    @property
    def has_gradient(self) -> bool:
        """Whether there is a gradient for the experts of this layer."""
        return self.weight.grad is not None and self._norm is not None

    def show(self, norm: float | None) -> None:
        """Make `norm` (None: there is no gradient) the proxy's gradient."""
        self._norm = norm
        self.weight.grad = None if norm is None else torch.full_like(self.weight, norm)

    def factor(self) -> float:
        """What was done to the gradient since it was shown: 1 if nothing was.

        Raises `ConfigError` for a gradient that was set to anything but a multiple.
        """
        if self._norm is None or self.weight.grad is None:
            return 1.0
        shown, now = torch.tensor(self._norm, dtype=self.weight.dtype).item(), self.weight.grad.item()
        if shown == now or math.isnan(shown):
            return 1.0
        if shown == 0:
            raise ConfigError(
                f"the gradient of the proxy of a layer's experts was 0 and was set to {now}; gradients of tiered "
                "experts can be scaled, not shifted"
            )
        return now / shown

    # what a state dict is made by: nothing of it
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        return

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        return


def give_proxies(modules: Sequence[torch.nn.Module], device: torch.device | None = None) -> list[Proxy]:
    """Register a proxy in every experts module, as its child `proxy`, on the device of the other parameters."""
    proxies = []
    for module in modules:
        proxy = Proxy(device)
        module.add_module(NAME, proxy)
        proxies.append(proxy)
    return proxies
