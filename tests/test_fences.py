"""The order of copies and kernels on a GPU, without a GPU: right bytes however late the device is.

`fake_cuda` runs what is enqueued as late and in as odd an order as streams and events allow. Every rule of docs/gpu.md
is also taken away once, to see that these tests notice.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fake_cuda
from device_runs import ChangingRun
from moetier import Residency, StoreError, TierConfig, arenas
from moetier.access import Access, ExpertKey, Phase
from moetier.arenas import CHUNK, DeviceArena, HostArena
from moetier.cache import ExpertCache
from moetier.fences import CopyClock, SlotFences
from moetier.lease import Lease
from moetier.record import RecordLayout
from test_cache import EXPERTS, LAYERS, LAYOUT, FakeStore, together

CPU = torch.device("cpu")
NBYTES = 1024
WHOLE = RecordLayout.of([("bytes", torch.uint8, (NBYTES,))])


def shuffle(cuda: fake_cuda.FakeCuda, seed: int, rounds: int = 300) -> list[str]:
    """Fill, use, save and overwrite at random, as workers and streams may; returns what went wrong."""
    draw, wrong = random.Random(seed), []
    arena, host = DeviceArena(3, NBYTES, CPU), HostArena(4, NBYTES, page_locked=True)
    streams = [cuda.default, cuda.stream()]
    version, in_host = 0, [0] * host.slots
    in_slot: list[int | None] = [None] * arena.slots
    for slot in range(host.slots):
        host.record(slot, 0, NBYTES).fill_(slot)
        in_host[slot] = slot
    for _ in range(rounds):
        kind = draw.choice(["fill", "fill", "behind", "use", "use", "use", "overwrite", "overwrite", "save"])
        device_slot, host_slot = draw.randrange(arena.slots), draw.randrange(host.slots)
        content = in_slot[device_slot]
        if kind in ("fill", "behind"):
            fill = arena.fill if kind == "fill" else arena.fill_behind
            host.hold(host_slot, fill(device_slot, host.record(host_slot, 0, NBYTES)))
            in_slot[device_slot] = in_host[host_slot]
        elif kind == "use" and content is not None:
            with cuda.using(draw.choice(streams)):
                bytes_ = arena.views(device_slot, WHOLE)["bytes"]

                def read(bytes_: torch.Tensor = bytes_, content: int = content) -> None:
                    if not bool((bytes_ == content).all()):
                        wrong.append(f"a kernel read {set(bytes_.tolist())} instead of {content}")

                cuda.launch(read)
                arena.used(device_slot)
        elif kind == "overwrite":
            version = (version + 1) % 90
            host.wait_unread(host_slot)
            host.record(host_slot, 0, NBYTES).fill_(version)  # a worker: at once
            in_host[host_slot] = version
        elif kind == "save" and content is not None:
            target = torch.empty(NBYTES, dtype=torch.uint8)
            arena.save(device_slot, target)
            if not bool((target == content).all()):
                wrong.append(f"saved {set(target.tolist())} instead of {content}")
    arena.close()
    cuda.run_all()
    return wrong


@pytest.mark.parametrize("seed", range(12))
def test_every_reader_sees_what_it_should(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = fake_cuda.install(monkeypatch, seed, haste=(0.0, 0.1, 0.5)[seed % 3])
    assert shuffle(cuda, seed) == []


def _forget_uses(self: SlotFences, slot: int, stream: Any) -> None:
    self.before_reading(slot, stream)


def _one_use_per_slot(self: SlotFences, slot: int, stream: Any) -> None:
    event = torch.cuda.Event()
    event.record(stream)
    self._uses[slot] = {0: event}


def _fill_waits_for_uses_only(self: SlotFences, slot: int, stream: Any) -> None:
    for event in self._uses[slot].values():
        stream.wait_event(event)


@pytest.mark.parametrize(
    ("where", "name", "broken"),
    [
        (SlotFences, "before_overwriting", _forget_uses),  # a fill does not wait for the kernels
        (SlotFences, "before_overwriting", _fill_waits_for_uses_only),  # nor a fill for the fill before it
        (SlotFences, "before_reading", lambda self, slot, stream: None),  # kernels do not wait for the fill
        (SlotFences, "used", _one_use_per_slot),  # one stream's use hides another's
        (SlotFences, "used", lambda self, slot, stream: None),
        (HostArena, "wait_unread", lambda self, slot: None),  # a source is overwritten while it is copied
    ],
    ids=["uses", "fills", "ready", "streams", "used", "source"],
)
def test_a_fence_taken_away_is_noticed(
    where: type, name: str, broken: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, name, broken)
    found = []
    for seed in range(6):
        with monkeypatch.context() as patch:
            found += shuffle(fake_cuda.install(patch, seed, haste=0.1), seed)
    assert found


def test_memory_of_pending_kernels_is_not_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The allocator gives the arena memory that queued kernels still read: the first fills must wait for these."""
    cuda = fake_cuda.install(monkeypatch)
    seen = []
    memory = torch.full((4 * NBYTES,), 7, dtype=torch.uint8)
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: memory)
    cuda.launch(lambda: seen.append(int(memory.sum())))
    arena = DeviceArena(4, NBYTES, CPU)
    fences = [fill(slot, torch.zeros(NBYTES, dtype=torch.uint8)) for slot, fill in enumerate([arena.fill] * 3)]
    fences.append(arena.fill_behind(3, torch.zeros(NBYTES, dtype=torch.uint8)))
    for fence in fences:
        fence.synchronize()
    cuda.run_all()
    assert seen == [7 * 4 * NBYTES]


