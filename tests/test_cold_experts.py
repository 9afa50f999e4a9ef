"""Cold experts on the CPU: the engine with a stand-in for the device, whoever computes what; its calibration."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import moetier
from device_runs import AtRandom
from moetier.access import Access, ExpertKey
from moetier.arenas import HostArena, HostTierArena
from moetier.cache import ExpertCache
from moetier.calibration import Calibration, calibrate, serve_in_place
from moetier.cli import app
from moetier.cli.costs import show_costs
from moetier.costs import Cost, Costs, Work, makespan, split
from moetier.errors import ConfigError, StoreError
from moetier.eventlog import Recorder, replay
from moetier.lease import Lease
from moetier.misses import AlwaysInPlace, CostModel, Miss, make_miss_policy
from moetier.options import Options
from moetier.residency import Residency
from moetier.tiers import TierConfig
from test_cache import EXPERTS, LAYERS, LAYOUT, FakeStore, together

IDS = torch.arange(24).view(2, 12)


class Late:
    """A store that takes its time, and not always the same."""

    def __init__(self, store: Any, seed: int):
        self._store, self._random = store, random.Random(seed)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def read(self, key: ExpertKey, segment: int, into: memoryview) -> int:
        time.sleep(self._random.random() * 3e-4)
        return int(self._store.read(key, segment, into))


@pytest.fixture
def with_device(tiered: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """`with_device(model, slots, host slots, misses)`: its experts in two tiers, the fast one a stand-in."""
    caches: list[ExpertCache] = []

    def get(model: Any, slots: int, host_slots: int, misses: Any = None, seed: int = 0, **config: Any) -> ExpertCache:
        store = Late(model.moetier.cache.store, seed)
        core = Residency([TierConfig(slots, **config), TierConfig(host_slots)], store.layers, store.experts, misses)
        device = HostTierArena(slots, store.slot_nbytes)
        host = HostArena(host_slots, store.slot_nbytes)
        model.moetier.cache = ExpertCache(store, Recorder(core), host, device)  # type: ignore[arg-type]
        caches.append(model.moetier.cache)
        return caches[-1]

    yield get
    for cache in caches:
        cache.mover.close()


def logits(model: Any) -> list[torch.Tensor]:
    return [model(input_ids=ids).logits for ids in (IDS, IDS[:, :1], IDS[:1, 3:4])]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("qwen3_moe", torch.bfloat16),
        ("qwen3_moe", torch.float32),
        ("gpt_oss", torch.bfloat16),
        ("nemotron_h", torch.bfloat16),
    ],
)
def test_the_same_bits_wherever_an_expert_is_computed(
    name: str, dtype: torch.dtype, tiered: Callable[..., Any], with_device: Callable[..., Any]
) -> None:
    model = tiered(name, dtype, slots="100%")
    expected = logits(model)
    one_tier = model.moetier.cache
    for number, (slots, host_slots) in enumerate([(1, 1), (1, 4), (4, 3), (6, 12)]):
        for misses in (AlwaysInPlace(), AtRandom(number), None)[: 3 if number == 2 else 2]:
            model.moetier.cache = one_tier
            cache = with_device(model, slots, host_slots, misses, number)
            for actual, wanted in zip(logits(model), expected, strict=True):
                assert torch.equal(actual, wanted)
            cache.core.core.check()
            in_place = cache.stats()["tiers"][1]["in_place"]
            assert (in_place > 0) == (misses is not None), "nothing was computed in place"
            again = replay(cache.core.log)
            assert again.digest() == cache.core.core.digest(), "the choices are part of the log"
    one_tier.close()


@pytest.mark.parametrize(("slots", "host_slots"), [(1, 1), (2, 3), (5, 4), (3, 12)])
def test_threads_and_failures_with_experts_in_place(slots: int, host_slots: int) -> None:
    """Every lease, of several threads at once, holds its record's bytes; failed reads are raised; nothing hangs."""
    store = FakeStore(slots, delay=0.0003)
    core = Residency([TierConfig(slots), TierConfig(host_slots)], LAYERS, EXPERTS, AtRandom(slots))
    cache = ExpertCache(
        store, core, HostArena(host_slots, store.slot_nbytes), HostTierArena(slots, store.slot_nbytes), 3
    )
    clock, times, seen = threading.Lock(), iter(range(1, 1000)), [0, 0, 0]

    def work(seed: int) -> None:
        draw = random.Random(seed)
        for step in range(25):
            layer, experts = step % LAYERS, sorted(draw.sample(range(EXPERTS), draw.randint(1, 6)))
            keys = tuple(ExpertKey(layer, expert) for expert in experts)
            with clock:
                access = Access(next(times), layer, keys, tuple(draw.randint(1, 9) for _ in keys))
            try:
                for lease in cache.stream(access):
                    check(lease)
                    seen[lease.in_place] += 1
                    time.sleep(draw.random() * 2e-4)
                    check(lease)
            except StoreError:
                seen[2] += 1

    def check(lease: Lease) -> None:
        expected = LAYOUT.views(torch.frombuffer(bytearray(store.content(lease.key)), dtype=torch.uint8))
        for name, tensor in expected.items():
            assert torch.equal(lease.fields[name].view(torch.uint8), tensor.view(torch.uint8))

    store.fail = {ExpertKey(1, 3)}
    together(*[lambda seed=seed: work(seed) for seed in range(3)])
    core.check()
    assert not core.tickets and all(seen), seen
    cache.close()


