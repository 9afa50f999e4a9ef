"""Trace files: Parquet, one row per token, columns per layer; exact in both directions.

Columns: `sequence` (int32), `step` (int64), `phase` (uint8: 0 prefill, 1 decode); per MoE layer N `experts.N`, a list
of `top_k` experts in order of gate weight (uint8, or int16 where -1 fills up or there are more than 256 experts); and,
where gate weights are known, `weights.N`, a list of as many float16, or float32 if one of them needs it; where the
tokens' numbers are known, `token` (int32). The schema's metadata holds a JSON text under `moetier.trace`: format,
version, num_experts, layers, top_k, weights, `TraceInfo`.

Measured on 108,000 tokens of gpt-oss-20b (24 layers, 4 of 32 experts): 2.1 bytes per token and layer without gate
weights, 6 with; a single list of all layers is 9 % larger and reads 8 times slower, a column per rank is 13 % larger.

Knows nothing of other formats (`interchange`) nor of what is recorded (`recording`). Needs pyarrow.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetier.errors import ConfigError
from moetier.files import whole_file
from moetier.trace import Trace, TraceInfo

__all__ = ["FORMAT", "VERSION", "read_trace", "require_pyarrow", "write_trace"]

FORMAT, VERSION = "moetier trace", 1
_KEY = b"moetier.trace"
_LEVEL = 9  # of zstd: experts take 8 % less than at the default, and a third more time to write


def write_trace(trace: Trace, path: str | os.PathLike[str]) -> None:
    """Write a trace as Parquet, whole or not at all. Raises `ConfigError` if it cannot be written."""
    pa, parquet = _pyarrow()
    if not (trace.layers and trace.top_k):
        raise ConfigError(f"{path}: a trace without layers cannot be written")
    columns = {
        "sequence": pa.array(trace.sequence.astype(np.int32, copy=False)),
        "step": pa.array(trace.step.astype(np.int64, copy=False)),
        "phase": pa.array(trace.phase.astype(np.uint8, copy=False)),
    }
    if trace.token_ids is not None:
        columns["token"] = pa.array(trace.token_ids.astype(np.int32, copy=False))
    experts = trace.experts.astype(_expert_dtype(trace))
    weights = None if trace.weights is None else _narrow(trace.weights)
    for layer in range(trace.layers):
        columns[f"experts.{layer}"] = _lists(pa, experts[:, layer])
        if weights is not None:
            columns[f"weights.{layer}"] = _lists(pa, weights[:, layer])
    head = {
        "format": FORMAT,
        "version": VERSION,
        "num_experts": trace.num_experts,
        "layers": trace.layers,
        "top_k": trace.top_k,
        "weights": weights is not None,
        "info": asdict(trace.info),
    }
    try:
        table = pa.table(columns).replace_schema_metadata({_KEY: json.dumps(head).encode()})
    except TypeError as error:
        raise ConfigError(f"{path}: the trace's info cannot be written as JSON: {error}") from None
    leaves = {name: f"{name}.list.element" for name in columns if "." in name}
    with whole_file(path) as draft:
        parquet.write_table(
            table,
            draft,
            compression="zstd",
            compression_level=_LEVEL,
            use_dictionary=[leaf for name, leaf in leaves.items() if name.startswith("experts")],
            column_encoding={"step": "DELTA_BINARY_PACKED", "sequence": "DELTA_BINARY_PACKED"}
            | {leaf: "BYTE_STREAM_SPLIT" for name, leaf in leaves.items() if name.startswith("weights")},
        )


def read_trace(path: str | os.PathLike[str]) -> Trace:
    """Read a trace file. Raises `ConfigError`, naming the file, for one that is missing, damaged or something else."""
    pa, parquet = _pyarrow()
    if not Path(path).is_file():
        raise ConfigError(f"{path}: " + ("not a file" if Path(path).exists() else "there is no such file"))
    try:
        with parquet.ParquetFile(path) as file:
            head = _head(path, file.schema_arrow.metadata or {})
            table = file.read()
    except (pa.ArrowException, OSError) as error:
        text = " ".join(str(error).split())[:200]
        raise ConfigError(f"{path}: not a trace file, or damaged: {text}; see `moetier trace import`") from error
    try:
        return _from_table(table, head)
    except (ConfigError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path}: a damaged trace: {error}") from error


def _head(path: str | os.PathLike[str], metadata: dict[bytes, bytes]) -> dict[str, Any]:
    try:
        head = json.loads(metadata.get(_KEY, b"null"))
    except (ValueError, RecursionError):
        head = None
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        raise ConfigError(f"{path}: a Parquet file, but not a trace of moetier; see `moetier trace import`")
    if head.get("version") != VERSION:
        raise ConfigError(f"{path}: trace format version {head.get('version')!r}; this moetier reads {VERSION}")
    return head


def _from_table(table: Any, head: dict[str, Any]) -> Trace:
    layers, top_k = int(head["layers"]), int(head["top_k"])
    experts = np.empty((table.num_rows, layers, top_k), dtype=np.int16)
    weights = np.empty(experts.shape, dtype=np.float32) if head["weights"] else None
    for layer in range(layers):
        experts[:, layer] = _array(table, f"experts.{layer}", "u1", "i2").reshape(-1, top_k)
        if weights is not None:
            weights[:, layer] = _array(table, f"weights.{layer}", "f2", "f4").reshape(-1, top_k)
    info = head["info"]
    return Trace(
        experts=experts,
        num_experts=int(head["num_experts"]),
        sequence=_array(table, "sequence", "i4").astype(np.int32),
        step=_array(table, "step", "i8").astype(np.int64),
        phase=_array(table, "phase", "u1").astype(np.uint8),
        weights=weights,
        info=TraceInfo(**info | {"sequences": tuple(info["sequences"])}),
        token_ids=_array(table, "token", "i4").astype(np.int32) if "token" in table.column_names else None,
    )


def _array(table: Any, name: str, *dtypes: str) -> NDArray[Any]:
    """A column of numbers, or of lists of them laid end to end."""
    column = table.column(name)
    if hasattr(column.type, "list_size"):
        column = column.combine_chunks()
        if column.null_count:
            raise ValueError(f"column {name} has gaps")
        column = column.flatten()
    if column.null_count:
        raise ValueError(f"column {name} has gaps")
    values: NDArray[Any] = column.to_numpy()
    if values.dtype.str[1:] not in dtypes:
        raise ValueError(f"column {name} holds {values.dtype}")
    return values


def _expert_dtype(trace: Trace) -> type[np.integer[Any]]:
    small = trace.num_experts <= 256 and (trace.tokens == 0 or int(trace.experts.min()) >= 0)
    return np.uint8 if small else np.int16


def _narrow(weights: NDArray[np.float32]) -> NDArray[Any]:
    """As float16 where that loses nothing; routers in bfloat16 or float16 give such weights."""
    with np.errstate(over="ignore"):
        half = weights.astype(np.float16)
    return half if np.array_equal(half.astype(np.float32), weights) else weights.astype(np.float32, copy=False)


def _lists(pa: Any, values: NDArray[Any]) -> Any:
    """[T, K] as a column of lists."""
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).reshape(-1)), values.shape[1])


def require_pyarrow() -> None:
    """Raise `ConfigError` where pyarrow is missing, before anything is made that could not be written."""
    _pyarrow()


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError("trace files need pyarrow: pip install 'moetier[lab]'") from None
    return pyarrow, pyarrow.parquet
