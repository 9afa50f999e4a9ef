"""Traces from and to the formats of others: npz and JSONL in both directions, libCacheSim's csv and oracleGeneral out.

npz: arrays `experts` [tokens, layers, k] (in order of gate weight; -1 fills up), `offsets` int64 [sequences + 1] (where
each sequence begins, and the end), `num_experts`; optional `gate_weights` of the shape of `experts`, and `meta`, a JSON
list with an object per sequence. Every token becomes a decode step of its own.
"""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetier.access import Phase
from moetier.errors import ConfigError
from moetier.trace import Trace, TraceInfo

__all__ = ["read_npz"]


def read_npz(path: str | os.PathLike[str]) -> Trace:
    """Import an npz file, see above. Raises `ConfigError`, naming the file and the array at fault."""
    arrays = _load_npz(path)
    for name in ("experts", "offsets", "num_experts"):
        if name not in arrays:
            raise ConfigError(f"{path}: no array {name!r}; found: {', '.join(arrays) or 'none'}")
    experts, offsets = arrays["experts"], arrays["offsets"]
    if experts.ndim != 3 or experts.dtype.kind not in "iu":
        raise ConfigError(f"{path}: experts must be whole numbers [tokens, layers, k], got {_kind(experts)}")
    if arrays["num_experts"].shape != () or arrays["num_experts"].dtype.kind not in "iu":
        raise ConfigError(f"{path}: num_experts must be one whole number, got {_kind(arrays['num_experts'])}")
    if experts.size and int(experts.max()) > np.iinfo(np.int16).max:
        raise ConfigError(f"{path}: experts has the number {int(experts.max())}; at most 32767 can be told apart")
    tokens = len(experts)
    sane = offsets.ndim == 1 and offsets.dtype.kind in "iu" and len(offsets) > 0
    if not (sane and offsets[0] == 0 and offsets[-1] == tokens and (np.diff(offsets.astype(np.int64)) >= 0).all()):
        raise ConfigError(f"{path}: offsets must rise from 0 to the number of tokens, {tokens}")
    weights = arrays.get("gate_weights")
    if weights is not None and (weights.shape != experts.shape or weights.dtype.kind != "f"):
        raise ConfigError(f"{path}: gate_weights must be floats of the shape of experts, got {_kind(weights)}")
    edges = offsets.astype(np.int64)
    lengths = edges[1:] - edges[:-1]
    try:
        return Trace(
            experts=experts.astype(np.int16),
            num_experts=int(arrays["num_experts"]),
            sequence=np.repeat(np.arange(len(lengths), dtype=np.int32), lengths),
            step=np.arange(tokens, dtype=np.int64),
            phase=np.full(tokens, Phase.DECODE, dtype=np.uint8),
            weights=None if weights is None else weights.astype(np.float32),
            info=TraceInfo(source=f"imported from {Path(path).name}", sequences=_meta(path, arrays.get("meta"))),
        )
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _load_npz(path: str | os.PathLike[str]) -> dict[str, NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            if not hasattr(file, "files"):
                raise ConfigError(f"{path}: a single array; an npz file with several is needed")
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file") from None
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, NotImplementedError) as error:
        raise ConfigError(f"{path}: not an npz file, or damaged: {' '.join(str(error).split())[:200]}") from error


def _meta(path: str | os.PathLike[str], value: NDArray[Any] | None) -> tuple[dict[str, Any], ...]:
    if value is None:
        return ()
    try:
        meta = json.loads(str(value[()]))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: meta is not JSON: {error}") from None
    if not (isinstance(meta, list) and all(isinstance(item, dict) for item in meta)):
        raise ConfigError(f"{path}: meta must be a list of objects, one per sequence")
    return tuple(meta)


def _kind(array: NDArray[Any]) -> str:
    return f"{array.dtype} {list(array.shape)}"
