"""The training engine against ordinary parameters and torch's fused optimizers: the same bits at any size."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from memory_store import MemoryStore
from moetier.access import Access, ExpertKey, Part
from moetier.errors import ConfigError, MoetierError, StoreError
from moetier.record import RecordLayout
from moetier.training.applied import Applied
from moetier.training.caches import small_cache
from moetier.training.engine import TrainingEngine
from moetier.training.gradients import gradient_layout
from moetier.training.ledger import Ledger
from moetier.training.optimizers import make_optimizer
from moetier.training.proxy import Proxy

LAYERS, EXPERTS, STEPS = 2, 6, 12
KINDS = ["sgd", "sgd(weight_decay=0.1)", "momentum(weight_decay=0.01)", "adamw(weight_decay=0.1)", "adam"]


def layout(dtype: torch.dtype) -> RecordLayout:
    return RecordLayout.of([("gate_up_proj", dtype, (10, 7)), ("down_proj", dtype, (7, 5))])


class Rig:
    """An engine over stores in memory, and the same experts as parameters."""

    def __init__(self, kind: str, slots: int, dtype: torch.dtype = torch.float32, when: Any = "step"):
        self.optimizer = make_optimizer(kind)
        layouts, counts = [layout(dtype)] * LAYERS, [EXPERTS] * LAYERS
        self.store = MemoryStore(layouts, counts)
        self.parameters: dict[ExpertKey, dict[str, torch.Tensor]] = {}
        generator = torch.Generator().manual_seed(0)
        for key, data in self.store.data.items():
            views = layouts[0].views(torch.frombuffer(data, dtype=torch.uint8))
            for view in views.values():
                view.copy_(torch.randn(view.shape, generator=generator))
            self.parameters[key] = {name: view.clone().requires_grad_() for name, view in views.items()}
        gradients = MemoryStore([gradient_layout(each) for each in layouts], counts)
        self.proxies = [Proxy() for _ in range(LAYERS)]
        weights = small_cache(self.store, slots, counts, 1)
        self.engine = TrainingEngine(weights, small_cache(gradients, slots, counts, 1), self.proxies, counts)
        states = [self.optimizer.state_layout(each) for each in layouts]
        state = None
        if states[0] is not None:
            state = small_cache(MemoryStore([each for each in states if each], counts), slots, counts, 1)
        self.engine.applied = Applied(self.optimizer, state, self.engine.weights, self.engine.ledger, "dense", when)

    def backward(self, layer: int, experts: list[int], seed: int) -> None:
        """Forward and backward of some experts of a layer, in the engine and in the parameters."""
        keys = tuple(ExpertKey(layer, expert) for expert in experts)
        list(self.engine.fresh(Access(0, layer, keys), self.engine.weights.batches))
        self.gradients(keys, seed)

    def gradients(self, keys: Sequence[ExpertKey], seed: int) -> None:
        """Gradients for experts of a layer."""
        generator = torch.Generator().manual_seed(seed)
        if not keys:
            return
        with self.engine.collect(Access(0, keys[0].layer, tuple(keys))) as add:
            for key in keys:
                made = {}
                for name, parameter in self.parameters[key].items():
                    made[name] = torch.randn(parameter.shape, generator=generator)
                    if parameter.grad is None:
                        parameter.grad = made[name].clone()
                    else:
                        parameter.grad += made[name]
                add(key, made)

    def weights(self) -> dict[ExpertKey, dict[str, torch.Tensor]]:
        self.engine.catch_up_all()
        found = {}
        for layer in range(LAYERS):
            keys = tuple(ExpertKey(layer, expert) for expert in range(EXPERTS))
            for lease in self.engine.weights.stream(Access(0, layer, keys)):
                found[lease.key] = {name: field.clone() for name, field in lease.fields.items()}
        return found

    def close(self) -> None:
        self.engine.weights.close()
        self.engine.close()


@pytest.fixture
def rig() -> Iterator[Any]:
    made: list[Rig] = []

    def make(*args: Any, **kwargs: Any) -> Rig:
        made.append(Rig(*args, **kwargs))
        return made[-1]

    yield make
    for one in made:
        one.close()


def of_torch(kind: str, parameters: list[torch.Tensor], lr: float) -> torch.optim.Optimizer:
    group = make_optimizer(kind).settings.group() | {"lr": lr}
    name = kind.partition("(")[0]
    classes: dict[str, Any] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    made: torch.optim.Optimizer = classes.get(name, torch.optim.SGD)(parameters, fused=True, **group)
    return made


def settings(rig: Rig, lr: float) -> list[Any]:
    own = rig.optimizer.settings
    return [type(own)(**own.group() | {"lr": lr})] * LAYERS


def unscaled(key: ExpertKey, square: float) -> float:
    return 1.0


def experts_of(step: int, layer: int) -> list[int]:
    """A few of the layer's experts; the last one never, the one before only in the beginning."""
    generator = torch.Generator().manual_seed(100 * step + layer)
    drawn = set(torch.randperm(EXPERTS - 2, generator=generator)[:2].tolist())
    return sorted(drawn | ({EXPERTS - 2} if step < 2 else set()))


