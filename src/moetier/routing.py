"""Choosing experts with an eye on the cache: the lossy levers as rules on tensors, and at work in a loaded model.

The rules know scores, choices and a mask of residents; they know nothing of models. `Lever` asks them while a model
decodes. Weights are never computed here: the router itself makes them for what it is told to choose
(`interception.py`), by whatever rule its family has.

Shapes: T tokens, E experts, K experts per token. Nothing here waits for a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from moetier.access import ExpertKey, Phase
from moetier.interception import Intercepted, Scale
from moetier.levers import Levers

__all__ = ["Lever", "cold_misses", "prefer_residents", "prefer_within_rank", "settle"]


def logits_of(ranked: torch.Tensor, own: torch.Tensor, scale: Scale) -> torch.Tensor:
    """What the router ranked by, [T, E], as scores that a bonus can be added to; -inf where it may not choose.

    Probabilities of a softmax become their logarithms: the logits but for a constant per token, as in the paper. Other
    rankings (sigmoids, scores with a bias) are taken as they are. Families with groups of experts mask the groups that
    a token may not use with -inf or with an exact zero.
    """
    ranked = ranked.detach().float()
    allowed = torch.isfinite(ranked) & (ranked != 0)
    z = ranked.log() if scale is Scale.PROBABILITIES else ranked
    z = z.masked_fill(~allowed, float("-inf"))
    lowest = z.masked_fill(~allowed, float("inf")).amin(
        dim=1, keepdim=True
    )  # for choices that were masked all the same
    lowest = torch.where(torch.isfinite(lowest), lowest, torch.zeros_like(lowest))
    chosen = torch.zeros_like(allowed).scatter_(1, own, True)
    return torch.where(chosen & ~allowed, lowest, z)


def score_range(z: torch.Tensor) -> torch.Tensor:
    """Per token, the greatest less the least score of those it may choose: [T]."""
    least = z.masked_fill(torch.isneginf(z), float("inf")).amin(dim=1)
    return z.amax(dim=1) - least


def order_of(z: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """The experts of every token from best to worst, [T, E]; its own choices come first, also where scores tie."""
    chosen = torch.zeros_like(z, dtype=torch.int8).scatter_(1, own, 1)
    order = z.argsort(dim=1, descending=True, stable=True)
    return order.gather(1, chosen.gather(1, order).argsort(dim=1, descending=True, stable=True))


def prefer_residents(
    z: torch.Tensor, own: torch.Tensor, resident: torch.Tensor, bonus: torch.Tensor | float, keep: int
) -> torch.Tensor:
    """Cache-Prior (arXiv 2412.00099): the top K by z + bonus · resident, the `keep` best by z always among them.

    `z` [T, E], `own` [T, K] the router's choice, `resident` [E]. `bonus` is λ times the running mean range of z.
    Returns the choice, [T, K], in no particular order.
    """
    biased = z + bonus * resident
    # a choice of the router wins a tie, so that nothing changes without a reason
    order = order_of(z, own)
    biased = biased.scatter(1, order[:, :keep], float("inf")).gather(1, order)
    return order.gather(1, biased.argsort(dim=1, descending=True, stable=True)[:, : own.shape[1]])


def prefer_within_rank(
    z: torch.Tensor,
    own: torch.Tensor,
    resident: torch.Tensor,
    keep: int,
    max_rank: int,
    max_mass: float | None = None,
    scale: Scale = Scale.LOGITS,
) -> torch.Tensor:
    """The max-rank form: the `keep` best, then residents of the `max_rank` best, then the router's own order; [T, K].

    With `max_mass`, only residents before which less than this share of the probability is ranked.
    """
    order = order_of(z, own)
    ranked = z.gather(1, order)
    rank = torch.arange(z.shape[1], device=z.device)
    preferred = resident[order] & (rank < max_rank) & ~torch.isneginf(ranked)
    if max_mass is not None:
        mass = ranked.clamp(min=0) if scale is Scale.SCORES else ranked.softmax(dim=1)
        mass = mass / mass.sum(dim=1, keepdim=True).clamp(min=1e-30)
        preferred &= mass.cumsum(dim=1) - mass < max_mass
    late = torch.where((rank < keep) | preferred, rank, rank + z.shape[1])
    return order.gather(1, late.argsort(dim=1)[:, : own.shape[1]])


def settle(z: torch.Tensor, own: torch.Tensor, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The new choice as a router gives one, [T, K], and how many experts of it are new, [T].

    Tokens whose set did not change keep their own row, order included; the others are ordered from best to worst.
    """
    among = torch.zeros_like(z, dtype=torch.bool).scatter_(1, own, True)
    new = (~among.gather(1, chosen)).sum(dim=1)
    best_first = chosen.gather(1, z.gather(1, chosen).argsort(dim=1, descending=True, stable=True))
    return torch.where((new > 0)[:, None], best_first, own), new


