"""Making a model's own routers choose again: the one place where the outcome of their last ranking can be replaced.

A router ranks all experts by `topk` and computes the weights of what it chose. Here the outcome of that `topk` is
exchanged, and the router goes on as it always does; so the weights of another choice follow the family's own rule:
unbiased scores, renormalised or not, scaled or not. That this is so is checked for every layer when the model is bound,
and a family where it is not is refused by name. Knows nothing of caches and of how a choice is made.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from moetier.errors import UnsupportedModelError
from moetier.predictors.routers import Routers, asking

__all__ = ["Intercepted", "Scale"]

_TRIAL_TOKENS = 33
_CANNOT = "cache_prior, max_rank and max_mass cannot be used, its routers cannot be made to choose again"
_SQUASHING = {"softmax", "sigmoid", "softplus", "tanh", "exp", "sqrt", "log_softmax"}


class Scale(Enum):
    """What a router's ranking is made of."""

    LOGITS = "logits"
    PROBABILITIES = "probabilities"  # a softmax of all experts, or the part of it that a token may use
    SCORES = "scores"  # anything else: sigmoids, with or without a bias


Choose = Callable[[int, torch.Tensor, torch.Tensor, Scale], torch.Tensor | None]
"""(layer, ranked [T, E], own choice [T, K], scale) → another choice [T, K], or None for its own."""


class _Rankings(TorchFunctionMode):
    """Counts the rankings of all experts, and notes how the last one came about."""

    def __init__(self, experts: int):
        super().__init__()
        self.experts, self.count, self.squashed = experts, 0, set[str]()
        self.ranked: torch.Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if _ranks(name, args, self.experts):
            self.count, self.ranked = self.count + 1, args[0]
        elif self.ranked is None and name in _SQUASHING and self.experts <= result.shape[-1] < 2 * self.experts:
            self.squashed.add(name)  # some routers have scores for shared experts beside the others
        return result


class _Exchange(TorchFunctionMode):
    """Exchanges the outcome of one ranking; the router around it does not notice."""

    def __init__(self, experts: int, number: int, choose: Callable[[torch.Tensor, torch.Tensor], torch.Tensor | None]):
        super().__init__()
        self.experts, self.left, self.choose = experts, number, choose

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not _ranks(getattr(func, "__name__", ""), args, self.experts):
            return result
        self.left -= 1
        if self.left:
            return result
        ranked, own = args[0], result[1]
        chosen = self.choose(ranked.reshape(-1, self.experts), own.reshape(-1, own.shape[-1]))
        if chosen is None:
            return result
        chosen = chosen.reshape(own.shape)
        return torch.return_types.topk((ranked.gather(-1, chosen), chosen))


def _ranks(name: str, args: Any, experts: int) -> bool:
    return name == "topk" and bool(args) and args[0].shape[-1] == experts


