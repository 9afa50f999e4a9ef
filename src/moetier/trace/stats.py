"""Statistics of a trace: skew, overlap of consecutive tokens, demand per access, reuse distances, working sets.

Everything is counted over the trace as recorded, unless said otherwise. `locality` holds what looks at segments of a
sequence, `summary` joins both and says what they mean. Knows nothing of slots and policies, except that LRU follows
from reuse distances.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetier.trace import Trace
from moetier.trace.needs import needs_of

__all__ = [
    "Demand",
    "Overlap",
    "Reuse",
    "Skew",
    "demand_of",
    "overlap_of",
    "reuse_of",
    "skew_of",
    "stack_distances",
    "union_of_streams",
    "working_set",
]

QUANTILES = (10, 25, 50, 75, 90, 95, 99)
_MOST_NEEDS = 2_000_000  # for reuse distances: about 3 seconds


@dataclass(frozen=True, slots=True)
class Skew:
    """Popularity of the experts, one number per layer.

    `gini`: 0 if all are used alike, 1 if one does everything. `entropy`: of the uses, over ln(experts); 1 if all alike.
    `top_half`: share of uses by the more popular half of the experts. `zipf`: exponent of popularity over rank (least
    squares of logarithms, over the experts that were used). `unused`: experts never used.
    """

    gini: list[float]
    entropy: list[float]
    top_half: list[float]
    zipf: list[float]
    unused: list[int]


def skew_of(trace: Trace) -> Skew:
    """How unevenly each layer uses its experts."""
    counts = usage(trace)  # [L, E]
    experts = trace.num_experts
    ascending = np.sort(counts, axis=1)
    total = np.maximum(1.0, ascending.sum(axis=1))
    ranks = np.arange(1, experts + 1)
    gini = (2 * (ascending * ranks).sum(axis=1) / total - (experts + 1)) / experts
    share = ascending / total[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -np.nansum(np.where(share > 0, share * np.log(share), 0), axis=1) / max(np.log(experts), 1e-12)
    zipf = []
    for row in ascending[:, ::-1]:
        used = row[row > 0]
        slope = np.polyfit(np.log(ranks[: len(used)]), np.log(used), 1)[0] if len(used) > 1 else 0.0
        zipf.append(max(0.0, -float(slope)))
    return Skew(
        gini=gini.tolist(),
        entropy=entropy.tolist(),
        top_half=share[:, experts - (experts + 1) // 2 :].sum(axis=1).tolist(),
        zipf=zipf,
        unused=(counts == 0).sum(axis=1).tolist(),
    )


def usage(trace: Trace) -> NDArray[np.float64]:
    """Tokens that use each expert, [layers, experts]."""
    counts = np.empty((trace.layers, trace.num_experts))
    for layer in range(trace.layers):
        chosen = trace.experts[:, layer]
        counts[layer] = np.bincount(chosen[chosen >= 0], minlength=trace.num_experts)
    return counts


@dataclass(frozen=True, slots=True)
class Overlap:
    """Share of a token's experts that the token before it in its sequence used too, per layer.

    `chance` is that share for two tokens drawn independently with the layer's popularities: what skew alone gives.
    """

    consecutive: list[float]
    chance: list[float]


def overlap_of(trace: Trace) -> Overlap:
    """How alike consecutive tokens are."""
    order = np.argsort(trace.sequence, kind="stable")
    follows = np.diff(trace.sequence[order]) == 0
    before, after = order[:-1][follows], order[1:][follows]
    consecutive, chance = [], []
    popularity = usage(trace) / max(1, trace.tokens)
    for layer in range(trace.layers):
        now, then = trace.experts[after, layer], trace.experts[before, layer]
        common = ((now[:, :, None] == then[:, None, :]) & (now >= 0)[:, :, None]).any(axis=2).sum()
        consecutive.append(float(common / max(1, (now >= 0).sum())))
        chance.append(float((popularity[layer] ** 2).sum() / max(1e-12, popularity[layer].sum())))
    return Overlap(consecutive, chance)


@dataclass(frozen=True, slots=True)
class Demand:
    """What a step asks of a cache.

    `records_per_token`: experts that one token uses over all layers; a global LRU with fewer slots hits nothing when
    decoding (the *cliff*): it has evicted each record before the layer comes round again. `per_access`: distinct
    experts of an access, mean over all accesses as recorded, and `share` of the layer's experts.
    """

    records_per_token: float
    per_access: float
    share: float
    accesses: int
    needs: int


def demand_of(trace: Trace) -> Demand:
    """Experts per token and per access, as recorded."""
    needs = needs_of(trace)
    steps = len(np.unique(trace.step))
    accesses = steps * trace.layers
    mean = len(needs.record) / max(1, accesses)
    return Demand(
        records_per_token=float((trace.experts >= 0).sum() / max(1, trace.tokens)),
        per_access=mean,
        share=mean / trace.num_experts,
        accesses=accesses,
        needs=len(needs.record),
    )


def union_of_streams(trace: Trace, streams: tuple[int, ...] = (1, 2, 4, 8, 16, 32), seed: int = 0) -> dict[int, float]:
    """Share of a layer's experts that a step needs, by the number of concurrent sequences.

    Steps are put together from one random token each of as many different sequences; numbers of streams that the trace
    has not enough sequences for are left out.
    """
    rng = np.random.default_rng(seed)
    of_sequence = [np.flatnonzero(trace.sequence == sequence) for sequence in trace.sequences()]
    shares: dict[int, float] = {}
    for count in streams:
        if count > len(of_sequence):
            break
        drawn, draws = 0, 200
        for _ in range(draws):
            chosen = rng.permutation(len(of_sequence))[:count]
            tokens = [rng.choice(of_sequence[index]) for index in chosen]
            rows = trace.experts[tokens].astype(np.int64) + np.arange(trace.layers)[None, :, None] * trace.num_experts
            drawn += len(np.unique(rows[trace.experts[tokens] >= 0]))
        shares[count] = drawn / draws / trace.records
    return shares


@dataclass(frozen=True, slots=True)
class Reuse:
    """Distances between two uses of a record.

    `steps`: how many steps later, and `records`: how many other records were used in between (the LRU stack distance,
    needs taken one by one), both by percentile over the uses that are not first. `first`: share of needs that are first
    uses. `lru`: hit rate of one global LRU cache by its share of all records (sequential semantics).
    """

    steps: dict[int, float]
    records: dict[int, float]
    first: float
    lru: dict[int, float]
    needs: int  # looked at: the first ones of the trace


def reuse_of(trace: Trace, shares: tuple[int, ...] = (10, 20, 30, 40, 50, 60, 70, 80)) -> Reuse:
    """Reuse distances of the first steps, up to two million needs; `shares` are percentages of all records."""
    most = _MOST_NEEDS // max(1, trace.layers * trace.top_k)
    if trace.tokens > most:  # whole steps
        trace = trace.first(max(1, int(np.searchsorted(trace.step, trace.step[most]))))
    access, record = needs_of(trace)
    before = previous_use(record)
    again = before >= 0
    distances = stack_distances(record)[again]
    gaps = (access[again] - access[before[again]]) / trace.layers
    total = max(1, len(record))

    def percentiles(values: NDArray[np.float64] | NDArray[np.int64]) -> dict[int, float]:
        return {q: float(np.percentile(values, q)) for q in QUANTILES} if len(values) else {}

    lru = {share: float((distances < share * trace.records // 100).sum() / total) for share in shares}
    return Reuse(percentiles(gaps), percentiles(distances), 1 - len(distances) / total, lru, len(record))


def previous_use(record: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each need, the index of the need before it of the same record, or -1."""
    before = np.full(len(record), -1, dtype=np.int64)
    order = np.argsort(record, kind="stable")
    again = record[order[1:]] == record[order[:-1]]
    before[order[1:][again]] = order[:-1][again]
    return before


