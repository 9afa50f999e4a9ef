"""Locality of routing: segment metrics, what per-layer caches could hit, and co-occurrence with controls.

SRP and SCH are the metrics of "Not All Models Suit Expert Offloading: On Local Routing Consistency of
Mixture-of-Experts Models" (arXiv 2505.16056). Every token counts as decoded by itself, whatever its phase.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moetier.trace import Trace

__all__ = ["CoOccurrence", "co_occurrence", "layer_cache_hits", "sample", "segment_cache_hits", "segment_routing"]


def sample(trace: Trace, tokens: int) -> Trace:
    """About so many tokens: whole sequences evenly from all over the trace, the last one cut."""
    if trace.tokens <= tokens:
        return trace.of_sequences(trace.sequences())
    sequences = trace.sequences()
    every = max(1, len(sequences) * tokens // trace.tokens)
    chosen = [sequences[index * len(sequences) // every] for index in range(every)]
    return trace.of_sequences(chosen).first(tokens)


def segment_routing(trace: Trace, length: int) -> float | None:
    """SRP(m), segment routing best performance: how well a fixed group of experts serves segments of `length` tokens.

    For every segment (sliding, within a sequence) and expert, predict "active at every token" where the expert is used
    by at least α of the segment's tokens; F1 of these predictions over all tokens, layers and experts, for the best α.
    1 if every segment keeps to k experts; None if no sequence is as long.
    """
    layers = np.arange(trace.layers)[None, :, None]
    histogram = np.zeros(length + 1, dtype=np.int64)  # (segment, expert) pairs by uses
    for part in _parts(trace):
        if len(part) < length:
            continue
        used = np.zeros((len(part) + 1, trace.layers, trace.num_experts + 1), dtype=np.int32)
        used[np.arange(1, len(part) + 1)[:, None, None], layers, part] = 1
        used = np.cumsum(used[..., : trace.num_experts], axis=0, dtype=np.int32)
        histogram += np.bincount((used[length:] - used[:-length]).ravel(), minlength=length + 1)
    uses = histogram * np.arange(length + 1)
    if not uses.any():
        return None
    matches = np.cumsum(uses[::-1])[::-1]  # by threshold: used at least so often
    predicted = np.cumsum(histogram[::-1])[::-1] * length
    return float((2 * matches / (predicted + uses.sum())).max())


def segment_cache_hits(trace: Trace, ratio: float, lookahead: int) -> float:
    """SCH(m, ρ), segment cache best hit rate: a cache per layer of ρ·k experts that evicts the one least used by the
    next m tokens (then the least recently used).

    Access-atomic: experts in use stay. As in the authors' code a cache starts empty with every sequence, and filling
    it is no miss.
    """
    size = min(trace.num_experts, max(trace.top_k, round(ratio * trace.top_k)))
    hits = needs = 0
    layers = np.arange(trace.layers)[None, :, None]
    for part in _parts(trace):
        tokens = len(part)
        used = np.zeros((tokens, trace.layers, trace.num_experts + 1), dtype=np.bool_)
        used[np.arange(tokens)[:, None, None], layers, part] = True
        used = used[..., : trace.num_experts]
        total = np.zeros((tokens + 1, trace.layers, trace.num_experts), dtype=np.int32)
        if lookahead:
            np.cumsum(used, axis=0, out=total[1:])
        resident = np.zeros(used.shape[1:], dtype=np.bool_)
        recent = np.zeros(used.shape[1:], dtype=np.int64)
        for token in range(tokens):
            need = used[token]
            free = size - resident.sum(axis=1)
            missing = np.maximum(0, (need & ~resident).sum(axis=1) - free)
            wanted = int(need.sum())
            hits += wanted - int(missing.sum())
            needs += wanted
            recent[need] = token + 1
            future = total[min(token + 1 + lookahead, tokens)] - total[token + 1]
            score = future.astype(np.int64) * (tokens + 2) + recent  # the best are kept
            score[need] += np.int64(1) << 40
            resident |= need
            score[~resident] = -1
            over = resident.sum(axis=1) > size
            if over.any():
                worst = np.argpartition(score, -size, axis=1)[:, :-size]
                kept = resident.copy()
                np.put_along_axis(kept, worst, False, axis=1)
                resident[over] = kept[over]
    return hits / max(1, needs)


def layer_cache_hits(trace: Trace, ratio: float) -> float:
    """Hit rate of LRU with ρ·k slots per layer: `segment_cache_hits` without knowing the future."""
    return segment_cache_hits(trace, ratio, 0)


def _parts(trace: Trace) -> list[NDArray[np.int64]]:
    """The sequences' experts, [tokens, L, K]; missing ones as `num_experts`."""
    experts = np.where(trace.experts < 0, trace.num_experts, trace.experts).astype(np.int64)
    order = np.argsort(trace.sequence, kind="stable")
    edges = np.flatnonzero(np.diff(trace.sequence[order])) + 1
    return [experts[rows] for rows in np.split(order, edges) if len(rows)]


