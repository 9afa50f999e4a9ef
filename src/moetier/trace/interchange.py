"""Traces from and to the formats of others: npz in, JSONL both ways, libCacheSim's csv and oracleGeneral out.

npz: arrays `experts` [tokens, layers, k] (in order of gate weight; -1 fills up), `offsets` int64 [sequences + 1] (where
each sequence begins, and the end), `num_experts`; optional `gate_weights` of the shape of `experts`, and `meta`, a JSON
list with an object per sequence. Every token becomes a decode step of its own.

JSONL: a header and then a line per token, in the order the model saw them:

    {"format": "moetier trace jsonl", "version": 1, "num_experts": 32, "model": "…", "tokenizer": "…", "sequences": […]}
    {"sequence": 0, "step": 0, "phase": "prefill", "experts": [[3, 17], [8, 0], …], "weights": [[0.6, 0.4], …]}

`experts` has a list per MoE layer, in order of gate weight; `weights`, and `token`, the token's number in the
tokenizer, are given on every line or on none. Of the header only format, version and num_experts are needed. `sequence`
is 0, `phase` "decode" and `step` that of the line before plus 1 where they are left out; tokens of one forward pass
share their step.

libCacheSim (the cache simulator): a request per need, `obj_id` = layer * num_experts + expert, `time` = number of the
access, size 1; csv with a header line, or oracleGeneral, 24 bytes each, which has the next use that Belady wants. It
serves the needs of an access one by one, so its hit rates are those of sequential, not of access-atomic semantics.
"""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetier.access import Phase
from moetier.errors import ConfigError
from moetier.files import whole_file
from moetier.trace import NO_EXPERT, Trace, TraceInfo
from moetier.trace.needs import needs_of

__all__ = ["EXPORTS", "IMPORTS", "read_jsonl", "read_npz", "write_csv", "write_jsonl", "write_oracle"]

JSONL_FORMAT, JSONL_VERSION = "moetier trace jsonl", 1
_MOST = int(np.iinfo(np.int16).max)
PathLike = str | os.PathLike[str]


def read_npz(path: PathLike) -> Trace:
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
    if experts.size and not NO_EXPERT <= int(experts.min()) <= int(experts.max()) <= _MOST:
        raise ConfigError(f"{path}: experts must be from -1 to {_MOST}")
    tokens = len(experts)
    sane = offsets.ndim == 1 and offsets.dtype.kind in "iu" and len(offsets) > 0
    edges = offsets.astype(np.int64) if sane else np.zeros(1, dtype=np.int64)
    lengths = edges[1:] - edges[:-1]
    if not (sane and edges[0] == 0 and edges[-1] == tokens and (lengths >= 0).all()):
        raise ConfigError(f"{path}: offsets must rise from 0 to the number of tokens, {tokens}")
    weights = arrays.get("gate_weights")
    if weights is not None and (weights.shape != experts.shape or weights.dtype.kind != "f"):
        raise ConfigError(f"{path}: gate_weights must be floats of the shape of experts, got {_kind(weights)}")
    return _made(
        path,
        experts=experts.astype(np.int16),
        num_experts=int(arrays["num_experts"]),
        sequence=np.repeat(np.arange(len(lengths), dtype=np.int32), lengths),
        step=np.arange(tokens, dtype=np.int64),
        phase=np.full(tokens, Phase.DECODE, dtype=np.uint8),
        weights=None if weights is None else weights.astype(np.float32),
        info=TraceInfo(source=f"imported from {Path(path).name}", sequences=_meta(path, arrays.get("meta"))),
    )


def _made(path: PathLike, **fields: Any) -> Trace:
    try:
        return Trace(**fields)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _load_npz(path: PathLike) -> dict[str, NDArray[Any]]:
    try:
        with open(path, "rb") as file:  # numpy leaves a damaged one open
            loaded = np.load(file, allow_pickle=False)
            arrays = {} if isinstance(loaded, np.ndarray) else {name: loaded[name] for name in loaded.files}
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file") from None
    except (OSError, ValueError, EOFError, KeyError, zlib.error, zipfile.BadZipFile, NotImplementedError) as error:
        raise ConfigError(f"{path}: not an npz file, or damaged: {' '.join(str(error).split())[:200]}") from error
    if not arrays:
        raise ConfigError(f"{path}: holds no named arrays; an npz file is needed")
    return arrays


def _meta(path: PathLike, value: NDArray[Any] | None) -> tuple[dict[str, Any], ...]:
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