def test_a_prefetch_never_has_more_than_two_chunks_in_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = fake_cuda.install(monkeypatch, haste=0.0)
    arena = DeviceArena(1, 5 * CHUNK + 512, CPU)
    source = torch.arange(5 * CHUNK + 100, dtype=torch.int32).view(torch.uint8)[: 5 * CHUNK + 100]
    deepest, under_way = 0, 0

    def copy(self: DeviceArena, target: torch.Tensor, chunk: torch.Tensor) -> None:
        nonlocal deepest, under_way
        assert chunk.numel() <= CHUNK
        under_way += 1
        deepest = max(deepest, under_way)

        def work() -> None:
            nonlocal under_way
            under_way -= 1
            target.copy_(chunk)

        cuda.launch(work)

    monkeypatch.setattr(DeviceArena, "_copy", copy)
    fence = arena.fill_behind(0, source)
    assert deepest == 2 and not fence.query()
    fence.synchronize()
    assert torch.equal(arena.record(0, source.numel()), source)


def test_copies_of_demand_do_not_wait_for_one_another_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = fake_cuda.install(monkeypatch, haste=0.0)
    arena = DeviceArena(8, NBYTES, CPU)
    source = torch.full((NBYTES,), 3, dtype=torch.uint8)
    fences = [arena.fill(slot, source) for slot in range(8)]
    assert not any(fence.query() for fence in fences) and cuda.host_waits == 0
    assert len([stream for stream in cuda.streams if stream.queue]) >= 2, "one lane waits while the other copies"
    arena.close()
    assert all(fence.query() for fence in fences)


def test_the_time_of_copies_is_that_of_their_union() -> None:
    class At:
        """An event that ended at a time, in milliseconds."""

        def __init__(self, when: float):
            self.when = when

        def query(self) -> bool:
            return self.when < 1000

        def elapsed_time(self, other: At) -> float:
            return other.when - self.when

    clock = CopyClock()
    assert clock.seconds() == 0.0
    for begin, end in [(10, 20), (15, 25), (16, 24), (100, 130), (120, 125), (129, 140), (990, 1010)]:
        clock.add(At(begin), At(end))
    assert clock.seconds() == pytest.approx(0.015 + 0.040), "and the last one has not ended"


class GpuRun:
    """A cache whose device is late: leases are checked by kernels, when these run at last."""

    def __init__(self, cuda: fake_cuda.FakeCuda, slots: int, host_slots: int, seed: int, **config: Any):
        self.cuda, self.store = cuda, FakeStore(seed, delay=0.0003)
        self.core = Residency([TierConfig(slots), TierConfig(host_slots, **config)], LAYERS, EXPERTS)
        host = HostArena(host_slots, self.store.slot_nbytes, page_locked=True)
        device = DeviceArena(slots, self.store.slot_nbytes, CPU)
        self.cache = ExpertCache(self.store, self.core, host, device, readers=3)
        self.wrong: list[ExpertKey] = []
        self.checked = 0

    def kernel(self, lease: Lease) -> None:
        expected = LAYOUT.views(torch.frombuffer(bytearray(self.store.content(lease.key)), dtype=torch.uint8))

        def check() -> None:
            self.checked += 1
            if any(not torch.equal(lease.fields[f].view(torch.uint8), expected[f].view(torch.uint8)) for f in expected):
                self.wrong.append(lease.key)

        self.cuda.launch(check)

    def serve(self, time: int, layer: int, experts: list[int], phase: Phase = Phase.DECODE) -> None:
        keys = tuple(ExpertKey(layer, expert) for expert in sorted(experts))
        for batch in self.cache.batches(Access(time, layer, keys, (1,) * len(keys), phase)):
            for lease in batch:
                self.kernel(lease)


