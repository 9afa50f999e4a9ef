"""`moetier.from_pretrained`: the checkpoint is checked before anything is loaded, and errors are moetier's own."""

from __future__ import annotations

import copy
import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from moetier.attach import plan_for
from moetier.errors import CheckpointError, ConfigError, MoetierError, UnsupportedModelError
from moetier.hf import TieredExpertsConfig, detach_experts, find_experts, map_experts
from moetier.mapping import DTYPES, LayerMap
from moetier.options import Options
from moetier.plan import Plan
from moetier.sizing import kv_nbytes
from moetier.stores.opening import find_packed, original_shards
from moetier.stores.packed_index import INDEX, RESIDENT, is_store
from moetier.stores.runfolder import RunFolder
from moetier.stores.runsteps import Head
from moetier.stores.shards import Shards

_HUB_ARGUMENTS = ("revision", "token", "cache_dir", "force_download", "local_files_only")
_NOT_CONFIG = ("config", "dtype", "torch_dtype", "attn_implementation", "device_map", "trust_remote_code")
_LOADER_ERRORS = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ArithmeticError)


def from_pretrained(
    model: str | Path | CheckedFolder,
    *,
    device_memory: str | int | None = None,
    host_memory: str | int | None = None,
    slots: str | int | None = None,
    policy: str = "horizon",
    device: str | torch.device | None = None,
    model_class: Any = AutoModelForCausalLM,
    **kwargs: Any,
) -> Any:
    """Load a Mixture-of-Experts model with its experts out of core.

    Args:
        model: a folder with a safetensors checkpoint, the id of one on the Hugging Face hub, or a packed store; or such
            a folder that `moetier.loading.checked` has validated, whose headers are then not read again.
        device_memory: GPU memory the run may take ("8GiB"); by default 80 % of what is free. Ignored without a GPU.
        host_memory: host memory the run may take beside the interpreter's own; by default 80 % of what is free.
        slots: size of the fastest tier as a number of experts or a share ("25%"); overrides its memory budget.
        policy: eviction policy, see `moetier.POLICIES`.
        device: where to compute; by default the first GPU, else the CPU.
        model_class: the transformers class to load with.
        **kwargs: further fields of `moetier.Options` (admission, context, readers, io, split, record_events,
            pin_after, profile, record_profile, store, cpu_experts; and the lossy levers: cache_prior, keep_top,
            max_rank, max_mass, drop_misses; to train the model: train, train_step, state_slots, gradient_slots,
            activation_memory, keep, writeback, see docs/training.md), and anything that `from_pretrained` of
            transformers takes (dtype, attn_implementation, revision, …).

    Returns:
        The ordinary transformers model, with its tiers reachable as `model.moetier`.

    Raises:
        CheckpointError: a file is missing, damaged, or does not fit the config.
        UnsupportedModelError: not an MoE, or a family without the experts interface.
        CapacityError: a budget below the minimum, which the message states.
        ConfigError: an argument that cannot be used.
    """
    own = {name: kwargs.pop(name) for name in list(kwargs) if name in Options.__dataclass_fields__}
    config = TieredExpertsConfig(
        device_memory=device_memory, host_memory=host_memory, slots=slots, policy=policy, **own
    )
    kwargs.setdefault("dtype", "auto")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if torch.device(device).type != "cpu":
        kwargs.setdefault("device_map", {"": torch.device(device)})
    hub = {name: kwargs.pop(name) for name in _HUB_ARGUMENTS if name in kwargs}
    found = model if isinstance(model, CheckedFolder) else checked(resolve(model, **hub))
    folder, config.shards = found.path, found.shards
    wants_info = kwargs.pop("output_loading_info", False)
    try:
        if (folder / INDEX).is_file():
            kwargs["config"] = _packed_config(folder, kwargs)
        loaded, info = model_class.from_pretrained(
            folder, quantization_config=config, output_loading_info=True, **kwargs
        )
    except MoetierError:
        raise
    except _LOADER_ERRORS as error:
        raise translate(error, model) from error
    if info["missing_keys"]:
        loaded.moetier.close()
        names = sorted(info["missing_keys"])
        raise CheckpointError(
            f"{folder}: no tensor for {names[0]!r} and {len(names) - 1} others; the checkpoint is incomplete, "
            "or its config.json belongs to another model"
        )
    return (loaded, info) if wants_info else loaded


