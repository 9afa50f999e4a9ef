"""Backward through experts that may have left their slots: what forward used is leased again, and computed again.

The graph keeps hidden states, expert indices and gate weights, and the version of every expert: never a view of a slot,
which may hold another expert by then. Backward is one more access over the same keys. Each expert is computed up to its
activation and differentiated as soon as it is leased, more experts than slots run in waves as in forward, and every
result has its own place, so that nothing depends on the order in which experts become ready.

Not differentiable twice.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing, nullcontext
from itertools import accumulate
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.autograd.function import once_differentiable

from moetier.access import Access
from moetier.cache import ExpertCache, Lease
from moetier.errors import CapacityError, StaleGraphError, UnsupportedModelError
from moetier.experts import Routing, per_expert_parameters
from moetier.training.arithmetic import Autocast, Fields, down_gradients, intermediate, weighted_rows
from moetier.training.proxy import Proxy
from moetier.training.sink import Add, Gradients

if TYPE_CHECKING:
    from moetier.tiered import TieredExperts

_HIDDEN, _INDEX, _WEIGHTS, _ANCHOR, _NORM = 3, 4, 5, 6, 7  # arguments of `_Experts.forward`


def differentiable(
    tiered: TieredExperts, layer: int, module: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """`tiered.compute`, recorded by autograd: [T, H] → [T, H]."""
    sink = tiered.sink
    trains = sink is not None and sink.trains(layer)
    # experts that train are no tensors: something has to tell autograd that the result depends on them
    anchor = torch.empty(0, device=hidden.device, requires_grad=trains)
    norm = _norm_parameters(module)
    arguments = tiered, layer, module, hidden, index, weights, anchor, *norm.values()
    result: torch.Tensor = _Experts.apply(*arguments)  # type: ignore[no-untyped-call]
    return result


def _norm_parameters(module: Any) -> dict[str, torch.Tensor]:
    """Those of the norm behind each expert, which stay in memory: the only ones that an experts module may have."""
    norm = dict(module.post_expert_norm.named_parameters()) if module.has_post_expert_norm else {}
    known = {id(parameter) for parameter in norm.values()}
    known |= {id(p) for part in module.children() if isinstance(part, Proxy) for p in part.parameters()}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and id(parameter) not in known:
            raise UnsupportedModelError(
                f"{type(module).__name__}.{name} wants a gradient, but of what is resident in an experts module only "
                "the norm behind the experts can be trained; freeze it with requires_grad_(False)"
            )
    return norm


class _Experts(torch.autograd.Function):
    """One layer's experts in one forward."""

    @staticmethod
    def forward(
        ctx: Any,
        tiered: TieredExperts,
        layer: int,
        module: Any,
        hidden: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        anchor: torch.Tensor,
        *norm: torch.Tensor,
    ) -> torch.Tensor:
        """The very forward of inference."""
        result, access = tiered.compute(layer, module, hidden, index, weights)
        if any(ctx.needs_input_grad):
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(hidden, index, weights, *norm)
            ctx.tiered, ctx.module, ctx.autocast = tiered, module, Autocast.now(hidden.device)
            ctx.use, ctx.sink = tiered.tape.record(access), tiered.sink
            ctx.versions = None if ctx.sink is None else tuple(map(ctx.sink.version, access.keys))
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor | None) -> Any:
        """Gradients of hidden states, gate weights and norm; those of the experts go to the sink."""
        if gradient is None:
            return (None,) * len(ctx.needs_input_grad)
        tiered, use = ctx.tiered, ctx.use
        if not isinstance(tiered.cache, ExpertCache):
            raise CapacityError(
                "backward needs a slot for a whole expert, and this memory budget has none; give more host_memory"
            )
        _check_versions(ctx, use.access)
        hidden, index, weights, *norm = ctx.saved_tensors
        needs = ctx.needs_input_grad
        names = list(_norm_parameters(ctx.module))
        layer = _Backward(ctx.module, ctx.autocast, hidden, Routing(index, weights), gradient, needs)
        layer.norm = {name: p for name, p, needed in zip(names, norm, needs[_NORM:], strict=True) if needed}
        tiered.tape.play(use)
        collects = needs[_ANCHOR] and ctx.sink is not None
        with torch.autocast(hidden.device.type, enabled=False):
            access = tiered.again(use.access)
            with (
                closing(cast("Generator[list[Lease], None, None]", tiered.cache.batches(access))) as batches,
                ctx.sink.collect(access) if collects else nullcontext() as add,
            ):
                for batch in batches:
                    for lease in batch:
                        layer.run(lease, add)
            of_hidden, of_weights, of_norm = layer.results(weights)
        found = (of_norm.get(name) for name in names)
        return (None, None, None, of_hidden, None, of_weights, None, *found)


def _check_versions(ctx: Any, access: Access) -> None:
    if ctx.sink is None:
        return
    for key, version in zip(access.keys, ctx.versions, strict=True):
        now = ctx.sink.version(key)
        if now != version:
            raise StaleGraphError(
                f"backward needs expert {key.expert} of MoE layer {key.layer} as forward saw it (version {version}), "
                f"but it has been updated since (version {now}); run backward before optimizer.step(), and run forward "
                "again after it"
            )


