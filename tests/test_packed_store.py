"""Which store serves a model, and every store that must not: of another model, stale, damaged, cut short, edited."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import family_class
from families import FAMILIES, VOCAB, make_checkpoint
from moetier import CheckpointError, ConfigError, StoreError, TieredExpertsConfig
from moetier.access import ExpertKey
from moetier.loading import inspect
from moetier.options import Options
from moetier.packing.unpack import unpack
from moetier.packing.verify import verify
from moetier.stores.checkpoint import CheckpointStore
from moetier.stores.packed import PackedStore
from moetier.stores.packed_index import DRAFT, INDEX, RESIDENT, PackedIndex, digest
from packs import own, packed, sums

Get = Callable[..., Any]
NAME = "qwen3_moe"


@pytest.fixture(scope="module")
def made(checkpoint: Get, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint and its store, not beside it. Never write to them."""
    folder = own(checkpoint(NAME), tmp_path_factory.mktemp("made") / "model")
    return folder, packed(folder, folder.parent / "store").index.folder


@pytest.fixture
def model(made: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the checkpoint with its store beside it."""
    shutil.copytree(made[1], tmp_path / "model.moetier")
    return own(made[0], tmp_path / "model")


@pytest.fixture
def store(model: Path) -> Path:
    return model.with_name("model.moetier")


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    return model(input_ids=ids).logits


def edit(folder: Path, change: Callable[[dict[str, Any]], Any], honest: bool = True) -> None:
    """Change the index; an honest one gets a fitting digest."""
    path = folder / INDEX
    body = json.loads(path.read_text())
    old = body.pop("digest")
    change(body)
    path.write_text(json.dumps(body | {"digest": digest(body) if honest else old}))


def flip(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


# -- which store serves ------------------------------------------------------------------------------------------------


def test_found_beside_named_and_switched_off(model: Path, store: Path, plain: Get, tiered: Get, tmp_path: Path) -> None:
    elsewhere = store.rename(tmp_path / "elsewhere")
    expected = logits(plain(NAME))
    served: dict[str, Any] = {}
    served["nothing beside"] = tiered(model)
    served["named"] = tiered(model, store=str(elsewhere))
    elsewhere.rename(store)
    served["beside"] = tiered(model)
    served["off"] = tiered(model, store="none")
    for case, kind in [
        ("nothing beside", CheckpointStore),
        ("named", PackedStore),
        ("beside", PackedStore),
        ("off", CheckpointStore),
    ]:
        assert isinstance(served[case].moetier.cache.store, kind), case
        assert torch.equal(logits(served[case]), expected)
    slots = {case: lm.moetier.plan.workload.slot_nbytes for case, lm in served.items()}
    assert slots["beside"] == served["beside"].moetier.cache.host.slot_nbytes < slots["off"]
    assert inspect(model, Options()).workload.slot_nbytes == slots["beside"]
    assert inspect(model, Options(store="none")).workload.slot_nbytes == slots["off"]


def test_a_copy_of_the_checkpoint_may_use_it(model: Path, store: Path, tiered: Get, tmp_path: Path) -> None:
    moved = own(model, tmp_path / "other")
    assert isinstance(tiered(moved, store=store).moetier.cache.store, PackedStore)


def test_the_transformers_door(model: Path, plain: Get) -> None:
    config = TieredExpertsConfig(slots="25%", context=64)
    lm = family_class(NAME).from_pretrained(model, dtype="auto", quantization_config=config)
    try:
        assert isinstance(lm.moetier.cache.store, PackedStore)
        assert torch.equal(logits(lm), logits(plain(NAME)))
    finally:
        lm.moetier.close()


def test_a_store_as_the_model(store: Path, made: tuple[Path, Path], tiered: Get, tmp_path: Path) -> None:
    """It needs nothing but its folder; transformers alone refuses it, and it cannot be saved or switched off."""
    lm = tiered(store)
    profile = tiered(made[0], record_profile=True)
    logits(profile)
    profile.moetier.profile().save(tmp_path / "profile.json")
    tiered(store, profile=str(tmp_path / "profile.json"))  # the same fingerprint
    with pytest.raises(ConfigError, match="cannot be saved; make the checkpoint again"):
        lm.save_pretrained(tmp_path / "saved")
    for off in ("none", str(made[1])):
        with pytest.raises(ConfigError, match="is itself a packed store"):
            tiered(store, store=off)
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        family_class(NAME).from_pretrained(store)
    assert inspect(store, Options()).workload.records == 24


def test_settings_of_a_packed_model(store: Path, made: tuple[Path, Path], tiered: Get) -> None:
    """Arguments that change the configuration do so here as well."""
    for lm in (tiered(store, num_experts_per_tok=1), tiered(made[0], num_experts_per_tok=1)):
        assert lm.config.num_experts_per_tok == 1 and lm.moetier.plan.workload.top_k == 1


# -- which must not ----------------------------------------------------------------------------------------------------


def test_a_changed_checkpoint(model: Path, store: Path, tiered: Get, tmp_path: Path) -> None:
    """Refused when found and when named; going without is a choice."""
    make_checkpoint(FAMILIES[NAME], model, seed=1)
    for options in ({}, {"store": str(store)}):
        with pytest.raises(
            StoreError, match=r"not from .*model as it is now: .* was changed since; pack it anew .*none"
        ):
            tiered(model, **options)
    with pytest.raises(StoreError, match="was changed since"):
        inspect(model, Options())
    logits(tiered(model, store="none"))


def test_a_change_that_the_fingerprint_does_not_see(model: Path, tiered: Get) -> None:
    path = model / "model.safetensors"
    flip(path, path.stat().st_size - 1)
    with pytest.raises(StoreError, match="was changed since"):
        tiered(model)


def test_a_store_of_another_model(checkpoint: Get, tiered: Get, store: Path) -> None:
    with pytest.raises(StoreError, match=r"model\.moetier: packed from model, but not from .* as it is now"):
        tiered("mixtral", store=str(store))


def test_another_configuration_in_a_packed_model(store: Path, tiered: Get) -> None:
    path = store / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"moe_intermediate_size": 48}))
    with pytest.raises(StoreError, match=r"config\.json: .* bytes instead of"):
        tiered(store)


def test_places_without_a_store(model: Path, tiered: Get, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"^store: .*nowhere: no such folder; make a store with"):
        tiered(model, store=str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=rf"^store: .*empty: not a packed store, {INDEX} is missing"):
        tiered(model, store=str(tmp_path / "empty"))


def test_an_unfinished_store(model: Path, store: Path, tiered: Get) -> None:
    """Beside the checkpoint it is not used yet; named or given as the model it is refused."""
    (store / INDEX).unlink()
    (store / DRAFT).write_text("{}")
    assert isinstance(tiered(model).moetier.cache.store, CheckpointStore)
    with pytest.raises(ConfigError, match="packing has not ended there; run the same `moetier pack` again"):
        tiered(model, store=str(store))
    with pytest.raises(StoreError, match="packing has not ended there"):
        tiered(store)


@pytest.mark.parametrize("name", ["experts-00001.bin", RESIDENT, "shards/model.safetensors.header"])
@pytest.mark.parametrize("how", ["truncated", "too long", "no such file"])
def test_files_of_another_size(name: str, how: str, store: Path) -> None:
    path = store / name
    if how == "no such file":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size + (-1 if how == "truncated" else 1))
    with pytest.raises(StoreError, match=rf"{name}: .*{how}.*; restore it, or pack the model again"):
        PackedIndex.load(store)


def test_a_file_that_shrinks_while_it_is_open(model: Path, store: Path, tiered: Get) -> None:
    lm = tiered(model)
    os.truncate(store / "experts-00002.bin", 0)
    with pytest.raises(StoreError, match=r"experts-00002\.bin: ends at byte \d+"):
        logits(lm)


BAD: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
    ("offset", lambda body: body["layers"][0]["records"][0].__setitem__(1, 4095)),
    ("end", lambda body: body["layers"][0]["records"][0].__setitem__(1, 1 << 40)),
    ("overlap", lambda body: body["layers"][0]["records"][0].__setitem__(1, 16384)),
    ("file", lambda body: body["layers"][0]["records"][0].__setitem__(0, 99)),
    ("negative", lambda body: body["layers"][0]["records"][0].__setitem__(1, -4096)),
    ("text", lambda body: body["layers"][0]["records"][0].__setitem__(3, "1")),
    ("short", lambda body: body["layers"][0]["records"][0].pop()),
    ("no layers", lambda body: body["layers"].clear()),
    ("layout", lambda body: body["layouts"][0].update(bytes=7)),
    ("dtype", lambda body: body["layouts"][0]["fields"][0].update(dtype="load")),
    ("escape", lambda body: body["files"][0].update(name="../secret")),
    ("absolute", lambda body: body["files"][0].update(name="/etc/passwd")),
    ("missing", lambda body: body.pop("files")),
    ("checksum", lambda body: body.update(checksum="md5")),
]


@pytest.mark.parametrize(("_", "change"), BAD, ids=[name for name, _ in BAD])
def test_an_index_that_makes_no_sense(_: str, change: Callable[[dict[str, Any]], Any], store: Path) -> None:
    edit(store, change)
    with pytest.raises(StoreError, match=rf"{INDEX}: damaged \(.*pack the model again"):
        PackedIndex.load(store)


def test_an_edited_index(store: Path) -> None:
    edit(store, lambda body: body.update(fingerprint="0" * 16), honest=False)
    with pytest.raises(StoreError, match=f"{INDEX}: damaged or edited: it does not match its digest"):
        PackedIndex.load(store)


def test_a_later_version(store: Path) -> None:
    edit(store, lambda body: body.update(version=2))
    with pytest.raises(StoreError, match=rf"{INDEX}: version 2 of the format; this moetier reads 1"):
        PackedIndex.load(store)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "\0" * 99, '{"format": "other"}'])
def test_an_index_that_is_none(text: str, store: Path) -> None:
    (store / INDEX).write_text(text)
    with pytest.raises(StoreError, match=rf"{INDEX}: (damaged: not JSON|not the index of a packed store)"):
        PackedIndex.load(store)


# -- damage ------------------------------------------------------------------------------------------------------------


def test_every_damaged_record_is_named(store: Path, tmp_path: Path) -> None:
    index = PackedIndex.load(store)
    assert list(verify(index)) == []
    size = index.region(ExpertKey(1, 0))
    flip(store / "experts-00001.bin", index.record(ExpertKey(1, 2)).offset)
    flip(
        store / "experts-00001.bin", index.record(ExpertKey(1, 7)).offset + size - 1
    )  # in the filling of its last page
    flip(store / RESIDENT, 5000)
    raw = bytearray((store / "experts-00002.bin").read_bytes())  # two records in each other's places
    a, b = (index.record(ExpertKey(2, expert)).offset for expert in (3, 4))
    raw[a : a + size], raw[b : b + size] = raw[b : b + size], raw[a : a + size]
    (store / "experts-00002.bin").write_bytes(raw)
    found = {str(damage.key or damage.path.name) for damage in verify(index)}
    bad = [ExpertKey(1, 2), ExpertKey(1, 7), ExpertKey(2, 3), ExpertKey(2, 4)]
    assert found == {*map(str, bad), RESIDENT}
    with pytest.raises(StoreError, match=r"resident\.safetensors: damaged"):
        unpack(index, tmp_path / "back")
    flip(store / RESIDENT, 5000)
    with pytest.raises(StoreError, match=r"experts-0000\d\.bin: layer \d, expert \d: damaged: does not match"):
        unpack(index, tmp_path / "back")
    assert not list((tmp_path / "back").iterdir())


def test_a_record_that_differs_from_the_checkpoint(model: Path, store: Path, tiered: Get, tmp_path: Path) -> None:
    """Compared with the model itself, as the engine reads it."""
    index = PackedIndex.load(store)
    other = tmp_path / "other"
    make_checkpoint(FAMILIES[NAME], other, seed=1)
    for folder, expected in ((model, 0), (other, 24)):
        home = tiered(folder, store="none").moetier.cache.store
        assert len(list(verify(index, home))) == expected


def test_unpacking_places(store: Path, made: tuple[Path, Path], tmp_path: Path) -> None:
    index = PackedIndex.load(store)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    for place, message in [
        (store, "inside the store"),
        (store / "back", "inside the store"),
        (tmp_path / "full", "is not an empty folder"),
        (tmp_path / "full" / "notes.txt", "is not an empty folder"),
    ]:
        with pytest.raises(ConfigError, match=message):
            unpack(index, place)
    (tmp_path / "back" / ".unpacking").mkdir(parents=True)  # of one that was killed
    (tmp_path / "back" / ".unpacking" / "model.safetensors").write_bytes(b"half")
    unpack(index, tmp_path / "back")
    assert sums(tmp_path / "back") == sums(made[0])


def test_the_model_folder_is_checked_first(store: Path, tiered: Get) -> None:
    (store / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: missing"):
        tiered(store)