def test_the_device_gets_its_work_first_and_in_place_comes_alone(
    tiered: Callable[..., Any], with_device: Callable[..., Any]
) -> None:
    cache = with_device(tiered("qwen3_moe", slots="100%"), 6, 12, None)

    def access(number: int, experts: Sequence[int]) -> Access:
        return Access(number, 0, tuple(ExpertKey(0, expert) for expert in experts), (1,) * len(experts))

    for _ in cache.batches(access(1, [0, 1])):
        pass
    with_hosts = [2, 3, 4, 5]
    for _ in cache.batches(access(2, with_hosts)):
        pass
    cache.core.core.misses = AtRandom(0)
    cache.core.core.misses.split = lambda _, misses: [m.key for m in misses if m.key.expert in (6, 7)]
    batches = [[(lease.key.expert, lease.in_place) for lease in batch] for batch in cache.batches(access(3, range(8)))]
    assert all(len({here for _, here in batch}) == 1 for batch in batches)
    assert batches[0] == [(expert, False) for expert in range(6)]
    assert sorted(expert for batch in batches for expert, _ in batch) == list(range(8))


def test_the_cost_model_in_the_engine(tiered: Callable[..., Any], with_device: Callable[..., Any]) -> None:
    model = tiered("qwen3_moe", slots="100%")
    expected = logits(model)
    slow_link = CostModel(Costs(Cost(1e-6), link=1.0))
    cache = with_device(model, 4, 24, slow_link)
    assert all(torch.equal(a, b) for a, b in zip(logits(model), expected, strict=True))
    first = cache.stats()["tiers"]
    assert first[1]["in_place"] > 0 and sum(first[0]["misses"]) > first[1]["in_place"], "one is fetched"
    fast_link = CostModel(Costs(Cost(1.0), link=1e-6))
    cache.core.core.misses = fast_link
    assert all(torch.equal(a, b) for a, b in zip(logits(model), expected, strict=True))
    assert cache.stats()["tiers"][1]["in_place"] == first[1]["in_place"]


def test_the_cost_model_answers_the_same_question_alike() -> None:
    model = CostModel(Costs(Cost(1e-3), link=1e-3))
    for layer in range(3):
        misses = [Miss(ExpertKey(layer, expert), 1, 1) for expert in (2 + layer, 5, 7, 9)]
        access = Access(layer + 1, layer, tuple(miss.key for miss in misses), (1,) * 4)
        chosen = model.split(access, misses)
        assert len(chosen) == 2 and chosen <= set(access.keys)  # type: ignore[operator]
    assert len(model._known) == 1


