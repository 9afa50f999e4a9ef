"""SLRU, frequency-aware: a segmented LRU that evicts the least used of its probation (SharpInference #74, #77)."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator

from moetier.access import Access, ExpertKey

PROTECTED_SHARE = 0.75


class SLRU:
    """Segmented LRU: 25 % probationary, 75 % protected.

    New entries are probationary; a hit promotes; a full protected segment demotes its least recent entry. The victim is
    the probationary entry with the fewest uses, the older one on ties, and never the one inserted last (else an entry
    with a count of one would be evicted for ever). Pins are the core's: it skips pinned keys in any order.
    """

    def __init__(self, layers: int, experts: int, slots: int):
        self._protected_slots = int(slots * PROTECTED_SHARE)
        self._probationary: OrderedDict[ExpertKey, None] = OrderedDict()  # least recent first
        self._protected: OrderedDict[ExpertKey, None] = OrderedDict()
        self._uses: Counter[ExpertKey] = Counter()
        self._newest: ExpertKey | None = None

    def on_access(self, access: Access) -> None:
        """Nothing to learn beyond hits and inserts."""

    def on_insert(self, key: ExpertKey, access: Access) -> None:
        """Insert at the head of the probationary segment."""
        self._uses[key] += 1
        self._probationary[key] = None
        self._newest = key

    def on_hit(self, key: ExpertKey, access: Access) -> None:
        """Promote, or refresh within the protected segment."""
        self._uses[key] += 1
        if key in self._protected:
            self._protected.move_to_end(key)
            return
        del self._probationary[key]
        if self._protected_slots == 0:
            self._probationary[key] = None
            return
        if len(self._protected) >= self._protected_slots:
            demoted, _ = self._protected.popitem(last=False)
            self._probationary[demoted] = None
        self._protected[key] = None

    def on_remove(self, key: ExpertKey) -> None:
        """Forget the place; the count stays."""
        if key in self._protected:
            del self._protected[key]
        else:
            del self._probationary[key]

    def victims(self, access: Access) -> Iterator[ExpertKey]:
        """Probationary by uses, then protected from the least recent, and the newest insert last of all."""
        newest = self._newest if self._newest in self._probationary else None
        for key in sorted(self._probationary, key=self._uses.__getitem__):  # stable: the older wins ties
            if key != newest:
                yield key
        yield from self._protected
        if newest:
            yield newest
