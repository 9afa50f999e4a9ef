"""`save_pretrained` of experts that were changed: plain transformers loads them, in every family's own layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import family_class
from moetier import StoreError
from moetier.access import ExpertKey
from moetier.saving import save_streaming
from moetier.stores import ExpertStore
from moetier.stores.diskio import aligned_buffer
from moetier.stores.opening import original_shards
from moetier.stores.runfamily import RunFamily
from moetier.stores.runfolder import RunFolder
from moetier.stores.shards import Shards
from packs import packed
from test_saving import LAYOUTS

Get = Callable[..., Any]


def scale(key: ExpertKey) -> float:
    """What a record is multiplied by: another factor for every expert, and exact in every dtype."""
    return -(2.0 ** (1 + key.expert % 5 + key.layer))


def change(store: RunFamily, counts: list[int]) -> None:
    buffer = aligned_buffer(store.slot_nbytes)
    for key in [ExpertKey(layer, expert) for layer, count in enumerate(counts) for expert in range(1, count)]:
        layout, phase = store.layout(key.layer), store.phase(key)
        record = buffer[phase : phase + layout.nbytes]
        for segment in range(store.segments(key)):
            store.read(key, segment, record)
        for field in layout.views(torch.frombuffer(record, dtype=torch.uint8)).values():
            field.mul_(scale(key))
        store.write(key, 0, record)


def expected(plain: Any, fields: set[str]) -> dict[str, torch.Tensor]:
    """The plain model's tensors with the experts changed; the first of each layer is not."""
    state = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    layers: dict[str, int] = {}
    for name, tensor in state.items():
        module, _, field = name.rpartition(".")
        if field in fields and module.endswith(".experts") and tensor.dim() > 1:
            layer = layers.setdefault(module, len(layers))
            for expert in range(1, tensor.shape[0]):
                tensor[expert].mul_(scale(ExpertKey(layer, expert)))
    assert layers
    return state


def changed(model: Any, folder: Path) -> tuple[RunFolder, RunFamily]:
    """A run with most of the model's records changed."""
    maps, base = model.moetier.layers, model.moetier.cache.store
    run = RunFolder.create(folder, model="m", fingerprint="f")
    store = run.family("weights", experts=[len(m.recipes) for m in maps], base=base)
    change(store, [len(m.recipes) for m in maps])
    return run, store


def save_changed(model: Any, source: Path, store: ExpertStore, out: Path, **options: Any) -> None:
    save_streaming(model, Shards.open(source), model.moetier.layers, lambda: store)
    model.save_pretrained(out, **options)


@pytest.mark.parametrize("name", [*LAYOUTS, "inkling_text"])
def test_changed_experts_load_plainly(name: str, checkpoint: Get, plain: Get, tiered: Get, tmp_path: Path) -> None:
    model = tiered(name)
    run, store = changed(model, tmp_path / "run")
    save_changed(model, checkpoint(name), store, tmp_path / "out", max_shard_size="60KB")
    run.close()
    again = family_class(name).from_pretrained(tmp_path / "out", dtype="auto")
    state = again.state_dict()
    fields = {field.name for layer in model.moetier.layers for field in layer.layout.fields}
    for tensor, value in expected(plain(name), fields).items():
        assert torch.equal(state[tensor], value), tensor
    assert again.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_in_the_dtype_that_was_trained(name: str, checkpoint: Get, tiered: Get, tmp_path: Path) -> None:
    """Records that were cast when they were read are saved as they are, not cast back."""
    model = tiered(name, torch.bfloat16, dtype=torch.float32)
    run, store = changed(model, tmp_path / "run")
    save_changed(model, checkpoint(name), store, tmp_path / "out")
    run.close()
    kind = family_class(name)
    before = kind.from_pretrained(checkpoint(name), dtype=torch.float32)
    state = kind.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    fields = {field.name for layer in model.moetier.layers for field in layer.layout.fields}
    for tensor, value in expected(before, fields).items():
        assert state[tensor].dtype == torch.float32 and torch.equal(state[tensor], value), tensor


def test_a_model_of_a_packed_store_alone(checkpoint: Get, plain: Get, tiered: Get, tmp_path: Path) -> None:
    """Its checkpoint is gone; what a run made of it can be saved all the same."""
    packed(checkpoint("gpt_oss"), tmp_path / "packed", "gpt_oss")
    model = tiered(tmp_path / "packed", model_class=family_class("gpt_oss"))
    assert model.moetier.cache.store.kind == "packed"
    shards = original_shards(tmp_path / "packed")
    assert shards.witness() == Shards.open(checkpoint("gpt_oss")).witness()
    run, store = changed(model, tmp_path / "run")
    save_streaming(model, shards, model.moetier.layers, lambda: store)
    model.save_pretrained(tmp_path / "out")
    run.close()
    state = family_class("gpt_oss").from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    fields = {field.name for layer in model.moetier.layers for field in layer.layout.fields}
    for tensor, value in expected(plain("gpt_oss"), fields).items():
        assert torch.equal(state[tensor], value), tensor


def test_a_damaged_record_is_not_saved(checkpoint: Get, tiered: Get, tmp_path: Path) -> None:
    model = tiered("qwen3_moe")
    run, store = changed(model, tmp_path / "run")
    run.commit(1)
    counts = store.layers * [store.experts]
    run.close()
    with open(run.folder / "weights.bin", "r+b") as file:
        file.seek(5000)
        file.write(b"\xff\xfe")
    with RunFolder.open(run.folder, write=False) as again:
        store = again.family("weights", experts=counts, base=model.moetier.cache.store)
        with pytest.raises(StoreError, match=r"weights of layer \d+, expert \d+ .* damaged"):
            save_changed(model, checkpoint("qwen3_moe"), store, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
