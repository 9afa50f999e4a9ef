"""Zigzag: evict the expert whose next use is farthest away, in the order in which a training step visits the layers.

Forward goes up through the layers, backward comes down, and needs in every layer exactly what forward needed there;
then the optimizer may pass once more. A cache sees some of these passes (one of gradients never sees a forward), in an
order that repeats, so the policy takes what followed a kind of pass last for what will follow it next. From that it has
for every expert the accesses ahead at which it may be used, with the chance u that it is:

- in a backward: 1 if a forward used it and its backward is still to come, else 0;
- in an update: 1 if a backward has used it since the last update, else 0;
- in a forward, and where the cache does not see the passes before: how often it was used in such passes lately.

The distance is the expected one to the first use: the sum of t * u over the accesses ahead, each u times the chance
that nothing before needs the expert. Without training only forwards follow each other, and what remains is the order
of the layers with the frequency of use. Belady's rule (1966) with what is known of the future.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from moetier.access import Access, ExpertKey, Part
from moetier.errors import ConfigError
from moetier.policies.ranking import Ranked

AHEAD = 5  # passes that are looked through, the running one included
DOWN = Part.BACKWARD  # the only one that visits the last layer first


class Zigzag(Ranked):
    """Evicts the largest expected distance; `memory` is how much of an expert's frequency of use stays at a pass."""

    def __init__(self, layers: int, experts: int, slots: int, memory: float = 0.8):
        super().__init__(layers, experts, slots)
        if not 0 <= memory < 1:
            raise ConfigError(f"zigzag: memory must be at least 0 and below 1, got {memory!r}")
        self._memory = memory
        records = layers * experts
        self._used: dict[Part, NDArray[np.float32]] = {}  # frequency of use, by kind of pass that was seen
        self._pending = np.zeros(records, np.float32)  # forwards whose backward is still to come
        self._touched = np.zeros(records, np.float32)  # used in a backward since the last update
        self._follows = {Part.FORWARD: DOWN}  # kind of pass -> what came after it last
        self._part, self._layer = Part.SERVE, layers - 1
        self._seen: set[int] = set()  # used since the pass came to this layer
        self._again = False  # some of it for a second time
        self._twice = False  # backward uses everything twice: to compute it again, then for gradients
        self._one_by_one = False  # a layer's experts come as accesses of their own
        self._distance: NDArray[np.float32] | None = None

    def on_access(self, access: Access) -> None:
        """Where the step is, and what it used."""
        part, layer = access.part, access.layer
        here = {Part.FORWARD: self._layer + 1, DOWN: self._layer or None}  # where an update is none of a pass:
        if part is Part.UPDATE and layer == here.get(self._part):
            return  # an expert that was idle catches up, or one is updated by its very backward
        ids = [layer * self._experts + key[1] for key in access.keys]
        stays = (part, layer) == (self._part, self._layer) and part > Part.FORWARD  # a forward asks for a layer once
        if not stays:
            self._move_on(part, layer)
        self._again = self._again or not self._seen.isdisjoint(ids)
        self._seen.update(ids)
        self._one_by_one = len(ids) == 1
        self._distance = None
        self._used[part][ids] += 1 - self._memory
        if part is Part.UPDATE:
            self._touched[ids] = 0
        elif part is Part.FORWARD:
            self._pending[ids] += 1
        elif part is DOWN:
            self._touched[ids] = 1
            if self._again or not self._twice:
                self._pending[ids] = np.maximum(self._pending[ids] - 1, 0)

    def _move_on(self, part: Part, layer: int) -> None:
        """To another layer, or to another pass."""
        before = self._part
        if part is not before or (layer >= self._layer if part is DOWN else layer <= self._layer):
            if before is not Part.FORWARD or part in (Part.FORWARD, DOWN):  # else its graph was thrown away
                self._follows[before] = part
            if part is Part.FORWARD and part is not before:
                self._pending.fill(0)  # of graphs that nobody went back through
            if before is Part.UPDATE:
                self._touched.fill(0)
        if before is DOWN:
            self._twice = self._again
        self._part, self._layer = part, layer
        self._seen.clear()
        self._again = False
        if part not in self._used:
            self._used[part] = np.full(len(self._pending), 0.5, np.float32)
        self._used[part][layer * self._experts : (layer + 1) * self._experts] *= self._memory

    def victims(self, access: Access) -> Iterator[ExpertKey]:
        """Farthest expected use first."""
        if self._distance is None:
            self._distance = self._look_ahead()
        return self._residents.ascending(np.negative(self._distance.take(self._residents.ids())))

    def _look_ahead(self) -> NDArray[np.float32]:
        """Accesses until the first use, expected, of every record."""
        layers, part = self._layers, self._part
        number = np.arange(layers, dtype=np.float32)
        turn = layers - 1 - number  # place of every layer in a pass that goes down
        place = turn if part is DOWN else number
        until = place - place[self._layer]  # accesses until the running pass is at the layer
        left = float(layers - 1 - place[self._layer])
        if part > Part.FORWARD:
            until[self._layer] = 0.5  # more of this layer may be to come
        distance = np.zeros((layers, self._experts), np.float32)
        unused = np.ones_like(distance)  # chance that nothing before needs it
        for ahead in range(AHEAD):
            use = self._chance(part).reshape(layers, -1)
            if ahead:
                until = left + 1 + (turn if part is DOWN else number)
                left += layers
            else:
                use = use * (until > 0)[:, None]
                if part > Part.FORWARD and not self._exact(part):
                    use[self._layer] *= self._still_to_come()
            found = unused * use
            distance += found * until[:, None]
            unused -= found
            part = self._follows.get(part, part)
        distance += unused * (left + layers)
        return distance.reshape(-1)

    def _exact(self, part: Part) -> bool:
        """Whether a pass uses what is known from the passes before it."""
        before = {DOWN: Part.FORWARD, Part.UPDATE: DOWN}.get(part)
        return before in self._used

    def _chance(self, part: Part) -> NDArray[np.float32]:
        """That a pass of this kind uses a record, if nothing before it does."""
        if self._exact(part):
            return np.minimum(self._pending, 1) if part is DOWN else self._touched
        return np.minimum(self._used[part], 1) if part in self._used else np.zeros_like(self._pending)

    def _still_to_come(self) -> NDArray[np.float32]:
        """Of this layer, 1 for what the pass may yet ask for: nothing, unless it asks for experts one by one."""
        left = np.full(self._experts, float(self._one_by_one), np.float32)
        left[[identity % self._experts for identity in self._seen]] = 0
        return left
