"""The training engine: joins the caches of weights, gradients and optimizer states of a model's experts.

It collects gradients in backward, decides at a step how they are applied, and has that done, and what idle experts
missed, when a forward uses them (`lazy.py`). What is due it asks the ledger, what an update does the record optimizer;
this file moves records between them. It knows nothing of autograd, checkpoints or the rest of the model.

Gradients are `pending` between a backward and its step, and only then. After an error in the middle of an update
the weights in the caches are of two steps: the engine refuses everything from then on, and the way out is the last
checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

import torch

from moetier.access import Access, ExpertKey, Part
from moetier.cache import ExpertCache
from moetier.errors import ConfigError, MoetierError
from moetier.stores import ExpertStore
from moetier.training.applied import Applied
from moetier.training.gradients import Fields, Gradients
from moetier.training.lazy import LazyUpdates
from moetier.training.leases import load_ahead, read_again
from moetier.training.ledger import MOST_OWED, Ledger
from moetier.training.optimizers import Hyper, Settings
from moetier.training.optimizers.clipping import norm_of, scale_, squared_norm
from moetier.training.outbound import Outbound
from moetier.training.proxy import Proxy
from moetier.training.sink import Batches, Take

Scale = Callable[[ExpertKey, float], float]


class TrainingEngine:
    """Trains the experts of one model, whose weights are in the cache `weights`: the sink of its backward.

    `proxies` stand for the experts of each layer; `counts` are the experts of each. With an `outbound` gradients come
    from a GPU: they are taken when they have arrived, all of them before backward ends.
    """

    def __init__(
        self,
        weights: ExpertCache,
        gradients: ExpertCache,
        proxies: Sequence[Proxy],
        counts: Sequence[int],
        outbound: Outbound | None = None,
    ):
        self.outbound = outbound
        self._unshown: set[int] = set()  # layers whose gradients may still be under way
        self.weights, self.gradients, self.proxies = weights, Gradients(gradients), list(proxies)
        self.ledger: Ledger = Ledger(counts)
        self.lazy = LazyUpdates(self.ledger, weights, self.gradients, self._whole)
        # what updates during backward are made with: settings by layer, and scales
        self.upcoming: Callable[[], tuple[Sequence[Settings | None], Scale]] | None = None
        self.coming: Callable[[], Iterator[Access]] = lambda: iter(())  # forwards whose backward is next
        self._ahead: dict[ExpertKey, None] = {}  # experts whose gradients are next, about in this order
        self._first: Sequence[ExpertKey] = ()  # experts of the first layer, whose updates come first
        self.owes = False  # the checkpoint's experts owe steps, and there is no optimizer yet to make them
        self._begun: dict[int, tuple[Hyper, Scale]] = {}  # layers whose step has begun during backward
        self._at_once: dict[int, dict[ExpertKey, float]] = {}  # squared norms, by layer, of what is applied
        self._broken: BaseException | None = None

    @property
    def applied(self) -> Applied | None:
        """The experts' optimizer; None before there is one."""
        return self.lazy.applied

    @applied.setter
    def applied(self, applied: Applied) -> None:
        self.lazy.applied = applied

    # -- forward -------------------------------------------------------------------------------------------------------

    def trains(self, layer: int) -> bool:
        """Whether the experts of a layer are trained."""
        return self.proxies[layer].trains

    def version(self, key: ExpertKey) -> int:
        """Changes whenever the expert's weights do, or will before anyone sees them again."""
        missed = 1 + (key.layer in self._begun)  # not the step under way: the expert's gradient may be still to come
        behind = self.ledger.behind(key.layer, [key.expert], by=missed)
        return int(self.ledger.versions[key]) + len(self.lazy.waiting(key.layer, behind))

    def fresh(self, access: Access, lease: Take) -> Batches:
        """The leases of a forward, on experts that have had all updates: those that wait are made on the way."""
        self.check()
        self._check_books()
        if access.part is Part.BACKWARD and access.layer in self._begun:  # a forward again, while it updates
            return lease(access, None)
        if self.weights.device is not None:  # forward's leases are there; updates are made in host memory
            self.lazy.catch_up(access.layer, access.keys)
            return lease(access, None)
        waiting = set(self.lazy.waiting(access.layer, access.keys))
        self.lazy.settle(access.layer, but=waiting)  # of experts without tokens this time
        return self._updated(access, waiting, lease) if waiting else lease(access, None)

    def _updated(self, access: Access, waiting: Set[ExpertKey], lease: Take) -> Batches:
        self.lazy.expect(access.layer, sorted(waiting))
        with closing(lease(replace(access, writes=True), 1)) as batches:
            for batch in batches:
                for one in batch:
                    if one.key in waiting:
                        self.lazy.make(one)
                yield batch

    def settle(self) -> None:
        """Make the updates that wait for the next forward; afterwards no gradient of a past step is left.

        Raises `StoreError` where records cannot be read or written; what still waits then is made the next time.
        """
        self.check()
        for layer in range(len(self.proxies)):
            self.lazy.settle(layer)

    def catch_up_all(self) -> None:
        """Make all updates that wait; no expert owes a step afterwards."""
        self.settle()
        for layer in range(len(self.proxies)):
            self.lazy.catch_up(layer)

    def anyone_owes(self) -> bool:
        """Whether any expert owes a step."""
        return any(self.ledger.behind(layer) for layer in range(len(self.proxies)))

    # -- backward ------------------------------------------------------------------------------------------------------

    def add(self, key: ExpertKey, gradients: Fields) -> None:
        """An expert's gradient from one backward pass: summed up for the step, or applied at once.

        Raises `ConfigError` where no optimizer is there to take it.
        """
        self.check()
        if self.applied is None:
            raise ConfigError(
                "the experts of this model have gradients but no optimizer: make one (moetier.AdamW(model, lr=…)) "
                "before the first backward, or freeze them (model.requires_grad_(False), or the parameter `proxy` of "
                "a layer's experts)"
            )
        if self.outbound is None:
            self._take(key, gradients)
            return
        if self.outbound.full:
            self._receive(self.outbound)
        self.outbound.send(key, gradients)

    def _take(self, key: ExpertKey, gradients: Fields) -> None:
        assert self.applied is not None
        self._ahead.pop(key, None)
        if self.applied.when == "step":
            self.gradients.add(key, gradients)
            self._load_ahead()
        else:
            self._apply_at_once(key, gradients)

    def _receive(self, outbound: Outbound) -> None:
        with outbound.receive() as (key, gradients):
            self._take(key, gradients)

    @contextmanager
    def collect(self, access: Access) -> Iterator[Callable[[ExpertKey, Fields], None]]:
        """Around one layer's backward, for `add`; in the end the layer's proxy shows the norm of its gradients.

        Gradients from a GPU go on arriving during the layers after it: then it does so when the whole backward ends.
        """
        here = dict(zip(access.keys, self.weights.holding(access.keys), strict=True))
        self._ahead = dict.fromkeys(sorted(access.keys, key=lambda key: not here[key]))  # what is here comes first
        following = next(self.coming(), None)
        if following is not None and self.trains(following.layer):
            self._ahead.update(dict.fromkeys(following.keys))
        *_, first = access, *self.coming()
        self._first = first.keys if self.trains(first.layer) else ()
        self._load_ahead()
        yield self.add
        if self.outbound is None:
            self.show(access.layer)
            return
        self._unshown.add(access.layer)
        if torch._C._current_graph_task_id() == -1:
            self.arrive()
        else:
            torch.autograd.Variable._execution_engine.queue_callback(self.arrive)

    @torch.no_grad()
    def arrive(self) -> None:
        """Take all gradients that are still on their way from a GPU."""
        while self.outbound is not None and self.outbound.under_way:
            self._receive(self.outbound)
        while self._unshown:
            self.show(self._unshown.pop())

    def _load_ahead(self) -> None:
        """Load what the next gradients of this backward go to: their sums, or the states that they are applied to.

        Beside the sums the states that the step's updates begin with, while the disk has time. They take the slots of
        the last layer's, which the updates would take from them anyway.
        """
        if self.applied is None:
            return
        if self.applied.when == "step":
            load_ahead(self.gradients.cache, self._ahead)
            self.applied.load_states_ahead(self._first)
        else:
            self.applied.load_states_ahead(self._ahead)

    def show(self, layer: int) -> None:
        """Make the norm of a layer's gradients so far the gradient of its proxy."""
        squares = self.squares(layer)
        self.proxies[layer].show(norm_of(squares.values()) if squares else None)

    def squares(self, layer: int) -> Mapping[ExpertKey, float]:
        """The squared 2-norms of the gradients of a layer's experts."""
        at_once = self.applied is not None and self.applied.when == "backward"
        return (self._at_once if at_once else self.gradients.squares).get(layer, {})

    @property
    def pending(self) -> bool:
        """Whether there are gradients that no step has taken."""
        under_way = self.outbound is not None and self.outbound.under_way
        return bool(self.gradients.squares or self._at_once or under_way)

    def clear(self) -> None:
        """Forget all gradients that no step has taken. Raises `ConfigError` for such as were applied already."""
        if self._at_once:
            raise ConfigError(
                "update='backward': the gradients of this backward are in the experts already, so they cannot be "
                "dropped; call optimizer.step() after every backward, or use update='step'"
            )
        self._unshown.clear()
        if self.outbound is not None:
            self.outbound.drop()
        self.gradients.clear()
        for proxy in self.proxies:
            proxy.show(None)

    # -- the step ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, settings: Sequence[Settings | None], scale: Scale) -> None:
        """One optimizer step of all layers that have a gradient. Experts get it before they are used again.

        `settings` (None: no optimizer has the layer) are per layer; `scale(key, squared norm)` is what an expert's
        gradient is multiplied by first. Where the weights have a device above them, experts get it now.
        """
        self.check()
        with self._whole():
            for layer, own in enumerate(settings):
                if own is not None and layer in self.gradients.squares:
                    self._step_layer(layer, own, scale)
            self.lazy.expect(-1, ())
        self.clear()

    def _step_layer(self, layer: int, settings: Settings, scale: Scale) -> None:
        applied = self.applied
        assert applied is not None
        self.lazy.settle(layer)  # a step that no forward has followed
        squares = self.gradients.take(layer)
        hyper = self.ledger.begin(layer, settings)
        applied.count(squares, hyper.step)
        self.lazy.defer(layer, hyper, {key: scale(key, square) for key, square in squares.items()})
        if self.weights.device is not None:
            self.lazy.settle(layer)
        self._forget(layer)

    def _forget(self, layer: int) -> None:
        """Bring experts up to date that owe very many steps, and drop the history that none owes."""
        self.lazy.catch_up(layer, self.ledger.behind(layer, by=MOST_OWED))
        self.ledger.forget(layer)

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Around updates: an error in the middle leaves experts of two steps, and the engine refuses to go on."""
        try:
            yield
        except BaseException as error:
            self._broken = error
            raise

    def usage(self) -> Any:
        """How often experts are used, for a checkpoint; None where nobody asks."""
        usage = None if self.applied is None else self.applied.usage
        return None if usage is None else usage.to_json()

    # -- updates during backward ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def _apply_at_once(self, key: ExpertKey, gradients: Fields) -> None:
        applied = self.applied
        assert applied is not None and self.upcoming is not None
        layer = key.layer
        squares = self._at_once.setdefault(layer, {})
        if key in squares:
            raise ConfigError(
                "update='backward' takes one backward per step, and this is another one; use update='step' to "
                "accumulate gradients"
            )
        squares[key] = squared_norm(gradients.values())
        with self._whole():
            if layer not in self._begun:
                settings, scale = self.upcoming()
                own = settings[layer]
                assert own is not None
                self._begun[layer] = (self.ledger.begin(layer, own), scale)
            hyper, scale = self._begun[layer]
            applied.count([key], hyper.step)
            scale_(gradients.values(), scale(key, squares[key]))
            with applied.records(key, part=Part.BACKWARD) as records:
                self._load_ahead()
                applied.update(records, gradients, hyper)

    def check_factors(self, factors: Sequence[float]) -> None:
        """Raise `ConfigError` if gradients were scaled that are in the experts already."""
        if any(factor != 1.0 for factor in factors):
            self._broken = ConfigError(
                "update='backward': the gradients were scaled or clipped after backward had applied them to the "
                "experts; use update='step' with accumulation, loss scaling and clipping by the global norm"
            )
            raise self._broken

    def close_step(self) -> None:
        """The end of a step whose updates were made during backward."""
        self.check()
        for layer in self._begun:
            self._forget(layer)
        self._begun.clear()
        self._at_once.clear()
        self.clear()

    # -- the whole ----------------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Make the updates that wait, and write everything changed home: weights and states. Raises `StoreError`."""
        self.settle()
        for cache in self._kept():
            cache.flush()

    def rewind(self, home: Callable[[], None], saved: Mapping[str, Any]) -> None:
        """Have the experts as they are at home after `home()` took that back to a step with these `saved` books.

        Graphs of forwards before it must not be used any more.
        """
        self.check()
        for cache in self._kept():
            cache.flush()  # nothing is on its way home then, and nothing is changed
        applied = self.applied
        assert applied is not None
        try:
            home()
            self.lazy.drop()
            self.ledger.load(saved["ledger"], applied.optimizer.settings)
            if applied.usage is not None:
                applied.usage.load(saved["usage"])
            for cache in self._kept():
                read_again(cache, self.ledger.counts)
        except BaseException as error:
            self._broken = error
            raise

    def settled(self) -> ExpertStore:
        """The store of the weights, with every expert in it as it is by now, none of which owes a step."""
        self._check_books()
        self.catch_up_all()
        self.weights.flush()
        return self.weights.store

    def close(self) -> None:
        """Stop what is the engine's own: the caches of gradients and states, and copies of gradients."""
        if self.outbound is not None:
            self.outbound.close()
        self.gradients.cache.close()
        if self.applied is not None and self.applied.state is not None:
            self.applied.state.close()

    def _kept(self) -> list[ExpertCache]:
        state = None if self.applied is None else self.applied.state
        return [self.weights] if state is None else [self.weights, state]

    def _check_books(self) -> None:
        if self.owes:
            raise ConfigError(
                "experts of this run owe steps that only its optimizer can make; make it (moetier.AdamW(model, …)) "
                "before the first forward or export"
            )

    def check(self) -> None:
        """Raise `MoetierError` where nothing more can be done with the experts in memory."""
        if self._broken is not None:
            raise MoetierError(
                f"training stopped in the middle of an update ({self._broken}), so the experts in memory are of two "
                "steps; load the model again with the same run folder, it goes on from the last checkpoint"
            ) from self._broken
