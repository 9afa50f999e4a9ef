"""What is applied to the experts of a model: an optimizer, its states, and leases on all that an update needs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

import torch

from moetier.access import ExpertKey, Part
from moetier.cache import ExpertCache
from moetier.lease import Lease
from moetier.training.leases import leased, load_ahead
from moetier.training.ledger import Ledger
from moetier.training.optimizers import Hyper, RecordOptimizer
from moetier.training.optimizers.usage import Usage

Idle = Literal["dense", "skip"]
When = Literal["step", "backward"]


@dataclass
class Records:
    """Leases on an expert's records. `begun`: the state was made just now."""

    weights: Lease
    state: Lease | None
    gradients: Lease | None
    begun: bool = False

    @property
    def states(self) -> dict[str, torch.Tensor]:
        """Fields of the state; none where the optimizer has none."""
        return {} if self.state is None else self.state.fields

    def keep(self, changed: bool) -> None:
        """Whether the records were changed, and must be written home."""
        self.weights.dirty = changed
        if self.state is not None:
            self.state.dirty = changed or self.begun


@dataclass
class Applied:
    """The optimizer of the experts whose weights are in a cache: with which states, what it does to idle experts, when.

    `ledger` keeps the books of it.
    """

    optimizer: RecordOptimizer
    state: ExpertCache | None  # None: the optimizer has no state
    weights: ExpertCache
    ledger: Ledger
    idle: Idle = "dense"
    when: When = "step"
    usage: Usage | None = None  # where the optimizer depends on how often an expert is used

    def to(self, key: ExpertKey) -> RecordOptimizer:
        """The optimizer of one expert: by its last use, so that it does not matter when it is asked for."""
        return self.optimizer if self.usage is None else self.optimizer.part(self.usage.share(key))

    def needs_state(self, key: ExpertKey) -> bool:
        """Whether an update of the expert needs its state."""
        if self.state is None or self.usage is None:
            return self.state is not None
        return self.to(key).state_layout(self.weights.store.layout(key.layer)) is not None

    def count(self, keys: Iterable[ExpertKey], step: int) -> None:
        """Experts are used in a step of their layer; before it is decided how they are updated."""
        if self.usage is not None:
            for key in keys:
                self.usage.count(key, step)

    @contextmanager
    def records(
        self, key: ExpertKey, gradients: ExpertCache | None = None, part: Part = Part.UPDATE
    ) -> Iterator[Records]:
        """What `beside` gives, of an expert whose weights are leased for it."""
        with leased(self.weights, key) as lease, self.beside(lease, gradients, part) as records:
            yield records

    @contextmanager
    def beside(
        self, weights: Lease, gradients: ExpertCache | None = None, part: Part = Part.UPDATE
    ) -> Iterator[Records]:
        """All records of an expert whose weights are leased, the state begun, marked as changed.

        `part` of the step is what the cache of states is told.
        """
        key = weights.key
        with ExitStack() as stack:
            state = None
            if self.state is not None and self.needs_state(key):
                state = stack.enter_context(leased(self.state, key, part))
            gradient = None if gradients is None else stack.enter_context(leased(gradients, key))
            records = Records(weights, state, gradient)
            records.keep(True)
            records.begun = state is not None and not self.ledger.begun[key]
            if records.begun:
                self.optimizer.begin(weights.fields, records.states)
                self.ledger.begun[key] = True
            yield records

    def load_states_ahead(self, keys: Iterable[ExpertKey]) -> None:
        """Begin to load the states of the first few of `keys`, whose updates are next."""
        if self.state is not None:
            load_ahead(self.state, filter(self.needs_state, keys))

    def update(self, records: Records, gradients: Mapping[str, torch.Tensor], hyper: Hyper) -> None:
        """One step of an expert with a gradient."""
        key = records.weights.key
        if self.idle == "skip":  # the expert's own count, as of a parameter without a gradient
            hyper = hyper.at(int(self.ledger.updates[key]) + 1)
        self.to(key).update(records.weights.fields, gradients, records.states, hyper)
        self.ledger.updated(key)

    def idle_steps(self, records: Records, missed: Sequence[Hyper]) -> None:
        """The steps that an expert missed, as if each had been made with a gradient of zero."""
        key = records.weights.key
        changed = self.to(key).idle(records.weights.fields, records.states, missed)
        records.keep(changed)
        self.ledger.caught_up(key, changed)
