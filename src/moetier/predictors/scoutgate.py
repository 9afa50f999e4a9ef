"""A small learned predictor that sees the last tokens, before the model has done anything with them.

Inference is numpy and needs no model; training is in `scoutgate_training`.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetier.access import Access
from moetier.errors import ConfigError
from moetier.predictors.scored import ScoredPredictor, Scores

__all__ = ["ScoutGate", "ScoutGateWeights", "context_windows", "load", "save"]

FORMAT, VERSION = "moetier scoutgate", 1
_TENSORS = {"tokens": 2, "context": 3, "layer": 2, "expert": 3, "bias": 2}  # name -> dimensions

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class ScoutGateWeights:
    """A trained predictor: V tokens, width P, window M, L layers, E experts, tower width D.

    `tokens` [V, P] are the normalised projections LN(e W_proj) of all token embeddings, so that the embeddings are not
    needed any more; `context` [M, P, D] and `layer` [L, D] make the context tower W_h h, `expert` [L, E, D] is the
    expert tower W_e v, `bias` [L, E].
    """

    tokens: NDArray[np.float16]
    context: Floats
    layer: Floats
    expert: Floats
    bias: Floats
    info: dict[str, Any]

    @property
    def window(self) -> int:
        """Tokens of context."""
        return len(self.context)

    def probabilities(self, windows: NDArray[np.int64], layer: int) -> Scores:
        """[T, E]: for T windows of token ids [T, M], newest last, -1 where there is no token."""
        known = (windows >= 0)[..., None]
        projected = np.where(known, self.tokens[np.maximum(windows, 0)].astype(np.float32), np.float32(0))
        tower = np.tensordot(projected, self.context, axes=([1, 2], [0, 1])) + self.layer[layer]  # [T, D]
        logits = tower @ self.expert[layer].T + self.bias[layer]
        return np.asarray(1 / (1 + np.exp(-np.clip(logits, -30, 30))), dtype=np.float64)


class ScoutGate(ScoredPredictor):
    """Two towers: s = (W_h h) . (W_e v) + b, sigmoid; h from the projections of the last 8 tokens and the layer.

    After ScoutGate of the two-level-moe-cache project. The same estimate for every distance,
    since only tokens are seen: it can look a whole token pass ahead. `file` is what `moetier predict train` wrote. It
    must be told the tokens of each step: `begin_step`, or `bind` a model.
    """

    needs = "tokens"

    def __init__(self, layers: int, experts: int, top_k: int, file: str = ""):
        if not file:
            raise ConfigError(
                "scoutgate needs its weights: scoutgate(file=...); make them with `moetier predict train`"
            )
        super().__init__(layers, experts, top_k)
        self._weights = load(file)
        if self._weights.bias.shape != (layers, experts):
            have = " x ".join(map(str, self._weights.bias.shape))
            raise ConfigError(f"{file}: was trained for {have} experts, this is {layers} x {experts}")
        self._windows: NDArray[np.int64] | None = None  # [rows, window]: of each row's last token
        self._all = np.empty((0, self._weights.window), dtype=np.int64)  # of every token of the step
        self._cache: dict[int, Scores] = {}
        self._handle: Any = None

    def begin_step(self, ids: NDArray[np.integer[Any]], fresh: bool | None = None) -> None:
        """The token ids [rows, tokens] of the step that comes. One token per row continues the rows' texts, more begin
        new ones, unless `fresh` says which. Raises `ConfigError` for an id that was unknown in training."""
        ids = np.atleast_2d(ids).astype(np.int64)
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < len(self._weights.tokens):
            raise ConfigError(f"scoutgate knows {len(self._weights.tokens)} tokens, got number {int(ids.max())}")
        window, before = self._weights.window, self._windows
        begins = ids.shape[1] > 1 if fresh is None else fresh
        tail = np.full((len(ids), window), -1, dtype=np.int64)
        if not begins and before is not None and len(before) == len(ids):
            tail = before
        rows = np.concatenate((tail, ids), axis=1)
        self._windows = rows[:, -window:]
        self._all = np.concatenate([context_windows(row, window)[window:] for row in rows])
        self._cache.clear()

    def bind(self, model: Any) -> None:
        """Be told the tokens by a loaded model, before each of its forwards."""

        from moetier.access import Phase
        from moetier.tiered import begins_text

        def watch(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            ids = kwargs.get("input_ids", args[0] if args else None)
            if ids is not None:
                phase = Phase.PREFILL if ids.shape[-1] > 1 else Phase.DECODE
                past = kwargs.get("past_key_values")
                self.begin_step(ids.detach().cpu().numpy(), past is None or begins_text(past, phase))

        self.close()
        self._handle = model.register_forward_pre_hook(watch, with_kwargs=True)

    def close(self) -> None:
        """Let the model go."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def learn(self, access: Access, used: Scores) -> None:
        """Nothing is learned online but what the estimates are worth."""

    def scores(self, access: Access, target: int, distance: int) -> Scores:
        """The trained estimate, any of the step's tokens."""
        if self._windows is None:
            raise ConfigError("scoutgate was not told any tokens: it needs their ids (begin_step), or a model (bind)")
        if target not in self._cache:
            one = self._weights.probabilities(self._all, target)
            self._cache[target] = np.asarray(1 - np.prod(1 - one, axis=0))
        return self._cache[target]