@pytest.mark.parametrize("slots", [1, 3, 12])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_those_of_torch_with_zero_gradients_for_the_idle(rig: Any, kind: str, slots: int) -> None:
    mine = rig(kind, slots)
    every = [p for fields in mine.parameters.values() for p in fields.values()]
    theirs = of_torch(kind, every, 0.1)
    for step in range(STEPS):
        lr = 0.1 / (step + 1)
        theirs.param_groups[0]["lr"] = lr
        for part in range(1 + step % 2):  # micro-batches
            for layer in reversed(range(LAYERS)):
                mine.backward(layer, experts_of(step + part, layer), step * 10 + part)
        for parameter in every:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        theirs.step()
        theirs.zero_grad()
        mine.engine.step(settings(mine, lr), unscaled)
        assert not mine.engine.pending
    for key, fields in mine.weights().items():
        for name, field in fields.items():
            assert torch.equal(field, mine.parameters[key][name]), (key, name)


def test_skipped_experts_keep_their_own_count(rig: Any) -> None:
    """As torch treats parameters whose gradient is None."""
    mine = rig("adamw(weight_decay=0.1)", 2)
    mine.engine.applied.idle = "skip"
    theirs = of_torch("adamw(weight_decay=0.1)", [p for f in mine.parameters.values() for p in f.values()], 0.1)
    for step in range(STEPS):
        for layer in reversed(range(LAYERS)):
            mine.backward(layer, experts_of(step, layer), step)
        theirs.step()
        theirs.zero_grad()
        mine.engine.step(settings(mine, 0.1), unscaled)
    for key, fields in mine.weights().items():
        for name, field in fields.items():
            assert torch.equal(field, mine.parameters[key][name]), (key, name)


def test_a_layer_without_gradients_makes_no_step(rig: Any) -> None:
    mine = rig("adamw(weight_decay=0.1)", 2)
    mine.backward(1, [2], 0)
    mine.engine.step(settings(mine, 0.1), unscaled)
    mine.engine.settle()
    assert [mine.engine.ledger.steps(layer) for layer in range(LAYERS)] == [0, 1]
    assert mine.engine.ledger.behind(0) == [] and len(mine.engine.ledger.behind(1)) == EXPERTS - 1


