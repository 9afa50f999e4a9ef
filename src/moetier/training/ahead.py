"""In a training step: the next layer's experts are loaded while this one computes, in both directions.

Backward comes down through the layers and needs what forward needed, so its next access is known to the expert. Forward
of many tokens needs nearly every expert of the next layer, so nearly all of them are taken as known. They go into free
slots and over what the policy would evict next, never over what this layer or the next one needs. Sans-I/O: the caller
holds the core's lock and starts the orders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from moetier.access import Access, ExpertKey, Part
from moetier.residency import Residency
from moetier.stream_ahead import SATURATED, StreamAhead

if TYPE_CHECKING:
    from moetier.eventlog import Recorder

Coming = Callable[[], Iterator[Access]]


class StepAhead:
    """For `core`; `experts` are those of each layer. `coming` gives the forwards whose backward is next, in order.

    What is no part of a training step is for `StreamAhead`.
    """

    def __init__(self, core: Residency | Recorder, experts: tuple[int, ...], coming: Coming):
        self._core, self._experts, self._coming = core, experts, coming
        self._prefill = StreamAhead(core, experts)
        self._next: list[ExpertKey] = []  # to look at, the first one last
        self._started: set[ExpertKey] = set()  # and not demanded yet
        self._issued = 0

    @property
    def issued(self) -> int:
        """Loads that were begun, in prefills and in training steps."""
        return self._issued + self._prefill.issued

    def demanded(self, access: Access) -> None:
        """After `acquire`: what was loaded for it has been found, or will not be wanted. The next one begins."""
        if access.part is Part.UPDATE:  # maybe in passing, of experts that catch up before a forward
            self._started.difference_update(access.keys)
            return
        self._prefill.demanded(access)
        for key in sorted(self._started.difference(access.keys)):
            self._core.cancel(key)
        self._started.clear()
        self._next = self._after(access)[::-1]
        self._issue()

    def released(self, access: Access) -> None:
        """After a release, when no expert of the access waits for a slot any more."""
        if access.part is Part.SERVE:
            self._prefill.released(access)
        elif access.part is not Part.UPDATE:
            self._issue()

    def _after(self, access: Access) -> list[ExpertKey]:
        """What the next access needs, in its order, as far as it is known."""
        layer = access.layer
        if access.part is Part.BACKWARD:
            following = next(self._coming(), None)
            return [] if following is None else list(following.keys)
        if access.part is not Part.FORWARD or layer + 1 >= len(self._experts):
            return []
        if len(access.keys) < SATURATED * self._experts[layer]:
            return []
        return [ExpertKey(layer + 1, expert) for expert in range(self._experts[layer + 1])]

    def _issue(self) -> None:
        """As many as there is room for; the others when slots are given back."""
        while self._next:
            key = self._next[-1]
            if not self._core.holds(key):
                if not self._core.prefetch(key, displace=True):
                    return
                self._started.add(key)
                self._issued += 1
            self._next.pop()
