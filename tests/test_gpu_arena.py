"""Copies, fences and experts in place on a real GPU. Skipped where there is none; `test_fences` has the same logic.

Nothing here is timed. Kernels are made late with a spinning one, so that a missing fence shows.
"""

from __future__ import annotations

import random
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import families
import moetier
from device_runs import ChangingRun
from moetier.access import Access, ExpertKey
from moetier.arenas import CHUNK, DeviceArena, HostArena
from moetier.cache import ExpertCache
from moetier.calibration import calibrate
from moetier.cpu_share import InPlace
from moetier.experts import Routing, expert_math, forward_from_leases
from moetier.fences import SlotFences
from moetier.record import RecordLayout
from moetier.residency import Residency
from moetier.tiered import TieredExperts
from moetier.tiers import TierConfig
from test_cache import EXPERTS, LAYERS, LAYOUT, FakeStore, together

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LATE = 20_000_000  # cycles: about 10 ms


def cuda() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def spin(cycles: int = LATE) -> None:
    torch.cuda._sleep(cycles)


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """What makes the host wait for a stream raises here, as far as torch knows of it; waits for events do not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("nbytes", [1, 511, 4096, 1_000_001, CHUNK, CHUNK + 1, 3 * CHUNK + 777])
def test_bytes_survive_both_ways(nbytes: int) -> None:
    arena, host = DeviceArena(3, nbytes, cuda()), HostArena(2, max(nbytes, 4096), page_locked=True)
    assert host.page_locked
    generator = torch.Generator().manual_seed(nbytes)
    record = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)
    host.record(0, 0, nbytes).copy_(record)
    for slot, fill in ((0, arena.fill), (2, arena.fill_behind)):
        fill(slot, host.record(0, 0, nbytes))
        host.record(1, 0, nbytes).zero_()
        arena.save(slot, host.record(1, 0, nbytes))
        assert torch.equal(host.record(1, 0, nbytes), record)
        assert torch.equal(arena.record(slot, nbytes).cpu(), record)
    assert arena.busy_seconds() > 0
    arena.close()
    host.close()


@pytest.mark.parametrize("seed", range(6))
def test_copies_and_kernels_at_random(seed: int) -> None:
    """Fills, uses on several streams, overwritten sources and saves, with a late device: nobody sees wrong bytes."""
    draw = random.Random(seed)
    nbytes = draw.choice([4096, 300_000, 2 * CHUNK + 5])
    whole = RecordLayout.of([("bytes", torch.uint8, (nbytes,))])
    arena, host = DeviceArena(3, nbytes, cuda()), HostArena(4, nbytes, page_locked=True)
    streams = [torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()]
    wrong = [torch.zeros((), dtype=torch.int64, device=cuda()) for _ in streams]
    for stream in streams[1:]:
        stream.wait_stream(streams[0])
    in_host, in_slot, version = [0, 1, 2, 3], [None] * 3, 3
    for slot in range(4):
        host.record(slot, 0, nbytes).fill_(slot)
    for _ in range(150):
        kind = draw.choice(["fill", "fill", "behind", "use", "use", "use", "overwrite", "overwrite", "save"])
        device_slot, host_slot = draw.randrange(3), draw.randrange(4)
        content: Any = in_slot[device_slot]
        if kind in ("fill", "behind"):
            fill = arena.fill if kind == "fill" else arena.fill_behind
            host.hold(host_slot, fill(device_slot, host.record(host_slot, 0, nbytes)))
            in_slot[device_slot] = in_host[host_slot]  # type: ignore[call-overload]
        elif kind == "use" and content is not None:
            number = draw.randrange(len(streams))
            with torch.cuda.stream(streams[number]):
                fields = arena.views(device_slot, whole)
                if draw.random() < 0.3:
                    spin(LATE // 10)
                wrong[number].add_((fields["bytes"] != content).sum())
                arena.used(device_slot)
        elif kind == "overwrite":
            version = (version + 1) % 200
            host.wait_unread(host_slot)
            host.record(host_slot, 0, nbytes).fill_(version)
            in_host[host_slot] = version
        elif kind == "save" and content is not None:
            target = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
            arena.save(device_slot, target)
            assert bool((target == content).all())
    arena.close()
    torch.cuda.synchronize()
    assert [int(count) for count in wrong] == [0, 0, 0]
    host.close()


def test_a_fence_taken_away_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """That the device is late enough for the tests above to mean anything."""
    nbytes = 1_000_000
    whole = RecordLayout.of([("bytes", torch.uint8, (nbytes,))])
    counts = []
    for broken in (False, True):
        arena, host = DeviceArena(1, nbytes, cuda()), HostArena(2, nbytes, page_locked=True)
        host.record(0, 0, nbytes).fill_(1)
        host.record(1, 0, nbytes).fill_(2)
        arena.fill(0, host.record(0, 0, nbytes)).synchronize()
        spin(10 * LATE)
        wrong = (arena.views(0, whole)["bytes"] != 1).sum()
        arena.used(0)
        if broken:
            monkeypatch.setattr(SlotFences, "before_overwriting", lambda self, slot, stream: None)
        arena.fill(0, host.record(1, 0, nbytes))
        torch.cuda.synchronize()
        counts.append(int(wrong))
        arena.close()
        host.close()
    assert counts == [0, nbytes]


def test_enqueueing_waits_for_nobody() -> None:
    """Fills, leases and rows for the host are enqueued while the compute stream is busy."""
    nbytes = 3 * CHUNK
    whole = RecordLayout.of([("bytes", torch.uint8, (nbytes,))])
    arena, host = DeviceArena(4, nbytes, cuda()), HostArena(4, nbytes, page_locked=True)
    hidden = torch.full((3, 64), 7.0, device=cuda())
    warm = arena.to_host([hidden], arena.mark())  # page-locked memory is allocated now, which may wait
    warm.append(arena.from_host(warm))
    del warm
    torch.cuda.synchronize()
    mark = arena.mark()
    spin(50 * LATE)
    busy = torch.cuda.Event()
    busy.record()
    with no_synchronisation():
        for slot in range(4):
            host.hold(slot, arena.fill(slot, host.record(slot, 0, nbytes)))
            arena.views(slot, whole)["bytes"].add_(1)
            arena.used(slot)
        (rows,) = arena.to_host([hidden], mark)
        back = arena.from_host([rows])
    assert not busy.query(), "the host waited for the compute stream"
    assert torch.equal(rows, torch.full((3, 64), 7.0)) and torch.equal(back.cpu(), rows)
    arena.close()
    host.close()


def test_memory_that_could_not_be_locked_does_not_blame_the_next_kernel() -> None:
    host = HostArena(2, 4096, page_locked=True)
    with pytest.warns(RuntimeWarning, match="could not be page locked"):
        assert not host._lock_pages()  # locked already
    assert int(torch.ones(8, device=cuda()).sum()) == 8
    torch.cuda.synchronize()
    host.close()


@pytest.mark.parametrize(("slots", "host_slots"), [(1, 1), (2, 1), (3, 3), (6, 4), (12, 24)])
@pytest.mark.parametrize(("threads", "exclusive"), [(1, False), (3, False), (1, True), (3, True)])
def test_the_engine_with_a_late_device(slots: int, host_slots: int, threads: int, exclusive: bool) -> None:
    store = FakeStore(slots, delay=0.0002)
    core = Residency([TierConfig(slots), TierConfig(host_slots, exclusive=exclusive)], LAYERS, EXPERTS)
    host = HostArena(host_slots, store.slot_nbytes, page_locked=True)
    cache = ExpertCache(store, core, host, DeviceArena(slots, store.slot_nbytes, cuda()), 3)
    expected = {
        ExpertKey(layer, expert): {
            name: tensor.view(torch.uint8).to(cuda())
            for name, tensor in LAYOUT.views(
                torch.frombuffer(bytearray(store.content(ExpertKey(layer, expert))), dtype=torch.uint8)
            ).items()
        }
        for layer in range(LAYERS)
        for expert in range(EXPERTS)
    }
    torch.cuda.synchronize()
    clock, times = threading.Lock(), iter(range(1, 10_000))

    def work(seed: int) -> int:
        draw, stream = random.Random(seed), torch.cuda.Stream()
        with torch.cuda.stream(stream):
            wrong = torch.zeros((), dtype=torch.int64, device=cuda())
            for step in range(40):
                keys = [ExpertKey(step % LAYERS, e) for e in sorted(draw.sample(range(EXPERTS), draw.randint(1, 5)))]
                with clock:
                    access = Access(next(times), step % LAYERS, tuple(keys), (1,) * len(keys))
                for batch in cache.batches(access):
                    if draw.random() < 0.2:
                        spin(LATE // 10)
                    for lease in batch:
                        for name, tensor in expected[lease.key].items():
                            wrong.add_((lease.fields[name].view(torch.uint8) != tensor).sum())
                if step % 4 == 0:
                    with cache._condition:
                        core.prefetch(ExpertKey((step + 1) % LAYERS, draw.randrange(EXPERTS)), displace=True)
                        cache._start_orders()
            return int(wrong)

    assert together(*[lambda seed=seed: work(seed) for seed in range(threads)]) == [0] * threads
    cache.settle()
    core.check()
    assert cache.stats()["links"]["host→device"]["busy_seconds"] > 0
    cache.close()


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("writeback", ["evict", "writethrough"])
@pytest.mark.parametrize(("slots", "host_slots"), [(1, 2), (3, 3), (5, 9)])
def test_changed_records_and_experts_in_place(slots: int, host_slots: int, exclusive: bool, writeback: str) -> None:
    """Write-backs through the device, changes in place, and prefetches, while kernels are late."""
    run = ChangingRun(slots, host_slots, 30_000, cuda(), lambda work: work(), slots, exclusive, writeback)
    run.run(80, lambda: spin(LATE // 20))
    run.finish()
    torch.cuda.synchronize()
    assert int(run.wrong) == 0 and run.in_place > 0 and sum(run.changes.values()) > 30


@pytest.fixture(params=["qwen3_moe", "gpt_oss", "mixtral", "nemotron_h"])
def model_of(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """`model_of(slots=…)`: a family's tiny model on the GPU."""
    family = families.FAMILIES[request.param]
    families.make_checkpoint(family, tmp_path / "model")
    models: list[Any] = []

    def get(**options: Any) -> Any:
        options = {"slots": 4, "host_memory": "64MiB", "device": "cuda", "dtype": torch.bfloat16} | options
        models.append(
            moetier.from_pretrained(tmp_path / "model", model_class=getattr(transformers, family.model), **options)
        )
        return models[-1]

    yield get
    for model in models:
        model.moetier.close()


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(24, device="cuda").view(2, 12)
    with torch.no_grad():
        return torch.cat([model(input_ids=part).logits.float().reshape(-1) for part in (ids, ids[:, :1], ids[:1, 5:6])])