def test_updates_wait_for_the_next_forward(rig: Any) -> None:
    """A step moves nothing; a forward updates what it needs on its own leases, and what it does not need before."""
    mine = rig("momentum", 3)
    mine.backward(0, [0, 1, 2], 0)
    weights = {key: bytes(data) for key, data in mine.store.data.items()}
    misses = sum(mine.engine.weights.stats()["tiers"][0]["misses"])
    mine.engine.step(settings(mine, 0.1), unscaled)
    keys = [ExpertKey(0, expert) for expert in range(3)]
    assert mine.engine.lazy.due(0) == keys and not mine.engine.pending
    assert [mine.engine.version(key) for key in keys] == [1, 1, 1]
    assert sum(mine.engine.weights.stats()["tiers"][0]["misses"]) == misses
    assert {key: bytes(data) for key, data in mine.store.data.items()} == weights
    leases = mine.engine.fresh(Access(0, 0, (keys[1], ExpertKey(0, 4))), mine.engine.weights.batches)
    for batch in leases:
        assert [lease.key for lease in batch if mine.engine.lazy.is_due(lease.key)] == []
        assert set(mine.engine.lazy.due(0)) <= {keys[1]}
    assert [mine.engine.version(key) for key in keys] == [1, 1, 1] and not mine.engine.lazy.due(0)
    assert {key: bytes(data) for key, data in mine.store.data.items()} != weights


OPERATIONS = st.one_of(
    st.tuples(
        st.sampled_from(["forward", "backward", "late"]),
        st.integers(0, LAYERS - 1),
        st.sets(st.integers(0, EXPERTS - 1), min_size=1, max_size=4),
    ),
    st.tuples(st.sampled_from(["step", "settle", "flush"]), st.just(0), st.just(set())),
)


@pytest.mark.parametrize("kind", ["sgd", "momentum(weight_decay=0.01)", "adamw(weight_decay=0.1)"])
@hypothesis.given(st.sampled_from([1, 2, 5, 12]), st.lists(OPERATIONS, max_size=24))
@hypothesis.settings(derandomize=True, deadline=None, max_examples=40)
def test_any_order_of_forwards_backwards_and_steps(kind: str, slots: int, operations: list[Any]) -> None:
    """ "late" is the backward of a graph that is older than the last step."""
    mine = Rig(kind, slots)
    every = {key: list(fields.values()) for key, fields in mine.parameters.items()}
    theirs = [of_torch(kind, [p for key in every if key.layer == n for p in every[key]], 0.1) for n in range(LAYERS)]
    try:
        for number, (what, layer, experts) in enumerate(operations):
            keys = tuple(ExpertKey(layer, expert) for expert in sorted(experts))
            if what == "forward":
                list(mine.engine.fresh(Access(0, layer, keys), mine.engine.weights.batches))
            elif what == "backward":
                mine.backward(layer, sorted(experts), number)
            elif what == "late":
                mine.gradients([key for key in keys if not mine.engine.lazy.waiting(layer, [key])], number)
            elif what == "step":
                for layer, optimizer in enumerate(theirs):
                    own = [p for key in every if key.layer == layer for p in every[key]]
                    if any(p.grad is not None for p in own):
                        for p in own:
                            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                        optimizer.step()
                        optimizer.zero_grad()
                mine.engine.step(settings(mine, 0.1), unscaled)
            else:
                getattr(mine.engine, what)()
        for key, fields in mine.weights().items():
            for name, field in fields.items():
                assert torch.equal(field, mine.parameters[key][name]), (key, name)
    finally:
        mine.close()


@pytest.mark.parametrize("writes", [0, 1])
def test_records_that_cannot_be_written_make_updates_wait(rig: Any, writes: int) -> None:
    mine = rig("sgd", 1)
    theirs = of_torch("sgd", [p for fields in mine.parameters.values() for p in fields.values()], 0.1)
    mine.backward(0, [0, 1, 2], 0)
    theirs.step()
    mine.store.refuse = mine.store.writes + writes
    mine.engine.step(settings(mine, 0.1), unscaled)
    for call in (lambda: mine.backward(0, [0, 1, 2], 1), mine.engine.flush):
        with pytest.raises(StoreError, match="the disk is full"):
            call()
    mine.store.refuse = None
    for key, fields in mine.weights().items():
        for name, field in fields.items():
            assert torch.equal(field, mine.parameters[key][name]), (key, name)


