"""What is applied to the experts of a model: an optimizer, its states, and leases on all that an update needs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from moetier.access import ExpertKey, Part
from moetier.cache import ExpertCache
from moetier.lease import Lease
from moetier.record import RecordLayout
from moetier.training.leases import together
from moetier.training.ledger import Ledger
from moetier.training.optimizers import RecordOptimizer
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
    """The optimizer of the experts: with which states, what it does to idle experts, and when."""

    optimizer: RecordOptimizer
    state: ExpertCache | None  # None: the optimizer has no state
    idle: Idle = "dense"
    when: When = "step"
    usage: Usage | None = None  # where the optimizer depends on how often an expert is used

    def to(self, key: ExpertKey) -> RecordOptimizer:
        """The optimizer of one expert: by its last use, so that it does not matter when it is asked for."""
        return self.optimizer if self.usage is None else self.optimizer.part(self.usage.share(key))

    def needs_state(self, key: ExpertKey, weights: RecordLayout) -> bool:
        """Whether an update of the expert, with weights of this layout, needs its state."""
        return self.state is not None and (self.usage is None or self.to(key).state_layout(weights) is not None)

    def count(self, keys: Iterable[ExpertKey], step: int) -> None:
        """Experts are used in a step of their layer; before it is decided how they are updated."""
        if self.usage is not None:
            for key in keys:
                self.usage.count(key, step)

    def records(
        self,
        ledger: Ledger,
        weights: ExpertCache,
        layer: int,
        keys: Sequence[ExpertKey],
        gradients: ExpertCache | None = None,
        part: Part = Part.UPDATE,
    ) -> Iterator[tuple[ExpertKey, Records]]:
        """The records of every key, the state begun, marked as changed; first those whose state is not needed.

        `part` of the step is what the cache of states is told.
        """
        if self.state is not None and self.usage is not None:
            layout = weights.store.layout(layer)
            needs = {key: self.needs_state(key, layout) for key in keys}
            without = [key for key in keys if not needs[key]]
            yield from self._leased(ledger, weights, without, None, gradients, part)
            keys = [key for key in keys if needs[key]]
        yield from self._leased(ledger, weights, keys, self.state, gradients, part)

    def _leased(
        self,
        ledger: Ledger,
        weights: ExpertCache,
        keys: Sequence[ExpertKey],
        state: ExpertCache | None,
        gradients: ExpertCache | None,
        part: Part,
    ) -> Iterator[tuple[ExpertKey, Records]]:
        caches = [(state, part), (weights, Part.UPDATE), (gradients, Part.UPDATE)]
        for leases in together(keys, [(cache, own) for cache, own in caches if cache is not None]):
            left = list(leases)
            own = left.pop(0) if state is not None else None
            records = Records(left.pop(0), own, left.pop() if left else None)
            records.keep(True)
            key = records.weights.key
            records.begun = state is self.state and not ledger.begun[key]
            if records.begun:
                self.optimizer.begin(records.weights.fields, records.states)
                ledger.begun[key] = True
            yield key, records
