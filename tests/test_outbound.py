"""Gradients from a late device, and updates below it: right bytes with every fence, wrong ones without any of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from device_training import CPU, late_device
from fake_cuda import FakeCuda, FakeStream
from memory_store import MemoryStore
from moetier.access import Access, ExpertKey, Part
from moetier.cache import ExpertCache
from moetier.errors import StoreError
from moetier.record import RecordLayout
from moetier.training import leases
from moetier.training.applied import Applied
from moetier.training.caches import small_cache, weights_cache
from moetier.training.engine import TrainingEngine
from moetier.training.gradients import gradient_layout
from moetier.training.optimizers import make_optimizer
from moetier.training.outbound import Outbound
from moetier.training.proxy import Proxy

LAYERS, EXPERTS = 2, 6
COUNTS = [EXPERTS] * LAYERS
LAYOUT = RecordLayout.of([("up", torch.float32, (40, 8)), ("down", torch.float32, (8, 20))])


class LateTraining:
    """The engine with experts of equal numbers, on a device that is late: kernels check weights and make gradients.

    SGD with a rate of 1 and whole numbers as gradients: what every expert has to be is known exactly.
    """

    def __init__(self, cuda: FakeCuda, slots: int, host_slots: int, when: Any, seed: int = 0, limit: int | None = 1):
        self.cuda, self.draw, self.limit = cuda, random.Random(seed), limit
        self.store = MemoryStore([LAYOUT] * LAYERS, COUNTS)
        self.expected: dict[ExpertKey, float] = {}
        for key, data in self.store.data.items():
            self.expected[key] = 100.0 * key.layer + key.expert
            for field in LAYOUT.views(torch.frombuffer(data, dtype=torch.uint8)).values():
                field.fill_(self.expected[key])
        self.weights = weights_cache(self.store, host_slots, COUNTS, 2, 2, "zigzag", "evict", slots, CPU)
        gradients = small_cache(MemoryStore([gradient_layout(LAYOUT)] * LAYERS, COUNTS), 2, COUNTS, 1)
        proxies = [Proxy() for _ in COUNTS]
        self.engine = TrainingEngine(
            self.weights, gradients, proxies, COUNTS, Outbound([LAYOUT] * LAYERS, CPU, 1 + seed % 3)
        )
        self.optimizer = make_optimizer("sgd")
        self.engine.applied = Applied(self.optimizer, None, self.weights, self.engine.ledger, "dense", when)
        self.settings = [type(self.optimizer.settings)(lr=1.0)] * LAYERS
        self.engine.upcoming = lambda: (self.settings, lambda key, square: 1.0)
        self.wrong: list[str] = []
        self.time = 0

    def use(self, fields: dict[str, torch.Tensor], key: ExpertKey) -> None:
        expected = self.expected[key]

        def check() -> None:
            for name, field in fields.items():
                if not bool((field == expected).all()):
                    self.wrong.append(f"{key}.{name} is {set(field.reshape(-1).tolist())} instead of {expected}")

        self.cuda.launch(check)

    def access(self, layer: int, experts: Sequence[int], part: Part) -> Access:
        self.time += 1
        return Access(self.time, layer, tuple(ExpertKey(layer, e) for e in sorted(experts)), part=part)

    def step(self, backwards: int = 1) -> None:
        used = [self.draw.sample(range(EXPERTS), self.draw.randint(1, EXPERTS)) for _ in COUNTS]
        sums: dict[ExpertKey, float] = {}
        for _ in range(backwards):
            for layer in range(LAYERS):
                access = self.access(layer, used[layer], Part.FORWARD)
                for batch in self.engine.fresh(access, self.weights.batches):
                    for lease in batch:
                        self.use(lease.fields, lease.key)
            for layer in reversed(range(LAYERS)):
                access = self.access(layer, used[layer], Part.BACKWARD)
                with self.engine.collect(access) as add:
                    for batch in self.weights.batches(access, self.limit):
                        for lease in batch:
                            self.use(lease.fields, lease.key)
                            made = {name: torch.zeros(field.shape) for name, field in lease.fields.items()}
                            value = float(self.draw.randint(1, 9))
                            sums[lease.key] = sums.get(lease.key, 0.0) + value
                            for one in made.values():
                                self.cuda.launch(lambda one=one, value=value: one.fill_(value))
                            add(lease.key, made)
                            for one in made.values():
                                self.cuda.free(one)
                            self.weights.prefetch([ExpertKey(1 - layer, self.draw.randrange(EXPERTS))])
                self.weights.core.check()
        if self.engine.applied is not None and self.engine.applied.when == "step":
            access = self.access(self.draw.randrange(LAYERS), self.draw.sample(range(EXPERTS), 3), Part.SERVE)
            for batch in self.weights.batches(access):  # an evaluation before the step, whose kernels are late
                for lease in batch:
                    self.use(lease.fields, lease.key)
            self.engine.step(self.settings, lambda key, square: 1.0)
        else:
            self.engine.close_step()
        for key, value in sums.items():
            self.expected[key] -= value
        self.weights.core.check()

    def finish(self) -> None:
        self.weights.flush()
        self.weights.core.check()
        self.weights.close()
        self.engine.close()
        self.cuda.run_all()
        for key, data in self.store.data.items():
            for name, field in LAYOUT.views(torch.frombuffer(data, dtype=torch.uint8)).items():
                if not bool((field == self.expected[key]).all()):
                    self.wrong.append(f"{key}.{name} at home is {set(field.reshape(-1).tolist())}")


def wrong_in(
    monkeypatch: pytest.MonkeyPatch,
    when: str,
    slots: int,
    host_slots: int,
    seed: int,
    haste: float,
    limit: int | None = 1,
) -> list[str]:
    with monkeypatch.context() as patch:
        run = LateTraining(late_device(patch, seed, haste), slots, host_slots, when, seed, limit)
        for _ in range(8):
            run.step(1 if when == "backward" else 1 + seed % 2)
        run.finish()
        assert run.engine.ledger.updates.sum() > 20
        return run.wrong


@pytest.mark.parametrize("when", ["step", "backward"])
@pytest.mark.parametrize(("slots", "host_slots"), [(1, 1), (2, 4), (4, 2), (12, 12)])
def test_every_expert_is_what_its_gradients_make_it(
    when: str, slots: int, host_slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed, haste in ((1, 0.0), (2, 0.2)):
        limit = None if host_slots == 12 else 1  # all leases of a batch held while some of its experts are updated
        assert wrong_in(monkeypatch, when, slots, host_slots, seed, haste, limit) == []


class _NoWait(FakeStream):
    def wait_event(self, event: Any) -> None:
        pass


def _unordered(patch: pytest.MonkeyPatch) -> None:
    made = Outbound.__init__

    def init(self: Outbound, *arguments: Any) -> None:
        made(self, *arguments)
        self._stream.__class__ = _NoWait

    patch.setattr(Outbound, "__init__", init)


def _unwaited(patch: pytest.MonkeyPatch) -> None:
    receive = Outbound.receive

    @contextmanager
    def at_once(self: Outbound) -> Any:
        key, slot, names, _ = self._under_way[0]
        self._under_way[0] = (key, slot, names, torch.cuda.Event())
        with receive(self) as found:
            yield found

    patch.setattr(Outbound, "receive", at_once)


def _unrecorded(patch: pytest.MonkeyPatch) -> None:
    send = Outbound.send

    def forgetful(self: Outbound, *arguments: Any) -> None:
        with patch.context() as inner:
            inner.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
            send(self, *arguments)

    patch.setattr(Outbound, "send", forgetful)


def _changed_while_read(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(leases, "_alone", lambda cache, lease: lease)


@pytest.mark.parametrize(
    ("broken", "when"),
    [
        (_unordered, "step"),  # the copy does not wait for the kernels that make the gradient
        (_unwaited, "step"),  # the host does not wait for the copy
        (_unrecorded, "backward"),  # the gradient's memory is given to others before it is copied
        (_changed_while_read, "step"),  # host memory is updated while it is copied to the device
    ],
    ids=["ordered", "waited", "recorded", "unread"],
)
def test_a_fence_taken_away_is_noticed(
    broken: Callable[[pytest.MonkeyPatch], None], when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str] = []
    broken(monkeypatch)
    for seed in range(12):
        found += wrong_in(monkeypatch, when, 5, 12, seed, 0.05, None)
        if found:
            return
    assert found


@pytest.mark.parametrize("broken", [False, True])
def test_a_device_slot_is_given_up_after_its_kernels(broken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An expert is updated by who still leases it above: the slot's next record waits for kernels with the old one."""
    run = LateTraining(late_device(monkeypatch, 0, 0.0), 1, 4, "step")
    if broken:
        mark = ExpertCache._mark_used
        monkeypatch.setattr(
            ExpertCache, "_mark_used", lambda self, device, lease: None if lease.in_place else mark(self, device, lease)
        )
    key = ExpertKey(0, 3)
    for lease in run.weights.stream(run.access(0, [3], Part.FORWARD)):
        run.use(lease.fields, key)
        with leases.leased(run.weights, key) as below:
            assert below.in_place and not run.weights.core.holds(ExpertKey(1, 1))
            below.dirty = True
            for field in below.fields.values():
                field.fill_(-1.0)
        assert not run.weights.core.holds(key)
        assert run.weights.prefetch([ExpertKey(1, 1)]) == 1
        run.weights.settle()
    run.expected[key] = -1.0
    copies = [stream for stream in run.cuda.streams if stream is not run.cuda.default]
    for _ in range(20):  # the kernels of the default stream are last
        for stream in copies:
            if stream.queue and stream.runnable():
                stream.queue.popleft()()
    run.finish()
    assert bool(run.wrong) == broken


