"""Predictors beside a running model: those that need its routers or its tokens, and any other."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch

from moetier.access import Access, ExpertKey, Phase
from moetier.errors import ConfigError, UnsupportedModelError
from moetier.predictors import make_predictor
from moetier.predictors.evaluate import Evaluation, measured_from

__all__ = ["evaluate_model"]


def evaluate_model(
    model: Any,
    texts: Sequence[tuple[str, Sequence[int]]],
    names: Sequence[str],
    distances: Sequence[int] = (1, 2, 3),
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Run a tiered model over texts (name, token ids), one token at a time, and the predictors beside it.

    The first half of the texts is observed, the other half is observed and measured (a single one is cut in the
    middle). Raises `UnsupportedModelError` for a family that next-gate cannot be bound to.
    """
    if not texts:
        raise ConfigError("--text: at least one text is needed")
    if any(len(ids) < 2 for _, ids in texts):
        raise ConfigError("--text: every text needs at least 2 tokens")
    tiered = model.moetier
    if tiered.watch is not None:
        raise ConfigError("the routing of this model is being watched already")
    layers, experts = len(tiered.layers), max(len(layer.recipes) for layer in tiered.layers)
    predictors = {name: make_predictor(name, layers, experts, tiered.plan.workload.top_k) for name in names}
    with ExitStack() as stack:
        for predictor in predictors.values():
            if hasattr(predictor, "bind"):
                predictor.bind(model)
                stack.callback(predictor.close)  # type: ignore[attr-defined]
        evaluation = Evaluation(predictors, layers, distances)
        watcher = _Watcher(evaluation)
        stack.callback(setattr, tiered, "watch", None)
        tiered.watch = watcher
        first = measured_from(len(texts))
        for number, (_, ids) in enumerate(texts):
            begin = len(ids) // 2 if len(texts) == 1 else 0
            watcher.sequence = number
            _run(model, ids, watcher, begin if number >= first else len(ids), progress)
    return evaluation


class _Watcher:
    """Makes an access of what a router chose, and gives it to the evaluation."""

    def __init__(self, evaluation: Evaluation):
        self.evaluation = evaluation
        self.sequence, self.measured, self._time = 0, False, 0

    def __call__(self, layer: int, index: torch.Tensor, weights: torch.Tensor, phase: Phase) -> None:
        self._time += 1
        experts = np.unique(index.cpu().numpy()).tolist()
        keys = tuple(ExpertKey(layer, expert) for expert in experts)
        access = Access(self._time, layer, keys, (1,) * len(keys), Phase.DECODE, self.sequence)
        self.evaluation.access(access, self.measured)


def _run(
    model: Any,
    ids: Sequence[int],
    watcher: _Watcher,
    measured_from: int,
    progress: Callable[[int], None] | None,
) -> None:
    """One text, token by token with the decoding cache."""
    past, extra = None, {}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        extra["logits_to_keep"] = 1
    with torch.no_grad():
        for position, number in enumerate(ids):
            watcher.measured = position >= measured_from
            tokens = torch.tensor([[number]], device=model.device)
            outputs = model(input_ids=tokens, past_key_values=past, use_cache=True, **extra)
            past = outputs.past_key_values
            if past is None:
                raise UnsupportedModelError(
                    f"{type(model).__name__} keeps no decoding cache; it cannot be run by token"
                )
            if progress is not None:
                progress(1)
