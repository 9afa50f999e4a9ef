"""The read-only store straight over a hub checkpoint: each expert is assembled from byte ranges of the shards.

Where the checkpoint's bytes already are an expert's bytes (most families), a record is a few contiguous ranges that are
read straight into the slot. Where the model's loader would transform them (transpose, interleave, cast), the ranges are
read aside and the loader's own operations run on this one expert. No fused tensor is ever built.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from moetier.access import ExpertKey
from moetier.record import PAGE, RecordLayout, round_up
from moetier.stores.blocks import read_block
from moetier.stores.diskio import DiskFile
from moetier.stores.shards import Shards

SEGMENT_NBYTES = 1 << 20  # one read request: large enough for full bandwidth, small enough to share among threads

IOMode = Literal["auto", "direct", "buffered"]


@dataclass(frozen=True, slots=True)
class Extent:
    """A byte range of a shard and where it belongs in the record (or in a conversion's input)."""

    file: int
    offset: int
    nbytes: int
    target: int


@dataclass(frozen=True, slots=True)
class Source:
    """One checkpoint tensor (or one expert's slice of it) that feeds a conversion."""

    pattern: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    extent: Extent


@dataclass(frozen=True, slots=True)
class Conversion:
    """A field that is not bytes of the checkpoint as they are: `run` turns the sources into the field's tensor.

    With `casts` that is no more than the sources one behind the other in another dtype.
    """

    field: str
    sources: tuple[Source, ...]
    run: Callable[[dict[str, list[torch.Tensor]]], torch.Tensor]
    casts: bool = False


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to assemble one record: ranges to read in place, and fields to convert.

    `alignment` (bytes) is what the record's start in memory must be a multiple of.
    """

    extents: tuple[Extent, ...]
    conversions: tuple[Conversion, ...] = ()
    alignment: int = 8


def split_extents(extents: Sequence[Extent]) -> tuple[Extent, ...]:
    """Merge ranges that touch both in the file and in the record, then cut them into read requests."""
    merged: list[Extent] = []
    for extent in sorted(extents, key=lambda e: (e.file, e.offset)):
        last = merged[-1] if merged else None
        if (
            last
            and last.file == extent.file
            and last.offset + last.nbytes == extent.offset
            and last.target + last.nbytes == extent.target
        ):
            merged[-1] = Extent(last.file, last.offset, last.nbytes + extent.nbytes, last.target)
        else:
            merged.append(extent)
    requests: list[Extent] = []
    for extent in merged:
        start, end = extent.offset, extent.offset + extent.nbytes
        while start < end:
            stop = min(end, round_up(start + 1, PAGE) - PAGE + SEGMENT_NBYTES)  # cut on pages of the file
            requests.append(Extent(extent.file, start, stop - start, extent.target + start - extent.offset))
            start = stop
    return tuple(requests)


class CheckpointStore:
    """Experts of a checkpoint, read on demand. Never writes; safe for concurrent reads."""

    kind = "checkpoint"

    def __init__(
        self,
        shards: Shards,
        layouts: Sequence[RecordLayout],
        recipes: Sequence[Sequence[Recipe]],
        io: IOMode = "auto",
    ):
        """`recipes[layer][expert]` says how to assemble a record of `layouts[layer]`."""
        self.shards = shards
        known: dict[RecordLayout, RecordLayout] = {}
        self._layouts = tuple(known.setdefault(layout, layout) for layout in layouts)  # equal ones are one object
        self._recipes = tuple(
            tuple(replace(recipe, extents=split_extents(recipe.extents)) for recipe in layer) for layer in recipes
        )
        self._phases = tuple(tuple(_phase(recipe) for recipe in layer) for layer in self._recipes)
        used = {
            extent.file
            for layer in self._recipes
            for recipe in layer
            for extent in (*recipe.extents, *(s.extent for c in recipe.conversions for s in c.sources))
        }
        self._files = {index: DiskFile(shards.files[index], io) for index in sorted(used)}

    @property
    def folder(self) -> Path:
        """Where the checkpoint is."""
        return self.shards.files[0].parent

    @property
    def layers(self) -> int:
        """MoE layers."""
        return len(self._layouts)

    @property
    def experts(self) -> int:
        """Experts of the layer that has most."""
        return max(len(layer) for layer in self._recipes)

    @property
    def records(self) -> int:
        """Experts over all layers."""
        return sum(len(layer) for layer in self._recipes)

    @property
    def slot_nbytes(self) -> int:
        """Bytes a slot needs: the largest record, up to one page of phase, rounded to pages."""
        return slot_nbytes(self._layouts, self._recipes)

    @property
    def direct(self) -> bool:
        """Whether reads bypass the page cache."""
        return all(file.direct for file in self._files.values())

    def layout(self, layer: int) -> RecordLayout:
        """How the records of a layer lie in a slot."""
        return self._layouts[layer]

    def phase(self, key: ExpertKey) -> int:
        """The first range's position in its file page, if views at that offset are possible; else 0."""
        return self._phases[key.layer][key.expert]

    def segments(self, key: ExpertKey) -> int:
        """One part per read request, and one per converted field."""
        recipe = self._recipes[key.layer][key.expert]
        return len(recipe.extents) + len(recipe.conversions)

    def read(self, key: ExpertKey, segment: int, into: memoryview) -> int:
        """Read one part into its place in `into`; `StoreError` names the file when it cannot be had."""
        recipe = self._recipes[key.layer][key.expert]
        if segment < len(recipe.extents):
            extent = recipe.extents[segment]
            target = into[extent.target : extent.target + extent.nbytes]
            self._files[extent.file].read_into(extent.offset, target)
            return extent.nbytes
        conversion = recipe.conversions[segment - len(recipe.extents)]
        record = torch.frombuffer(into, dtype=torch.uint8)
        target_tensor = self._layouts[key.layer].views(record)[conversion.field]
        inputs: dict[str, list[torch.Tensor]] = {}
        nbytes = 0
        for source in conversion.sources:
            scratch = torch.empty(source.shape, dtype=source.dtype)
            self._files[source.extent.file].read_into(source.extent.offset, _bytes_of(scratch))
            inputs.setdefault(source.pattern, []).append(scratch)
            nbytes += source.extent.nbytes
        target_tensor.copy_(conversion.run(inputs))
        return nbytes

    def sliceable(self, layer: int) -> bool:
        """Whether the layer's records are the checkpoint's bytes, or casts of them."""
        return can_slice(self._recipes[layer])

    def read_block(self, key: ExpertKey, field: str, rows: range, columns: range | None, into: memoryview) -> int:
        """Read a block of a field; some columns only are picked out of whole rows."""
        shape = next(f for f in self._layouts[key.layer].fields if f.name == field)
        recipe = self._recipes[key.layer][key.expert]
        cast = next((c for c in recipe.conversions if c.field == field), None)
        if cast is None:
            span = partial(self._read_span, recipe.extents, shape.offset)
            return read_block(span, shape, shape.dtype, rows, columns, into)
        span = partial(self._read_span, _one_behind_the_other(cast.sources), 0)
        return read_block(span, shape, cast.sources[0].dtype, rows, columns, into)

    def _read_span(self, extents: Sequence[Extent], start: int, begin: int, into: memoryview) -> None:
        """Fill `into` from where the record's bytes from `start + begin` on come from."""
        begin += start
        end, got = begin + len(into), 0
        for extent in extents:
            low, high = max(begin, extent.target), min(end, extent.target + extent.nbytes)
            if low < high:
                part = into[low - begin : high - begin]
                self._files[extent.file].read_into(extent.offset + low - extent.target, part)
                got += high - low
        assert got == len(into), "the extents do not cover the block"

    def read_range(self, file: int, offset: int, into: memoryview) -> None:
        """Read bytes of a file that holds experts as they are; `StoreError` when they cannot be had."""
        self._files[file].read_into(offset, into)

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()


def slot_nbytes(layouts: Sequence[RecordLayout], recipes: Sequence[Sequence[Recipe]]) -> int:
    """Bytes a slot needs to hold any record, wherever in its first page it starts; a multiple of the page size."""
    needed = (
        layout.nbytes + max(_phase(recipe) for recipe in layer) for layout, layer in zip(layouts, recipes, strict=True)
    )
    return round_up(max(needed), PAGE)


def _phase(recipe: Recipe) -> int:
    if not recipe.extents:
        return 0
    first = min(recipe.extents, key=lambda extent: (extent.file, extent.offset))
    phase = (first.offset - first.target) % PAGE
    return phase if phase % recipe.alignment == 0 else 0


def can_slice(recipes: Sequence[Recipe]) -> bool:
    """Whether these records can be read in blocks: nothing is converted but dtypes."""
    return all(conversion.casts for recipe in recipes for conversion in recipe.conversions)


def _one_behind_the_other(sources: Sequence[Source]) -> list[Extent]:
    extents, target = [], 0
    for source in sources:
        extents.append(replace(source.extent, target=target))
        target += source.extent.nbytes
    return extents


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
