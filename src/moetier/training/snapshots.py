"""What a checkpoint of training holds beside the experts: resident weights, resident optimizer state, random states.

Tensors as safetensors, everything else as JSON; nothing is pickled. Knows no run folder.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from moetier.errors import ConfigError, StoreError
from moetier.training.proxy import Proxy

RESIDENT = "resident.safetensors"
OPTIMIZER = "optimizer.safetensors"
RANDOM = "random.safetensors"

CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

# -- resident weights --------------------------------------------------------------------------------------------------


def resident_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers of the model by name, shared ones once; without the proxies of experts."""
    proxies = {id(p) for module in model.modules() if isinstance(module, Proxy) for p in module.parameters()}
    named = {name: p.data for name, p in model.named_parameters() if id(p) not in proxies}
    named |= {f"buffer:{name}": b for name, b in model.named_buffers()}
    return named


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write tensors to a safetensors file, one after the other: never more than one of them is copied."""
    header: dict[str, Any] = {}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        header[name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy().data)


class TensorFile(Mapping[str, torch.Tensor]):
    """The tensors of a safetensors file, each read when it is asked for. Raises `StoreError` naming the file."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._file = cast(Any, safe_open(path, "pt"))
            self._names = list(self._file.keys())
        except (OSError, SafetensorError) as error:
            raise StoreError(f"{path}: cannot be read: {error}; go on from another step") from error

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@torch.no_grad()
def restore_resident(model: torch.nn.Module, tensors: TensorFile) -> None:
    """Put saved weights back in place. Raises `StoreError` where they are not those of this model."""
    own, path = resident_tensors(model), tensors.path
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


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: TensorFile, saved: Mapping[str, Any]) -> None:
    """Put the state back, every tensor with the bits and the dtype that it had. Raises `StoreError`."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    group_of = [group for group in optimizer.param_groups for _ in group["params"]]
    groups = saved["groups"]
    if [len(group["params"]) for group in groups] != [len(group["params"]) for group in optimizer.param_groups]:
        raise StoreError(
            f"{tensors.path}: the run's optimizer had other groups of parameters; make it as it was made before"
        )
    for own, group in zip(optimizer.param_groups, groups, strict=True):
        for name, value in group.items():
            if name != "params":
                own[name] = tuple(value) if isinstance(own.get(name), tuple) else value
    optimizer.state.clear()
    for full, tensor in tensors.items():
        number, _, name = full.partition(".")
        parameter = parameters[int(number)]
        # torch keeps counts of steps on the CPU, but where kernels on a GPU read them
        here = name == "step" and not (group_of[int(number)].get("fused") or group_of[int(number)].get("capturable"))
        optimizer.state[parameter][name] = tensor.to("cpu" if here else parameter.device, copy=True)
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
