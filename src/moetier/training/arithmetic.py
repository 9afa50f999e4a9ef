"""One expert's arithmetic for training: rows in, weighted rows out, and its gradients.

Forward has the bits of `moetier.experts`, which are those of transformers' `grouped_mm`. Backward never needs the
results of the down projection: with out = g · (h Wᵀ + b), a gate weight's gradient is ⟨∂out, h Wᵀ + b⟩ =
⟨∂out W, h⟩ + ⟨∂out, b⟩, and ∂out W is computed for ∂h = g · (∂out W) anyway (SonicMoE, arXiv 2512.14080, does the same
to save memory; here it saves a third of the recomputation). A norm behind each expert needs them, and gets them.

Shapes: n rows of an expert, H wide, I wide in between. Weights are [outputs, inputs], or [inputs, outputs] in
transposed families. Knows nothing of slots, routing or caches.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from moetier.experts import up_name

Fields = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Autocast:
    """The state of autocast on a kind of device. The experts' products are never cast, as in `grouped_mm`."""

    device: str
    enabled: bool
    dtype: torch.dtype

    @classmethod
    def now(cls, device: torch.device) -> Autocast:
        """The caller's."""
        kind = device.type
        return cls(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))

    def on(self) -> AbstractContextManager[Any]:
        """For what ran under the caller's state."""
        return torch.autocast(self.device, self.dtype) if self.enabled else nullcontext()

    def off(self) -> AbstractContextManager[Any]:
        """For products."""
        return torch.autocast(self.device, enabled=False) if self.enabled else nullcontext()


def weighted_rows(
    module: Any,
    rows: torch.Tensor,
    fields: Fields,
    gates: torch.Tensor,
    norm: Fields | None = None,
    autocast: Autocast | None = None,
) -> torch.Tensor:
    """An expert's rows [n, H] times their gate weights [n]: differentiable in rows, fields, gates and the norm.

    `norm` stands for the parameters of the norm behind the expert, by default its own. `autocast` is the state in which
    the activation and the norm run, by default the caller's.
    """
    autocast = autocast or Autocast.now(rows.device)
    h = intermediate(module, rows, fields, autocast)
    down, bias = fields["down_proj"], fields.get("down_proj_bias")
    if not module.has_post_expert_norm:
        arguments = h, down, bias, gates, module.is_transposed
        weighted: torch.Tensor = _WeightedDown.apply(*arguments)  # type: ignore[no-untyped-call]
        return weighted
    with autocast.off():
        d = _product(h, down, bias, module.is_transposed)
    with autocast.on():
        normed: torch.Tensor = torch.func.functional_call(module.post_expert_norm, norm or {}, (d,))
    return normed * gates.unsqueeze(-1)


def intermediate(module: Any, rows: torch.Tensor, fields: Fields, autocast: Autocast) -> torch.Tensor:
    """Up projection and activation: [n, H] → [n, I]. Differentiable; `autocast` is the state for the activation."""
    return activated(module, up_product(module, rows, fields, autocast), autocast)


def up_product(module: Any, rows: torch.Tensor, fields: Fields, autocast: Autocast) -> torch.Tensor:
    """Up projection, with a gate's beside it: [n, H] → [n, I] or [n, 2 I]."""
    name = up_name(module)
    with autocast.off():
        return _product(rows, fields[name], fields.get(f"{name}_bias"), module.is_transposed)


def activated(module: Any, up: torch.Tensor, autocast: Autocast) -> torch.Tensor:
    """[n, I] of what `up_product` gives; every family has a gate of its own."""
    with autocast.on():
        h: torch.Tensor = module._apply_gate(up) if module.has_gate else module.act_fn(up)
        return h


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, is_transposed: bool) -> torch.Tensor:
    out = torch.mm(x.to(weight.dtype), weight if is_transposed else weight.t())
    return out if bias is None else out + bias


@dataclass(frozen=True, slots=True)
class DownGradients:
    """Of the weighted down projection; None where nobody asked."""

    h: torch.Tensor | None  # [n, I]
    gates: torch.Tensor | None  # [n]
    weight: torch.Tensor | None
    bias: torch.Tensor | None


def down_gradients(
    h: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    gates: torch.Tensor,
    is_transposed: bool,
    gradient: torch.Tensor,
    needs_h: bool,
    needs_gates: bool,
    needs_fields: bool,
) -> DownGradients:
    """Gradients of `gates · (h Wᵀ + b)` for the `gradient` [n, H] of its result. Autocast must be off."""
    x = h.to(weight.dtype)
    of_h = of_gates = of_weight = of_bias = None
    if needs_h or needs_gates:
        back = torch.mm(gradient.to(weight.dtype), weight.t() if is_transposed else weight)  # [n, I]
        if needs_h:
            of_h = (back * gates.unsqueeze(-1)).to(h.dtype)
        if needs_gates:
            wide = torch.promote_types(weight.dtype, gates.dtype)
            dots = (back.to(wide) * x.to(wide)).sum(dim=-1)
            if bias is not None:
                dots = dots + (gradient.to(wide) * bias.to(wide)).sum(dim=-1)
            of_gates = dots.to(gates.dtype)
    if needs_fields:
        weighted = (gradient * gates.unsqueeze(-1)).to(weight.dtype)
        of_weight = torch.mm(x.t(), weighted) if is_transposed else torch.mm(weighted.t(), x)
        of_bias = None if bias is None else weighted.sum(dim=0)
    return DownGradients(of_h, of_gates, of_weight, of_bias)


@dataclass(frozen=True, slots=True)
class UpGradients:
    """Of the up projection; None where nobody asked."""

    rows: torch.Tensor | None  # [n, H]
    weight: torch.Tensor | None
    bias: torch.Tensor | None


def up_gradients(
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    is_transposed: bool,
    gradient: torch.Tensor,
    needs_rows: bool,
    needs_fields: bool,
) -> UpGradients:
    """Gradients of `x Wᵀ + b` for the `gradient` of its result, by autograd's own products. Autocast must be off."""
    of_rows = of_weight = of_bias = None
    if needs_rows:
        of_rows = torch.mm(gradient, weight.t() if is_transposed else weight).to(rows.dtype)
    if needs_fields:
        x = rows.to(weight.dtype)
        of_weight = torch.mm(x.t(), gradient) if is_transposed else torch.mm(gradient.t(), x)
        of_bias = None if bias is None else gradient.sum(dim=0)
    return UpGradients(of_rows, of_weight, of_bias)


class _WeightedDown(torch.autograd.Function):
    """`down_gradients` as a part of an ordinary graph: saves h, not the results."""

    @staticmethod
    def forward(
        ctx: Any, h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gates: torch.Tensor, turned: bool
    ) -> torch.Tensor:
        """gates · (h Wᵀ + b): [n, I] → [n, H]."""
        ctx.save_for_backward(h, weight, bias, gates)
        ctx.is_transposed = turned
        with Autocast.now(h.device).off():
            return _product(h, weight, bias, turned) * gates.unsqueeze(-1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        """Gradients of what wants them."""
        h, weight, bias, gates = ctx.saved_tensors
        of_h, of_weight, of_bias, of_gates, _ = ctx.needs_input_grad
        with Autocast.now(h.device).off():
            found = down_gradients(
                h, weight, bias, gates, ctx.is_transposed, gradient, of_h, of_gates, of_weight or of_bias
            )
        return found.h, found.weight, found.bias, found.gates, None
