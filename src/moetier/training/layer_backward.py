"""The math of one layer's backward: each expert differentiated when its lease comes, in any order.

What forward kept of an expert is not computed again; without it, the up projection is.

Every result has its own place, so that nothing depends on that order: the gradients of a token's rows add up in the
order of its top-k, those of a norm behind the experts from the last expert to the first. Knows nothing of autograd's
graph, nor of caches.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from moetier.experts import Routing, per_expert_parameters, up_name
from moetier.lease import Lease
from moetier.training.arithmetic import (
    Autocast,
    Fields,
    activated,
    down_gradients,
    up_gradients,
    up_product,
    weighted_rows,
)
from moetier.training.sink import Add, Gradients


@dataclass(frozen=True, slots=True)
class Needs:
    """Which gradients are wanted; `norm` are those parameters of the norm behind the experts that want theirs."""

    hidden: bool
    weights: bool
    experts: bool
    norm: Fields


class LayerBackward:
    """For hidden states [T, H], their routing and the `gradient` [T, H] of the layer's result.

    `autocast` is the state in which forward ran; the caller switches it off around this. `up` is what forward kept of
    the up projections, for all sorted rows; None if it kept nothing.
    """

    def __init__(
        self,
        module: Any,
        autocast: Autocast,
        hidden: torch.Tensor,
        routing: Routing,
        gradient: torch.Tensor,
        needs: Needs,
        up: torch.Tensor | None = None,
    ):
        self.module, self.autocast, self.routing, self.gradient = module, autocast, routing, gradient
        self.needs, self._up = needs, up
        self._token = routing.order // routing.top_k  # of every sorted row
        # the rows of every expert, [S, H]: read by its recomputation, then overwritten with their gradient
        self._rows = hidden[self._token]
        self._of_gates = torch.zeros_like(routing.weights)
        self._of_norm: dict[int, list[torch.Tensor]] = {}
        self._ends = list(accumulate(routing.tokens, initial=0))
        self._names = per_expert_parameters(module)

    def run(self, lease: Lease, add: Add | None) -> None:
        """One expert; its own gradients go to `add`, if they are wanted."""
        number = self.routing.number[lease.key.expert]
        part = slice(self._ends[number], self._ends[number + 1])
        trained = self.needs.experts and add is not None
        fields = {name: lease.fields[name] for name in self._names}
        if lease.in_place:  # the CPU may have had it in forward; here the device computes everything
            fields = {name: field.to(self._rows.device) for name, field in fields.items()}
        # not detach(): its check for changes is of the whole arena, and other slots are filled meanwhile
        fields = {name: field.data for name, field in fields.items()}
        rows = self._rows[part]
        way = self._through_norm if self.module.has_post_expert_norm else self._through_down
        found = way(number, rows, fields, part, trained)
        if self.needs.hidden:
            self._rows[part] = found.pop("rows")
        if trained and add is not None:
            add(lease.key, found)

    def results(self, norm: list[str]) -> tuple[torch.Tensor | None, ...]:
        """Gradients of hidden states [T, H], gate weights [T, K] and the parameters that `norm` names."""
        by_token, top_k = self.routing.by_token, self.routing.top_k
        of_hidden = of_weights = None
        if self.needs.hidden:
            shape = len(self.gradient), top_k, self._rows.size(-1)
            of_hidden = by_token(self._rows).view(shape).sum(dim=1)
        if self.needs.weights:
            of_weights = by_token(self._of_gates).view(-1, top_k)
        of_norm: Fields = {}
        for number in sorted(self._of_norm, reverse=True):  # as autograd adds up the uses of a parameter
            for name, one in zip(self.needs.norm, self._of_norm[number], strict=True):
                of_norm[name] = of_norm[name] + one if name in of_norm else one
        return of_hidden, of_weights, *(of_norm.get(name) for name in norm)

    def _through_down(self, number: int, rows: torch.Tensor, fields: Fields, part: slice, trained: bool) -> Gradients:
        """Without a norm: the results of the down projection are not needed."""
        module = self.module
        name, turned = up_name(module), module.is_transposed
        further = self.needs.hidden or trained  # than the gate weights
        if self._up is None:
            with torch.no_grad():
                up = up_product(module, rows, fields, self.autocast)
        else:
            up = self._up[part]
        with torch.set_grad_enabled(further):
            up = up.detach().requires_grad_(further)
            h = activated(module, up, self.autocast)
        weight, bias, gates = fields["down_proj"], fields.get("down_proj_bias"), self.routing.weights[part]
        gradient = self._gradient(part, torch.promote_types(weight.dtype, gates.dtype))
        down = down_gradients(h.detach(), weight, bias, gates, turned, gradient, further, self.needs.weights, trained)
        if down.gates is not None:
            self._of_gates[part] = down.gates
        found = {"down_proj": down.weight, "down_proj_bias": down.bias}
        if further:
            (of_up,) = torch.autograd.grad(h, up, down.h)
            of = up_gradients(rows, fields[name], fields.get(f"{name}_bias"), turned, of_up, self.needs.hidden, trained)
            found |= {"rows": of.rows, name: of.weight, f"{name}_bias": of.bias}
        return {name: value for name, value in found.items() if value is not None}

    def _through_norm(self, number: int, rows: torch.Tensor, fields: Fields, part: slice, trained: bool) -> Gradients:
        """With a norm behind the expert: all of it is computed again."""
        rows = rows.detach().requires_grad_(self.needs.hidden)
        fields = {name: field.requires_grad_(trained) for name, field in fields.items()}
        gates = self.routing.weights[part].detach().requires_grad_(self.needs.weights)
        norm = {name: parameter.detach().requires_grad_() for name, parameter in self.needs.norm.items()}
        with torch.enable_grad():
            result = weighted_rows(self.module, rows, fields, gates, norm, self.autocast)
        wanted = {"rows": rows} if self.needs.hidden else {}
        wanted |= fields if trained else {}
        wanted |= {"gates": gates} if self.needs.weights else {}
        inputs = [*wanted.values(), *norm.values()]
        values = torch.autograd.grad(result, inputs, self._gradient(part, result.dtype))
        if norm:
            self._of_norm[number] = list(values[len(wanted) :])
        found = dict(zip(wanted, values, strict=False))
        if self.needs.weights:
            self._of_gates[part] = found.pop("gates")
        return found

    def _gradient(self, part: slice, dtype: torch.dtype) -> torch.Tensor:
        """Of an expert's weighted rows, [n, H]."""
        return self.gradient[self._token[part]].to(dtype)
