"""The results of a sweep in a file, one JSON line each, so that an interrupted sweep goes on where it stopped.

A result is found again by a key: a hash of its configuration, of the trace (and the trace to fit on), and of the code
that decides. Knows nothing of processes.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from moetier.errors import ConfigError, StoreError
from moetier.simulate.config import Result, SimulationConfig, result_from_dict
from moetier.trace import Trace

__all__ = ["Journal", "fingerprint", "job_key"]

_DECIDING = (  # what a result depends on, beside the policy's own file
    "access.py residency.py tiers.py victims.py endings.py in_place.py prefetching.py exclusive.py misses.py "
    "prefetch.py pinning.py profile.py policies/*.py predictors/*.py trace/__init__.py trace/streams.py "
    "simulate/config.py simulate/instant.py simulate/clock.py simulate/links.py simulate/run.py"
)


def fingerprint(trace: Trace) -> str:
    """A hash of all that a simulation reads of a trace; what `info` says of it does not count."""
    digest = hashlib.sha256(repr((trace.experts.shape, trace.num_experts, trace.weights is None)).encode())
    for array in (trace.experts, trace.sequence, trace.step, trace.phase, trace.weights):
        if array is not None:
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def job_key(config: SimulationConfig, traces: str) -> str:
    """The name of a result in the file. `traces` are the fingerprints of the trace and of the one to fit on."""
    names = (config.policy, config.host_policy, config.predictor)
    foreign = [_foreign_code(name.partition("(")[0].strip()) for name in names if name and ":" in name]
    parts = [json.dumps(config.to_dict(), sort_keys=True), traces, _code(), *foreign]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


@cache
def _code() -> str:
    """A hash of the files that decide: results of another version of them are not taken for ours."""
    package = Path(__file__).parent.parent
    files = sorted(file for pattern in _DECIDING.split() for file in package.glob(pattern))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _foreign_code(name: str) -> str:
    """A hash of the file of somebody else's policy, `"package.module:Class"`; a missing one is reported elsewhere."""
    try:
        spec = importlib.util.find_spec(name.partition(":")[0])
        origin = Path(spec.origin) if spec is not None and spec.origin else None
    except (ImportError, ValueError):
        origin = None
    return hashlib.sha256(origin.read_bytes()).hexdigest() if origin is not None and origin.is_file() else ""


class Journal:
    """The file, open for adding. Use it as a context manager; `results` are those found in it, by key.

    The file is locked: a second sweep that is given it is refused. A last line without an end, as an interruption may
    leave it, is cut off. Raises `ConfigError` for a file that is something else.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.results: dict[str, Result] = {}
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Journal:
        try:
            self._file = open(self.path, "a+b")
        except OSError as error:
            raise ConfigError(f"resume: {self.path} cannot be opened: {error.strerror}") from None
        try:
            self._lock()
            self._read()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, key: str, result: Result) -> None:
        """Append one result. Raises `StoreError` if the disk does not take it."""
        assert self._file is not None, "the journal is not open"
        self.results[key] = result
        line = json.dumps({"key": key, "result": result.to_dict()}, separators=(",", ":"))
        try:
            self._file.write(line.encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise StoreError(f"resume: {self.path} could not be written: {error.strerror}") from error

    def _lock(self) -> None:
        import fcntl

        assert self._file is not None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"resume: {self.path} is in use by another sweep; give another file") from None
        except OSError:
            pass  # a file system without locks: two sweeps at once are then the user's to avoid

    def _read(self) -> None:
        assert self._file is not None
        self._file.seek(0)
        whole = 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                if number == 1 and not b'{"key":'.startswith(line[:7]):
                    raise ConfigError(f"resume: {self.path} is not a file of results; give another, or a new one")
                self._file.truncate(whole)
                break
            self._take(number, line)
            whole += len(line)
        self._file.seek(0, os.SEEK_END)

    def _take(self, number: int, line: bytes) -> None:
        try:
            entry: dict[str, Any] = json.loads(line)
            key, values = entry["key"], entry["result"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ConfigError(
                f"resume: {self.path}, line {number}: not a result of a sweep; give another file, or a new one"
            ) from None
        # A result of another version, whose fields differ, has another key too, and is not asked for.
        with contextlib.suppress(KeyError, TypeError, ValueError):
            self.results[key] = result_from_dict(values)