@pytest.mark.parametrize("when", ["step", "backward"])
def test_an_update_that_fails_ends_training(rig: Any, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = rig("sgd", 1, when=when)
    mine.engine.upcoming = lambda: (settings(mine, 0.1), unscaled)

    def fail(*_: Any) -> None:
        raise MemoryError("no memory is left")

    monkeypatch.setattr(mine.optimizer, "step", fail)
    with pytest.raises(MemoryError):
        mine.backward(0, [0, 1, 2], 0)
        mine.engine.step(settings(mine, 0.1), unscaled)
        mine.backward(0, [0, 1, 2], 1)
    for call in (mine.engine.catch_up_all, lambda: mine.engine.add(ExpertKey(0, 0), {})):
        with pytest.raises(MoetierError, match="it goes on from the last checkpoint"):
            call()


def test_updates_in_a_backward_through_two_forwards(rig: Any) -> None:
    """The second one's experts, other ones, have not missed the step that the first one's gradients begin."""
    mine = rig("adamw(weight_decay=0.1)", 3, when="backward")
    mine.engine.upcoming = lambda: (settings(mine, 0.1), unscaled)
    theirs = of_torch("adamw(weight_decay=0.1)", [p for f in mine.parameters.values() for p in f.values()], 0.1)
    for step in range(2):
        uses = [[ExpertKey(layer, expert) for expert in two] for layer in range(LAYERS) for two in ((0, 1), (2, 3))]
        for keys in uses:
            list(mine.engine.fresh(Access(0, keys[0].layer, tuple(keys)), mine.engine.weights.batches))
        versions = [list(map(mine.engine.version, keys)) for keys in uses]
        for number, keys in enumerate(uses):
            again = Access(0, keys[0].layer, tuple(keys), part=Part.BACKWARD)
            list(mine.engine.fresh(again, mine.engine.weights.batches))
            assert list(map(mine.engine.version, keys)) == versions[number]
            mine.gradients(keys, 10 * step + number)
        for fields in mine.parameters.values():
            for parameter in fields.values():
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        theirs.step()
        theirs.zero_grad()
        mine.engine.close_step()
    for key, fields in mine.weights().items():
        for name, field in fields.items():
            assert torch.equal(field, mine.parameters[key][name]), (key, name)


def test_the_proxy_shows_the_norm_and_hands_back_what_was_done_to_it(rig: Any) -> None:
    mine = rig("sgd", 2)
    mine.backward(0, [0, 3], 0)
    every = [p.grad.reshape(-1) for f in mine.parameters.values() for p in f.values() if p.grad is not None]
    proxy = mine.proxies[0]
    assert proxy.weight.grad.item() == pytest.approx(torch.cat(every).norm().item(), rel=1e-6)
    assert proxy.factor() == 1.0 and mine.proxies[1].weight.grad is None
    proxy.weight.grad *= 0.25
    assert proxy.factor() == 0.25
    mine.engine.clear()
    assert proxy.weight.grad is None and proxy.factor() == 1.0 and not mine.engine.pending
    proxy.show(0.0)
    proxy.weight.grad += 1.0
    with pytest.raises(ConfigError, match="can be scaled, not shifted"):
        proxy.factor()
    assert not proxy.state_dict()


def test_the_books_come_back_as_they_were(rig: Any) -> None:
    mine = rig("momentum", 2)
    for step in range(3):
        mine.backward(0, experts_of(step, 0), step)
        mine.engine.step(settings(mine, 0.1 / (step + 1)), unscaled)
    template = mine.optimizer.settings
    again = Ledger([EXPERTS] * LAYERS)
    again.load(json.loads(json.dumps(mine.engine.ledger.save())), template)
    for expert in range(EXPERTS):
        assert again.owed(ExpertKey(0, expert)) == mine.engine.ledger.owed(ExpertKey(0, expert))
    assert again.save() == mine.engine.ledger.save()
    for damaged in ({}, {"done": [[1]]}, mine.engine.ledger.save() | {"done": [[0]]}):
        with pytest.raises(StoreError, match="books of steps"):
            again.load(damaged, template)
