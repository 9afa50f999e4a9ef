"""`save_pretrained` of a tiered model: an ordinary checkpoint, written piece by piece, or an error and nothing."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open

from conftest import family_class
from families import VOCAB
from moetier import ConfigError, MoetierError, StoreError, saving
from moetier.stores.shards import Shards

Get = Callable[..., Any]
# per expert, fused, fused under another name, transposed with biases, without gate, norm behind, interleaved
LAYOUTS = ["qwen3_moe", "mixtral", "mistral4", "granitemoe", "gpt_oss", "nemotron_h", "muse_spark", "inkling2_text"]


def prompt() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def fingerprint(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("name", LAYOUTS)
def test_saved_models_load_plainly(name: str, checkpoint: Get, plain: Get, tiered: Get, tmp_path: Path) -> None:
    before = fingerprint(checkpoint(name))
    model = tiered(name)
    model.save_pretrained(tmp_path / "saved")
    assert fingerprint(checkpoint(name)) == before
    expected = plain(name)(**prompt()).logits
    again = family_class(name).from_pretrained(tmp_path / "saved", dtype="auto")
    assert torch.equal(again(**prompt()).logits, expected)
    assert torch.equal(tiered(tmp_path / "saved", model_class=family_class(name))(**prompt()).logits, expected)
    assert torch.equal(model(**prompt()).logits, expected)  # saving changes nothing in the model
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert "quantization_config" not in config and "moetier" not in json.dumps(config)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_dtype_is_the_one_it_was_loaded_with(name: str, checkpoint: Get, tiered: Get, tmp_path: Path) -> None:
    model = tiered(name, torch.float32, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    kind = family_class(name)
    expected = kind.from_pretrained(checkpoint(name, torch.float32), dtype=torch.bfloat16)(**prompt()).logits
    again = kind.from_pretrained(tmp_path, dtype="auto")
    assert again.dtype == torch.bfloat16
    assert torch.equal(again(**prompt()).logits, expected)
    experts = {name for m in model.moetier.layers for name in m.tensors}
    entries = Shards.open(tmp_path).tensors
    assert {entries[name].dtype for name in experts} == {"BF16"}


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_small_shards(name: str, plain: Get, tiered: Get, tmp_path: Path) -> None:
    tiered(name).save_pretrained(tmp_path, max_shard_size="100KB")
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 5
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    held = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            names = opened.keys()
            held |= dict.fromkeys(names, file.name)
            sizes = [opened.get_tensor(key).nbytes for key in names]
        assert sum(sizes) <= 100_000 or len(sizes) == 1
    assert held == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(entry.nbytes for entry in Shards.open(tmp_path).tensors.values())
    again = family_class(name).from_pretrained(tmp_path, dtype="auto")
    assert torch.equal(again(**prompt()).logits, plain(name)(**prompt()).logits)


def test_changed_weights_beside_the_experts_are_saved(plain: Get, tiered: Get, tmp_path: Path) -> None:
    model = tiered("qwen3_moe")
    model.lm_head.weight.mul_(2)
    model.save_pretrained(tmp_path)
    again = family_class("qwen3_moe").from_pretrained(tmp_path, dtype="auto")
    assert torch.equal(again(**prompt()).logits, 2 * plain("qwen3_moe")(**prompt()).logits)


@pytest.mark.parametrize("way", ["same", "relative", "link"])
def test_the_source_is_never_written(
    way: str, checkpoint: Get, tiered: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint("qwen3_moe")
    before = fingerprint(source)
    target: Path = source
    if way == "relative":
        monkeypatch.chdir(source)
        target = Path(".")
    elif way == "link":
        target = tmp_path / "link"
        target.symlink_to(source)
    with pytest.raises(ConfigError, match="holds the checkpoint that the experts are read from"):
        tiered("qwen3_moe").save_pretrained(target)
    assert fingerprint(source) == before


def test_a_folder_whose_files_are_links_to_the_source(checkpoint: Get, plain: Get, tiered: Get, tmp_path: Path) -> None:
    """The links are replaced, not followed."""
    source = checkpoint("qwen3_moe")
    before = fingerprint(source)
    for file in source.iterdir():
        (tmp_path / file.name).symlink_to(file)
    tiered("qwen3_moe").save_pretrained(tmp_path)
    assert fingerprint(source) == before
    again = family_class("qwen3_moe").from_pretrained(tmp_path, dtype="auto")
    assert torch.equal(again(**prompt()).logits, plain("qwen3_moe")(**prompt()).logits)


def test_an_older_model_in_the_folder_is_replaced(checkpoint: Get, plain: Get, tiered: Get, tmp_path: Path) -> None:
    family_class("mixtral").from_pretrained(checkpoint("mixtral")).save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "notes.txt").write_text("kept")
    tiered("qwen3_moe").save_pretrained(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "kept"
    again = family_class("qwen3_moe").from_pretrained(tmp_path, dtype="auto")
    assert torch.equal(again(**prompt()).logits, plain("qwen3_moe")(**prompt()).logits)
    assert not list(tmp_path.glob(".saving-*"))


class FullDisk:
    """A file that takes so many bytes and then has no room."""

    def __init__(self, file: Any, room: int):
        self.file, self.room = file, room

    def __enter__(self) -> FullDisk:
        self.file.__enter__()
        return self

    def __exit__(self, *cause: Any) -> None:
        self.file.__exit__(*cause)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def write(self, data: Any) -> int:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return int(self.file.write(data))


@pytest.mark.parametrize("room", [0, 4000, 150_000])
def test_a_full_disk(
    room: int, tiered: Get, plain: Get, checkpoint: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error says so, the folder keeps what it had, and the model can be saved once there is room."""
    model = tiered("qwen3_moe")
    family_class("mixtral").from_pretrained(checkpoint("mixtral")).save_pretrained(tmp_path)
    before = fingerprint(tmp_path)

    def opened(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        file = open(path, mode, *args, **kwargs)  # noqa: SIM115
        return FullDisk(file, room) if "w" in mode and str(path).endswith(".safetensors") else file

    with monkeypatch.context() as patch:
        patch.setattr(saving, "open", opened, raising=False)
        with pytest.raises(StoreError, match=r"could not be written: No space left on device"):
            model.save_pretrained(tmp_path)
    assert fingerprint(tmp_path) == before
    assert not list(tmp_path.glob(".saving-*"))
    model.save_pretrained(tmp_path)
    again = family_class("qwen3_moe").from_pretrained(tmp_path, dtype="auto")
    assert torch.equal(again(**prompt()).logits, plain("qwen3_moe")(**prompt()).logits)


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), SafetensorError("I/O error: No space left on device")]
)
def test_a_full_disk_while_the_other_weights_are_written(
    error: Exception, tiered: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers.modeling_utils

    def full(*args: Any, **kwargs: Any) -> None:
        raise error

    model = tiered("qwen3_moe")
    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", full)
    with pytest.raises(StoreError, match="No space left on device"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_source_that_is_gone(checkpoint: Get, tiered: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    family_class("qwen3_moe").from_pretrained(checkpoint("qwen3_moe")).save_pretrained(source)
    model = tiered(source)
    (source / "model.safetensors").unlink()
    with pytest.raises(StoreError, match=r"model.safetensors: cannot be opened"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists() or not list((tmp_path / "saved").iterdir())
    model(**prompt())  # its open files are still readable


def test_arguments_that_cannot_be_used(tiered: Get, tmp_path: Path) -> None:
    model = tiered("qwen3_moe")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file; give a folder"):
        model.save_pretrained(tmp_path / "file")
    with pytest.raises(ConfigError, match="push_to_hub is not supported"):
        model.save_pretrained(tmp_path / "saved", push_to_hub=True)
    with pytest.raises(ConfigError, match="max_shard_size: 'many' is not a size"):
        model.save_pretrained(tmp_path / "saved", max_shard_size="many")


def test_a_given_state_dict_is_saved_as_it_is(tiered: Get, tmp_path: Path) -> None:
    model = tiered("qwen3_moe")
    model.save_pretrained(tmp_path, state_dict={"lm_head.weight": model.lm_head.weight})
    assert list(Shards.open(tmp_path).tensors) == ["lm_head.weight"]


def test_saving_after_closing(tiered: Get, plain: Get, tmp_path: Path) -> None:
    """Either it works or it says why; it does here, because saving opens the files itself."""
    model = tiered("qwen3_moe")
    model.moetier.close()
    try:
        model.save_pretrained(tmp_path)
    except MoetierError:
        return
    again = family_class("qwen3_moe").from_pretrained(tmp_path, dtype="auto")
    assert torch.equal(again(**prompt()).logits, plain("qwen3_moe")(**prompt()).logits)


def test_experts_pass_through_a_small_buffer(tiered: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No piece is larger than the buffer, whatever the tensors' sizes are."""
    model = tiered("gpt_oss")  # fused: one tensor is 8 experts
    monkeypatch.setattr(saving, "CHUNK", 4096)
    pieces = []
    real = saving.DiskFile.read_into
    monkeypatch.setattr(
        saving.DiskFile, "read_into", lambda file, offset, into: (pieces.append(len(into)), real(file, offset, into))[1]
    )
    save_experts = saving._add_experts
    monkeypatch.setattr(saving, "_add_experts", lambda *args: (pieces.clear(), save_experts(*args)))
    model.save_pretrained(tmp_path)
    experts = sum(entry.nbytes for name, entry in Shards.open(tmp_path).tensors.items() if ".experts." in name)
    assert sum(piece for piece in pieces if piece == 4096) > experts / 2
    assert max(pieces) < 8192  # headers of files included
