"""Belady: evict the expert whose next use is farthest away (L. A. Belady, 1966). Offline: it is shown the future."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np

from moetier.access import Access, ExpertKey
from moetier.errors import ConfigError
from moetier.policies.ranking import Ranked

LATE = float(2**52)  # added to the next use of what must not go now; exact in float64


class ForcedBelady(Ranked):
    """The oracle with forced admission: every miss gets a slot. The fewest misses possible under these rules:

    - an access is atomic: all of its keys are classified against residency at its start;
    - its keys, hit or missed, are not victims while it runs; if they exceed the slots, the first ones get them;
    - nothing is evicted but to make room for a miss.

    A tier below tier 0 is asked only for what the tiers above miss; there, distance to the next use by the model is not
    distance to the next request, and the order is a heuristic.
    """

    offline: ClassVar[bool] = True
    _name = "belady-forced"

    def __init__(self, layers: int, experts: int, slots: int):
        super().__init__(layers, experts, slots)
        self._never = 0  # the next use of a key without one
        self._next = array("q", bytes(8 * layers * experts))  # by id: after the current access
        self._next_view = np.frombuffer(self._next, dtype=np.int64)
        self._after = array("q")  # for the keys of all accesses, end to end: the next use after that access
        self._first: dict[int, int] = {}  # by time of access: where its keys begin in `_after`

    def foresee(self, accesses: Sequence[Access]) -> None:
        """Be shown everything that will be accessed, in order."""
        width = max((len(access.keys) for access in accesses), default=0) or 1
        self._never = len(accesses) * width
        self._first.clear()
        self._next_view.fill(self._never)
        self._after = array("q", bytes(8 * sum(len(access.keys) for access in accesses)))
        end = len(self._after)
        for number in range(len(accesses) - 1, -1, -1):
            access = accesses[number]
            ids = [access.layer * self._experts + key[1] for key in access.keys]
            end -= len(ids)
            self._first[access.time] = end
            for offset, identity in enumerate(ids):
                self._after[end + offset] = self._next[identity]
            # two keys of one access are used at the same time: the one that is used again sooner counts as nearer
            for rank, identity in enumerate(sorted(ids, key=self._next.__getitem__)):
                self._next[identity] = number * width + rank

    def on_access(self, access: Access) -> None:
        """Move on by one access."""
        begin = self._first.get(access.time)
        if begin is None:
            raise ConfigError(f"policy {self._name!r} needs the future: call foresee(accesses) with all of them first")
        base = access.layer * self._experts
        for offset, key in enumerate(access.keys, begin):
            self._next[base + key[1]] = self._after[offset]

    def victims(self, access: Access) -> Iterator[ExpertKey]:
        """Farthest next use first; the keys of the access last."""
        distance = self._next_view.take(self._residents.ids())
        scores = np.negative(distance, dtype=np.float64)
        positions = self._residents.position
        for key in access.keys:
            if key in positions:
                scores[positions[key]] += LATE
        return self._residents.ascending(scores)


class Belady(ForcedBelady):
    """The oracle with bypass: a miss may pass through a staging slot, so that its set of residents is the best one.

    The rules are those of forced admission, but for the missed keys: free slots are filled in ascending order of the
    keys; then, with the misses by nearest and the victims by farthest next use, the i-th miss is admitted if it is used
    again before the i-th victim. Without staging slots in the tier, admission is forced all the same.

    Where two keys are next used by the same access, their uses after that decide: a hit key cannot be a victim while
    its access runs, a missed one may be bypassed, so what is held then matters. (Without the rule that protects hits,
    fewer misses would be possible: an oracle could drop a key in the access that hits it.)
    """

    _name = "belady"

    def __init__(self, layers: int, experts: int, slots: int):
        super().__init__(layers, experts, slots)
        self._decided: int | None = None  # the time of the access that `_admitted` is about
        self._admitted: frozenset[ExpertKey] = frozenset()

    def on_access(self, access: Access) -> None:
        """Move on by one access."""
        super().on_access(access)
        self._decided = None

    def admit(self, incoming: ExpertKey, victim: ExpertKey, access: Access) -> bool:
        """Whether `incoming` is among the misses that are worth a slot; decided for all at the first question."""
        if self._decided != access.time:
            self._admitted, self._decided = self._worth_a_slot(access), access.time
        return incoming in self._admitted and self._next_use(incoming) < self._next_use(victim)

    def _next_use(self, key: ExpertKey) -> int:
        return self._next[key[0] * self._experts + key[1]]

    def _worth_a_slot(self, access: Access) -> frozenset[ExpertKey]:
        missed = sorted((key for key in access.keys if key not in self._residents.position), key=self._next_use)
        keys = set(access.keys)
        candidates = (victim for victim in self.victims(access) if victim not in keys)
        pairs = zip(missed, candidates, strict=False)
        return frozenset(miss for miss, victim in pairs if self._next_use(miss) < self._next_use(victim))
