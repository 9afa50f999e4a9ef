"""A checkpoint with random weights from a config, written a module at a time: the model need not fit in memory.

Every module is initialised by the model's own code in transformers, written under the names that its checkpoints have,
and dropped. The most in memory is a layer's experts, twice, and a shard.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from moetier.errors import CheckpointError, StoreError
from moetier.loading import translate

SHARD = 1 << 30  # bytes after which a file is closed
RECIPE = "moetier-initial.json"  # in the checkpoint: what it was made from
NOT_VALUES = ("transformers_version", "_name_or_path")  # of a config: no weight follows from them


@dataclass(frozen=True, slots=True)
class Recipe:
    """What random weights follow from: the config as its file has it, the seed, and `dtype` (auto: the config's)."""

    config: Mapping[str, Any]
    seed: int
    dtype: str

    @classmethod
    def of(cls, place: Path, seed: int, dtype: str) -> Recipe:
        """From a folder with a config, or its file. Raises `CheckpointError`."""
        config = read_config(place)
        return cls({name: value for name, value in config.items() if name not in NOT_VALUES}, seed, dtype)

    @classmethod
    def load(cls, folder: Path) -> Recipe | None:
        """That of a checkpoint; None where it does not say."""
        try:
            return cls(**json.loads((folder / RECIPE).read_text("utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def save(self, folder: Path) -> None:
        """Write it. Raises OSError."""
        (folder / RECIPE).write_text(json.dumps(asdict(self), indent=2, sort_keys=True) + "\n", "utf-8")

    def difference(self, before: Recipe) -> str:
        """What was another one before, by its flag; empty where nothing was."""
        pairs = {"--seed": (before.seed, self.seed), "--dtype": (before.dtype, self.dtype)}
        for name in sorted(before.config.keys() | self.config.keys()):
            pairs[f"the model's {name}"] = before.config.get(name), self.config.get(name)
        return ", ".join(f"{name} {old}, not {new}" for name, (old, new) in pairs.items() if old != new)


def read_config(place: Path) -> dict[str, Any]:
    """The values in a folder's config or in a JSON file. Raises `CheckpointError`."""
    file = place / "config.json" if place.is_dir() else place
    try:
        return dict(json.loads(file.read_text("utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{file}: no config ({error}); give a folder with config.json, or such a file") from None


def config_of(place: Path, trust_remote_code: bool = False) -> Any:
    """The config in a folder or in a JSON file. Raises `CheckpointError`."""
    read_config(place)
    try:
        return AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # whatever a config class raises
        raise translate(error, place) from error


def make_checkpoint(config: Any, folder: Path, recipe: Recipe, trust_remote_code: bool = False) -> None:
    """Write a new checkpoint from the config of the recipe; the folder is there when it is complete.

    Raises `CheckpointError` for a config that makes no model, `StoreError` where it cannot be written.
    """
    draft = folder.with_name(f".{folder.name}.draft")
    chosen = getattr(config, "dtype", None) if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=chosen or torch.float32, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # whatever a model class raises about numbers that do not fit
        raise translate(error, folder.parent) from error
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            _write(model, draft)
        model.config.save_pretrained(draft)
        if model.can_generate():
            model.generation_config.save_pretrained(draft)
        recipe.save(draft)
        os.replace(draft, folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StoreError(
            f"{folder}: the checkpoint could not be written ({reason}); give a folder on a disk that has room for it"
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@torch.no_grad()
def _write(model: Any, folder: Path) -> None:
    """All weights of a model on the meta device, in files of `SHARD` bytes or a module more, and their index."""
    weight_map: dict[str, str] = {}
    pending: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    total = 0

    def close_shard() -> None:
        if pending:
            name = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
            save_file(pending, folder / name, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(pending, name))
            pending.clear()

    for prefix, module in model.named_modules():
        own = module._parameters | {
            n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set
        }
        names = [name for name, tensor in own.items() if tensor is not None and id(tensor) not in seen]
        seen.update(id(own[name]) for name in names)
        if not names:
            continue
        shapes = {name: tensor for name, tensor in module.named_parameters(recurse=False)} | dict(
            module.named_buffers(recurse=False)
        )
        module.to_empty(device="cpu", recurse=False)
        for buffer in module.buffers(recurse=False):
            buffer.zero_()
        model._init_weights(module)
        tensors = {f"{prefix}.{name}".lstrip("."): getattr(module, name).detach() for name in names}
        for name, tensor in revert_weight_conversion(model, tensors).items():
            pending[name] = tensor.contiguous().clone()
            total += tensor.numel() * tensor.element_size()
        for name in shapes:  # gives the memory back
            if name in module._parameters:
                module._parameters[name] = torch.nn.Parameter(module._parameters[name].to("meta"))
            else:
                module._buffers[name] = module._buffers[name].to("meta")
        if sum(tensor.numel() * tensor.element_size() for tensor in pending.values()) >= SHARD:
            close_shard()
    close_shard()
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
