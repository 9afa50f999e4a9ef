"""LRU hit rates for all sizes in one pass: stack distances (R. L. Mattson et al., 1970) for atomic accesses.

All keys of an access are classified against the stack as it was before the access; then they go on top of it, in
ascending order. A need at distance d (d - 1 other records were used since) is a hit in every cache of at least d slots.
That holds from the largest access on: smaller caches serve it in waves.

The policy `lru` differs in one point: within an access it counts hits as used before misses. Which are which depends on
the size, so plain LRU of atomic accesses is no stack algorithm, and no single pass gives all its sizes. `StackLRU` is
LRU with the order that does not depend on the size; a run of it hits what the curve says, at every size. Where every
access is one key the two are the same. Knows no prefetch, no pins, no time.

`moetier.trace.stats` has the distance of every single need, one after the other; it needs no compiler, and is slower.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetier.access import Access, ExpertKey
from moetier.errors import CapacityError, ConfigError
from moetier.policies.lru import LRU
from moetier.trace.needs import Needs

__all__ = ["Curve", "StackLRU", "layer_curve", "lru_curve", "needs_of_accesses"]


@dataclass(frozen=True)
class Curve:
    """Hits of LRU at every size: `hits[slots]` of `needs`; valid from `smallest` slots, the largest access."""

    hits: NDArray[np.int64]
    needs: int
    smallest: int

    def hit_rate(self, slots: int) -> float:
        """Hits over needs. Raises `CapacityError` below the largest access, where the curve says nothing."""
        if slots < self.smallest:
            raise CapacityError(
                f"the curve begins at {self.smallest} slots, the largest access; {slots} is below", self.smallest
            )
        return int(self.hits[min(slots, len(self.hits) - 1)]) / max(1, self.needs)

    def slots_for(self, hit_rate: float) -> int | None:
        """The fewest slots with at least this hit rate; None if no size reaches it."""
        enough = np.flatnonzero(self.hits[self.smallest :] >= hit_rate * self.needs)
        return int(enough[0]) + self.smallest if len(enough) else None


def needs_of_accesses(accesses: Sequence[Access], experts: int) -> Needs:
    """Accesses as arrays: for what `Trace.accesses(batch)` made."""
    sizes = np.fromiter((len(access.keys) for access in accesses), dtype=np.int64, count=len(accesses))
    keys = chain.from_iterable(access.keys for access in accesses)
    flat = np.fromiter(chain.from_iterable(keys), dtype=np.int64, count=2 * int(sizes.sum())).reshape(-1, 2)
    return Needs(np.repeat(np.arange(len(accesses)), sizes), flat[:, 0] * experts + flat[:, 1])


def lru_curve(needs: Needs, records: int) -> Curve:
    """The curve of one cache for all layers. `records` is layers x experts, the largest size that matters.

    Raises `ConfigError` without numba.
    """
    if len(needs.record) and not 0 <= int(needs.record.min()) <= int(needs.record.max()) < records:
        raise ConfigError(f"needs name a record that is not below {records}")
    histogram = np.zeros(records + 1, dtype=np.int64)
    largest = int(np.unique(needs.access, return_counts=True)[1].max()) if len(needs.access) else 0
    _counter()(needs.access, needs.record, records, largest, histogram)
    histogram[0] = 0  # first uses, which are hits nowhere
    return Curve(np.cumsum(histogram), len(needs.record), largest)


def layer_curve(needs: Needs, layers: int, experts: int) -> Curve:
    """The same where every layer has a cache of its own: `slots` are those of each layer."""
    layer_of = needs.record // experts
    curves = []
    for layer in range(layers):
        own = layer_of == layer
        curves.append(lru_curve(Needs(needs.access[own], needs.record[own] - layer * experts), experts))
    hits = np.zeros(experts + 1, dtype=np.int64)
    for curve in curves:
        hits += curve.hits
    return Curve(hits, len(needs.record), max(curve.smallest for curve in curves))


class StackLRU(LRU):
    """LRU with ascending order inside an access, hit or not. As a policy: `moetier.simulate.mattson:StackLRU`."""

    def __init__(self, layers: int, experts: int, slots: int):
        super().__init__(layers, experts, slots)
        self._last: tuple[ExpertKey, ...] = ()

    def on_access(self, access: Access) -> None:
        """Put the keys of the access before into their order."""
        for key in self._last:
            if key in self._order:
                self._order.move_to_end(key)
        self._last = access.keys


@cache
def _counter() -> Callable[..., None]:
    """The compiled pass. It fills `histogram[d]` with the needs at distance d, and `histogram[0]` with first uses.

    A Fenwick tree holds a mark at the last use of every record, on a line of positions that is renumbered when it is
    full: the tree stays as small as the number of records, and in the processor's cache.
    """
    try:
        from numba import njit
    except ImportError as error:
        raise ConfigError("LRU curves need numba: pip install 'moetier[lab]'") from error

    def add(tree: Any, position: int, change: int) -> None:
        while position < len(tree):
            tree[position] += change
            position += position & -position

    def up_to(tree: Any, position: int) -> int:
        total = 0
        while position:
            total += tree[position]
            position &= position - 1
        return total

    compiled_add, compiled_up_to = njit(add), njit(up_to)

    def count(access: Any, record: Any, records: int, largest: int, histogram: Any) -> None:
        size = 4 * records + largest
        tree = np.zeros(size + 1, dtype=np.int32)
        owner = np.full(size + 1, -1, dtype=np.int64)  # of a position
        position = np.zeros(records, dtype=np.int64)  # of a record's last use; 0: none
        top = live = begin = 0
        while begin < len(record):
            end = begin + 1
            while end < len(record) and access[end] == access[begin]:
                end += 1
            if top + end - begin > size:  # renumber
                kept = 0
                for old in range(1, top + 1):
                    if owner[old] >= 0:
                        kept += 1
                        owner[kept] = owner[old]
                        position[owner[old]] = kept
                tree[:] = 0
                for index in range(1, size + 1):
                    if index > kept:
                        owner[index] = -1
                    else:
                        tree[index] += 1
                    above = index + (index & -index)
                    if above <= size:
                        tree[above] += tree[index]
                top = kept
            for index in range(begin, end):
                last = position[record[index]]
                histogram[live - compiled_up_to(tree, last - 1) if last else 0] += 1
            for index in range(begin, end):
                key = record[index]
                if position[key]:
                    compiled_add(tree, position[key], -1)
                    owner[position[key]] = -1
                else:
                    live += 1
                top += 1
                position[key] = top
                owner[top] = key
                compiled_add(tree, top, 1)
            begin = end

    compiled: Callable[..., None] = njit(count)
    return compiled