def resolve(model: str | Path, **hub: Any) -> Path:
    """The local folder of a model: the folder itself, or the hub's snapshot, downloaded if it is not in its cache yet.

    `hub` are arguments of `huggingface_hub.snapshot_download` (revision, token, cache_dir, …). Only configuration,
    tokenizer and safetensors files of the repository's top folder are fetched. Raises `CheckpointError`.
    """
    folder = Path(model).expanduser()
    if folder.exists() or str(model).startswith((".", "/", "~")) or str(model).count("/") != 1:
        if not folder.is_dir():
            raise CheckpointError(
                f"{model}: no such model folder; give a folder with config.json, or a hub id (owner/name)"
            )
        return folder
    try:
        return Path(
            snapshot_download(
                str(model),
                allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"],
                ignore_patterns=["*/*", "consolidated*"],
                **hub,
            )
        )
    except (OSError, ValueError, HfHubHTTPError) as error:
        text = str(error).splitlines()[0]
        raise CheckpointError(
            f"{model}: not a folder, and the hub could not give it: {text}; check the name and the connection, or "
            "download the model and give its folder"
        ) from error


@dataclass(frozen=True)
class CheckedFolder:
    """A local model folder that `check_folder` has found good, with what it has read of the headers."""

    path: Path
    shards: Shards

    def __str__(self) -> str:
        return str(self.path)


def checked(folder: Path | CheckedFolder) -> CheckedFolder:
    """Validate a local model folder, once. Raises what `check_folder` raises."""
    return folder if isinstance(folder, CheckedFolder) else CheckedFolder(folder, check_folder(folder))


def inspect(folder: Path | CheckedFolder, options: Options, device: torch.device | None = None, **kwargs: Any) -> Plan:
    """The memory plan of a model without loading a weight: headers, shapes and arithmetic.

    Raises what `from_pretrained` would raise, but a budget below the minimum is a status of the plan.
    """
    made = skeleton(folder, **kwargs)
    packed = find_packed(made.shards, [m.layout for m in made.maps], options.store)
    detach_experts(made.model, made.modules)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kv = kv_nbytes(made.model, options.context)
    return plan_for(made.model, made.maps, options, device, made.top_k, kv, packed)


@dataclass(frozen=True)
class Skeleton:
    """A model without data, and where its experts are in the checkpoint."""

    model: Any
    modules: list[tuple[str, Any]]
    shards: Shards
    maps: list[LayerMap]
    top_k: int


def skeleton(
    folder: Path | CheckedFolder,
    dtype: torch.dtype | None = None,
    model_class: Any = AutoModelForCausalLM,
    **kwargs: Any,
) -> Skeleton:
    """Build a model on the meta device and map its experts; `dtype` None is what the config says.

    Raises `CheckpointError`, `UnsupportedModelError`, `ConfigError` as `from_pretrained` does.
    """
    known = checked(folder)
    shards = known.shards
    try:
        config = AutoConfig.from_pretrained(known.path, **kwargs)
        dtype = dtype or getattr(config, "dtype", None) or _stored_dtype(shards)
        with torch.device("meta"):
            make = getattr(model_class, "from_config", None) or model_class._from_config
            model = make(config, dtype=dtype, **kwargs)
    except _LOADER_ERRORS as error:
        raise translate(error, known.path) from error
    modules = find_experts(model)
    maps, top_k = map_experts(model, modules, shards, dtype)
    return Skeleton(model, modules, shards, maps, top_k)


