"""Choosing experts with an eye on the cache: the lossy levers as rules on arrays, and at work in a loaded model.

The rules know scores, choices and a mask of residents; they know nothing of models. `Lever` asks them while a model
decodes. Weights are never computed here: the router itself makes them for what it is told to choose
(`interception.py`), by whatever rule its family has.

Shapes: T tokens, E experts, K experts per token. The rules work on the host: the arrays are small, and a dozen numpy
operations take less time than as many kernels. On a GPU that costs one small read a layer where a router chooses again,
and one where misses may be dropped.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moetier.access import ExpertKey, Phase
from moetier.interception import Intercepted, Scale
from moetier.levers import Levers

__all__ = [
    "Lever",
    "choose_again",
    "cold_misses",
    "logits_of",
    "on_host",
    "order_of",
    "prefer_residents",
    "prefer_within_rank",
    "score_range",
    "settle",
    "shares_of",
]

Scores = NDArray[np.float32]
Choice = NDArray[np.int64]
Mask = NDArray[np.bool_]


def logits_of(ranked: Scores, own: Choice, scale: Scale) -> Scores:
    """What the router ranked by, [T, E], as scores that a bonus can be added to; -inf where it may not choose.

    Probabilities of a softmax become their logarithms: the logits but for a constant per token, as in the paper. Other
    rankings (sigmoids, scores with a bias) are taken as they are. Families with groups of experts mask the groups that
    a token may not use with -inf or with an exact zero.
    """
    allowed = np.isfinite(ranked) & (ranked != 0)
    if allowed.all():
        return np.log(ranked) if scale is Scale.PROBABILITIES else ranked
    ranked = np.where(allowed, ranked, 1)
    z = np.log(ranked) if scale is Scale.PROBABILITIES else ranked
    lowest = np.where(allowed, z, np.inf).min(axis=1, keepdims=True)  # for what was chosen though it is masked
    lowest = np.where(np.isfinite(lowest), lowest, 0)
    return np.where(allowed, z, np.where(_among(own, z.shape[1]), lowest, -np.inf)).astype(np.float32)


def score_range(z: Scores) -> NDArray[np.float32]:
    """Per token, the greatest less the least score of those it may choose: [T]."""
    ranges: NDArray[np.float32] = z.max(axis=1) - np.where(np.isneginf(z), np.inf, z).min(axis=1)
    return ranges


def shares_of(z: Scores, scale: Scale) -> NDArray[np.float64]:
    """The scores as shares of one per token, [T, E]: the softmax, or where they are no logits what is positive."""
    mass = np.maximum(z, 0) if scale is Scale.SCORES else np.exp(z - z.max(axis=1, keepdims=True))
    shares: NDArray[np.float64] = mass.astype(np.float64)
    shares /= np.maximum(mass.sum(axis=1, keepdims=True, dtype=np.float64), 1e-30)
    return shares


def order_of(z: Scores, own: Choice) -> Choice:
    """The experts of every token from best to worst, [T, E]; its own choices come first, also where scores tie."""
    return np.lexsort((-z, ~_among(own, z.shape[1])), axis=-1)


def prefer_residents(z: Scores, own: Choice, resident: Mask, bonus: float, keep: int) -> Choice:
    """Cache-Prior (arXiv 2412.00099): the top K by z + bonus · resident, the `keep` best by z always among them.

    `z` [T, E], `own` [T, K] the router's choice, `resident` [E]. `bonus` is λ times the running mean range of z.
    Returns the choice, [T, K], in no particular order. Where scores tie, the router's order holds.
    """
    order = order_of(z, own)
    biased = np.take_along_axis(z + np.float32(bonus) * resident, order, axis=1)
    biased[:, :keep] = np.inf
    return np.take_along_axis(order, np.argsort(-biased, axis=1, kind="stable")[:, : own.shape[1]], axis=1)


def prefer_within_rank(
    z: Scores,
    own: Choice,
    resident: Mask,
    keep: int,
    max_rank: int,
    max_mass: float | None = None,
    scale: Scale = Scale.LOGITS,
) -> Choice:
    """The max-rank form: the `keep` best, then residents of the `max_rank` best, then the router's own order; [T, K].

    With `max_mass`, only residents before which less than this share of the probability is ranked.
    """
    order = order_of(z, own)
    ranked = np.take_along_axis(z, order, axis=1)
    rank = np.arange(z.shape[1])
    preferred = resident[order] & (rank < max_rank) & ~np.isneginf(ranked)
    if max_mass is not None:
        mass = shares_of(ranked, scale)
        preferred &= np.cumsum(mass, axis=1) - mass < max_mass
    preferred[:, :keep] = True
    return np.take_along_axis(order, np.argsort(~preferred, axis=1, kind="stable")[:, : own.shape[1]], axis=1)


def choose_again(
    levers: Levers, z: Scores, own: Choice, resident: Mask, keep: int, bonus: float, scale: Scale
) -> tuple[Choice, NDArray[np.int64]]:
    """What the levers make of a router's choice, [T, K], and how many experts of it are new, [T].

    `keep` and `bonus` are what `keep_top` and `cache_prior` come to in this layer.
    """
    if levers.cache_prior:
        return settle(z, own, prefer_residents(z, own, resident, bonus, keep))
    rank = levers.max_rank or z.shape[1]
    return settle(z, own, prefer_within_rank(z, own, resident, keep, rank, levers.max_mass, scale))


def settle(z: Scores, own: Choice, chosen: Choice) -> tuple[Choice, NDArray[np.int64]]:
    """The new choice as a router gives one, [T, K], and how many experts of it are new, [T].

    Tokens whose set did not change keep their own row, order included; the others are ordered from best to worst.
    """
    new = (~np.take_along_axis(_among(own, z.shape[1]), chosen, axis=1)).sum(axis=1)
    if not new.any():
        return own, new
    best_first = np.argsort(-np.take_along_axis(z, chosen, axis=1), axis=1, kind="stable")
    return np.where((new > 0)[:, None], np.take_along_axis(chosen, best_first, axis=1), own), new


def cold_misses(index: Choice, weights: Scores, resident: Mask, share: float) -> Mask:
    """Which (token, expert) pairs of an access need not be served: [T, K].

    Those of an expert that is not `resident` [E], is no token's best, and has less than `share` / K of the gate weights
    of every token that chose it.
    """
    shares = np.abs(weights)
    shares = shares / np.maximum(shares.sum(axis=1, keepdims=True), 1e-30)
    greatest = np.zeros(len(resident), dtype=shares.dtype)
    np.maximum.at(greatest, index, shares)
    needed = resident | (greatest >= share / index.shape[1])
    needed[np.take_along_axis(index, shares.argmax(axis=1)[:, None], axis=1)] = True
    dropped: Mask = ~needed[index]
    return dropped


def without(index: Choice, weights: Scores, dropped: Mask) -> tuple[Choice, NDArray[np.int64], Mask]:
    """The experts that are left, [T, K'], the columns of their weights, and which of these weights are to be zero.

    K' is what the token that keeps most keeps. In the places that the others have left over, the token's best expert
    stands once more, which is needed anyway, with the weight zero.
    """
    columns = np.argsort(dropped, axis=1, kind="stable")[:, : int((~dropped).sum(axis=1).max())]
    empty = np.take_along_axis(dropped, columns, axis=1)
    best = np.take_along_axis(index, np.abs(weights).argmax(axis=1)[:, None], axis=1)
    return np.where(empty, best, np.take_along_axis(index, columns, axis=1)), columns, empty


def _among(own: Choice, experts: int) -> Mask:
    """The choice as a mask, [T, E]."""
    mask = np.zeros((len(own), experts), dtype=np.bool_)
    np.put_along_axis(mask, own, True, axis=1)
    return mask


class Lever:
    """The levers at work in one loaded model. Raises `UnsupportedModelError`, naming the family, if it cannot choose
    again there; `ConfigError` if a setting does not fit the model's shape.

    Only decoding steps are changed: a prefill needs nearly all experts whatever it chooses, so that there is little to
    save, and what it computes is the memory of all tokens after it.
    """

    def __init__(self, model: Any, levers: Levers):
        tiered = model.moetier
        levers.check()
        self.levers = levers
        self._tiered = tiered
        counts = [len(layer.recipes) for layer in tiered.layers]
        keep = {count: levers.fit(count, tiered.plan.workload.top_k) for count in counts}
        self._keep = [keep[count] for count in counts]
        self._keys = [[ExpertKey(layer, expert) for expert in range(count)] for layer, count in enumerate(counts)]
        self._ranges = [0.0] * len(counts)  # running means
        self._seen = [0] * len(counts)
        self._counts = {"choices": 0, "changed": 0, "dropped": 0}
        self._intercepted = Intercepted(model, self._choose) if levers.rechooses else None

    def close(self) -> None:
        """Leave the model as it was."""
        if self._intercepted is not None:
            self._intercepted.close()

    def report(self) -> dict[str, Any]:
        """The settings, and of the decoding steps so far: (token, expert) pairs chosen, changed and dropped."""
        return {**self.levers.to_dict(), **self._counts}

    def drop(self, layer: int, index: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The choice [T, K] and its weights [T, K], less the misses that weigh too little to be loaded: [T, K']."""
        if self._tiered.phase is not Phase.DECODE:
            return index, weights
        self._counts["choices"] += index.numel()
        if not self.levers.drop_misses:
            return index, weights
        chosen, gates = on_host(index, weights)
        resident = np.array(self._tiered.cache.holding(self._keys[layer]))
        dropped = cold_misses(chosen, gates, resident, self.levers.drop_misses)
        if not dropped.any():
            return index, weights
        self._counts["dropped"] += int(dropped.sum())
        kept, columns, empty = without(chosen, gates, dropped)
        given = weights.gather(1, torch.from_numpy(columns).to(weights.device))
        given = given.masked_fill(torch.from_numpy(empty).to(weights.device), 0)
        return torch.from_numpy(kept).to(index), given

    def _choose(self, layer: int, ranked: torch.Tensor, own: torch.Tensor, scale: Scale) -> torch.Tensor | None:
        """What the router is to choose in place of `own` [T, K], having ranked all experts [T, E]; None: its own."""
        if self._tiered.phase is not Phase.DECODE:
            return None
        levers = self.levers
        chosen, scores = on_host(own, ranked)
        z = logits_of(scores, chosen, scale)
        bonus = levers.cache_prior * self._mean_range(layer, z) if levers.cache_prior else 0.0
        resident = np.array(self._tiered.cache.holding(self._keys[layer]))
        if resident[chosen].all():  # no rule would change that
            return None
        choice, new = choose_again(levers, z, chosen, resident, self._keep[layer], bonus, scale)
        if not new.any():
            return None
        self._counts["changed"] += int(new.sum())
        return torch.from_numpy(choice).to(own)

    def _mean_range(self, layer: int, z: Scores) -> float:
        """The running mean over all tokens so far, these included, of the range of their scores."""
        self._seen[layer] += len(z)
        total = float(score_range(z).sum(dtype=np.float64))
        self._ranges[layer] += (total - len(z) * self._ranges[layer]) / self._seen[layer]
        return self._ranges[layer]


def on_host(index: torch.Tensor, values: torch.Tensor) -> tuple[Choice, Scores]:
    """Expert ids [T, K] and numbers [T, N] as arrays."""
    if index.device.type == "cpu":
        return index.long().numpy(), values.detach().float().numpy()
    both = torch.cat((index.double(), values.detach().double()), dim=1).cpu().numpy()  # one copy; exact in float64
    top_k = index.shape[1]
    return both[:, :top_k].astype(np.int64), both[:, top_k:].astype(np.float32)