@dataclass(frozen=True, slots=True)
class CoOccurrence:
    """How much more often two random tokens share a pair of experts than after a shuffle that breaks the pairs.

    `over_all`: tokens shuffled over the whole trace; every topic that lasts raises it. `within`: shuffled within their
    sequences; what is left is a tie between the experts themselves. 1 means none.
    """

    over_all: float
    within: float


def co_occurrence(trace: Trace, seed: int = 0) -> dict[str, CoOccurrence | None]:
    """Pairs in the `same_layer` (None if tokens use one expert), and across `next_layer` (None if there is one layer).

    For each pair of experts the share of tokens that use both; the sum of squares is the chance that two random pairs
    are the same. Shuffles keep every expert's popularity and have the same number of pairs, so that what chance alone
    gives cancels. Across layers the tokens of one are permuted. In one layer, where a token's experts exclude each
    other, random pairs of tokens swap experts they do not share, which keeps the tokens' sets proper (the
    fixed-margins null of ecology; Connor and Simberloff, 1979).
    """
    rng = np.random.default_rng(seed)
    orders = (lambda: rng.permutation(trace.tokens), lambda: _within(trace, rng))
    in_order = np.argsort(trace.sequence, kind="stable")
    permuted = np.empty(trace.tokens, dtype=np.int64)
    permuted[in_order] = orders[1]()  # each token's place is taken by one of its sequence
    permutations = (orders[0](), permuted)
    same: list[list[float]] = []
    cross: list[list[float]] = []
    for layer in range(trace.layers):
        here = trace.experts[:, layer]
        same.append([_repeats(here, here, trace.num_experts, True)])
        for order, pairs in zip(orders, (np.zeros_like(trace.sequence), trace.sequence), strict=True):
            shuffled = _swapped(here, pairs, order, rng)
            same[-1].append(_repeats(shuffled, shuffled, trace.num_experts, True))
        if layer + 1 < trace.layers:
            ahead = trace.experts[:, layer + 1]
            shuffles = (ahead, *(ahead[rows] for rows in permutations))
            cross.append([_repeats(here, other, trace.num_experts, False) for other in shuffles])
    return {"same_layer": _ratio(same), "next_layer": _ratio(cross)}


def _ratio(repeats: list[list[float]]) -> CoOccurrence | None:
    """From the chances per layer: real, shuffled over all, shuffled within."""
    real, over_all, within = np.sum(repeats, axis=0) if repeats else (0.0, 0.0, 0.0)
    if not (over_all and within):
        return None
    return CoOccurrence(float(real / over_all), float(real / within))


def _within(trace: Trace, rng: np.random.Generator) -> NDArray[np.int64]:
    """The tokens in random order, sequence by sequence."""
    return np.lexsort((rng.random(trace.tokens), trace.sequence))


def _swapped(
    experts: NDArray[np.int16],
    group: NDArray[np.int32],
    order: Callable[[], NDArray[np.int64]],
    rng: np.random.Generator,
) -> NDArray[np.int16]:
    """[T, K] after rounds in which neighbours of a random order, if of one group, try to swap an expert each."""
    experts = experts.copy()
    for _ in range(4 * experts.shape[1]):
        rows = order()
        one, other = rows[: len(rows) // 2 * 2 : 2], rows[1::2]
        together = group[one] == group[other]
        one, other = one[together], other[together]
        i, j = rng.integers(0, experts.shape[1], (2, len(one)))
        x, y = experts[one, i], experts[other, j]
        proper = (x >= 0) & (y >= 0) & (experts[one] != y[:, None]).all(axis=1)
        proper &= (experts[other] != x[:, None]).all(axis=1)
        experts[one[proper], i[proper]], experts[other[proper], j[proper]] = y[proper], x[proper]
    return experts


def _repeats(one: NDArray[np.int16], other: NDArray[np.int16], experts: int, unordered: bool) -> float:
    """The chance that two random pairs (an expert of `one`, an expert of `other`, same row) are the same pair."""
    counts = np.zeros(experts * experts, dtype=np.int64)
    for i in range(one.shape[1]):
        for j in range(i + 1 if unordered else 0, other.shape[1]):
            a, b = one[:, i].astype(np.int64), other[:, j].astype(np.int64)
            known = (a >= 0) & (b >= 0) & ((a != b) | (not unordered))
            a, b = a[known], b[known]
            codes = np.minimum(a, b) * experts + np.maximum(a, b) if unordered else a * experts + b
            counts += np.bincount(codes, minlength=experts * experts)
    pairs = int(counts.sum())
    return float((counts * (counts - 1)).sum() / (pairs * (pairs - 1))) if pairs > 1 else 0.0