def read_jsonl(path: PathLike) -> Trace:
    """Import a JSONL file, see above. Raises `ConfigError`, naming the file and the line at fault."""
    try:
        with open(path, encoding="utf-8") as file:
            head = _jsonl_head(path, file.readline())
            rows: list[_Row] = []
            for number, line in enumerate(file, 2):
                if line.strip():
                    rows.append(_jsonl_row(f"{path}, line {number}", line, head["num_experts"], rows))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text file; see `moetier trace import --help`") from None
    if not rows:
        raise ConfigError(f"{path}: there are no tokens after the header")
    layers, top_k = len(rows[0].experts), max(len(layer) for row in rows for layer in row.experts)
    experts = np.full((len(rows), layers, top_k), NO_EXPERT, dtype=np.int16)
    weights = None if rows[0].weights is None else np.zeros(experts.shape, dtype=np.float32)
    for token, row in enumerate(rows):
        for layer, chosen in enumerate(row.experts):
            experts[token, layer, : len(chosen)] = chosen
            if weights is not None and row.weights is not None:
                weights[token, layer, : len(chosen)] = row.weights[layer]
    info = TraceInfo(
        model=str(head.get("model", "")),
        tokenizer=str(head.get("tokenizer", "")),
        source=str(head.get("source", f"imported from {Path(path).name}")),
        sequences=tuple(head.get("sequences", ())),
        extra=dict(head.get("extra", {})),
    )
    return _made(
        path,
        experts=experts,
        num_experts=head["num_experts"],
        sequence=np.array([row.sequence for row in rows], dtype=np.int32),
        step=np.array([row.step for row in rows], dtype=np.int64),
        phase=np.array([row.phase for row in rows], dtype=np.uint8),
        weights=weights,
        info=info,
        token_ids=None if rows[0].token is None else np.array([row.token for row in rows], dtype=np.int32),
    )


def _jsonl_head(path: PathLike, line: str) -> dict[str, Any]:
    head = _json(f"{path}, line 1", line)
    if head.get("format") != JSONL_FORMAT:
        raise ConfigError(f'{path}, line 1: not a header; it must say "format": "{JSONL_FORMAT}"')
    if head.get("version") != JSONL_VERSION:
        raise ConfigError(f"{path}, line 1: version {head.get('version')!r}; this moetier reads {JSONL_VERSION}")
    if not (_is_number(head.get("num_experts")) and 1 <= head["num_experts"] <= _MOST):
        raise ConfigError(f"{path}, line 1: num_experts must be a whole number from 1 to {_MOST}")
    sequences = head.get("sequences", [])
    if not (isinstance(sequences, list) and all(isinstance(item, dict) for item in sequences)):
        raise ConfigError(f"{path}, line 1: sequences must be a list of objects")
    if not isinstance(head.get("extra", {}), dict):
        raise ConfigError(f"{path}, line 1: extra must be an object")
    return head


class _Row:
    """A token's line, checked."""

    __slots__ = ("experts", "phase", "sequence", "step", "token", "weights")

    def __init__(self, where: str, values: dict[str, Any], num_experts: int, before: _Row | None):
        self.sequence = values.get("sequence", 0)
        self.step: int = values.get("step", 0 if before is None else before.step + 1)
        name = values.get("phase", "decode")
        if name not in ("prefill", "decode"):
            raise ConfigError(f'{where}: phase must be "prefill" or "decode", got {name!r}')
        self.phase = Phase.PREFILL if name == "prefill" else Phase.DECODE
        self.token: int | None = values.get("token")
        numbers = [("sequence", self.sequence, 2**31 - 1), ("step", self.step, 2**63 - 1)]
        for key, value, most in [*numbers, ("token", 0 if self.token is None else self.token, 2**31 - 1)]:
            if not (_is_number(value) and 0 <= value <= most):
                raise ConfigError(f"{where}: {key} must be a whole number, not negative")
        if before is not None and self.step < before.step:
            raise ConfigError(f"{where}: step {self.step} after step {before.step}; steps must not decrease")
        self.experts: list[list[int]] = _lists(where, "experts", values.get("experts"))
        for chosen in self.experts:
            if not all(_is_number(expert) and 0 <= expert < num_experts for expert in chosen):
                raise ConfigError(f"{where}: experts must be whole numbers from 0 to {num_experts - 1}, got {chosen}")
            if len(set(chosen)) != len(chosen):
                raise ConfigError(f"{where}: an expert is named twice in one layer: {chosen}")
        self.weights: list[list[float]] | None = None
        if "weights" in values:
            self.weights = _lists(where, "weights", values["weights"])
            if [len(layer) for layer in self.weights] != [len(layer) for layer in self.experts]:
                raise ConfigError(f"{where}: weights must have the shape of experts")
            if not all(isinstance(w, (int, float)) and abs(w) < 1e38 for layer in self.weights for w in layer):
                raise ConfigError(f"{where}: weights must be finite numbers")
        if before is not None and len(self.experts) != len(before.experts):
            raise ConfigError(f"{where}: {len(self.experts)} layers, the line before has {len(before.experts)}")
        if before is not None and (self.weights is None) != (before.weights is None):
            raise ConfigError(f"{where}: weights must be given for every token or for none")
        if before is not None and (self.token is None) != (before.token is None):
            raise ConfigError(f"{where}: token must be given on every line or on none")


