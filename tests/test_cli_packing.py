"""`moetier pack`, `verify`, `unpack`, and `--store`: what is printed, and what each mistake costs."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import moetier
from moetier.profile import Profile
from packs import sums
from test_cli import FAST, NAME, PROMPT, call, said, tokenizer

Get = Callable[..., Any]


@pytest.fixture(scope="module")
def folder(checkpoint: Get, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny MoE with a tokenizer. Never write to it."""
    path = Path(shutil.copytree(checkpoint(NAME), tmp_path_factory.mktemp("packing") / "model"))
    tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def model(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "model"))


def test_from_pack_to_unpack(model: Path) -> None:
    """The default place is where `run` and `plan` look; the store runs by itself; the files come back."""
    store, stats = model.with_name("model.moetier"), model.with_name("stats.json")
    made = call("pack", model)
    assert re.fullmatch(rf"{store}: 24 experts in 3 layers, 384\.0 KiB, in \d+\.\d s\n", made.stdout)
    assert call("pack", model).stdout == f"{store}: holds this store already (24 experts, 384.0 KiB)\n"
    texts = []
    for where, options, kind in [
        (model, (), "packed"),
        (model, ("--store", "none"), "checkpoint"),
        (store, (), "packed"),
    ]:
        result = call("run", where, PROMPT, "--greedy", *FAST, *options, "--stats-json", stats)
        texts.append(result.stdout)
        assert f"experts from {kind}" in said(result)
        assert json.loads(stats.read_text())["store"] == {
            "kind": kind,
            "path": str(model if kind == "checkpoint" else store),
        }
    assert len(texts[0]) > 5 and len(set(texts)) == 1
    assert "24 in 3 layers" in call("plan", model, "--store", store).stdout
    whole = call("verify", store).stdout
    assert re.fullmatch(rf"{store}: whole: 24 experts, \d+\.\d KiB read\n", whole)
    assert call("verify", store, model).stdout.endswith(f"read, and the same as in {model}\n")
    call("unpack", store, model.with_name("back"))
    assert sums(model.with_name("back")) == sums(model)


def test_verify_names_what_is_damaged(model: Path) -> None:
    store = model.with_name("model.moetier")
    call("pack", model, "--quiet")
    for number, offset in ((0, 100), (2, 16384 * 7 + 5)):
        path = store / f"experts-{number:05d}.bin"
        raw = bytearray(path.read_bytes())
        raw[offset] ^= 255
        path.write_bytes(raw)
    result = call("verify", store, code=4)
    assert sorted(result.stdout.splitlines()) == [
        f"{store}/experts-00000.bin: layer 0, expert 0: damaged: does not match its checksum",
        f"{store}/experts-00002.bin: layer 2, expert 7: damaged: does not match its checksum",
    ]
    assert f"error: {store}: 2 damaged; pack the model again (moetier pack MODEL {store} --replace)" in said(result)
    assert "layer" in said(call("unpack", store, model.with_name("back"), code=4))


def test_a_profile_and_a_dtype(model: Path, checkpoint: Get, tmp_path: Path) -> None:
    uses = torch.zeros(3, 8, dtype=torch.int64).numpy()
    uses[:, 6] = 3
    Profile(3, 8, uses=uses).save(tmp_path / "profile.json")
    out = tmp_path / "out"
    result = call("pack", model, out, "--profile", tmp_path / "profile.json", "--dtype", "float32")
    assert "cannot be made again" not in result.stderr  # widened: no bit is lost
    index = json.loads((out / "moetier-store.json").read_text())
    assert all(layer["records"][6][1] == 0 for layer in index["layers"])
    shutil.copytree(checkpoint(NAME, torch.float32), tmp_path / "wide")
    result = call("pack", tmp_path / "wide", "--dtype", "bfloat16")
    assert re.search(
        r"warning: the checkpoint cannot be made again from this store: layer 0: \w+ was cast from float32 to "
        r"bfloat16, which loses bits; keep .*wide",
        said(result),
    )
    assert "keep the checkpoint it was packed from" in said(
        call("unpack", tmp_path / "wide.moetier", tmp_path / "x", code=5)
    )


