"""Records of a store as the checkpoint's own tensors again, one record in memory at a time.

How a record was put together from tensors is undone: its fields are taken apart, and their elements put back in the
order that the checkpoint has them. Knows layouts and where bytes belong; knows no model family and makes no shards.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from moetier.access import ExpertKey
from moetier.errors import UnsupportedModelError
from moetier.mapping import LayerMap
from moetier.record import PAGE
from moetier.stores import ExpertStore
from moetier.stores.diskio import aligned_buffer
from moetier.stores.packed_sources import LayerSources, sources_of, uncovered
from moetier.stores.shards import Shards


@dataclass(frozen=True, slots=True)
class Piece:
    """Some elements of a field that belong together into a tensor, `begin` elements behind its start."""

    tensor: str
    begin: int
    elements: int


class ExpertTensors:
    """The checkpoint's expert tensors as the records of `store` have them now.

    Raises `UnsupportedModelError` where records were computed from the tensors, and not only rearranged.
    """

    def __init__(self, store: ExpertStore, maps: Sequence[LayerMap], shards: Shards):
        self._store = store
        self._layers: list[LayerSources] = []
        for layer in maps:
            sources = sources_of(layer)
            if isinstance(sources, str):
                raise UnsupportedModelError(f"changed experts cannot be saved in the checkpoint's layout: {sources}")
            self._layers.append(sources)
        own = {name for layer in maps for name in layer.tensors}
        foreign = own.intersection(uncovered(shards, self._layers))
        if foreign:
            raise UnsupportedModelError(f"{min(foreign)}: not all of it belongs to experts, so it cannot be saved")
        entries = sorted((entry.file, entry.offset, name) for name in own if (entry := shards.tensors[name]).nbytes)
        self._starts = [(file, offset) for file, offset, _ in entries]
        self._names = [name for _, _, name in entries]
        self._buffer = aligned_buffer(store.slot_nbytes + PAGE)

    def pieces(self, key: ExpertKey) -> list[list[Piece]]:
        """Where the elements of each field of a record belong, in the order in which they were put together."""
        layer = self._layers[key.layer]
        found = []
        for field, feed in zip(layer.fields, layer.spans[key.expert], strict=True):
            size = field.dtype.itemsize
            row = []
            for file, offset, nbytes in feed:
                place = bisect_right(self._starts, (file, offset)) - 1
                row.append(Piece(self._names[place], (offset - self._starts[place][1]) // size, nbytes // size))
            found.append(row)
        return found

    def write(self, fd: int, places: Mapping[str, int], dtypes: Mapping[str, torch.dtype]) -> int:
        """Write the tensors of `places` (name -> offset in the file, in bytes) as `dtypes` says; returns the bytes.

        Raises `StoreError` where a record cannot be read, OSError where the file cannot be written.
        """
        total = 0
        for layer, sources in enumerate(self._layers):
            for expert in range(len(sources.spans)):
                key = ExpertKey(layer, expert)
                pieces = self.pieces(key)
                if any(piece.tensor in places for row in pieces for piece in row):
                    total += self._write_record(fd, key, pieces, places, dtypes)
        return total

    def _write_record(
        self,
        fd: int,
        key: ExpertKey,
        pieces: list[list[Piece]],
        places: Mapping[str, int],
        dtypes: Mapping[str, torch.dtype],
    ) -> int:
        total = 0
        views = self._read(key)
        for source, row in zip(self._layers[key.layer].fields, pieces, strict=True):
            dtype = dtypes[row[0].tensor]
            elements = replace(source, dtype=dtype).restore(views[source.name])
            begin = 0
            for piece in row:
                if piece.tensor in places:
                    part = elements[begin : begin + piece.elements].view(torch.uint8)
                    offset = places[piece.tensor] + piece.begin * dtype.itemsize
                    _write_all(fd, memoryview(part.numpy()), offset)  # type: ignore[arg-type]
                    total += part.numel()
                begin += piece.elements
        return total

    def _read(self, key: ExpertKey) -> dict[str, torch.Tensor]:
        layout, phase = self._store.layout(key.layer), self._store.phase(key)
        record = self._buffer[phase : phase + layout.nbytes]
        for segment in range(self._store.segments(key)):
            self._store.read(key, segment, record)
        return layout.views(torch.frombuffer(record, dtype=torch.uint8))


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)
