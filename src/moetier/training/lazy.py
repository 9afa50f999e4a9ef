"""Updates that wait for their expert: made when it comes by for the next forward, not in the step itself.

In the step nothing computes while an update's records are fetched. In a forward the weights are fetched anyway, and
the states and gradients of the next experts load while this one's rows are computed. Two kinds of updates wait: with
the gradient of the last step, and the steps that an expert without tokens has missed. Whoever looks at an expert finds
all of them made.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch

from moetier.access import ExpertKey
from moetier.cache import ExpertCache
from moetier.lease import Lease
from moetier.training.applied import Applied, Records
from moetier.training.gradients import Gradients
from moetier.training.leases import AHEAD, load_ahead
from moetier.training.ledger import Ledger
from moetier.training.optimizers import Hyper
from moetier.training.optimizers.clipping import scale_

Around = Callable[[], AbstractContextManager[None]]


@contextmanager
def _by_itself() -> Iterator[None]:
    """Torch as an update finds it in a step of its own: what a forward runs in (autocast, …) would change its bits."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        yield


@dataclass
class Due:
    """A layer's last step: the gradients that are still to be applied, and what each is multiplied by first."""

    hyper: Hyper
    factors: dict[ExpertKey, float]


class LazyUpdates:
    """Makes the updates of experts of the cache `weights`. `applied` is set before there are any.

    Every expert's is made wholly or not at all, `whole` being told of it: where a record cannot be read or written,
    the updates that wait go on waiting.
    """

    def __init__(self, ledger: Ledger, weights: ExpertCache, gradients: Gradients, whole: Around):
        self.applied: Applied | None = None
        self._ledger, self._weights, self._gradients, self._whole = ledger, weights, gradients, whole
        self._due: dict[int, Due] = {}
        self._next: dict[ExpertKey, None] = {}  # experts that come by next, about in this order

    # -- what waits ----------------------------------------------------------------------------------------------------

    def is_due(self, key: ExpertKey) -> bool:
        """Whether a gradient of the last step is still to be applied to the expert."""
        due = self._due.get(key.layer)
        return due is not None and key in due.factors

    def due(self, layer: int) -> list[ExpertKey]:
        """The experts of a layer that this is true of, ascending."""
        due = self._due.get(layer)
        return [] if due is None else list(due.factors)

    def waiting(self, layer: int, keys: Iterable[ExpertKey] | None = None) -> list[ExpertKey]:
        """Those of the experts of a layer that have updates to be made. A missed step that changes nothing is none."""
        if not self._ledger.steps(layer) or self.applied is None:
            return []
        behind = self._ledger.behind(layer, None if keys is None else [key.expert for key in keys])
        return [key for key in behind if self.is_due(key) or self._moves(self.applied, key)]

    def _moves(self, applied: Applied, key: ExpertKey) -> bool:
        """Whether the steps that the expert missed may change it; otherwise they are in the books as made."""
        if applied.idle == "dense" and any(map(applied.to(key).idles, self._ledger.owed(key))):
            return True
        self._ledger.caught_up(key, False)
        return False

    def defer(self, layer: int, hyper: Hyper, factors: Mapping[ExpertKey, float]) -> None:
        """A layer's step, with the gradients that these experts have in the cache of gradients."""
        assert not self.due(layer), "a layer has one step that waits"
        self._due[layer] = Due(hyper, {key: factors[key] for key in sorted(factors)})

    def drop(self) -> None:
        """Forget the gradients that are due: the experts are as they were before the step."""
        for layer in list(self._due):
            self._gradients.forget(self.due(layer))
            del self._due[layer]
        self._next.clear()

    # -- making them ---------------------------------------------------------------------------------------------------

    @_by_itself()
    def make(self, lease: Lease) -> None:
        """The updates of one expert, on a lease that may be changed; its other records are leased beside it."""
        gradients = self._gradients.cache if self.is_due(lease.key) else None
        with self._of().beside(lease, gradients) as records:
            self._make(records)

    @_by_itself()
    def settle(self, layer: int, but: Container[ExpertKey] = ()) -> None:
        """Apply the gradients that are due in a layer, except to some experts."""
        self._make_all([key for key in self.due(layer) if key not in but], self._gradients.cache)

    @_by_itself()
    def catch_up(self, layer: int, keys: Iterable[ExpertKey] | None = None) -> None:
        """Make the steps that experts of a layer (None: all) missed; not for those that have a gradient due."""
        self._make_all([key for key in self.waiting(layer, keys) if not self.is_due(key)], None)

    def _make_all(self, keys: Sequence[ExpertKey], gradients: ExpertCache | None) -> None:
        for number, key in enumerate(keys):
            following = keys[number : number + AHEAD]
            load_ahead(self._weights, following)
            if gradients is not None:
                load_ahead(gradients, following)
            self._of().load_states_ahead(following)
            with self._of().records(key, gradients) as records:
                self._make(records)

    def _make(self, records: Records) -> None:
        applied, key = self._of(), records.weights.key
        self._next.pop(key, None)
        self.load_ahead()
        with self._whole():
            if records.gradients is None:
                applied.idle_steps(records, self._ledger.owed(key))
                return
            due, fields = self._due[key.layer], records.gradients.fields
            scale_(fields.values(), due.factors[key])
            applied.update(records, fields, due.hyper)
            self._gradients.used(records.gradients)
            del due.factors[key]

    def _of(self) -> Applied:
        assert self.applied is not None, "updates without an optimizer"
        return self.applied

    # -- what comes next -----------------------------------------------------------------------------------------------

    def expect(self, layer: int, keys: Iterable[ExpertKey]) -> None:
        """These experts of a layer come by now, in about this order; then the layers above, as far as they are due."""
        after = (key for above in sorted(self._due) if above > layer for key in self._here_first(self.due(above)))
        self._next = dict.fromkeys([*self._here_first(list(keys)), *after])
        self.load_ahead()

    def _here_first(self, keys: Sequence[ExpertKey]) -> Iterator[ExpertKey]:
        here = self._weights.holding(keys)
        yield from (key for key, holds in zip(keys, here, strict=True) if holds)
        yield from (key for key, holds in zip(keys, here, strict=True) if not holds)

    def load_ahead(self) -> None:
        """Load the gradients and states of the next experts."""
        if self._next:
            load_ahead(self._gradients.cache, filter(self.is_due, self._next))
            self._of().load_states_ahead(self._next)