class Intercepted:
    """A loaded model whose routers ask `choose` in every forward, until `close`.

    Raises `UnsupportedModelError`, naming the family, if a router cannot be bound, does not rank its experts where it
    can be seen, or does not compute weights for what it is told to choose.
    """

    def __init__(self, model: Any, choose: Choose):
        self._choose = choose
        self._trial: Callable[[torch.Tensor, torch.Tensor], torch.Tensor | None] | None = None
        self._open = True
        self._wrapped: list[tuple[torch.nn.Module, Any, Any]] = []
        self._family = f"{type(model).__name__} ({model.config.model_type})"
        try:
            routers = Routers(model)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(str(error).replace("next-gate cannot be bound", _CANNOT)) from None
        try:
            for layer in range(len(routers)):
                self._bind(layer, routers)
        except BaseException:
            self.close()
            raise
        finally:
            routers.close()

    def close(self) -> None:
        """Give the routers back."""
        self._open = False
        for module, ours, before in self._wrapped:
            if module.__dict__.get("forward") is not ours:
                continue  # wrapped by somebody else since; ours lets everything through from now on
            if before is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = before
        self._wrapped.clear()

    def _bind(self, layer: int, routers: Routers) -> None:
        module, experts = routers.module(layer), routers.experts(layer)
        generator = torch.Generator().manual_seed(layer)
        like = routers.like_residual(layer)
        trial = torch.randn(_TRIAL_TOKENS, like.shape[1], generator=generator).to(like)
        with _Rankings(experts) as seen:
            plain = routers.outputs(layer, trial)
        if seen.ranked is None:
            raise self._refusal(layer, "its router ranks experts in a way that cannot be seen")
        scale = _scale(seen.ranked, seen.squashed)
        number, inner, before = seen.count, module.forward, module.__dict__.get("forward")

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not self._open or (asking() and self._trial is None):
                return inner(*args, **kwargs)
            choose = self._trial or (lambda ranked, own: self._choose(layer, ranked, own, scale))
            with _Exchange(experts, number, choose):
                return inner(*args, **kwargs)

        module.__dict__["forward"] = forward
        self._wrapped.append((module, forward, before))
        try:
            self._check(layer, routers, trial, plain)
        finally:
            self._trial = None

    def _check(self, layer: int, routers: Routers, trial: torch.Tensor, plain: list[Any]) -> None:
        """The rule of the family, on choices that are known: its own, and two neighbours of it."""
        place = routers.place(layer)
        own = plain[place].reshape(_TRIAL_TOKENS, -1)
        ranking: list[torch.Tensor] = []

        def told(chosen: torch.Tensor) -> list[Any]:
            def choose(ranked: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
                ranking.append(ranked)
                return chosen

            self._trial = choose
            return routers.outputs(layer, trial)

        again = told(own.clone())
        same = [torch.equal(a, b) for a, b in zip(plain, again, strict=True) if isinstance(a, torch.Tensor)]
        if not ranking or not all(same):
            raise self._refusal(layer, "its router does not give its own weights again for its own choice")
        weights_at = next((n for n, value in enumerate(plain) if n != place and _are_weights(value, own)), None)
        if weights_at is None:
            raise self._refusal(layer, "its router gives no weights beside its choice")
        best, rows = _ranked_first(ranking[0], own)
        top_k = own.shape[1]
        if not rows.any():
            return  # no token may use another expert than those it chose
        swapped = torch.cat((best[:, : top_k - 1], best[:, top_k : top_k + 1]), dim=1)
        shifted = best[:, 1 : top_k + 1]
        given = []
        for chosen in (best[:, :top_k], swapped, shifted):
            outputs = told(chosen)
            if not torch.equal(outputs[place].reshape(own.shape), chosen):
                raise self._refusal(layer, "its router does not choose what it is told to")
            given.append(outputs[weights_at].reshape(own.shape)[rows].double().cpu())
        tolerance = 1e-3 if plain[weights_at].dtype == torch.float32 else 6e-2
        if not _consistent(given[0], given[1], given[2], tolerance):
            raise self._refusal(layer, "the weights that its router gives do not follow what it chooses")

    def _refusal(self, layer: int, reason: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{self._family}: {_CANNOT}: MoE layer {layer}: {reason}")


def _scale(ranked: torch.Tensor, squashed: set[str]) -> Scale:
    if not squashed:
        return Scale.LOGITS
    ranked = ranked.float()
    shares = bool((ranked >= 0).all()) and bool((ranked.sum(dim=-1) <= 1.01).all())
    return Scale.PROBABILITIES if squashed == {"softmax"} and shares else Scale.SCORES


def _are_weights(value: Any, own: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel() == own.numel()


def _ranked_first(ranked: torch.Tensor, own: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The K + 1 experts ranked highest, [T, K + 1], and for which tokens the last of them may be chosen at all, [T]."""
    top_k = own.shape[1]
    if ranked.shape[1] == top_k:
        return own, torch.zeros(len(own), dtype=torch.bool, device=own.device)
    scores, best = ranked.float().topk(top_k + 1, dim=1)
    return best, (torch.isfinite(scores) & (scores != 0)).all(dim=1)


def _consistent(own: torch.Tensor, swapped: torch.Tensor, shifted: torch.Tensor, tolerance: float) -> bool:
    """Whether the weights [T, K] of three choices come from one score per expert and a scale per token and choice.

    The choices are the experts ranked (0 … K-1), (0 … K-2, K) and (1 … K).
    """
    if own.shape[1] == 1:
        return True

    def close(a: torch.Tensor, b: torch.Tensor) -> bool:
        return bool(((a - b).abs() <= tolerance * torch.maximum(a.abs(), b.abs()) + 1e-9).all())

    kept = close(own[:, :-1] * swapped[:, :1], swapped[:, :-1] * own[:, :1])
    kept = kept and close(own[:, 1:] * shifted[:, :1], shifted[:, :-1] * own[:, 1:2])
    return kept and close(own[:, 0] * shifted[:, 0] * swapped[:, -1], own[:, 1] * shifted[:, -1] * swapped[:, 0])
