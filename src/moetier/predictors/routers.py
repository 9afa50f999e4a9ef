"""A loaded model's own routers, callable on any hidden state: found by watching one small forward, then checked.

Serves every family whose router looks at its layer's hidden state alone; others are refused by name. Knows nothing of
caches, accesses or probabilities. Calls made here leave no trace in the model: no expert runs, no output is recorded.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from threading import local
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from moetier.errors import UnsupportedModelError
from moetier.predictors.linear_gate import folded

__all__ = ["Routed", "Routers", "asking"]

_PROBE_TOKENS = 7  # a number that no width or count of a model is
_inside: contextvars.ContextVar[bool] = contextvars.ContextVar("moetier_next_gate", default=False)


def asking() -> bool:
    """Whether a router is being asked here, or a model probed: no token depends on what comes out."""
    return _inside.get()


@dataclass(frozen=True, slots=True)
class Routed:
    """A router's answer for T tokens: the experts it chooses, [T, K]; what it ranked them by, [T, E], if that shows."""

    index: torch.Tensor
    scores: torch.Tensor | None


class _Choices(TorchFunctionMode):
    """Notes what is ranked by `topk`: a router's last ranking of all experts is after bias and group rules."""

    def __init__(self, experts: int):
        super().__init__()
        self.experts, self.ranked = experts, None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == "topk" and args and args[0].shape[-1] == self.experts:
            self.ranked = args[0]
        return func(*args, **(kwargs or {}))


@dataclass
class _Call:
    """One call of a module during the probe."""

    module: torch.nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None


@dataclass
class _Layer:
    """How one layer routes: residual -> norm -> router."""

    experts: int
    router: torch.nn.Module
    place: int  # of the index in the router's output
    rank: int  # dimensions of the router's input
    rest: tuple[Any, ...]  # its other arguments, the same for every token
    named: dict[str, Any]
    norm: torch.nn.Module | None  # None: the router sees the residual itself
    norm_rank: int
    probe: torch.Tensor = field(repr=False)  # residual of the probe
    index: torch.Tensor = field(repr=False)  # what the router chose there
    matrix: torch.Tensor | None = field(default=None, repr=False)  # the whole router, if it is no more than one


