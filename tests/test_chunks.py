"""Experts that fit no slot stream in slices: the same bits, within the budget, whatever happens to the reads."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moetier
from conftest import family_class
from families import FAMILIES, make_checkpoint
from moetier import CapacityError, ConfigError, MoetierError, StoreError, chunks
from moetier.access import ExpertKey
from moetier.chunks import SliceCache
from moetier.loading import inspect
from moetier.options import Options
from moetier.plan import LEAST_BUFFERS, Plan, Status
from moetier.stores import SlicedStore
from moetier.stores.packed import PackedStore
from moetier.stores.slices import GRANULE, divide, least_outputs
from moetier.timeline import Part
from packs import packed
from test_families import Outputs, tokens

# Stored per expert, fused, fused and transposed with biases, fused and transposed, without gate. Wide enough to be cut.
LAYOUTS = ["mixtral", "granitemoe", "gpt_oss", "aria_text", "nemotron_h"]
WIDE = {"hidden_size": 192, "intermediate_size": 208, "moe_intermediate_size": 208, "moe_latent_size": 160}
NAME = "mixtral"


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`wide("mixtral", dtype)`: like `checkpoint`, with matrices that are worth cutting. Never write to it."""
    made: dict[tuple[str, torch.dtype], Path] = {}

    def get(name: str = NAME, dtype: torch.dtype = torch.bfloat16) -> Path:
        family_class(name)
        if (name, dtype) not in made:
            family = FAMILIES[name]
            sizes = {key: value for key, value in WIDE.items() if key in family.settings}
            made[name, dtype] = tmp_path_factory.mktemp(name)
            make_checkpoint(replace(family, settings=dict(family.settings) | sizes), made[name, dtype], dtype)
        return made[name, dtype]

    return get


@pytest.fixture
def load(wide: Callable[..., Path]) -> Iterator[Callable[..., Any]]:
    """`load("mixtral", dtype, share=0.9)`: the model with that share of one slot for experts."""
    models: list[Any] = []

    def get(name: str = NAME, stored: torch.dtype = torch.bfloat16, share: float = 0.9, **options: Any) -> Any:
        options = {"context": 64, "model_class": family_class(name)} | options
        roomy = moetier.from_pretrained(wide(name, stored), host_memory="1TiB", **options).moetier
        roomy.close()
        work = roomy.plan.workload
        budget = fixed(roomy.plan) + max(int(share * work.slot_nbytes), LEAST_BUFFERS * work.slice_nbytes)
        with pytest.warns(RuntimeWarning, match="experts stream in slices of .*; nothing is cached"):
            models.append(moetier.from_pretrained(wide(name, stored), host_memory=budget, **options))
        assert models[-1].moetier.plan.status is Status.CHUNKED
        return models[-1]

    yield get
    for model in models:
        model.moetier.close()


def roomy_plan(folder: Path) -> Plan:
    return inspect(folder, Options(host_memory="1TiB", context=64))


def fixed(plan: Plan) -> int:
    """Bytes of a run beside its experts."""
    work = plan.workload
    return work.resident_nbytes + work.kv_nbytes + work.workspace_nbytes


@pytest.mark.parametrize(
    ("dtype", "share"),
    [(torch.bfloat16, 0.9), (torch.bfloat16, 0.3), (torch.float16, 0.6), (torch.float32, 0.5)],
    ids=lambda value: str(value),
)
@pytest.mark.parametrize("name", LAYOUTS)
def test_bits_do_not_change(name: str, dtype: torch.dtype, share: float, wide: Any, load: Any) -> None:
    """Prefill, batches, padding and one-token steps; every byte of an expert is read, once where rows are slices."""
    expected = Outputs.of(family_class(name).from_pretrained(wide(name, dtype), dtype="auto").eval())
    model = load(name, dtype, share)
    expected.check(Outputs.of(model))
    stats = model.moetier.stats()
    read, uses = stats["links"]["disk→host"]["bytes"], sum(stats["tiers"][0]["misses"])
    assert stats["chunks"]["slices_per_expert"] > (4 if name == "gpt_oss" else 2)  # four fields
    assert stats["links"]["disk→host"]["copies"] == uses * stats["chunks"]["slices_per_expert"]
    raw = sum(field.nbytes for field in model.moetier.layers[0].layout.fields)
    if model.moetier.plan.workload.slices_reread:
        assert uses * raw < read < uses * raw * stats["chunks"]["slices_per_expert"]
    else:
        assert read == uses * raw