def _jsonl_row(where: str, line: str, num_experts: int, rows: list[_Row]) -> _Row:
    return _Row(where, _json(where, line), num_experts, rows[-1] if rows else None)


def _json(where: str, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: a JSON object is needed")
    return value


def _lists(where: str, name: str, value: Any) -> list[list[Any]]:
    if not (isinstance(value, list) and value and all(isinstance(layer, list) for layer in value)):
        raise ConfigError(f"{where}: {name} must be a list with a list per layer")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def write_jsonl(trace: Trace, path: PathLike) -> None:
    """Export as JSONL, see above; reading it back gives the same trace."""
    info = trace.info
    head = {"format": JSONL_FORMAT, "version": JSONL_VERSION, "num_experts": trace.num_experts, "model": info.model}
    head |= {"tokenizer": info.tokenizer, "source": info.source, "sequences": list(info.sequences), "extra": info.extra}
    with whole_file(path) as draft, open(draft, "w", encoding="utf-8") as file:
        file.write(json.dumps(head) + "\n")
        for token in range(trace.tokens):
            used = trace.experts[token] >= 0
            row: dict[str, Any] = {"sequence": int(trace.sequence[token]), "step": int(trace.step[token])}
            if trace.token_ids is not None:
                row["token"] = int(trace.token_ids[token])
            row["phase"] = Phase(int(trace.phase[token])).name.lower()
            row["experts"] = [trace.experts[token, layer][used[layer]].tolist() for layer in range(trace.layers)]
            if trace.weights is not None:
                row["weights"] = [trace.weights[token, layer][used[layer]].tolist() for layer in range(trace.layers)]
            file.write(json.dumps(row, separators=(",", ":")) + "\n")


def write_csv(trace: Trace, path: PathLike) -> None:
    """Export for libCacheSim as csv: `-t "time-col=1, obj-id-col=2, obj-size-col=3, obj-id-is-num=true"`."""
    needs = needs_of(trace)
    with whole_file(path) as draft, open(draft, "w", encoding="ascii") as file:
        file.write("time,obj_id,size\n")
        for begin in range(0, len(needs.record), 1 << 20):
            part = slice(begin, begin + (1 << 20))
            pairs = zip(needs.access[part].tolist(), needs.record[part].tolist(), strict=True)
            file.writelines([f"{time},{record},1\n" for time, record in pairs])


def write_oracle(trace: Trace, path: PathLike) -> None:
    """Export for libCacheSim as oracleGeneral: little-endian uint32 time, uint64 id, uint32 size, int64 next use.

    The next use is the number of a request, the first being 1; -1 if there is none.
    """
    needs = needs_of(trace)
    if len(needs.access) and needs.access[-1] > np.iinfo(np.uint32).max:
        raise ConfigError(f"{path}: {needs.access[-1]} accesses are more than oracleGeneral can number")
    request = np.dtype([("time", "<u4"), ("id", "<u8"), ("size", "<u4"), ("next", "<i8")])
    table = np.empty(len(needs.record), dtype=request)
    table["time"], table["id"], table["size"] = needs.access, needs.record, 1
    order = np.argsort(needs.record, kind="stable")
    again = needs.record[order[:-1]] == needs.record[order[1:]]
    table["next"] = -1
    table["next"][order[:-1][again]] = order[1:][again] + 1
    with whole_file(path) as draft:
        table.tofile(draft)


IMPORTS: dict[str, Callable[[PathLike], Trace]] = {"jsonl": read_jsonl, "npz": read_npz}
EXPORTS: dict[str, Callable[[Trace, PathLike], None]] = {
    "csv": write_csv,
    "jsonl": write_jsonl,
    "oracleGeneral": write_oracle,
}