class Routers:
    """The routers of all MoE layers of `model`, in the order a forward visits them.

    While open, `residual` is what the norm before the latest MoE layer saw: (layer, [tokens, width]). Raises
    `UnsupportedModelError`, naming the family, if a router cannot be called on its own. `close` removes the hooks.
    """

    def __init__(self, model: Any):
        from moetier.hf import find_experts

        self._family = f"{type(model).__name__} ({model.config.model_type})"
        self._handles: list[Any] = []
        self._seen = local()  # per thread
        modules = [module for _, module in find_experts(model)]
        calls = self._probe(model, modules)
        try:
            self._layers = [self._find(model, calls, number, module) for number, module in enumerate(modules)]
            for number, layer in enumerate(self._layers):
                self._handles.append((layer.norm or layer.router).register_forward_pre_hook(self._watch(number)))
            for number, layer in enumerate(self._layers):
                self._check(number, layer)
        except BaseException:
            self.close()
            raise

    @property
    def residual(self) -> tuple[int, torch.Tensor] | None:
        """What the norm before the latest MoE layer of this thread's forward saw; None before there was one."""
        residual: tuple[int, torch.Tensor] | None = getattr(self._seen, "residual", None)
        return residual

    def __len__(self) -> int:
        return len(self._layers)

    def ranks(self, layer: int, residual: torch.Tensor) -> torch.Tensor | None:
        """[T, E] float32 scores that rank as layer `layer`'s router does, if that is one matrix."""
        matrix = self._layers[layer].matrix
        if matrix is None:
            return None
        # not numpy: its BLAS would wake threads of its own for this
        return torch.mm(residual.float(), matrix.t())

    def route(self, layer: int, residual: torch.Tensor) -> Routed:
        """What layer `layer`'s router would choose if `residual` [tokens, width] came to it."""
        return contextvars.Context().run(self._route, self._layers[layer], residual)

    def outputs(self, layer: int, residual: torch.Tensor) -> list[Any]:
        """All that the router of `layer` gives for `residual` [tokens, width]; the choice is at `place(layer)`."""
        return contextvars.Context().run(self._ask, self._layers[layer], residual)[0]

    def place(self, layer: int) -> int:
        """Where in a router's outputs its choice is."""
        return self._layers[layer].place

    def module(self, layer: int) -> torch.nn.Module:
        """The router itself."""
        return self._layers[layer].router

    def experts(self, layer: int) -> int:
        """How many experts it ranks."""
        return self._layers[layer].experts

    def like_residual(self, layer: int) -> torch.Tensor:
        """A row, [1, width], of the dtype and on the device of what comes to this layer."""
        return self._layers[layer].probe

    def close(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _route(self, layer: _Layer, residual: torch.Tensor) -> Routed:
        outputs, ranked = self._ask(layer, residual)
        index = outputs[layer.place].reshape(len(residual), -1)
        return Routed(index, _agreeing(ranked, index))

    def _ask(self, layer: _Layer, residual: torch.Tensor) -> tuple[list[Any], torch.Tensor | None]:
        _inside.set(True)  # this context only: recorders of transformers and hooks of ours are off in it
        with torch.no_grad(), _Choices(layer.experts) as choices:
            hidden = residual
            if layer.norm is not None:
                hidden = layer.norm(_with_rank(residual, layer.norm_rank))
            hidden = _with_rank(hidden, layer.rank)
            return _tensors(layer.router(hidden, *layer.rest, **layer.named)), choices.ranked

    def _watch(self, number: int) -> Callable[[Any, tuple[Any, ...]], None]:
        def watch(module: Any, args: tuple[Any, ...]) -> None:
            if args and not _inside.get():
                self._seen.residual = (number, args[0].detach().reshape(-1, args[0].shape[-1]))

        return watch

    # -- finding ------------------------------------------------------------------------------------------------------

    def _probe(self, model: Any, modules: Sequence[torch.nn.Module]) -> list[_Call]:
        """All calls of modules in one forward of a few tokens, in the order they ended; no expert runs."""
        calls: list[_Call] = []

        def note(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            calls.append(_Call(module, args, kwargs, output))

        def skip(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            return torch.zeros_like(hidden)

        base = model.base_model
        vocabulary = model.get_input_embeddings().weight.shape[0]
        ids = torch.arange(3, 3 + _PROBE_TOKENS, device=model.device)[None] % vocabulary
        handles = [m.register_forward_hook(note, with_kwargs=True, always_call=False) for m in base.modules()]
        for module in modules:
            module.__dict__["forward"] = skip
        try:
            with torch.no_grad():
                contextvars.Context().run(_as_probe, base, ids)
        finally:
            for module in modules:
                del module.__dict__["forward"]
            for handle in handles:
                handle.remove()
        return calls

    def _find(self, model: Any, calls: list[_Call], number: int, experts: torch.nn.Module) -> _Layer:
        ends = [place for place, call in enumerate(calls) if call.module is experts]
        if len(ends) != 1:
            raise self._refusal(number, f"its experts ran {len(ends)} times in a forward")
        arguments = [*calls[ends[0]].args, *calls[ends[0]].kwargs.values()]
        if len(arguments) < 3 or not isinstance(arguments[1], torch.Tensor):
            raise self._refusal(number, "its experts are called in a way of their own")
        index = arguments[1].reshape(_PROBE_TOKENS, -1)
        earlier = calls[: ends[0]]
        position = next((n for n in reversed(range(len(earlier))) if _place(earlier[n], index) is not None), None)
        if position is None:
            raise self._refusal(number, "no module of it chooses its experts")
        call = earlier[position]
        given = [*call.args, *call.kwargs.values()]
        if not call.args or any(_per_token(value) for value in given[1:]) or not _per_token(given[0]):
            raise self._refusal(number, "its router needs more than the hidden state")
        hidden = call.args[0]
        norm = _norm(earlier[:position], hidden)
        return _Layer(
            experts=int(getattr(experts, "num_experts", 0)) or _experts(model),
            router=call.module,
            place=_place(call, index) or 0,
            rank=hidden.dim(),
            rest=call.args[1:],
            named=call.kwargs,
            norm=None if norm is None else norm.module,
            norm_rank=0 if norm is None else norm.args[0].dim(),
            probe=(hidden if norm is None else norm.args[0]).reshape(_PROBE_TOKENS, -1),
            index=index,
        )

    def _check(self, number: int, layer: _Layer) -> None:
        """The control: on its own hidden state every router must choose what it chose in the forward."""
        try:
            routed = self.route(number, layer.probe)
        except Exception as error:  # whatever a module raises that is called without the model around it
            reason = f"its router cannot be called on its own ({type(error).__name__}: {error})"
            raise self._refusal(number, reason) from error
        if not torch.equal(routed.index.sort(dim=-1).values, layer.index.sort(dim=-1).values):
            raise self._refusal(number, "its router does not choose again what it chose in the model")
        layer.matrix = folded(layer.router, layer.norm, layer.probe, layer.index)
        layer.probe, layer.index = layer.probe[:1].clone(), torch.empty(0)

    def _refusal(self, number: int, reason: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{self._family}: next-gate cannot be bound: MoE layer {number}: {reason}")


def _as_probe(base: Any, ids: torch.Tensor) -> None:
    _inside.set(True)
    base(input_ids=ids, use_cache=False)


def _with_rank(tensor: torch.Tensor, rank: int) -> torch.Tensor:
    return tensor.reshape(*[1] * (rank - 2), -1, tensor.shape[-1])


def _tensors(output: Any) -> list[Any]:
    return list(output) if isinstance(output, tuple | list) else [output]


def _place(call: _Call, index: torch.Tensor) -> int | None:
    """Where in a call's output the index is."""
    for place, tensor in enumerate(_tensors(call.output)):
        whole = isinstance(tensor, torch.Tensor) and not tensor.is_floating_point()
        if whole and tensor.numel() == index.numel() and torch.equal(tensor.reshape(index.shape), index):
            return place
    return None


def _per_token(value: Any) -> bool:
    """Whether an argument differs from token to token."""
    if isinstance(value, torch.Tensor):
        return _PROBE_TOKENS in value.shape
    if isinstance(value, tuple | list):
        return any(_per_token(item) for item in value)
    return not isinstance(value, int | float | str | bool | torch.nn.Module | torch.dtype | type(None))


def _norm(calls: list[_Call], hidden: torch.Tensor) -> _Call | None:
    """The last call that made `hidden` out of something else of the same width."""
    for call in reversed(calls):
        output, given = call.output, call.args[0] if call.args else None
        if not (isinstance(output, torch.Tensor) and isinstance(given, torch.Tensor)):
            continue
        if output.numel() != hidden.numel() or given.shape != output.shape:
            continue
        made = torch.equal(output.reshape(-1).to(hidden.dtype), hidden.reshape(-1))
        if made and not torch.equal(given, output):
            return call if len(call.args) == 1 and not call.kwargs else None
    return None


def _agreeing(ranked: torch.Tensor | None, index: torch.Tensor) -> torch.Tensor | None:
    """The ranking, if its best are those chosen."""
    if ranked is None or ranked.numel() != len(index) * ranked.shape[-1]:
        return None
    ranked = ranked.detach().reshape(len(index), -1).float()
    chosen = torch.zeros_like(ranked, dtype=torch.bool).scatter_(1, index.long(), True)
    worst = ranked.masked_fill(~chosen, float("inf")).amin(dim=1)
    best = ranked.masked_fill(chosen, float("-inf")).amax(dim=1)
    return ranked if bool((worst >= best).all()) else None


def _experts(model: Any) -> int:
    config = model.config.get_text_config()
    names: Iterator[str] = (
        name for name in ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    )
    return next((int(getattr(config, name)) for name in names if getattr(config, name, None)), 0)
