"""Backward through experts that may have left their slots: what forward used is leased again, and computed again.

The graph keeps hidden states, expert indices and gate weights, the version of every expert, and where there is room the
results of the up projections: never a view of a slot, which may hold another expert by then. Backward is one more
access over the same keys; `layer_backward.py` has its math.

A layer is two nodes. `_Keep` saves tensors and computes nothing; `_Experts` computes and saves nothing. Checkpointing
that is not reentrant stops its recomputation when everything saved is there again: where the experts come last in a
decoder layer, that is before they run, so that they are not fetched a third time.

Not differentiable twice.
"""

from __future__ import annotations

from contextlib import closing, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from moetier.access import Access, Part
from moetier.cache import ExpertCache
from moetier.errors import CapacityError, StaleGraphError, UnsupportedModelError
from moetier.experts import Routing
from moetier.training.adapters import FactorGradients, Factors, adapted, factors_of
from moetier.training.arithmetic import Autocast
from moetier.training.layer_backward import LayerBackward, Needs
from moetier.training.proxy import Proxy
from moetier.training.sink import Sink

if TYPE_CHECKING:
    from moetier.tiered import TieredExperts


def differentiable(
    tiered: TieredExperts, layer: int, module: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """`tiered.compute`, recorded by autograd: [T, H] → [T, H].

    Its experts' gradients go to `tiered.sink` whenever a backward would accumulate those of ordinary parameters.
    """
    sink = tiered.sink if tiered.sink is not None and tiered.sink.trains(layer) else None
    norm, adapters = _norm_of(module), factors_of(module)
    factors = [tensor for of in adapters for tensor in (of.lhs, of.rhs)]
    if sink is None and not any(tensor.requires_grad for tensor in (hidden, weights, *norm.values(), *factors)):
        with torch.no_grad():
            return tiered.compute(layer, module, hidden, index, weights)[0]
    kept = _Kept(tiered, layer, module, list(norm), [(of.field, of.scale) for of in adapters], sink, hidden.device)
    tensors = hidden, weights, *norm.values(), *factors
    linked = _Keep.apply(kept, kept.anchor, index, *tensors)  # type: ignore[no-untyped-call]
    result: torch.Tensor = _Experts.apply(kept, index, *linked)  # type: ignore[no-untyped-call]
    return result


def _norm_of(module: Any) -> dict[str, torch.Tensor]:
    """Parameters of the norm behind each expert. They stay in memory; no others of the module may want gradients."""
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


class _Kept:
    """What the two nodes of a layer share. `node` is that of `_Keep`, which has the tensors."""

    def __init__(
        self,
        tiered: TieredExperts,
        layer: int,
        module: Any,
        norm: list[str],
        adapters: list[tuple[str, float]],
        sink: Sink | None,
        device: torch.device,
    ):
        self.tiered, self.layer, self.module, self.norm = tiered, layer, module, norm
        self.adapters = adapters  # fields and scales; their factors are among the tensors
        self.sink = sink  # None: the layer's experts are frozen
        self.autocast = Autocast.now(device)
        self.node: Any = None
        # experts are no tensors: an empty one stands for them, so that something wants a gradient
        self.anchor = torch.empty(0, device=device, requires_grad=sink is not None)
        self._leaf: Any = None
        if sink is not None:
            made_of = self.anchor.view_as(self.anchor).grad_fn
            assert made_of is not None
            self._leaf = made_of.next_functions[0][0]

    def adapters_of(self, factors: list[torch.Tensor]) -> list[Factors]:
        """The adapters as forward had them, from what was saved of them."""
        pairs = zip(self.adapters, factors[::2], factors[1::2], strict=True)
        return [Factors(field, lhs, rhs, scale) for (field, scale), lhs, rhs in pairs]

    def collects(self) -> bool:
        """In a backward: whether it would accumulate gradients of ordinary parameters in the experts' place.

        `torch.autograd.grad` and `backward(inputs=...)` do that only for what they are asked for.
        """
        return self._leaf is not None and bool(torch._C._will_engine_execute_node(self._leaf))


class _Keep(torch.autograd.Function):
    """Identity; saves what backward needs."""

    @staticmethod
    def forward(
        ctx: Any, kept: _Kept, anchor: torch.Tensor, index: torch.Tensor, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Hidden states, gate weights, the norm's parameters and the adapters' factors, as they are."""
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(index, *tensors)
        kept.node = ctx
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        """As they come."""
        return (None, None, None, *gradients)


class _Experts(torch.autograd.Function):
    """One layer's experts in one forward."""

    @staticmethod
    def forward(
        ctx: Any, kept: _Kept, index: torch.Tensor, hidden: torch.Tensor, weights: torch.Tensor, *others: torch.Tensor
    ) -> torch.Tensor:
        """The very forward of inference."""
        ctx.set_materialize_grads(False)
        tiered = kept.tiered
        # a recomputation is asked for by a backward, and comes in its order
        part = Part.FORWARD if torch._C._current_graph_task_id() == -1 else Part.BACKWARD
        has_norm = kept.module.has_post_expert_norm  # which needs all of an expert again
        ctx.block = None if tiered.activations is None or has_norm else tiered.activations.block()
        result, access = tiered.compute(kept.layer, kept.module, hidden, index, weights, part, ctx.block)
        ctx.kept, ctx.use, ctx.changes = kept, tiered.tape.record(access), tiered.sink
        ctx.versions = () if tiered.sink is None else tuple(map(tiered.sink.version, access.keys))
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor | None) -> Any:
        """Gradients of hidden states, gate weights, norm and adapters; those of the experts go to the sink."""
        kept: _Kept = ctx.kept
        nothing = (None,) * (4 + len(kept.norm) + 2 * len(kept.adapters))
        if gradient is None:
            return nothing
        cache = kept.tiered.cache
        if not isinstance(cache, ExpertCache):
            raise CapacityError(
                "backward needs a slot for a whole expert, and this memory budget has none; give more host_memory"
            )
        _check_versions(ctx.changes, ctx.use.access, ctx.versions)
        index, hidden, weights, *others = kept.node.saved_tensors
        _, _, _, of_hidden, of_weights, *of_others = kept.node.needs_input_grad
        norm, factors = others[: len(kept.norm)], others[len(kept.norm) :]
        wanted = {name: p for name, p, needed in zip(kept.norm, norm, of_others, strict=False) if needed}
        adapters = kept.adapters_of(factors)
        of_factors = FactorGradients(adapters) if any(of_others[len(norm) :]) else None
        needs = Needs(of_hidden, of_weights, kept.collects() or of_factors is not None, wanted)
        if not (needs.hidden or needs.weights or needs.experts or needs.norm):
            return nothing
        kept.tiered.tape.play(ctx.use)
        with torch.autocast(hidden.device.type, enabled=False):
            routing, up = Routing(index, weights), None if ctx.block is None else ctx.block.up
            layer = LayerBackward(kept.module, kept.autocast, hidden, routing, gradient, needs, up)
            access = kept.tiered.again(ctx.use.access)
            collect = nullcontext() if kept.sink is None or not needs.experts else kept.sink.collect(access)
            # one by one above a tier of updates: those during backward come when the device's lease has ended
            limit = None if cache.device is None else 1
            leases = cache.batches(access, limit)
            with collect as add, closing(leases):
                for batch in adapted(leases, adapters) if adapters else leases:
                    for lease in batch:
                        layer.run(lease, add if of_factors is None else of_factors.add)
            if ctx.block is not None:
                ctx.block.free()  # a second backward through a retained graph computes again
            found = [None] * len(factors) if of_factors is None else of_factors.results()
            return None, None, *layer.results(kept.norm), *found


def _check_versions(sink: Sink | None, access: Access, versions: tuple[int, ...]) -> None:
    if sink is None:
        return
    for key, version in zip(access.keys, versions, strict=True):
        now = sink.version(key)
        if now != version:
            raise StaleGraphError(
                f"backward needs expert {key.expert} of MoE layer {key.layer} as forward saw it (version {version}), "
                f"but it has been updated since (version {now}); run backward before optimizer.step(), and run forward "
                "again after it"
            )
