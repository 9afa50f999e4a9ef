"""Least-Stale: first evict what the current forward pass has not touched (SpecMD, arXiv 2602.03921)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from moetier.access import Access, ExpertKey

Queue = OrderedDict[ExpertKey, None]


class LeastStale:
    """Two FIFO queues, fresh and stale. A use makes an expert fresh; a new forward pass makes everything stale.

    The victim is the first stale expert in the order of layers, then the first fresh one; within a layer, the one that
    joined the queue first. What earlier layers left unused therefore goes before what later layers may still use. (In
    order of arrival alone it would be LRU: a pass visits each layer once.) A pass begins when the layer does not come
    after that of the access before.
    """

    def __init__(self, layers: int, experts: int, slots: int):
        self._stale: list[Queue] = [OrderedDict() for _ in range(layers)]
        self._fresh: list[Queue] = [OrderedDict() for _ in range(layers)]
        self._layer = -1

    def on_access(self, access: Access) -> None:
        """Rotate the queues when a pass begins."""
        if access.layer <= self._layer:
            for layer, fresh in enumerate(self._fresh):
                if fresh and self._stale[layer]:
                    self._stale[layer].update(fresh)
                    fresh.clear()
                elif fresh:
                    self._stale[layer], self._fresh[layer] = fresh, self._stale[layer]
        self._layer = access.layer

    def on_insert(self, key: ExpertKey, access: Access) -> None:
        """Queue up as fresh."""
        self._fresh[key[0]][key] = None

    def on_hit(self, key: ExpertKey, access: Access) -> None:
        """Stale becomes fresh; what is fresh keeps its place."""
        stale = self._stale[key[0]]
        if key in stale:
            del stale[key]
            self._fresh[key[0]][key] = None

    def on_remove(self, key: ExpertKey) -> None:
        """Leave the queue."""
        stale = self._stale[key[0]]
        del (stale if key in stale else self._fresh[key[0]])[key]

    def victims(self, access: Access) -> Iterator[ExpertKey]:
        """Stale by layer, then fresh by layer."""
        for queues in (self._stale, self._fresh):
            for queue in queues:
                yield from queue