def test_names_of_choices() -> None:
    costs = Costs(Cost(1.0))
    assert make_miss_policy("off", costs) is None
    assert isinstance(make_miss_policy("always", costs), AlwaysInPlace)
    auto = make_miss_policy("auto", costs)
    assert isinstance(auto, CostModel) and auto.costs is costs
    assert isinstance(make_miss_policy("moetier.misses:AlwaysInPlace", costs), AlwaysInPlace)
    with pytest.raises(ConfigError, match="unknown cpu_experts 'on'; choose one of: always, auto, off"):
        Options(cpu_experts="on").check()


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_calibration_with_a_device(name: str, tiered: Callable[..., Any], with_device: Callable[..., Any]) -> None:
    model = tiered(name, slots="100%")
    expected = logits(model)
    cache = with_device(model, 4, 6)
    module = next(m for m in model.modules() if hasattr(m, "_moetier"))
    found = serve_in_place(cache, "auto", module, top_k=2)
    assert found is not None
    costs = found.costs
    assert isinstance(cache.core.core.misses, CostModel) and cache.core.core.misses.costs is costs
    assert [tokens for tokens, _ in found.cpu][:2] == [1, 2] and all(seconds > 0 for _, seconds in found.cpu)
    assert found.device and costs.link > 0 and costs.disk > 0 and costs.contention >= 0
    assert found.record_nbytes == cache.store.layout(0).nbytes
    assert all(torch.equal(a, b) for a, b in zip(logits(model), expected, strict=True)), "the slots were given back"


def test_calibration_without_a_device(tiered: Callable[..., Any]) -> None:
    model = tiered("qwen3_moe")
    expected = logits(tiered("qwen3_moe"))
    cache = model.moetier.cache
    module = next(m for m in model.modules() if hasattr(m, "_moetier"))
    found = calibrate(cache, module, seconds=0.1)
    assert found.cpu and not found.device and found.costs.link == 0.0
    assert found.to_dict()["costs"]["cpu"]["floor"] > 0
    assert all(torch.equal(a, b) for a, b in zip(logits(model), expected, strict=True))


def test_a_large_expert_is_measured_with_fewer_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    from moetier import calibration

    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)

    def slow() -> None:
        nonlocal now
        now += 5.0

    assert calibration._timed(slow, 1.0) == 5.0
    assert now == 10.0, "twice: the first run does not count"


def test_without_a_gpu_it_is_not_used_and_says_so(checkpoint: Callable[..., Path]) -> None:
    with pytest.warns(RuntimeWarning, match="cpu_experts is not used"):
        model = moetier.from_pretrained(checkpoint("qwen3_moe"), slots=4, cpu_experts="auto")
    assert model.moetier.calibration is None and model.moetier.cache.core.misses is None
    model.moetier.close()


def plan(*flags: object) -> str:
    result = CliRunner().invoke(app, ["plan", *map(str, flags)])
    assert result.exit_code == 0, result.stderr + result.stdout
    return result.stdout


def test_the_plan_prints_what_experts_cost(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("qwen3_moe")
    text = plan(folder, "--slots", "50%", "--measure")
    assert "CPU ms" in text and "There is no GPU" in text
    found = json.loads(plan(folder, "--measure", "--json"))
    assert found["slots"] and found["calibration"]["cpu"][0][0] == 1 and "forecast" not in found


def test_the_costs_with_a_gpu_are_words_too() -> None:
    costs = Costs(Cost(4e-4), Cost(5e-5), 2e-4, 2e-3, 1e-4, 0.25, 3e-5)
    found = Calibration(costs, 10**7, ((1, 4e-4), (16, 9e-4)), ((1, 5e-5), (16, 6e-5)), 8, 1.5)
    console = Console(file=StringIO(), width=100)
    show_costs(json.loads(json.dumps(found.to_dict())), 8, console)
    text = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    assert "1 0.400 25.0 0.050 16 0.900 11.1 0.060" in text
    assert "on the link 0.200 ms (50.0 GB/s)" in text and "25 % longer beside copies" in text
    sides = split([Work(1)] * 8, costs)
    assert f"auto fetches {sides.in_place.count(False)}" in text and f"{1e3 * sides.seconds:.3f} ms instead of" in text
    assert sides.seconds < makespan([Work(1)] * 8, [False] * 8, costs)
