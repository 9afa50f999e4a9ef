"""What a checkpoint of training holds beside the experts: resident weights, resident optimizer state, random states.

Tensors as safetensors, everything else as JSON; nothing is pickled. Knows no run folder.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from moetier.errors import ConfigError, StoreError
from moetier.training.proxy import Proxy

RESIDENT = "resident.safetensors"
OPTIMIZER = "optimizer.safetensors"
RANDOM = "random.safetensors"

# -- resident weights --------------------------------------------------------------------------------------------------


def resident_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers of the model by name, shared ones once; without the proxies of experts."""
    proxies = {id(p) for module in model.modules() if isinstance(module, Proxy) for p in module.parameters()}
    named = {name: p.data for name, p in model.named_parameters() if id(p) not in proxies}
    named |= {f"buffer:{name}": b for name, b in model.named_buffers()}
    return named


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write tensors to a safetensors file."""
    # contiguous copies of their own: safetensors refuses tensors that share memory
    save_file({name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}, path)


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read such a file. Raises `StoreError` naming it."""
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{path}: cannot be read: {error}; go on from another step") from error


@torch.no_grad()
def restore_resident(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Put saved weights back in place. Raises `StoreError` where they are not those of this model."""
    own = resident_tensors(model)
    for name in sorted(own.keys() ^ tensors.keys()):
        where = "is missing" if name in own else "is not in the model"
        raise StoreError(f"{path}: {name} {where}: the run was made with another model")
    for name, tensor in own.items():
        saved = tensors[name]
        if saved.shape != tensor.shape or saved.dtype != tensor.dtype:
            raise StoreError(
                f"{path}: {name} is {saved.dtype} {list(saved.shape)} in the run, but {tensor.dtype} "
                f"{list(tensor.shape)} in the model; load the model as it was loaded when the run began"
            )
        tensor.copy_(saved)


# -- resident optimizer state ------------------------------------------------------------------------------------------


def optimizer_snapshot(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The state dict of an optimizer of torch as tensors and as JSON."""
    state = optimizer.state_dict()
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for number, entries in state["state"].items():
        for name, value in entries.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{number}.{name}"] = value
            else:
                values.setdefault(str(number), {})[name] = plain(value, f"optimizer state {name}")
    groups = [plain(group, "param_groups") for group in state["param_groups"]]
    return tensors, {"values": values, "groups": groups}


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor], saved: Mapping[str, Any], path: Path
) -> None:
    """Put the state back, every tensor with the bits and the dtype that it had. Raises `StoreError`."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    groups = saved["groups"]
    if [len(group["params"]) for group in groups] != [len(group["params"]) for group in optimizer.param_groups]:
        raise StoreError(f"{path}: the run's optimizer had other groups of parameters; make it as it was made before")
    for own, group in zip(optimizer.param_groups, groups, strict=True):
        for name, value in group.items():
            if name != "params":
                own[name] = tuple(value) if isinstance(own.get(name), tuple) else value
    optimizer.state.clear()
    for full, tensor in tensors.items():
        number, _, name = full.partition(".")
        parameter = parameters[int(number)]
        # torch keeps counts of steps where they are made, on the CPU
        optimizer.state[parameter][name] = tensor if tensor.dim() == 0 else tensor.to(parameter.device)
    for text, entries in saved["values"].items():
        optimizer.state[parameters[int(text)]].update(entries)


# -- random states -----------------------------------------------------------------------------------------------------


def random_snapshot() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The generators of torch (CPU and every GPU), Python and numpy."""
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"cuda:{number}": state for number, state in enumerate(torch.cuda.get_rng_state_all())}
    kind, keys, *rest = np.random.get_state(legacy=True)
    tensors["numpy"] = torch.from_numpy(np.asarray(keys, dtype=np.uint32).astype(np.int64))
    version, words, gauss = random.getstate()
    return tensors, {"python": [version, list(words), gauss], "numpy": [str(kind), *map(plain_number, rest)]}


def restore_random(tensors: Mapping[str, torch.Tensor], saved: Mapping[str, Any]) -> None:
    """Set all generators as they were."""
    torch.set_rng_state(tensors["torch"])
    for name, state in tensors.items():
        if name.startswith("cuda:") and torch.cuda.is_available():
            torch.cuda.set_rng_state(state, int(name.removeprefix("cuda:")))
    kind, position, has_gauss, gauss = saved["numpy"]
    np.random.set_state((kind, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, gauss))
    version, words, gauss = saved["python"]
    random.setstate((version, tuple(words), gauss))


# -- JSON --------------------------------------------------------------------------------------------------------------


def plain_number(value: Any) -> Any:
    """A number of numpy as one of Python."""
    return value.item() if isinstance(value, np.generic) else value


def plain(value: Any, what: str) -> Any:
    """The value as JSON has it: tensors of one element as numbers, tuples as lists.

    Raises `ConfigError` naming `what` for anything that JSON does not have.
    """
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{what}.{key}") for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [plain(item, what) for item in value]
    value = plain_number(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ConfigError(f"{what}: a {type(value).__name__} cannot be kept in a checkpoint; only what JSON has can")


def check_json(value: Any, what: str) -> Any:
    """The user's own value, as it will come back. Raises `ConfigError` if JSON cannot keep it."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{what}: {error}; a checkpoint keeps what JSON can: numbers, text, lists, dicts") from error
