"""Saving a tiered model as an ordinary checkpoint, streaming: never more than an expert of them in memory.

The experts are copied from the checkpoint they came from, or, where they were changed, written from their records. They
keep the names and the layout that they have in the checkpoint they came from, which every loader of that
checkpoint understands. Everything else is saved by transformers itself.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MethodType
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError

from moetier.errors import ConfigError, MoetierError, StoreError
from moetier.expert_tensors import ExpertTensors
from moetier.mapping import DTYPES, LayerMap
from moetier.plan import parse_size
from moetier.stores import ExpertStore
from moetier.stores.diskio import DiskFile
from moetier.stores.shards import Shards, TensorEntry

CHUNK = 4 << 20
_CODES = {dtype: code for code, dtype in DTYPES.items()}


def save_streaming(
    model: Any, shards: Shards, maps: list[LayerMap], changed: Callable[[], ExpertStore | None] | None = None
) -> None:
    """Give the model a `save_pretrained` that writes its experts too.

    `changed` is called when the model is saved, and gives the store that holds the experts as they are by then, every
    change included; without it, or where it gives None, they are as the checkpoint has them.
    """
    plain_save = type(model).save_pretrained
    targets = {name: m.layout.fields[0].dtype for m in maps for name in m.tensors}

    def save_pretrained(self: Any, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        if kwargs.get("state_dict") is not None or getattr(self, "_hf_peft_config_loaded", False):
            plain_save(self, save_directory, **kwargs)  # the caller's own tensors, or adapters only
            return
        if kwargs.pop("push_to_hub", False):
            raise ConfigError("push_to_hub is not supported for tiered models; save to a folder and upload that")
        store = None if changed is None else changed()
        if shards.known and store is None:
            raise ConfigError(
                f"{shards.files[0].parent}: a model that was loaded from a packed store cannot be saved; make the "
                "checkpoint again (moetier unpack) and load that"
            )
        folder = Path(save_directory)
        if any(folder.resolve() == file.resolve().parent or folder.resolve() == file.parent for file in shards.files):
            raise ConfigError(f"{folder} holds the checkpoint that the experts are read from; save to another folder")
        if folder.is_file():
            raise ConfigError(f"{folder} is a file; give a folder to save to")
        limit = parse_size(kwargs.get("max_shard_size", "5GB"), "max_shard_size")
        experts = None if store is None else ExpertTensors(store, maps, shards)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as scratch:
                plain_save(self, scratch, **kwargs)
                _add_experts(Path(scratch), shards, targets, limit, experts)
                _publish(Path(scratch), folder)
        except MoetierError:
            raise
        except (OSError, SafetensorError) as error:
            raise StoreError(f"{folder}: the model could not be saved: {error}") from error

    object.__setattr__(model, "save_pretrained", MethodType(save_pretrained, model))


def _add_experts(
    folder: Path, shards: Shards, targets: dict[str, torch.dtype], limit: int, experts: ExpertTensors | None
) -> None:
    """Write expert shards beside those of the other weights, and one index over all."""
    weights: dict[str, Path] = {}
    total = sum(_nbytes(shards.tensors[name], dtype) for name, dtype in targets.items())
    for file in sorted(folder.glob("*.safetensors")):
        entries = Shards.from_files([file]).tensors
        weights |= dict.fromkeys(entries, file)
        total += sum(entry.nbytes for entry in entries.values())
    plain_files = sorted(set(weights.values()))
    groups = list(_groups([shards.tensors[name] for name in targets], targets, limit))
    count = len(plain_files) + len(groups)
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    weight_map: dict[str, str] = {}
    for file, name in zip(plain_files, names, strict=False):
        file.rename(folder / name)
        weight_map |= {tensor: name for tensor, owner in weights.items() if owner == file}
    for group, name in zip(groups, names[len(plain_files) :], strict=True):
        _write_shard(folder / name, shards, group, targets, experts)
        weight_map |= {entry.name: name for entry in group}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _groups(entries: list[TensorEntry], targets: dict[str, torch.dtype], limit: int) -> Iterator[list[TensorEntry]]:
    group: list[TensorEntry] = []
    size = 0
    for entry in entries:
        nbytes = _nbytes(entry, targets[entry.name])
        if group and size + nbytes > limit:
            yield group
            group, size = [], 0
        group.append(entry)
        size += nbytes
    if group:
        yield group


def _nbytes(entry: TensorEntry, dtype: torch.dtype) -> int:
    return entry.nbytes // DTYPES[entry.dtype].itemsize * dtype.itemsize


def _write_shard(
    path: Path,
    shards: Shards,
    group: list[TensorEntry],
    targets: dict[str, torch.dtype],
    experts: ExpertTensors | None,
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in group:
        dtype = targets[entry.name]
        end = offset + _nbytes(entry, dtype)
        header[entry.name] = {"dtype": _CODES[dtype], "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    try:
        with open(path, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            if experts is None:
                _copy_tensors(file, shards, group, targets)
            else:
                file.flush()
                begins = {name: 8 + len(text) + header[name]["data_offsets"][0] for name in header.keys() & targets}
                written = experts.write(file.fileno(), begins, targets)
                assert written == offset, f"{written} bytes of tensors instead of {offset}"
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise StoreError(f"{path}: the checkpoint could not be written: {error.strerror or error}") from error


def _copy_tensors(file: BinaryIO, shards: Shards, group: list[TensorEntry], targets: dict[str, torch.dtype]) -> None:
    buffer = torch.empty(CHUNK, dtype=torch.uint8)
    for entry in group:
        with DiskFile(shards.files[entry.file], "buffered") as source:
            for begin in range(0, entry.nbytes, CHUNK):
                part = buffer[: min(CHUNK, entry.nbytes - begin)]
                source.read_into(entry.offset + begin, part.numpy().data)
                cast = part.view(DTYPES[entry.dtype]).to(targets[entry.name])
                file.write(cast.view(torch.uint8).numpy().data)


def _publish(scratch: Path, folder: Path) -> None:
    """Move the finished files into place, what makes the folder a model last."""
    stale = [f for f in folder.glob("model*.safetensors*") if f.is_file()]
    for file in stale:
        file.unlink()
    for file in sorted(scratch.iterdir(), key=lambda f: (f.suffix != ".safetensors", f.name == "config.json")):
        shutil.move(file, folder / file.name)