class _Backward:
    """The math of one layer's backward, expert by expert in any order."""

    def __init__(
        self,
        module: Any,
        autocast: Autocast,
        hidden: torch.Tensor,
        routing: Routing,
        gradient: torch.Tensor,
        needs: tuple[bool, ...],
    ):
        self.module, self.autocast, self.routing, self.gradient = module, autocast, routing, gradient
        self.needs_hidden, self.needs_weights = needs[_HIDDEN], needs[_WEIGHTS]
        self.norm: Fields = {}  # parameters of the norm that want gradients
        self.token = routing.order // routing.top_k  # of every sorted row
        # the rows of every expert, [S, H]: read by its recomputation, then overwritten with their gradient
        self.rows = hidden[self.token]
        self.of_gates = torch.zeros_like(routing.weights)
        self._of_norm: dict[int, list[torch.Tensor]] = {}
        self._ends = list(accumulate(routing.tokens, initial=0))
        self._names = per_expert_parameters(module)

    def run(self, lease: Lease, add: Add | None) -> None:
        """One expert."""
        number = self.routing.number[lease.key.expert]
        part = slice(self._ends[number], self._ends[number + 1])
        fields = {name: lease.fields[name] for name in self._names}
        if lease.in_place:  # the CPU had it in forward; here the device computes everything
            fields = {name: field.to(self.rows.device) for name, field in fields.items()}
        with torch.enable_grad():
            # not detach(): that counts changes of the whole arena, and other slots are filled meanwhile
            fields = {name: field.data.requires_grad_(add is not None) for name, field in fields.items()}
            rows = self.rows[part].detach().requires_grad_(self.needs_hidden)
            way = self._through_norm if self.module.has_post_expert_norm else self._through_down
            found = way(number, rows, fields, part)
        if self.needs_hidden:
            self.rows[part] = found.pop("rows")
        if add is not None:
            add(lease.key, found)

    def results(self, weights: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, Fields]:
        """Gradients of hidden states [T, H], gate weights [T, K] and the norm's parameters."""
        order, top_k = self.routing.order, self.routing.top_k
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.size(0), device=order.device)
        of_hidden = of_weights = None
        if self.needs_hidden:
            of_hidden = self.rows[inverse].view(-1, top_k, self.rows.size(-1)).sum(dim=1)
        if self.needs_weights:
            of_weights = self.of_gates[inverse].view(weights.shape)
        of_norm: Fields = {}
        for number in sorted(self._of_norm, reverse=True):  # the order of autograd's own sum
            for name, one in zip(self.norm, self._of_norm[number], strict=True):
                of_norm[name] = of_norm[name] + one if name in of_norm else one
        return of_hidden, of_weights, of_norm

    def _through_down(self, number: int, rows: torch.Tensor, fields: Fields, part: slice) -> Gradients:
        """Without a norm: the results of the down projection are not needed."""
        module, trained = self.module, fields["down_proj"].requires_grad
        h = intermediate(module, rows, fields, self.autocast)
        wanted = {"rows": rows} if self.needs_hidden else {}
        wanted |= {name: fields[name] for name in self._names if trained and not name.startswith("down_proj")}
        with torch.no_grad():
            weight, bias, gates = fields["down_proj"], fields.get("down_proj_bias"), self.routing.weights[part]
            dtype = torch.promote_types(weight.dtype, gates.dtype)
            gradient = self.gradient[self.token[part]].to(dtype)
            down = down_gradients(
                h, weight, bias, gates, module.is_transposed, gradient, bool(wanted), self.needs_weights, trained
            )
        if down.gates is not None:
            self.of_gates[part] = down.gates
        found: Gradients = {}
        if wanted:
            found = dict(zip(wanted, torch.autograd.grad(h, list(wanted.values()), down.h), strict=True))
        found |= {} if down.weight is None else {"down_proj": down.weight}
        return found | ({} if down.bias is None else {"down_proj_bias": down.bias})

    def _through_norm(self, number: int, rows: torch.Tensor, fields: Fields, part: slice) -> Gradients:
        """With a norm behind the expert: all of it is computed again."""
        gates = self.routing.weights[part].detach().requires_grad_(self.needs_weights)
        norm = {name: parameter.detach().requires_grad_() for name, parameter in self.norm.items()}
        result = weighted_rows(self.module, rows, fields, gates, norm, self.autocast)
        wanted = {"rows": rows} if self.needs_hidden else {}
        wanted |= {name: field for name, field in fields.items() if field.requires_grad}
        wanted |= {"gates": gates} if self.needs_weights else {}
        gradient = self.gradient[self.token[part]].to(result.dtype)
        inputs = [*wanted.values(), *norm.values()]
        if not inputs:
            return {}
        found = torch.autograd.grad(result, inputs, gradient)
        if norm:
            self._of_norm[number] = list(found[len(wanted) :])
        by_name = dict(zip(wanted, found, strict=False))
        if self.needs_weights:
            self.of_gates[part] = by_name.pop("gates")
        return by_name
