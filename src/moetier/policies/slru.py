"""SLRU, frequency-aware: a segmented LRU that evicts the least used of its probation (SharpInference #74, #77)."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterator

from moetier.access import Access, ExpertKey
from moetier.policies.parameters import within
from moetier.policies.ranking import MOST, ResidentIndex

BITS = 40  # of a score, for the place within a segment
PROTECTED = 1 << 62  # the protected segment ranks behind all of probation


class SLRU:
    """Segmented LRU: a probationary segment and a protected one of `protected` times the slots, 75 % by default.

    New entries are probationary; a hit promotes; a full protected segment demotes its least recent entry. The victim is
    the probationary entry with the fewest uses, the older one on ties, and never the one inserted last (else an entry
    with a count of one would be evicted for ever). Pins are the core's: it skips pinned keys in any order.
    """

    def __init__(self, layers: int, experts: int, slots: int, protected: float = 0.75):
        self._experts = experts
        self._protected_slots = int(slots * within("protected", protected, 0.0, 1.0))
        self._protected: OrderedDict[ExpertKey, None] = OrderedDict()  # least recent first
        self._uses = array("q", bytes(8 * layers * experts))
        self._newest: ExpertKey | None = None
        self._moves = 0  # entries into a segment, and refreshes: gives the order within it
        self._residents = ResidentIndex(experts, slots, columns="q")
        self._position = self._residents.position
        self._scores = self._residents.columns[0]

    def on_access(self, access: Access) -> None:
        """Nothing to learn beyond hits and inserts."""

    def on_insert(self, key: ExpertKey, access: Access) -> None:
        """Insert at the head of the probationary segment."""
        identity = key[0] * self._experts + key[1]
        self._uses[identity] = uses = self._uses[identity] + 1
        self._moves += 1
        self._scores[self._residents.add(key)] = uses << BITS | self._moves
        self._newest = key

    def on_hit(self, key: ExpertKey, access: Access) -> None:
        """Promote, or refresh within the protected segment."""
        identity = key[0] * self._experts + key[1]
        self._uses[identity] = uses = self._uses[identity] + 1
        self._moves += 1
        if key in self._protected:
            self._protected.move_to_end(key)
        elif self._protected_slots == 0:
            self._scores[self._position[key]] = uses << BITS | self._moves
            return
        else:
            if len(self._protected) >= self._protected_slots:
                self._demote()
            self._protected[key] = None
        self._scores[self._position[key]] = PROTECTED | self._moves

    def _demote(self) -> None:
        key, _ = self._protected.popitem(last=False)
        self._scores[self._position[key]] = self._uses[key[0] * self._experts + key[1]] << BITS | self._moves
        self._moves += 1

    def on_remove(self, key: ExpertKey) -> None:
        """Forget the place; the count stays."""
        self._protected.pop(key, None)
        self._residents.remove(key)

    def victims(self, access: Access) -> Iterator[ExpertKey]:
        """Probationary by uses, then protected from the least recent, and the newest insert last of all."""
        scores, newest = self._residents.column(0).copy(), self._newest
        if newest is not None and newest in self._position and newest not in self._protected:
            scores[self._position[newest]] = MOST - 1
        return self._residents.ascending(scores)
