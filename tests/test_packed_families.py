"""A packed store gives every way of storing experts the bits of the checkpoint, and gives the checkpoint back."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import family_class
from moetier import ConfigError, UnsupportedModelError
from moetier.access import ExpertKey
from moetier.packing.unpack import unpack
from moetier.packing.verify import verify
from moetier.stores.checkpoint import CheckpointStore
from moetier.stores.packed import PackedStore
from packs import own, packed, sums
from test_families import LAYOUTS, Outputs

Get = Callable[..., Any]
PAGE = 4096


def records(store: CheckpointStore | PackedStore) -> list[bytes]:
    """Every record as the engine would get it, read segment by segment."""
    found = []
    for layer in range(store.layers):
        nbytes = max(field.offset + field.nbytes for field in store.layout(layer).fields)
        for expert in range(8):
            key, buffer = ExpertKey(layer, expert), bytearray(store.layout(layer).nbytes)
            read = sum(store.read(key, segment, memoryview(buffer)) for segment in range(store.segments(key)))
            assert read >= sum(field.nbytes for field in store.layout(layer).fields)
            found.append(bytes(buffer[:nbytes]))
    return found


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.bfloat16) for name in LAYOUTS]
    + [(name, torch.float32) for name in ("qwen3_moe", "gpt_oss", "muse_spark", "inkling2_text")],
    ids=str,
)
def test_bits_do_not_change(
    name: str, dtype: torch.dtype, checkpoint: Get, plain: Get, tiered: Get, tmp_path: Path
) -> None:
    """From beside the checkpoint, and with the store as the model; and back to the same files."""
    folder = own(checkpoint(name, dtype), tmp_path / "model")
    index = packed(folder, tmp_path / "model.moetier", name).index
    assert not index.lossy and list(verify(index)) == []
    assert all(record.offset % PAGE == 0 for row in index.records for record in row)
    expected = Outputs.of(plain(name, dtype))
    kind = family_class(name)
    for where in (folder, index.folder):
        model = tiered(where, model_class=kind)
        assert isinstance(model.moetier.cache.store, PackedStore)
        expected.check(Outputs.of(model))
    unpack(index, tmp_path / "back")
    assert sums(tmp_path / "back") == sums(folder)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "inkling2_text"])
def test_records_are_those_of_the_checkpoint(name: str, checkpoint: Get, tiered: Get, tmp_path: Path) -> None:
    """Whole pages from a page on, in one request each, and the same bytes."""
    folder = own(checkpoint(name), tmp_path / "model")
    index = packed(folder, tmp_path / "out", name).index
    store = tiered(folder, model_class=family_class(name)).moetier.cache.store
    assert isinstance(store, CheckpointStore)
    other = PackedStore(index)
    try:
        assert records(other) == records(store)
        key = ExpertKey(1, 3)
        assert other.layout(1).nbytes % PAGE == 0 and other.slot_nbytes == max(
            other.layout(layer).nbytes for layer in range(other.layers)
        )
        assert (other.phase(key), other.segments(key)) == (0, 1)
        assert other.slot_nbytes <= store.slot_nbytes
        assert (other.layers, other.experts, other.records) == (store.layers, store.experts, store.records)
    finally:
        other.close()


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_small_shards_come_back(name: str, checkpoint: Get, plain: Get, tiered: Get, tmp_path: Path) -> None:
    """An expert's tensors lie in several files; the index of the shards comes back too."""
    folder, kind = tmp_path / "model", family_class(name)
    kind.from_pretrained(checkpoint(name), dtype="auto").save_pretrained(folder, max_shard_size="30KB")
    assert len(list(folder.glob("*.safetensors"))) > 5
    index = packed(folder, tmp_path / "out", name).index
    Outputs.of(plain(name)).check(Outputs.of(tiered(index.folder, model_class=kind)))
    unpack(index, tmp_path / "back")
    assert sums(tmp_path / "back") == sums(folder)


def test_transposed_as_on_the_hub(checkpoint: Get, tiered: Get, tmp_path: Path) -> None:
    """Records are converted on the way in, and back on the way out."""
    name = "qwen3_vl_moe"
    kind, source, folder = family_class(name), checkpoint(name), tmp_path / "model"
    tensors = load_file(source / "model.safetensors")
    for key in [key for key in tensors if re.search(r"experts\.(gate_up|down)_proj$", key)]:
        tensors[key] = tensors[key].transpose(1, 2).contiguous()
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text((source / "config.json").read_text())
    index = packed(folder, tmp_path / "out", name).index
    assert not index.lossy
    expected = Outputs.of(kind.from_pretrained(source, dtype="auto").eval())
    expected.check(Outputs.of(tiered(index.folder, model_class=kind)))
    unpack(index, tmp_path / "back")
    assert sums(tmp_path / "back") == sums(folder)


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("widened", [True, False], ids=["widened", "narrowed"])
def test_casts(name: str, widened: bool, checkpoint: Get, tiered: Get, tmp_path: Path) -> None:
    """A store in another dtype serves that dtype; the files come back only where no bit was lost."""
    stored, wanted = (torch.bfloat16, torch.float32) if widened else (torch.float32, torch.bfloat16)
    kind, folder = family_class(name), own(checkpoint(name, stored), tmp_path / "model")
    index = packed(folder, tmp_path / "model.moetier", name, wanted).index
    assert {field.dtype for layout in index.layouts for field in layout.fields} == {wanted}
    model = tiered(folder, model_class=kind, dtype=wanted)
    assert isinstance(model.moetier.cache.store, PackedStore)
    Outputs.of(kind.from_pretrained(folder, dtype=wanted).eval()).check(Outputs.of(model))
    with pytest.raises(ConfigError, match=r"model\.moetier holds the experts in .*, but .* is asked for"):
        tiered(folder, model_class=kind)
    if widened:
        unpack(index, tmp_path / "back")
        assert sums(tmp_path / "back") == sums(folder)
    else:
        assert re.search("was cast from float32 to bfloat16, which loses bits", index.lossy)
        with pytest.raises(UnsupportedModelError, match="cannot be made again from this store"):
            unpack(index, tmp_path / "back")
        assert not (tmp_path / "back").exists()
