"""The books of a training run: which steps each expert has had, and which it still owes.

A step of a layer is an optimizer step in which the layer had a gradient, as torch counts the steps of a parameter. An
expert that got no tokens in it has a gradient of zero; what that does to it (decay, momentum that goes on) is done
later, before the expert is used again. Decides what is due; moves no bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from moetier.access import ExpertKey
from moetier.errors import StoreError
from moetier.training.optimizers import Hyper, Settings
from moetier.training.optimizers.history import StepHistory

MOST_OWED = 1024  # steps an expert may owe before it catches up: the settings of so many are kept


class Ledger:
    """Steps of the experts of all layers.

    `done[layer, expert]` is the last step of the layer that the expert has had, `updates` how many gradients it has
    had, `begun` whether it has optimizer state, `versions` counts the changes of its weights in this process.
    """

    def __init__(self, counts: Sequence[int]):
        """`counts` are the experts of each layer."""
        self.counts = tuple(counts)
        shape = (len(counts), max(counts))
        self.done = np.zeros(shape, np.int64)
        self.updates = np.zeros(shape, np.int64)
        self.begun = np.zeros(shape, np.bool_)
        self.versions = np.zeros(shape, np.int64)
        self._history: list[StepHistory[Settings]] = [StepHistory() for _ in counts]

    def steps(self, layer: int) -> int:
        """Steps of a layer so far."""
        return self._history[layer].last

    def begin(self, layer: int, settings: Settings) -> Hyper:
        """Another step of a layer."""
        return self._history[layer].append(settings)

    def updated(self, key: ExpertKey) -> None:
        """The expert's gradient of the layer's last step is in its weights."""
        self.done[key] = self.steps(key.layer)
        self.updates[key] += 1
        self.versions[key] += 1

    def caught_up(self, key: ExpertKey, changed: bool) -> None:
        """The expert owes nothing any more."""
        self.done[key] = self.steps(key.layer)
        self.versions[key] += changed

    def behind(self, layer: int, experts: Iterable[int] | None = None, by: int = 1) -> list[ExpertKey]:
        """Those of the experts (None: all of the layer) that owe at least `by` steps."""
        due = self.steps(layer) - by
        done = self.done[layer, : self.counts[layer]]
        if experts is None:
            return [ExpertKey(layer, int(expert)) for expert in np.flatnonzero(done <= due)]
        return [ExpertKey(layer, expert) for expert in experts if done[expert] <= due]

    def owed(self, key: ExpertKey) -> list[Hyper]:
        """The steps that the expert has missed, oldest first."""
        return self._history[key.layer].missed(int(self.done[key]))

    def forget(self, layer: int) -> None:
        """Drop the history that no expert of the layer owes."""
        self._history[layer].prune(int(self.done[layer, : self.counts[layer]].min()))

    # -- in a checkpoint -----------------------------------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "done": self.done.tolist(),
            "updates": self.updates.tolist(),
            "begun": self.begun.astype(int).tolist(),
            "history": [history.to_json() for history in self._history],
        }

    def load(self, saved: Mapping[str, Any], template: Settings) -> None:
        """Take over what `save` gave, of steps with settings like these. Raises `StoreError` if it does not fit."""
        try:
            tables = {name: np.array(saved[name], np.int64) for name in ("done", "updates", "begun")}
            history = [StepHistory.from_json(template, layer) for layer in saved["history"]]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StoreError(f"the checkpoint's books of steps are damaged: {error}") from error
        shape = self.done.shape
        if any(table.shape != shape for table in tables.values()) or len(history) != shape[0]:
            raise StoreError(f"the checkpoint's books of steps do not fit {shape[0]} layers of {shape[1]} experts")
        self._history = history
        self.done, self.updates = tables["done"], tables["updates"]
        self.begun = tables["begun"].astype(np.bool_)
        self.versions = np.zeros(shape, np.int64)