def _stored_dtype(shards: Shards) -> torch.dtype:
    """What the loader takes where the config says nothing: the dtype of the first weight."""
    entries = sorted(shards.tensors.values(), key=lambda entry: (entry.file, entry.offset))
    return next((DTYPES[entry.dtype] for entry in entries if entry.dtype in DTYPES), torch.float32)


def _packed_config(folder: Path, kwargs: dict[str, Any]) -> Any:
    """The configuration of a packed store, which says where the weights are that are not experts."""
    config = kwargs.get("config")
    if config is None:
        known = {name: kwargs[name] for name in ("trust_remote_code", "code_revision") if name in kwargs}
        config = AutoConfig.from_pretrained(folder, **known)
    config = copy.deepcopy(config)
    for name in [name for name in kwargs if name not in _NOT_CONFIG and hasattr(config, name)]:
        setattr(config, name, kwargs.pop(name))
    config.transformers_weights = RESIDENT
    return config


def check_folder(folder: Path) -> Shards:
    """Validate a local model folder before transformers sees it. Raises `CheckpointError`, `UnsupportedModelError`."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such model folder; give a folder with config.json, or a hub id")
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        training = about_training(folder)
        raise CheckpointError(training or f"{path}: missing; a model folder needs its config.json") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}); download the file again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: is not a JSON object; download the file again")
    quantised = config.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method", "method unknown") if isinstance(quantised, dict) else quantised
        raise UnsupportedModelError(
            f"{path}: the checkpoint is quantised ({method}); moetier runs fp32, fp16 and bf16 checkpoints so far"
        )
    if "auto_map" not in config:
        _check_values(path, config)
    return original_shards(folder) if is_store(folder) else Shards.open(folder)


def about_training(folder: Path) -> str:
    """That a folder is a training run's, and the way to a model from there; empty for any other folder."""
    out = next((place for place in (folder, folder.absolute().parent) if (place / "train.toml").is_file()), None)
    run = next((place for place in (folder, folder / "run") if RunFolder.exists(place)), None)
    if run is None:
        return ""
    told = f"{folder}: the folder of a training run, not a model"
    name = Head.load(run).model
    if name.startswith("synthetic "):
        return f"{told}: that of moetier train synthetic, which makes no model; give a model"
    if out is not None and (out / "run").absolute() == run.absolute():
        options = shlex.quote(str(out / "train.toml"))
        return f"{told}; save its model with moetier train --config {options} --resume --export DIR, and give DIR"
    return (
        f"{told}; save its model with moetier.from_pretrained({name or 'MODEL'!r}, train={str(run)!r})"
        ".save_pretrained(DIR), and give DIR"
    )


def _check_values(path: Path, config: dict[str, Any]) -> None:
    kind = config.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise UnsupportedModelError(
            f"{path}: model type {kind!r} is unknown to this version of transformers; upgrade it"
        )
    try:
        CONFIG_MAPPING[kind].from_pretrained(path.parent)
    except Exception as error:  # whatever its own checks raise
        text = " ".join(str(error).split())
        raise CheckpointError(f"{path}: has a value that cannot be used: {text}; download the file again") from error


def translate(error: Exception, model: str | Path | CheckedFolder) -> MoetierError:
    """An error of the loader as one of moetier's, keeping its first lines."""
    text = "; ".join(line.strip() for line in str(error).splitlines() if line.strip())[:600]
    if "trust_remote_code" in text:
        return ConfigError(f"{model}: this model needs its own code; pass trust_remote_code=True if you trust it")
    if "unexpected keyword argument" in text:
        return ConfigError(f"{model}: {text}; see moetier.Options for the arguments that moetier takes")
    if isinstance(error, OSError):
        return CheckpointError(f"{model}: {text}")
    return CheckpointError(f"{model}: the checkpoint and its config.json do not fit together: {text}")