def stack_distances(record: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each need, the distinct other records used since the last use of its record; -1 for a first use.

    An LRU cache of n slots hits exactly the needs with a distance from 0 to n - 1 (Mattson et al., 1970). Between the
    uses p and i there is one distinct record for every need j whose own last use is before p: counting j < i with
    p(j) < p(i) and taking away those up to p leaves them. O(n log n). (`moetier.simulate.mattson` takes the needs of an
    access at once, compiles its pass, and keeps the histogram only.)
    """
    before = previous_use(record)
    again = np.flatnonzero(before >= 0)
    first_before = np.cumsum(before < 0)[again]
    ranks = np.empty(len(again), dtype=np.int64)
    ranks[np.argsort(before[again])] = np.arange(len(again))
    distances = np.full(len(record), -1, dtype=np.int64)
    distances[again] = first_before + smaller_before(ranks) - (before[again] + 1)
    return distances


def smaller_before(permutation: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each element of a permutation of 0…n-1, how many before it are smaller.

    Bit by bit from the highest: elements with the same higher bits form a group, in order; those with the bit set pass
    those of their group without it that come before them.
    """
    if not len(permutation):
        return np.zeros(0, dtype=np.int64)
    small = np.int32 if len(permutation) < 1 << 30 else np.int64
    count = np.zeros(len(permutation), dtype=small)  # by value
    values: NDArray[Any] = permutation.astype(small)
    position: NDArray[Any] = np.arange(len(values), dtype=small)
    for bit in reversed(range(max(1, len(values)).bit_length())):
        is_one = (values >> bit) & 1
        zeros = position - np.cumsum(is_one, dtype=small) + is_one  # zeros before each position
        begin = (values >> (bit + 1)) << (bit + 1)  # where the group begins: its smallest value
        zeros -= zeros[begin]
        count[values] += zeros * is_one
        moved = np.empty_like(values)
        moved[begin + np.where(is_one, (1 << bit) + position - begin - zeros, zeros)] = values
        values = moved
    return count[permutation].astype(np.int64)


def working_set(trace: Trace, windows: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)) -> dict[int, float]:
    """Share of all records that a window of so many tokens of one sequence uses, mean over windows side by side.

    Windows longer than every sequence are left out. Denning's working set, in tokens.
    """
    order = np.argsort(trace.sequence, kind="stable")
    sequence = trace.sequence[order]
    begins = np.flatnonzero(np.diff(sequence, prepend=sequence[:1] - 1)) if len(order) else np.empty(0, dtype=np.int64)
    lengths = np.diff(begins, append=len(order))
    position = np.arange(len(order)) - np.repeat(begins, lengths)
    experts = trace.experts[order].astype(np.int64)
    records = experts + np.arange(trace.layers)[None, :, None] * trace.num_experts
    shares: dict[int, float] = {}
    for window in windows:
        whole = position < np.repeat(lengths // window * window, lengths)
        if not whole.any():
            break
        number = np.cumsum(position[whole] % window == 0) - 1
        codes = number[:, None, None] * trace.records + records[whole]
        distinct = _distinct(codes[experts[whole] >= 0], (int(number[-1]) + 1) * trace.records)
        shares[window] = distinct / (int(number[-1]) + 1) / trace.records
    return shares


def _distinct(codes: NDArray[np.int64], limit: int) -> int:
    """How many different numbers below `limit` there are."""
    if limit > 1 << 30:
        return len(np.unique(codes))
    seen = np.zeros(limit, dtype=np.bool_)
    seen[codes] = True
    return int(np.count_nonzero(seen))
