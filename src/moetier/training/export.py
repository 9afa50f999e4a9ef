"""Saving a trained model as an ordinary checkpoint: the trained experts, with the names and layout they came with.

Streams: one expert at a time goes from the cache to its places in the new files. Everything else is saved by
transformers itself. Knows where a record's bytes come from (`stores/packed_sources.py`), and goes that way back.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moetier.access import ExpertKey
from moetier.errors import StoreError, UnsupportedModelError
from moetier.mapping import LayerMap
from moetier.saving import save_streaming, shard_header
from moetier.stores.packed_sources import LayerSources, sources_of
from moetier.stores.shards import Shards, TensorEntry
from moetier.training.engine import TrainingEngine
from moetier.training.leases import access_of


def save_trained(model: Any, shards: Shards, maps: list[LayerMap], engine: TrainingEngine) -> None:
    """Give the model a `save_pretrained` that writes its experts as they are trained by now.

    It raises `UnsupportedModelError` for a family whose experts are computed from the checkpoint's tensors, and not
    only rearranged.
    """

    def write_experts(paths: Sequence[tuple[Path, list[TensorEntry]]], targets: dict[str, torch.dtype]) -> None:
        sources = [_sources(layer) for layer in maps]
        with _Files(paths, targets) as files:
            engine.catch_up_all()
            for layer, source in enumerate(sources):
                keys = tuple(ExpertKey(layer, expert) for expert in range(len(source.spans)))
                for lease in engine.weights.stream(access_of(layer, keys, writes=False)):
                    for own, feed in zip(source.fields, source.spans[lease.key.expert], strict=True):
                        field = lease.fields[own.name]
                        elements = replace(own, dtype=field.dtype).restore(field)
                        files.put(elements, own.dtype.itemsize, feed)

    save_streaming(model, shards, maps, write_experts)


def _sources(layer: LayerMap) -> LayerSources:
    sources = sources_of(layer)
    if isinstance(sources, str):
        raise UnsupportedModelError(f"the trained experts cannot be saved as a checkpoint: {sources}")
    return sources


class _Files:
    """New shards, whose tensors are filled from where they were in the old ones."""

    def __init__(self, paths: Sequence[tuple[Path, list[TensorEntry]]], targets: dict[str, torch.dtype]):
        # per old file: where each tensor begins there, and what it becomes where
        self._places: dict[int, list[tuple[int, TensorEntry, torch.dtype, int, int]]] = {}
        self._fds: list[int] = []
        self._paths = [path for path, _ in paths]
        try:
            for number, (path, group) in enumerate(paths):
                self._open(number, path, group, targets)
        except OSError as error:
            self.close()
            raise _failed(path, error) from error
        for places in self._places.values():
            places.sort(key=lambda place: place[0])

    def _open(self, number: int, path: Path, group: list[TensorEntry], targets: dict[str, torch.dtype]) -> None:
        header, sizes = shard_header(group, targets)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._fds.append(fd)
        os.pwrite(fd, header, 0)
        offset = len(header)
        for entry, nbytes in zip(group, sizes, strict=True):
            place = (entry.offset, entry, targets[entry.name], number, offset)
            self._places.setdefault(entry.file, []).append(place)
            offset += nbytes
        os.truncate(fd, offset)

    def put(self, elements: torch.Tensor, itemsize: int, feed: Sequence[tuple[int, int, int]]) -> None:
        """Write flat elements to where `feed` (file, offset, bytes: of old files, in `itemsize`) had them."""
        begin = 0
        for file, offset, nbytes in feed:
            count = nbytes // itemsize
            self._put_span(file, offset, elements[begin : begin + count], itemsize)
            begin += count

    def _put_span(self, file: int, offset: int, elements: torch.Tensor, itemsize: int) -> None:
        places = self._places[file]
        while elements.numel():
            at = bisect_right(places, offset, key=lambda place: place[0]) - 1
            start, entry, dtype, number, target = places[at]
            inside = (offset - start) // itemsize
            count = min(elements.numel(), (start + entry.nbytes - offset) // itemsize)
            data = elements[:count].to(dtype).contiguous().view(torch.uint8).numpy().data
            self._write(number, target + inside * dtype.itemsize, memoryview(data))
            elements, offset = elements[count:], offset + count * itemsize

    def _write(self, number: int, offset: int, data: memoryview) -> None:
        done = 0
        try:
            while done < len(data):
                done += os.pwrite(self._fds[number], data[done:], offset + done)
        except OSError as error:
            raise _failed(self._paths[number], error) from error

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            if error is None:
                for path, fd in zip(self._paths, self._fds, strict=True):
                    try:
                        os.fsync(fd)
                    except OSError as failed:
                        raise _failed(path, failed) from failed
        finally:
            self.close()

    def close(self) -> None:
        """Close the files."""
        for fd in self._fds:
            os.close(fd)
        self._fds = []


def _failed(path: Path, error: OSError) -> StoreError:
    return StoreError(f"{path}: the checkpoint could not be written: {error.strerror or error}")
