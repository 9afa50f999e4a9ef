"""During a prefill: the next layer's loads begin before this layer ends, so that the disk never waits for a router.

A long prompt needs nearly every expert of a layer, so what comes next needs no predictor. Its experts go into staging
slots that this layer has done with; they displace nothing, and the decode working set stays. Sans-I/O: the caller holds
the core's lock and starts the orders.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from moetier.access import Access, ExpertKey, Part, Phase
from moetier.residency import Residency

if TYPE_CHECKING:
    from moetier.eventlog import Recorder

SATURATED = 0.75  # share of a layer's experts that an access needs for the next layer's needs to be taken as known


class Ahead(Protocol):
    """What starts loads for the access after the running one; called by the cache, which holds the core's lock."""

    def demanded(self, access: Access) -> None:
        """After `acquire`."""

    def released(self, access: Access) -> None:
        """After a release, when no expert of the access waits for a slot any more."""


class StreamAhead:
    """For `core`; `experts` are those of each layer."""

    def __init__(self, core: Residency | Recorder, experts: tuple[int, ...]):
        self._core, self._experts = core, experts
        self._staged: dict[int, set[ExpertKey]] = {}  # by layer, not demanded yet
        self._next: dict[int, int] = {}  # by layer: the first expert that was not looked at
        self.issued = 0

    def demanded(self, access: Access) -> None:
        """After `acquire`: what was staged for this layer has been found, or will not be wanted."""
        staged = self._staged.pop(access.layer, None)
        self._next.pop(access.layer, None)
        for key in staged.difference(access.keys) if staged else ():
            self._core.cancel(key)

    def released(self, access: Access) -> None:
        """After a release, when no expert of the access waits for a slot any more."""
        layer = access.layer + 1
        if access.phase is not Phase.PREFILL or access.part > Part.FORWARD or layer >= len(self._experts):
            return
        if len(access.keys) < SATURATED * self._experts[access.layer]:
            return
        staged = self._staged.setdefault(layer, set())
        for expert in range(self._next.get(layer, 0), self._experts[layer]):  # in the order of the next access
            key = ExpertKey(layer, expert)
            if not self._core.holds(key):
                if not self._core.prefetch(key, staged=True):
                    break
                staged.add(key)
                self.issued += 1
            self._next[layer] = expert + 1
