"""Which predictor a loaded model gets, and its binding to the model's routers.

`auto` is next-gate where the model's routers can be asked on their own, else `mix`. Knows nothing of budgets or of
whether prefetching pays: that is `prefetch_engine` and `prefetch_control`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from moetier.errors import ConfigError, UnsupportedModelError
from moetier.predictors import Predictor, make_predictor
from moetier.predictors.next_gate import NextGate
from moetier.prefetch_engine import Prefetching

__all__ = ["AUTO", "OFF", "attach_prefetching", "check_prefetch"]

AUTO, OFF = "auto", "off"
FALLBACK = "mix"

_log = logging.getLogger("moetier")


def check_prefetch(name: str) -> None:
    """Raise `ConfigError` for what cannot be a predictor of a run."""
    if not isinstance(name, str) or not name:
        raise ConfigError(f"prefetch: give auto, off, or the name of a predictor, not {name!r}")
    if name in (AUTO, OFF):
        return
    try:
        needs = getattr(make_predictor(name, 2, 4, 1), "needs", "")
    except ConfigError as error:
        raise ConfigError(f"prefetch: {error}; or choose auto or off") from None
    if needs == "tokens":
        raise ConfigError(f"prefetch: {name} has to be told the tokens, which a run does not do; choose another one")


def attach_prefetching(model: Any, cache: Any, name: str, top_k: int) -> None:
    """Give the cache of a loaded model its prefetching; none where it is off or every expert has a slot.

    Raises `UnsupportedModelError` if next-gate is asked for by name and cannot be bound.
    """
    layers, experts = cache.store.layers, cache.store.experts
    if name == OFF or cache.core.configs[0].slots >= cache.store.records:
        return
    first = None
    if name == AUTO:
        try:
            first = _bound(model, make_predictor("next-gate", layers, experts, top_k))
            name = "next-gate"
        except UnsupportedModelError as error:
            _log.info("prefetch: %s instead of next-gate: %s", FALLBACK, error)
            name = FALLBACK
    if first is None:
        first = _bound(model, make_predictor(name, layers, experts, top_k))
    cache.prefetching = Prefetching(
        cache.core,
        _factory(first, lambda: make_predictor(name, layers, experts, top_k)),
        name,
        lambda layer: cache.store.layout(layer).nbytes,
    )


def _bound(model: Any, predictor: Predictor) -> Predictor:
    bind = getattr(predictor, "bind", None)
    if bind is not None:
        training = model.training
        model.eval()  # what a router does in training is not what it does in a run
        try:
            with torch.no_grad():
                bind(model)
        finally:
            model.train(training)
    return predictor


def _factory(first: Predictor, more: Callable[[], Predictor]) -> Callable[[], Predictor]:
    """The bound predictor for the first thread; others share its routers."""
    unused = [first]

    def make() -> Predictor:
        if unused:
            return unused.pop()
        return first.twin() if isinstance(first, NextGate) else more()

    return make
