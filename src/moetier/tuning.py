"""Fit the weights of the `horizon` policy to a model's own routing, or to several.

    weights = fit_hazard(accesses, layers, experts)
    weights.save("weights.json")          # then: policy horizon(weights=weights.json)

The shipped weights came from `fit(collect(...) for ...)` over six traces: each of two models one stream at a time, and
with 4, 8 and 16 (8) concurrent streams. Nothing but numpy is needed, and a minute per million expert accesses.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moetier.access import Access
from moetier.errors import ConfigError
from moetier.policies.hazard import FEATURES, LATER, HazardWeights, History

__all__ = ["Examples", "HazardWeights", "collect", "fit", "fit_hazard", "log_loss"]

WARM_UP = 50  # visits of a layer before the first example: averages have to settle
RIDGE = 1e-6  # keeps the weights of features that say the same apart from infinity
STEPS = 40  # of Newton's method at most; it takes about ten
NEVER = LATER + 2  # distance of what is not used within the visits looked at
Reals = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Examples:
    """Experts at visits of their layer, and when they were used next."""

    features: NDArray[np.float32]  # [examples, FEATURES]
    distance: NDArray[np.int64]  # visits until the next use: 1 to LATER + 1, or NEVER


class _Open:
    """The experts of a layer after one visit, until enough later visits are known."""

    def __init__(self, features: NDArray[np.float32]):
        self.features = features
        self.distance = np.full(features.shape[1], NEVER, np.int64)
        self.visits = 0

    def see(self, chosen: NDArray[np.int64]) -> bool:
        """The next visit; whether it was the last of interest."""
        self.visits += 1
        self.distance[chosen] = np.minimum(self.distance[chosen], self.visits)
        return self.visits == LATER + 1


def collect(accesses: Iterable[Access], layers: int, experts: int, share: float = 0.1, seed: int = 0) -> Examples:
    """Replay routing and take examples at a random `share` of the visits."""
    random = np.random.default_rng(seed)
    history = History(layers, experts)
    visits = [0] * layers
    pending: list[list[_Open]] = [[] for _ in range(layers)]
    closed: list[_Open] = []
    for access in accesses:
        if not access.keys:
            continue
        layer = access.layer
        if not 0 <= layer < layers or access.keys[-1].expert >= experts:
            raise ConfigError(f"an access of layer {layer} does not fit {layers} layers x {experts} experts")
        chosen = np.array([key.expert for key in access.keys])
        closed += [example for example in pending[layer] if example.see(chosen)]
        pending[layer] = [example for example in pending[layer] if example.visits <= LATER]
        history.observe(layer, chosen.tolist())
        visits[layer] += 1
        if visits[layer] > WARM_UP and random.random() < share:
            pending[layer].append(_Open(history.features(layer)))
    if not closed:
        return Examples(np.empty((0, len(FEATURES)), np.float32), np.empty(0, np.int64))
    features = np.concatenate([example.features.T for example in closed])
    return Examples(features, np.concatenate([example.distance for example in closed]))


def fit(parts: Iterable[Examples]) -> HazardWeights:
    """Maximum likelihood over examples from one or several traces. Raises `ConfigError` if there are too few."""
    pool = list(parts)
    features = np.concatenate([part.features for part in pool]).astype(np.float64)
    distance = np.concatenate([part.distance for part in pool])
    if len(distance) < 100 * len(FEATURES) or not 0 < (distance == 1).mean() < 1:
        few = f"{len(distance)} examples; record a longer trace, of {WARM_UP + 50} tokens at least"
        raise ConfigError(f"too little routing to fit: {few}")
    return HazardWeights(*(tuple(_logistic(*trials)) for trials in _both_models(features, distance)))


def fit_hazard(
    accesses: Sequence[Access], layers: int, experts: int, share: float = 0.1, seed: int = 0
) -> HazardWeights:
    """Fit to one trace: accesses in the order in which they were served."""
    return fit([collect(accesses, layers, experts, share, seed)])


def log_loss(weights: HazardWeights, examples: Examples) -> tuple[float, float]:
    """Mean negative log-likelihood of the two models, in nats per expert and visit; smaller is better."""
    losses = []
    models = _both_models(examples.features.astype(np.float64), examples.distance)
    for row, (features, uses, trials) in zip((weights.next, weights.later), models, strict=True):
        score = features @ np.array(row)
        loss = uses * np.logaddexp(0.0, -score) + (trials - uses) * np.logaddexp(0.0, score)
        losses.append(float(loss.sum() / trials.sum()))
    return losses[0], losses[1]


def _both_models(features: Reals, distance: NDArray[np.int64]) -> list[tuple[Reals, Reals, Reals]]:
    """Features, uses and trials of each model: every visit is a trial until the first use ends it."""
    late = distance > 1
    trials = np.minimum(distance[late] - 1, LATER).astype(np.float64)
    return [
        (features, (distance == 1).astype(np.float64), np.ones(len(distance))),
        (features[late], (distance[late] < NEVER).astype(np.float64), trials),
    ]


def _logistic(features: Reals, uses: Reals, trials: Reals) -> list[float]:
    """Newton's method for the logistic regression of `uses` among `trials`."""
    weights = np.zeros(features.shape[1])
    ridge = RIDGE * trials.sum()
    for _ in range(STEPS):
        chance = 1.0 / (1.0 + np.exp(-np.clip(features @ weights, -30.0, 30.0)))
        slope = features.T @ (trials * chance - uses) + ridge * weights
        bend = (features * (trials * chance * (1.0 - chance))[:, None]).T @ features + ridge * np.eye(len(weights))
        step = np.linalg.solve(bend, slope)
        weights -= step
        if np.abs(step).max() < 1e-8:
            break
    return [round(float(weight), 4) for weight in weights]
