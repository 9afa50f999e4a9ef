"""Zigzag: evict the expert whose next use is farthest away, in the order in which a training step visits the layers.

Forward goes up through the layers, backward comes down, and needs in every layer exactly what forward needed there; then
the optimizer may pass once more. A cache sees some of these passes (one of gradients never sees a forward), in an order
that repeats, so the policy takes what followed a kind of pass last for what will follow it next. From that it has for
every expert the accesses ahead at which it may be used, with the chance u that it is:

- in a backward: 1 if a forward used it and its backward is still to come, else 0;
- in an update: 1 if a backward has used it since the last update, else 0;
- in a forward, and wherever the cache has not seen the pass before: how often it was used in such passes lately.

The distance is the expected one to the first use: the sum over the accesses ahead of t * u * (1 - u)(1 - u')... of those
before. Without training (accesses that are part of no step) only forwards follow each other, and what remains is the
order of the layers with the frequency of use. Belady's rule (1966) with what is known of the future.
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
        self._follows: dict[Part, Part] = {}  # kind of pass -> what came after it last
        self._part, self._layer = Part.SERVE, layers - 1
        self._visits = 1  # of the layer in a row
        self._twice = False  # backward visits every layer twice: recomputation, then gradients
        self._distance: NDArray[np.float32] | None = None

    def on_access(self, access: Access) -> None:
        """Where the step is, and what it used."""
        part, layer = access.part, access.layer
        turned = part is not self._part or (layer > self._layer if part is DOWN else layer < self._layer)
        again = not turned and layer == self._layer and part is DOWN
        if turned or (layer == self._layer and not again):
            self._follows[self._part] = part
            if part <= Part.FORWARD and self._part > Part.FORWARD:
                self._pending.fill(0)  # graphs that nobody went back through
        if again:
            self._visits += 1
        else:
            if self._part is DOWN:
                self._twice = self._visits > 1
            self._visits = 1
        self._part, self._layer = part, layer
        self._distance = None
        base = layer * self._experts
        ids = [base + key[1] for key in access.keys]
        if part not in self._used:
            self._used[part] = np.full(len(self._pending), 0.5, np.float32)
        used = self._used[part][base : base + self._experts]
        used *= self._memory
        self._used[part][ids] += 1 - self._memory
        if part is Part.UPDATE:
            self._touched[base : base + self._experts] = 0
        elif part is not DOWN:
            self._pending[ids] += 1
        else:
            self._touched[ids] = 1
            if self._visits > 1 or not self._twice:
                self._pending[ids] = np.maximum(self._pending[ids] - 1, 0)

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
        behind = place - place[self._layer]  # accesses until the running pass is at the layer
        left = float(layers - 1 - place[self._layer])
        if self._twice and self._visits == 1 and part is DOWN:
            behind[self._layer] = 0.5  # the very same experts come again at once
        distance = np.zeros((layers, self._experts), np.float32)
        unused = np.ones_like(distance)  # chance that nothing before needs it
        for ahead in range(AHEAD):
            use = self._chance(part).reshape(layers, -1)
            if ahead:
                until = left + 1 + (turn if part is DOWN else number)
                left += layers
            else:
                until = behind
                use = use * (behind > 0)[:, None]
            found = unused * use
            distance += found * until[:, None]
            unused -= found
            part = self._follows.get(part, part)
        distance += unused * (left + layers)
        return distance.reshape(-1)

    def _chance(self, part: Part) -> NDArray[np.float32]:
        """That a pass of this kind uses a record, if nothing before it does."""
        seen = self._used
        if part is DOWN and (Part.FORWARD in seen or Part.SERVE in seen):
            return np.minimum(self._pending, 1)
        if part is Part.UPDATE and DOWN in seen:
            return self._touched
        return seen[part] if part in seen else np.zeros_like(self._pending)