def cold_misses(index: torch.Tensor, weights: torch.Tensor, resident: torch.Tensor, share: float) -> torch.Tensor:
    """Which (token, expert) pairs of an access need not be served: [T, K].

    Those of an expert that is not `resident` [E], is no token's best, and has less than `share` / K of the gate weights
    of every token that chose it.
    """
    top_k = index.shape[1]
    gates = weights.detach().float().abs()
    shares = gates / gates.sum(dim=1, keepdim=True).clamp(min=1e-30)
    greatest = torch.zeros(len(resident), device=index.device)
    greatest.scatter_reduce_(0, index.reshape(-1), shares.reshape(-1), "amax")
    needed = resident | (greatest >= share / top_k)
    needed.index_fill_(0, index.gather(1, shares.argmax(dim=1, keepdim=True)).reshape(-1), True)
    return ~needed[index]


def without(index: torch.Tensor, weights: torch.Tensor, dropped: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The choice and its weights less the dropped pairs, in which a token's best expert stands with the weight 0.

    On the CPU the columns that no token needs are cut off, so that one token computes only what it kept. On a GPU that
    would need its result here.
    """
    best = index.gather(1, weights.abs().argmax(dim=1, keepdim=True))
    index, weights = torch.where(dropped, best, index), weights.masked_fill(dropped, 0)
    if index.device.type != "cpu":
        return index, weights
    kept_first = dropped.to(torch.int8).argsort(dim=1, stable=True)
    columns = int((~dropped).sum(dim=1).max())
    return index.gather(1, kept_first)[:, :columns], weights.gather(1, kept_first)[:, :columns]


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
        self._ranges: list[torch.Tensor | None] = [None] * len(counts)  # running means
        self._seen = [0] * len(counts)
        self._counts = {"choices": 0, "changed": 0, "dropped": 0}
        self._uncounted: list[tuple[str, torch.Tensor]] = []  # on a GPU, read when somebody asks
        self._intercepted = Intercepted(model, self._choose) if levers.rechooses else None

    def close(self) -> None:
        """Leave the model as it was."""
        if self._intercepted is not None:
            self._intercepted.close()

    def report(self) -> dict[str, Any]:
        """The settings, and of the decoding steps so far: (token, expert) pairs chosen, changed and dropped."""
        self._collect()
        return {**self.levers.to_dict(), **self._counts}

    def drop(self, layer: int, index: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The choice [T, K] and its weights [T, K], less the misses that weigh too little to be loaded."""
        if self._tiered.phase is not Phase.DECODE:
            return index, weights
        self._counts["choices"] += index.numel()
        if not self.levers.drop_misses:
            return index, weights
        resident = _mask(self._tiered.cache.holding(self._keys[layer]), index.device)
        dropped = cold_misses(index, weights, resident, self.levers.drop_misses)
        if index.device.type == "cpu" and not dropped.any():
            return index, weights
        self._note("dropped", dropped)
        return without(index, weights, dropped)

    def _choose(self, layer: int, ranked: torch.Tensor, own: torch.Tensor, scale: Scale) -> torch.Tensor | None:
        """What the router is to choose in place of `own` [T, K], having ranked all experts [T, E]; None: its own."""
        if self._tiered.phase is not Phase.DECODE:
            return None
        z, levers = logits_of(ranked, own, scale), self.levers
        mean = self._mean_range(layer, z) if levers.cache_prior else None
        held = self._tiered.cache.holding(self._keys[layer])
        if own.device.type == "cpu" and all(held[expert] for expert in own.reshape(-1).tolist()):
            return None  # residents all: no rule would change that
        resident = _mask(held, own.device)
        if mean is not None:
            chosen = prefer_residents(z, own, resident, levers.cache_prior * mean, self._keep[layer])
        else:
            rank = levers.max_rank or z.shape[1]
            chosen = prefer_within_rank(z, own, resident, self._keep[layer], rank, levers.max_mass, scale)
        choice, new = settle(z, own, chosen)
        self._note("changed", new)
        return choice

    def _mean_range(self, layer: int, z: torch.Tensor) -> torch.Tensor:
        """The running mean over all tokens so far, these included, of the range of their scores."""
        total, before = score_range(z).sum(), self._ranges[layer]
        self._seen[layer] += len(z)
        mean = total / len(z) if before is None else before + (total - len(z) * before) / self._seen[layer]
        self._ranges[layer] = mean
        return mean

    def _note(self, name: str, counts: torch.Tensor) -> None:
        self._uncounted.append((name, counts.sum()))
        if counts.device.type == "cpu" or len(self._uncounted) >= 4096:
            self._collect()

    def _collect(self) -> None:
        for name, count in self._uncounted:
            self._counts[name] += int(count)
        self._uncounted.clear()


def _mask(held: Sequence[bool], device: torch.device) -> torch.Tensor:
    """As a tensor, [E]; on its way to a GPU nobody waits for it."""
    mask = torch.tensor(held)
    return mask if device.type == "cpu" else mask.pin_memory().to(device, non_blocking=True)
