"""The tensors an update works on: fp32 masters of half-precision weights, moments, chunks of zero gradients.

Knows names, dtypes and shapes of fields; knows no optimizer's formula, no caches and no files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from moetier.errors import ConfigError
from moetier.record import Field

Fields = Mapping[str, torch.Tensor]
"""The tensors of one record by the names of their fields, as a lease gives them."""

HALF = (torch.bfloat16, torch.float16)
TRAINABLE = (torch.float32, torch.float64, *HALF)
MASTER = "master"

# Elements that are caught up on at a time: so few that the zero gradients take little memory, so many that calling the
# kernel takes little of its time. A multiple of what a vector and a cache line hold, so that where a chunk ends changes
# no bit; elements beyond the last full vector are computed otherwise, in the last chunk as in the whole tensor.
CPU_CHUNK = 256 * 1024
GPU_CHUNK = 4 * 1024 * 1024


def working_dtype(field: Field, masters: bool) -> torch.dtype:
    """The dtype that a field is updated in. Raises `ConfigError` for a field that cannot be trained."""
    if field.dtype not in TRAINABLE:
        raise ConfigError(
            f"field {field.name!r} of the experts has dtype {str(field.dtype).removeprefix('torch.')}, which cannot be "
            "trained; load the model in float32, bfloat16 or float16, or train without its experts"
        )
    return torch.float32 if masters and field.dtype in HALF else field.dtype


def state_name(field: str, part: str) -> str:
    """What a part of a field's state is called: `gate_up_proj.exp_avg`."""
    return f"{field}.{part}"


def working(name: str, weights: Fields, state: Fields) -> torch.Tensor:
    """The tensor that is updated: the master if there is one, else the weights."""
    return state.get(state_name(name, MASTER), weights[name])


def untouched(state: Fields) -> bool:
    """Whether every bit of these tensors is zero; -0.0 is not."""
    return not any(bool(tensor.view(torch.uint8).any()) for tensor in state.values() if tensor.numel())


def chunks(tensors: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """The tensors, all of one shape and contiguous, in flat pieces."""
    size = CPU_CHUNK if tensors[0].device.type == "cpu" else GPU_CHUNK
    flat = [tensor.view(-1) for tensor in tensors]
    for begin in range(0, flat[0].numel(), size):
        yield [tensor[begin : begin + size] for tensor in flat]


class Zeros:
    """Zero gradients, one chunk per dtype and device, that are made once and only ever read."""

    def __init__(self) -> None:
        self._made: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}

    def like(self, chunk: torch.Tensor) -> torch.Tensor:
        """Zeros of a chunk's size, dtype and device."""
        kind = (chunk.dtype, chunk.device)
        if kind not in self._made:
            size = CPU_CHUNK if chunk.device.type == "cpu" else GPU_CHUNK
            self._made[kind] = torch.zeros(size, dtype=chunk.dtype, device=chunk.device)
        return self._made[kind][: chunk.numel()]
