"""Which way to share small steps among CPU threads: by trial, as it depends on what else the machine does.

By product, torch's way, is a little faster where every thread has a core to itself, and collapses where one has not; by
expert (`crew.py`) is never far from the best. Both have the same bits. So both are timed for some steps, the faster one
is kept for a while, and steps that suddenly take twice as long end torch's way at once.

Knows step times only: no threads, no clock.
"""

from __future__ import annotations

from collections import deque
from statistics import median

TRIED = 8  # steps of a trial
SETTLING = 2  # first steps after a change, not counted: threads wake up
HOLD, LONGEST = 128, 1024  # steps until the next trial; doubled while the verdict stays the same
MARGIN = 0.97  # torch's way must be this much faster to be taken
COLLAPSE = 2.0  # times the other way's median; two such steps end a trial, or what it led to
DRIFT = 1.15  # times what the other way took when it was tried: then it is tried again, after `SOONEST` steps at least
SOONEST = 32
RECENT = 32


class SplitTrial:
    """Says step by step whether the crew is to be used; is told how long the steps took."""

    def __init__(self) -> None:
        self.crew = True  # which way the next step goes
        self.changes = 0
        self._times: dict[bool, deque[float]] = {way: deque(maxlen=RECENT) for way in (True, False)}
        self._chosen = True  # what the last trial found better
        self._left = TRIED + SETTLING  # steps until something is decided
        self._trial = True
        self._first = True  # the first trial of the crew is followed by one of torch's way
        self._hold = HOLD
        self._skip = SETTLING
        self._slow = 0

    def record(self, seconds: float) -> None:
        """A step took so long, the way `crew` said."""
        if self._skip:
            self._skip -= 1
        elif not self.crew and self._collapsed(seconds):
            self._times[False].clear()  # what it took before says nothing any more
            self._settle(True)
            return
        else:
            self._times[self.crew].append(seconds)
        self._left -= 1
        if self._left > 0:
            if not self._trial and self._drifted():
                self._hold = HOLD
                self._try(not self.crew)
            return
        if self._trial and not self._first:
            mine, other = median(self._times[False]), median(self._times[True])
            self._settle(mine > MARGIN * other)
        else:
            self._first = False
            self._try(not self.crew)

    def _collapsed(self, seconds: float) -> bool:
        usual = median(self._times[True]) if self._times[True] else seconds
        self._slow = self._slow + 1 if seconds > COLLAPSE * usual else 0
        return self._slow == 2

    def _drifted(self) -> bool:
        """Whether the chosen way is by now slower than the other one was: the machine has changed."""
        held = self._hold - self._left
        if held < SOONEST or held % TRIED or not self._times[not self.crew]:
            return False
        recent = list(self._times[self.crew])[-TRIED:]
        return median(recent) > DRIFT * median(self._times[not self.crew])

    def _try(self, crew: bool) -> None:
        self._trial, self._left = True, TRIED + SETTLING
        self._turn(crew)
        self._times[crew].clear()

    def _settle(self, crew: bool) -> None:
        self._hold = min(2 * self._hold, LONGEST) if crew == self._chosen else HOLD
        self._chosen, self._trial, self._left = crew, False, self._hold
        self._turn(crew)

    def _turn(self, crew: bool) -> None:
        self._slow = 0
        if crew != self.crew:
            self.crew, self._skip = crew, SETTLING
            self.changes += 1

    def report(self) -> str:
        """In use now, for people."""
        return "experts" if self.crew else "products"