def context_windows(ids: NDArray[np.int64], window: int) -> NDArray[np.int64]:
    """[T, window]: for each of T tokens itself and those before it, newest last, -1 before the first."""
    padded = np.concatenate((np.full(window - 1, -1, dtype=np.int64), ids))
    return np.lib.stride_tricks.sliding_window_view(padded, window)


def save(weights: ScoutGateWeights, path: str | os.PathLike[str]) -> None:
    """Write safetensors with a JSON header, whole or not at all."""
    from safetensors.numpy import save as to_bytes

    from moetier.files import whole_file

    tensors = {name: np.ascontiguousarray(getattr(weights, name)) for name in _TENSORS}
    head = {"format": FORMAT, "version": VERSION, "info": weights.info}
    with whole_file(path) as draft:
        draft.write_bytes(to_bytes(tensors, metadata={"moetier": json.dumps(head)}))


def load(path: str | os.PathLike[str]) -> ScoutGateWeights:
    """Read what `save` wrote. Raises `ConfigError`, naming the file, for one that is missing, damaged or another."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise ConfigError(f"{path}: there is no such file; make it with `moetier predict train scoutgate`")
    try:
        with safe_open(path, framework="np") as file:
            head = json.loads((file.metadata() or {}).get("moetier", "null"))
            if not isinstance(head, dict) or head.get("format") != FORMAT or head.get("version") != VERSION:
                raise ConfigError(f"{path}: not a scoutgate of this version of moetier")
            tensors = {name: file.get_tensor(name) for name in _TENSORS}
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: not a scoutgate file, or damaged: {' '.join(str(error).split())[:200]}") from error
    weights = ScoutGateWeights(**tensors, info=dict(head.get("info") or {}))
    _check(path, weights)
    return weights


def _check(path: str | os.PathLike[str], weights: ScoutGateWeights) -> None:
    right = all(getattr(weights, name).ndim == dimensions for name, dimensions in _TENSORS.items())
    if right:
        (_, width), (_, inner, depth) = weights.tokens.shape, weights.context.shape
        layers, experts = weights.bias.shape
        right = inner == width and weights.layer.shape == (layers, depth)
        right = right and weights.expert.shape == (layers, experts, depth)
    if not right or not all(np.isfinite(getattr(weights, name)).all() for name in _TENSORS):
        raise ConfigError(f"{path}: a damaged scoutgate: its tensors do not belong together")