def near(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """As near as bfloat16 is when CPU and GPU round differently."""
    return bool((actual - expected).norm() <= 2e-2 * expected.norm())


@pytest.mark.parametrize("way", ["always", "auto"])
def test_experts_in_place_on_the_cpu(model_of: Callable[..., Any], way: str) -> None:
    expected = logits(model_of(slots="100%"))
    model = model_of(cpu_experts=way)
    found = model.moetier.calibration
    assert found is not None and found.cpu and found.device
    assert found.costs.link > 0 and found.costs.disk > 0 and found.costs.in_place > 0
    for _ in range(4):
        assert near(logits(model), expected)
    tiers = model.moetier.stats()["tiers"]
    assert sum(tiers[0]["misses"]) > 0
    if way == "always":
        assert tiers[1]["in_place"] > 0


def test_off_is_the_same_bits_and_fetches_all(model_of: Callable[..., Any]) -> None:
    outputs = [logits(model_of(slots=slots, cpu_experts="off")) for slots in ("100%", 2, 4)]
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


def test_the_forward_waits_for_nothing_but_the_routing(
    model_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of the experts' forward under torch's check for synchronisation: hits, misses, and experts in place."""
    for way in ("off", "always"):
        model = model_of(cpu_experts=way)
        expected = logits(model)  # what is allocated once is allocated now
        forward = TieredExperts.forward

        def strict(*args: Any, forward: Any = forward) -> torch.Tensor:
            with no_synchronisation():
                result: torch.Tensor = forward(*args)
            return result

        with monkeypatch.context() as patch:
            patch.setattr(TieredExperts, "forward", strict)
            assert near(logits(model), expected)


def test_calibration_on_the_gpu_gives_the_slots_back(model_of: Callable[..., Any]) -> None:
    expected = logits(model_of())
    model = model_of()
    module = next(module for module in model.modules() if hasattr(module, "_moetier"))
    found = calibrate(model.moetier.cache, module, 0, 2, seconds=0.5)
    assert [tokens for tokens, _ in found.device][:2] == [1, 2] and found.costs.device(1) > 0
    assert torch.equal(logits(model), expected)


def test_one_expert_in_place_against_the_device() -> None:
    """Rows out, results in, into the right rows: the device's own products of the same expert are near."""

    class Module:
        has_gate, has_bias, is_transposed, has_post_expert_norm = True, False, False, False

        def _apply_gate(self, up: torch.Tensor) -> torch.Tensor:
            gate, value = up.chunk(2, dim=-1)
            return torch.nn.functional.silu(gate) * value

    generator = torch.Generator().manual_seed(0)
    layout = RecordLayout.of([("gate_up_proj", torch.bfloat16, (96, 64)), ("down_proj", torch.bfloat16, (64, 48))])
    host, arena = HostArena(4, 32_768, page_locked=True), DeviceArena(4, 32_768, cuda())
    for slot in range(4):
        for tensor in host.views(slot, layout, 0).values():
            tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
        arena.fill(slot, host.record(slot, 0, layout.nbytes))
    hidden = torch.randn(9, 64, generator=generator).to(torch.bfloat16).to(cuda())
    index = torch.randint(0, 4, (9, 2), generator=generator).to(cuda())
    weights = torch.rand(9, 2, generator=generator).to(cuda())
    routing = Routing(index, weights)

    class Given:
        def __init__(self, expert: int, in_place: bool):
            self.key, self.in_place = ExpertKey(0, expert), in_place
            self.fields = host.views(expert, layout, 0) if in_place else arena.views(expert, layout)

    results = []
    for here in ((), (1, 3), (0, 1, 2, 3)):
        in_place = InPlace(Module(), hidden, routing, arena)
        batches: list[Any] = [[Given(e, False)] for e in routing.number if e not in here]
        batches += [[Given(e, True)] for e in routing.number if e in here]
        results.append(forward_from_leases(Module(), hidden, routing, batches, None, in_place).float())
    assert near(results[1], results[0]) and near(results[2], results[0])
    rows = hidden[:1]
    assert near(
        expert_math(Module(), rows, arena.views(0, layout)).float().cpu(),
        expert_math(Module(), rows.cpu(), host.views(0, layout, 0)).float(),
    )
    arena.close()
    host.close()
