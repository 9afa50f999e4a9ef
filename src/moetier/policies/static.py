"""Static placement: keep the experts that a profiling trace used most (Fiddler, and every list of hot experts)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from moetier.access import Access, ExpertKey
from moetier.errors import ConfigError
from moetier.policies.ranking import ResidentIndex

PINNED = 1 << 62  # a score: behind everything outside the set


class Static:
    """Pins the `slots` most used experts of a fitted trace; the others, least recent first, go before them.

    Ties in the counts go to the lower layer and expert. If the set itself must give way, its least used goes first.
    With staging slots, a full tier admits what was used more than the victim, and experts outside the set (which were
    used equally little) only to slots that the set leaves over.
    """

    def __init__(self, layers: int, experts: int, slots: int):
        self._slots, self._references = slots, 0
        self._scores: dict[ExpertKey, int] | None = None  # of the set
        self._residents = ResidentIndex(experts, slots, columns="q")

    def fit(self, accesses: Sequence[Access]) -> None:
        """Choose the set. The trace should be disjoint from the one that will be served."""
        uses = Counter(key for access in accesses for key in access.keys)
        chosen = sorted(uses, key=lambda key: (-uses[key], key))[: self._slots]
        self._scores = {key: PINNED - rank for rank, key in enumerate(chosen)}

    def on_access(self, access: Access) -> None:
        """Nothing is learnt; raises `ConfigError` if nothing was fitted."""
        if self._scores is None:
            raise ConfigError("policy 'static' keeps a fixed set: call fit(accesses) with a profiling trace first")

    def on_insert(self, key: ExpertKey, access: Access) -> None:
        """Insert as most recent."""
        self._touch(key, self._residents.add(key))

    def on_hit(self, key: ExpertKey, access: Access) -> None:
        """Move to most recent."""
        self._touch(key, self._residents.position[key])

    def _touch(self, key: ExpertKey, position: int) -> None:
        self._references += 1
        self._residents.columns[0][position] = (self._scores or {}).get(key, self._references)

    def on_remove(self, key: ExpertKey) -> None:
        """Forget."""
        self._residents.remove(key)

    def admit(self, incoming: ExpertKey, victim: ExpertKey, access: Access) -> bool:
        """Whatever improves the set, or costs it nothing."""
        scores = self._scores or {}
        ahead = scores.get(incoming, 0) - scores.get(victim, 0)
        return ahead > 0 or (ahead == 0 and len(scores) < self._slots)

    def victims(self, access: Access) -> Iterator[ExpertKey]:
        """Those outside the set from the least recent, then the set from the least used."""
        return self._residents.ascending(self._residents.column(0).copy())