@pytest.mark.parametrize("wanted", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_cast_while_streaming(name: str, wanted: torch.dtype, wide: Any, load: Any) -> None:
    expected = Outputs.of(family_class(name).from_pretrained(wide(name), dtype=wanted).eval())
    expected.check(Outputs.of(load(name, dtype=wanted)))


@pytest.mark.parametrize("io", ["direct", "buffered"])
@pytest.mark.parametrize("readers", [1, 4])
def test_timing_does_not_matter(io: str, readers: int, wide: Any, load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random delays in the reads shuffle the order in which slices arrive."""
    model = load(readers=readers, io=io, share=0.6)
    rng, arrived = random.Random(readers), []
    read = model.moetier.cache.store.read_block

    def late(key: ExpertKey, field: str, rows: range, columns: range | None, into: memoryview) -> int:
        time.sleep(rng.choice((0, 0, 0.0005, 0.002)))
        nbytes: int = read(key, field, rows, columns, into)
        arrived.append((key, field, rows.start))
        return nbytes

    monkeypatch.setattr(model.moetier.cache.store, "read_block", late)
    expected = Outputs.of(family_class(NAME).from_pretrained(wide(), dtype="auto").eval())
    expected.check(Outputs.of(model))
    in_order = [slot for slot, _ in sorted(enumerate(arrived), key=lambda item: item[1][0])]
    assert len(arrived) > 100 and in_order != list(range(len(arrived)))


def test_the_next_slices_are_read_while_one_computes(load: Any) -> None:
    """The ring is refilled before the caller has done with the slice it holds, and never beyond."""
    model = load(share=0.9)
    cache = model.moetier.cache
    assert cache.host.slots == 4
    keys = tuple(ExpertKey(0, expert) for expert in (1, 2, 5))
    stream = cache.slices(moetier.Access(1, 0, keys))
    seen = [next(stream)]
    deadline = time.monotonic() + 20
    while cache.mover.links[0].copies < 4 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)
    assert cache.mover.links[0].copies == 4  # the one in hand and three more: every buffer is full
    seen += list(stream)
    assert [part.expert for part in seen] == sorted(part.expert for part in seen)
    assert cache.mover.links[0].copies == len(seen) == 3 * cache.stats()["chunks"]["slices_per_expert"]
    seconds = cache.stats()["seconds"]
    assert seconds["compute"] > 0.02 and seconds["wait"] > 0


def test_a_failed_read_is_told_and_forgotten(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load()
    store = model.moetier.cache.store
    expected, read, calls = model(tokens()).logits, store.read_block, iter(range(1_000_000))

    def fail(key: ExpertKey, field: str, rows: range, columns: range | None, into: memoryview) -> int:
        if next(calls) == 7:
            raise StoreError("model.safetensors: the disk is on fire")
        nbytes: int = read(key, field, rows, columns, into)
        return nbytes

    monkeypatch.setattr(store, "read_block", fail)
    with pytest.raises(StoreError, match="the disk is on fire"):
        model(tokens())
    assert torch.equal(model(tokens()).logits, expected)


def test_an_error_in_the_math_leaves_it_usable(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load()
    expected = model(tokens()).logits
    module = model.model.layers[1].mlp.experts
    monkeypatch.setattr(type(module), "_apply_gate", lambda self, x: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        model(tokens())
    monkeypatch.undo()
    assert torch.equal(model(tokens()).logits, expected)


def test_threads_take_turns(load: Any) -> None:
    model = load()
    expected = [model(tokens(rows, 5)).logits for rows in (1, 2, 3)]
    made: dict[int, torch.Tensor] = {}

    def run(number: int) -> None:
        with torch.no_grad():
            made[number] = model(tokens(number + 1, 5)).logits

    runs = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in runs:
        thread.start()
    for thread in runs:
        thread.join(60)
    assert all(torch.equal(made[number], expected[number]) for number in range(3))


def test_closed(load: Any) -> None:
    model = load()
    model.moetier.close()
    with pytest.raises(MoetierError, match="closed"):
        model(tokens())


def test_watching_profiles_and_saving_go_on_working(wide: Any, load: Any, tmp_path: Path) -> None:
    model = load(record_profile=True)
    seen: list[int] = []
    model.moetier.watch = lambda layer, experts, weights, phase: seen.append(layer)
    expected = model(tokens()).logits
    assert seen == [0, 1, 2]
    misses = model.moetier.stats()["tiers"][0]["misses"]
    assert model.moetier.profile().uses.sum(axis=1).tolist() == misses and min(misses) > 2
    model.save_pretrained(tmp_path)
    saved = family_class(NAME).from_pretrained(tmp_path, dtype="auto").eval()
    assert torch.equal(saved(tokens()).logits, expected)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_from_a_packed_store(name: str, wide: Any, load: Any, tmp_path: Path) -> None:
    expected = Outputs.of(family_class(name).from_pretrained(wide(name), dtype="auto").eval())
    packed(wide(name), tmp_path / "packed", name)
    model = load(name, share=0.5, store=str(tmp_path / "packed"))
    assert isinstance(model.moetier.cache.store, PackedStore)
    expected.check(Outputs.of(model))


# -- the plan ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_minimum_that_is_told_works(name: str, wide: Any) -> None:
    folder = wide(name)
    with pytest.raises(CapacityError, match=r"leaves no slot for an expert; the minimum is .*\(\d+ bytes\)"):
        moetier.from_pretrained(folder, host_memory="1MiB", context=64, model_class=family_class(name))
    told = inspect(folder, Options(host_memory="1MiB", context=64)).advice
    minimum = int(told.partition("(")[2].partition(" bytes")[0])
    plan = inspect(folder, Options(host_memory=minimum, context=64))
    assert plan.status is Status.CHUNKED and plan.chunks is not None and plan.slots == 0
    assert plan.host_total_nbytes == minimum == fixed(plan) + plan.chunks.buffers * plan.chunks.nbytes
    assert inspect(folder, Options(host_memory=minimum - 1, context=64)).status is Status.BUDGET_EXHAUSTED
    one = minimum - plan.host_total_nbytes + fixed(plan) + plan.workload.slot_nbytes
    assert inspect(folder, Options(host_memory=one, context=64)).slots == 1
    below = inspect(folder, Options(host_memory=one - 1, context=64))
    assert below.status is Status.CHUNKED and below.host_total_nbytes < one


def test_narrow_experts_are_not_cut(checkpoint: Callable[..., Path]) -> None:
    """Slices would take more memory than the expert: the minimum is a slot, as ever."""
    work = roomy_plan(checkpoint(NAME)).workload
    assert LEAST_BUFFERS * work.slice_nbytes > work.slot_nbytes
    plan = inspect(checkpoint(NAME), Options(host_memory=fixed(roomy_plan(checkpoint(NAME))) + work.slot_nbytes - 1))
    assert plan.status is Status.BUDGET_EXHAUSTED and plan.chunks is None


def test_converted_experts_are_not_cut(checkpoint: Callable[..., Path]) -> None:
    """The loader interleaves them, which takes the whole expert."""
    plan = roomy_plan(checkpoint("inkling2_text"))
    assert plan.workload.slice_nbytes == 0


@pytest.mark.parametrize("options", [{"pin_after": 5}, {"record_events": True}], ids=str)
def test_options_that_need_a_cache(options: dict[str, Any], wide: Any) -> None:
    budget = fixed(roomy_plan(wide())) + roomy_plan(wide()).workload.slot_nbytes - 1
    with pytest.raises(ConfigError, match=f"^{next(iter(options))}: .*nothing is cached"):
        moetier.from_pretrained(wide(), host_memory=budget, context=64, **options)


def test_a_machine_whose_products_cannot_be_cut(wide: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    budget = fixed(roomy_plan(wide())) + roomy_plan(wide()).workload.slot_nbytes - 1
    monkeypatch.setattr(chunks, "products_can_be_cut", lambda *matrix: False)
    with pytest.raises(CapacityError, match=r"bfloat16 products of .* differ in the last bit when cut; give more"):
        moetier.from_pretrained(wide(), host_memory=budget, context=64)


# -- cutting and reading -----------------------------------------------------------------------------------------------


@settings(derandomize=True, deadline=None)
@given(st.integers(1, 5000), st.integers(0, 3000))
def test_divide(outputs: int, more: int) -> None:
    most = least_outputs(outputs) + more
    parts = divide(outputs, most)
    assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])] and parts[-1].stop == outputs
    assert max(map(len, parts)) <= most
    assert len(parts) == 1 or min(map(len, parts)) >= GRANULE
    assert all(part.start % GRANULE == 0 for part in parts)


@pytest.mark.parametrize(("name", "dtype"), [("mixtral", "auto"), ("gpt_oss", "auto"), ("granitemoe", torch.float32)])
def test_blocks_are_the_bytes_of_the_record(name: str, dtype: Any, wide: Any, load: Any) -> None:
    model = load(name, dtype=dtype)
    store = model.moetier.cache.store
    assert isinstance(store, SlicedStore) and isinstance(model.moetier.cache, SliceCache)
    rng = random.Random(0)
    for key in (ExpertKey(0, 0), ExpertKey(1, 5), ExpertKey(2, 7)):
        layout = store.layout(key.layer)
        whole = bytearray(layout.nbytes)
        for segment in range(store.segments(key)):
            store.read(key, segment, memoryview(whole))
        views = layout.views(torch.frombuffer(whole, dtype=torch.uint8))
        for field in layout.fields:
            for _ in range(8):
                begin = rng.randrange(field.shape[0])
                rows, columns = range(begin, rng.randint(begin + 1, field.shape[0])), None
                expected = views[field.name][rows.start : rows.stop]
                if len(field.shape) == 2 and rng.random() < 0.5:
                    first = rng.randrange(field.shape[1])
                    columns = range(first, rng.randint(first + 1, field.shape[1]))
                    expected = expected[:, columns.start : columns.stop]
                into = bytearray(expected.nbytes)
                store.read_block(key, field.name, rows, columns, memoryview(into))
                given = torch.frombuffer(into, dtype=field.dtype).view(expected.shape)
                assert torch.equal(given, expected)


def test_the_clocks_and_a_timeline_see_slices(load: Callable[..., Any]) -> None:
    model = load(share=0.5)
    with model.moetier.timeline() as timeline:
        model(input_ids=torch.tensor([[5, 6, 7]]))
    stats = model.moetier.stats()
    assert [span.access.layer for span in timeline.accesses()] == list(range(len(stats["tiers"][0]["misses"])))
    assert sum(part.nbytes for part in timeline.events(Part)) == stats["links"]["disk→host"]["bytes"]
    phase = stats["phases"]["prefill"]
    assert phase["wait"] == pytest.approx(stats["seconds"]["wait"])
    assert phase["io"] > 0 and phase["exposed"] <= phase["wait"] <= phase["run"]


def test_backward_needs_a_slot(load: Callable[..., Any]) -> None:
    model = load()
    with torch.enable_grad():
        loss = model(input_ids=torch.tensor([[5, 6, 7]])).logits.sum()
        with pytest.raises(CapacityError, match="backward needs a slot for a whole expert"):
            loss.backward()
