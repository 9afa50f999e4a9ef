"""The books of a training run: which steps each expert has had, and which it still owes.

A step of a layer is an optimizer step in which the layer had a gradient, as torch counts the steps of a parameter. An
expert that got no tokens in it has a gradient of zero; what that does to it (decay, momentum that goes on) is done
later, before the expert is used again. Decides what is due; moves no bytes, needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import numpy as np

from moetier.access import ExpertKey
from moetier.errors import StoreError

H = TypeVar("H")  # what a step is made with: learning rate and the like

MOST_OWED = 256  # steps an expert may owe: the hyperparameters of so many are kept


class Ledger(Generic[H]):
    """Steps of the experts of all layers.

    `done[layer, expert]` is the last step of the layer that the expert has had, `updates` how many gradients it has
    had, `begun` whether it has optimizer state, `versions` counts the changes of its weights in this process.
    """

    def __init__(self, counts: Sequence[int]):
        """`counts` are the experts of each layer."""
        self.counts = tuple(counts)
        shape = (len(counts), max(counts))
        self.steps = [0] * len(counts)
        self.done = np.zeros(shape, np.int64)
        self.updates = np.zeros(shape, np.int64)
        self.begun = np.zeros(shape, np.bool_)
        self.versions = np.zeros(shape, np.int64)
        self._history: list[dict[int, H]] = [{} for _ in counts]

    def begin(self, layer: int, hyper: H) -> int:
        """Another step of a layer; its number, from 1."""
        self.steps[layer] += 1
        self._history[layer][self.steps[layer]] = hyper
        return self.steps[layer]

    def updated(self, key: ExpertKey) -> None:
        """The expert's gradient of the layer's last step is in its weights."""
        self.done[key] = self.steps[key.layer]
        self.updates[key] += 1
        self.versions[key] += 1

    def caught_up(self, key: ExpertKey, changed: bool) -> None:
        """The expert owes nothing any more."""
        self.done[key] = self.steps[key.layer]
        self.versions[key] += changed

    def behind(self, layer: int, experts: Iterable[int] | None = None, by: int = 1) -> list[ExpertKey]:
        """Those of the experts (None: all of the layer) that owe at least `by` steps."""
        due = self.steps[layer] - by
        done = self.done[layer, : self.counts[layer]]
        if experts is None:
            return [ExpertKey(layer, int(expert)) for expert in np.flatnonzero(done <= due)]
        return [ExpertKey(layer, expert) for expert in experts if done[expert] <= due]

    def owed(self, key: ExpertKey) -> list[H]:
        """The steps that the expert has missed, oldest first."""
        history = self._history[key.layer]
        return [history[step] for step in range(int(self.done[key]) + 1, self.steps[key.layer] + 1)]

    def forget(self, layer: int) -> None:
        """Drop the history that no expert of the layer owes."""
        history, least = self._history[layer], int(self.done[layer, : self.counts[layer]].min())
        for step in [step for step in history if step <= least]:
            del history[step]

    # -- in a checkpoint -----------------------------------------------------------------------------------------------

    def save(self, plain: Any) -> dict[str, Any]:
        """As JSON; `plain(hyper)` makes a JSON value of a step's hyperparameters."""
        return {
            "steps": list(self.steps),
            "done": self.done.tolist(),
            "updates": self.updates.tolist(),
            "begun": self.begun.astype(int).tolist(),
            "history": [{str(step): plain(hyper) for step, hyper in layer.items()} for layer in self._history],
        }

    def load(self, saved: Mapping[str, Any], made: Any) -> None:
        """Take over what `save` gave; `made` is the inverse of its `plain`. Raises `StoreError` if it does not fit."""
        try:
            tables = {name: np.array(saved[name], np.int64) for name in ("done", "updates", "begun")}
            steps: Sequence[int] = [int(step) for step in saved["steps"]]
            history = [{int(step): made(value) for step, value in layer.items()} for layer in saved["history"]]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StoreError(f"the checkpoint's books of steps are damaged: {error}") from error
        shape = self.done.shape
        if any(table.shape != shape for table in tables.values()) or len(steps) != shape[0] or len(history) != shape[0]:
            raise StoreError(
                f"the checkpoint's books of steps are not those of {shape[0]} layers of {shape[1]} experts"
            )
        self.steps, self._history = list(steps), history
        self.done, self.updates = tables["done"], tables["updates"]
        self.begun = tables["begun"].astype(np.bool_)
        self.versions = np.zeros(shape, np.int64)