def test_only_the_oldest_copy_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = late_device(monkeypatch, 0, 0.0)
    outbound = Outbound([LAYOUT], CPU, 3)
    for expert in range(3):
        assert not outbound.full
        outbound.send(ExpertKey(0, expert), {"up": torch.full((40, 8), float(expert))})
    assert outbound.full and cuda.host_waits == 0
    later = cuda.event()
    cuda.launch(lambda: None)
    later.record()
    with outbound.receive() as (key, fields):
        assert key == ExpertKey(0, 0) and bool((fields["up"] == 0).all())
    assert cuda.host_waits == 1 and not outbound.full
    outbound.drop()
    assert not outbound.under_way
    outbound.send(ExpertKey(0, 5), {"up": torch.full((40, 8), 5.0)})
    with outbound.receive() as (key, fields):
        assert key == ExpertKey(0, 5) and bool((fields["up"] == 5).all())
    outbound.close()


def test_an_error_while_gradients_are_under_way_ends_training(monkeypatch: pytest.MonkeyPatch) -> None:
    run = LateTraining(late_device(monkeypatch, 1), 3, 1, "backward")
    run.store.refuse = 0
    with pytest.raises(StoreError, match="the disk is full"):
        for _ in range(4):
            run.step()
    with pytest.raises(Exception, match="goes on from the last checkpoint"):
        run.engine.catch_up_all()
    run.store.refuse = None
    run.weights.close()
    run.engine.close()