MISTAKES: list[tuple[tuple[str, ...], int, str]] = [
    (("pack", "{0}", "{0}/store"), 2, "inside the model folder"),
    (("pack", "{0}", "{0}/config.json"), 2, "inside the model folder"),
    (("pack", "{0}/nowhere"), 4, "no such model folder"),
    (("pack", "{0}", "--dtype", "int8"), 2, "--dtype int8: choose one of auto, float32"),
    (("pack", "{0}", "{1}/out", "--profile", "{0}/config.json"), 2, "config.json: not a profile of moetier"),
    (("pack", "{1}/model.moetier", "{1}/out"), 2, "is a packed store itself; give the checkpoint"),
    (("verify", "{0}"), 4, "not a packed store, moetier-store.json is missing"),
    (("verify", "{1}/nowhere"), 4, "no such folder; make a store with"),
    (("unpack", "{0}", "{1}/out"), 4, "not a packed store"),
    (("unpack", "{1}/model.moetier", "{0}"), 2, "exists and is not an empty folder"),
    (("run", "{0}", "Once", "--store", "{1}/nowhere"), 2, "--store: {1}/nowhere: no such folder"),
    (("run", "{0}", "Once", "--dtype", "float32"), 2, "holds the experts in bfloat16, but float32 is asked for"),
    (("run", "{1}/model.moetier", "Once", "--store", "none"), 2, "is itself a packed store"),
]


def test_mistakes(model: Path) -> None:
    call("pack", model)
    for arguments, code, message in MISTAKES:
        filled = [argument.format(model, model.parent) for argument in arguments]
        said_ = said(call(*filled, code=code))
        assert said_.startswith("error: ") and message.format(model, model.parent) in said_, (filled, said_)


def test_the_hub_needs_a_place(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    import moetier.loading

    monkeypatch.setattr(moetier.loading, "resolve", lambda name, **options: model)
    assert "comes from the hub; give OUT" in said(call("pack", "owner/name", code=2))


def test_headers_are_read_once(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the library and by every command that loads a model, checkpoint or packed store."""
    from moetier.stores import shards

    read: list[str] = []
    entries = shards._entries

    def count(path: Path, *rest: Any) -> Any:
        read.append(path.name)
        return entries(path, *rest)

    monkeypatch.setattr(shards, "_entries", count)
    store = model.with_name("model.moetier")

    def counted(expected: int, command: str, where: Path, *arguments: object) -> None:
        read.clear()
        call(command, where, *arguments)
        assert len(read) == expected, (command, where.name, read)

    text = model.with_name("text.txt")
    text.write_text("Once upon a time")
    files = len(list(model.glob("*.safetensors")))
    counted(files, "pack", model)
    for folder, options in ((model, ("--store", "none")), (model, ()), (store, ())):
        counted(files, "run", folder, PROMPT, "--greedy", *FAST, *options)
        counted(files, "eval", folder, "--text", text, "--tokens", 4, "--slots", 8, "--try", "max_rank=4", *options)
        counted(files, "plan", folder, *options)
        read.clear()
        moetier.from_pretrained(folder, slots=6, context=64, store=options[1] if options else None).moetier.close()
        assert len(read) == files
    counted(files, "verify", store, model)


def test_headers_of_other_files_are_not_taken_over(model: Path, tmp_path: Path) -> None:
    """What was validated counts for these very files only."""
    from moetier.loading import checked
    from moetier.stores.opening import shards_of

    other = Path(shutil.copytree(model, tmp_path / "other"))
    known = checked(model).shards
    files = sorted(model.glob("*.safetensors"))
    assert shards_of(files, known) is known
    fresh = shards_of([other / file.name for file in files], known)
    assert fresh is not known and fresh.files[0].parent == other
    assert moetier.from_pretrained(checked(model), slots=6).moetier.cache.store.folder == model