@pytest.mark.parametrize(("slots", "host_slots"), [(1, 1), (2, 1), (1, 5), (3, 3), (6, 4), (12, 24)])
@pytest.mark.parametrize(("haste", "exclusive"), [(0.0, False), (0.3, False), (0.0, True), (0.2, True)])
def test_the_engine_on_a_late_device(
    slots: int, host_slots: int, haste: float, exclusive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = fake_cuda.install(monkeypatch, slots, haste)
    run = GpuRun(cuda, slots, host_slots, slots, exclusive=exclusive)
    draw, served = random.Random(slots), 0
    for time in range(1, 60):
        layer, experts = time % LAYERS, draw.sample(range(EXPERTS), draw.randint(1, 5))
        run.serve(time, layer, experts)
        served += len(experts)
        if time % 3 == 0:  # a prefetch, perhaps demanded before it is there
            with run.cache._condition:
                run.core.prefetch(ExpertKey((time + 1) % LAYERS, draw.randrange(EXPERTS)), displace=True)
                run.cache._start_orders()
        run.core.check()
    run.cache.settle()
    run.core.check()
    run.cache.close()
    cuda.run_all()
    link = run.cache.mover.links[1]
    assert link.copies > 0 and link.busy_seconds > 0
    assert run.checked == served and not run.wrong


def test_several_streams_on_a_late_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = fake_cuda.install(monkeypatch, 3, 0.1)
    run = GpuRun(cuda, 4, 5, 3)
    clock, times = threading.Lock(), iter(range(1, 1000))

    def work(seed: int) -> None:
        draw = random.Random(seed)
        with cuda.using(cuda.stream()):
            for step in range(12):
                with clock:
                    time = next(times)
                run.serve(time, step % LAYERS, draw.sample(range(EXPERTS), draw.randint(1, 4)))

    together(*[lambda seed=seed: work(seed) for seed in range(3)])
    run.cache.settle()
    run.core.check()
    run.cache.close()
    cuda.run_all()
    assert run.checked and not run.wrong


def test_a_copy_that_cannot_be_enqueued_is_raised_and_leaves_the_cache_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = fake_cuda.install(monkeypatch, 5, 0.1)
    run = GpuRun(cuda, 4, 8, 5)
    copy, failures = DeviceArena._copy, iter([False, True, True])

    def sometimes(self: DeviceArena, target: torch.Tensor, source: torch.Tensor) -> None:
        if next(failures, False):
            raise RuntimeError("CUDA error: invalid argument")
        copy(self, target, source)

    monkeypatch.setattr(DeviceArena, "_copy", sometimes)
    for time in (1, 2):
        with pytest.raises(RuntimeError, match="invalid argument"):
            run.serve(time, 0, [0, 1])
        run.core.check()
        assert not run.core.tickets
    for time in range(3, 12):
        run.serve(time, time % LAYERS, [0, 1, 2])
    run.store.fail = {ExpertKey(1, 5)}
    with pytest.raises(StoreError):
        run.serve(12, 1, [2, 5])
    run.cache.close()
    cuda.run_all()
    assert not run.wrong


@pytest.mark.parametrize(("haste", "exclusive"), [(0.0, False), (0.2, False), (0.0, True), (0.2, True)])
@pytest.mark.parametrize("writeback", ["evict", "writethrough"])
@pytest.mark.parametrize(("slots", "host_slots"), [(1, 2), (3, 3), (5, 9)])
def test_changed_records_and_experts_in_place_on_a_late_device(
    slots: int, host_slots: int, haste: float, exclusive: bool, writeback: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What kernels change is written home, what the CPU changes is what the device gets later, and nothing mixes."""
    cuda = fake_cuda.install(monkeypatch, slots, haste)
    run = ChangingRun(slots, host_slots, 300, CPU, cuda.launch, slots, exclusive, writeback)
    run.run(60)
    run.finish()
    cuda.run_all()
    assert int(run.wrong) == 0 and run.in_place > 0 and sum(run.changes.values()) > 30


def test_rows_leave_for_the_host_before_later_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = fake_cuda.install(monkeypatch, haste=0.0)
    monkeypatch.setattr(arenas, "_page_locked", lambda shape, dtype: torch.empty(shape, dtype=dtype))
    arena = DeviceArena(1, NBYTES, CPU)
    hidden = torch.zeros(2, 3)
    cuda.launch(lambda: hidden.fill_(4.0))
    mark = arena.mark()
    cuda.default.queue.append(fake_cuda.Wait(cuda.event(), 1))  # never ends: who waits for it fails
    (copy,) = arena.to_host([hidden], mark)
    assert torch.equal(copy, torch.full((2, 3), 4.0))
    assert torch.equal(arena.from_host([copy, copy]), torch.full((4, 3), 4.0))
