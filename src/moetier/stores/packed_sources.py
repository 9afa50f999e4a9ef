"""Where in the checkpoint's files the bytes of a record came from, and how to put them back.

A field is either the sources' bytes as they are, or the same elements in another order (transposed, interleaved),
perhaps in another dtype. The order is found by letting the loader's own operations move numbers instead of weights, and
written as nested strides; whether going back gives the very bytes is tried on every record when it is packed.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moetier.errors import StoreError
from moetier.mapping import LayerMap
from moetier.record import RecordLayout
from moetier.stores.checkpoint import Conversion, Recipe
from moetier.stores.shards import Shards

SOURCES = "sources.json"
Span = tuple[int, int, int]  # file, offset, bytes
Strides = tuple[tuple[int, int], ...]  # (count, step) in elements, outermost first


@dataclass(frozen=True, slots=True)
class FieldSources:
    """How a field's elements lie in its sources, taken one behind the other.

    `dtype` is that of the sources. Element (i, j, …) of the field, seen as an array of the counts of `strides`, is
    element i * step_i + j * step_j + … of the sources; `strides` is empty where the order is the same.
    """

    name: str
    dtype: torch.dtype
    strides: Strides = ()

    def restore(self, field: torch.Tensor) -> torch.Tensor:
        """The sources' elements, flat, from the field's tensor."""
        flat = field.reshape(-1).to(self.dtype)
        if not self.strides:
            return flat
        sizes, steps = zip(*self.strides, strict=True)
        result = torch.empty_like(flat)
        result.as_strided(sizes, steps).copy_(flat.view(sizes))
        return result


@dataclass(frozen=True, slots=True)
class LayerSources:
    """`spans[expert][field]` are the byte ranges of the checkpoint that became the field, in order."""

    fields: tuple[FieldSources, ...]
    spans: tuple[tuple[tuple[Span, ...], ...], ...]

    def plain(self, layout: RecordLayout) -> bool:
        """Whether records are the checkpoint's bytes as they are."""
        return all(not f.strides and f.dtype == own.dtype for f, own in zip(self.fields, layout.fields, strict=True))


def sources_of(layer: LayerMap) -> LayerSources | str:
    """The sources of a layer's records, or why the way back is not known."""
    fields: list[FieldSources] = []
    first = layer.recipes[0]
    for own in layer.layout.fields:
        conversion = next((c for c in first.conversions if c.field == own.name), None)
        if conversion is None:
            fields.append(FieldSources(own.name, own.dtype))
            continue
        dtypes = {source.dtype for source in conversion.sources}
        if len(dtypes) > 1:
            return f"{own.name} is made of tensors of several dtypes"
        strides = _order(conversion, torch.Size(own.shape).numel())
        if strides is None:
            return f"{own.name} is computed from the checkpoint's tensors, not only rearranged"
        fields.append(FieldSources(own.name, dtypes.pop(), strides))
    spans = tuple(
        tuple(_spans(recipe, layer.layout, number) for number in range(len(fields))) for recipe in layer.recipes
    )
    return LayerSources(tuple(fields), spans)


def _spans(recipe: Recipe, layout: RecordLayout, number: int) -> tuple[Span, ...]:
    own = layout.fields[number]
    for conversion in recipe.conversions:
        if conversion.field == own.name:
            return tuple((s.extent.file, s.extent.offset, s.extent.nbytes) for s in conversion.sources)
    inside = [e for e in recipe.extents if own.offset <= e.target < own.offset + own.nbytes]
    return tuple((e.file, e.offset, e.nbytes) for e in sorted(inside, key=lambda e: e.target))


def _order(conversion: Conversion, elements: int) -> Strides | None:
    """How the conversion orders elements; empty for the same order, None for anything but an order."""
    inputs: dict[str, list[torch.Tensor]] = {}
    begin = 0
    for source in conversion.sources:
        count = torch.Size(source.shape).numel()
        numbers = torch.arange(begin, begin + count, dtype=torch.int32).view(source.shape)
        inputs.setdefault(source.pattern, []).append(numbers)
        begin += count
    try:
        moved = conversion.run(inputs)
    except (RuntimeError, ValueError, TypeError):  # the operation does not move whole numbers
        return None
    if moved.dtype != torch.int32 or moved.numel() != elements or begin != elements:
        return None
    flat = moved.reshape(-1)
    strides = strides_of(flat.numpy())
    if strides is None or strides == ((elements, 1),):
        return None if strides is None else ()
    back = FieldSources("", torch.int32, strides).restore(flat)
    return strides if bool((back == torch.arange(elements, dtype=torch.int32)).all()) else None


def strides_of(positions: NDArray[np.int32]) -> Strides | None:
    """Positions as nested strides, or None where they do not have that form."""
    if positions.size == 0 or positions[0] != 0:
        return None
    dims: list[tuple[int, int]] = []
    rest = positions
    while rest.size > 1:
        step = int(rest[1] - rest[0])
        breaks = np.flatnonzero(np.diff(rest) != step)
        count = int(breaks[0]) + 1 if breaks.size else rest.size
        if step <= 0 or rest.size % count:
            return None
        rows = rest.reshape(-1, count)
        if not (rows == rows[:, :1] + np.arange(count, dtype=rest.dtype) * step).all():
            return None
        dims.append((count, step))
        rest = rows[:, 0]
    return tuple(reversed(dims)) or ((1, 1),)


def uncovered(shards: Shards, layers: Sequence[LayerSources]) -> list[str]:
    """The tensors that are not wholly in the records, in the order of files and offsets."""
    spans = sorted({span for layer in layers for expert in layer.spans for feed in expert for span in feed})
    begins: list[tuple[int, int]] = []
    ends: list[int] = []
    for file, offset, nbytes in spans:
        if begins and begins[-1][0] == file and ends[-1] >= offset:
            ends[-1] = max(ends[-1], offset + nbytes)
        else:
            begins.append((file, offset))
            ends.append(offset + nbytes)
    found = []
    for entry in sorted(shards.tensors.values(), key=lambda e: (e.file, e.offset, e.nbytes)):
        place = bisect_right(begins, (entry.file, entry.offset)) - 1
        inside = place >= 0 and begins[place][0] == entry.file and entry.offset + entry.nbytes <= ends[place]
        if not inside or entry.nbytes == 0:
            found.append(entry.name)
    return found


def save_sources(layers: Sequence[LayerSources]) -> bytes:
    """The sources as JSON."""
    body = [
        {
            "fields": [
                {"name": f.name, "dtype": str(f.dtype).removeprefix("torch."), "strides": f.strides}
                for f in layer.fields
            ],
            "spans": layer.spans,
        }
        for layer in layers
    ]
    return (json.dumps({"layers": body}, separators=(",", ":")) + "\n").encode()


def load_sources(path: Path) -> list[LayerSources]:
    """What `save_sources` wrote. Raises `StoreError` for anything else."""
    try:
        return [_layer(item) for item in json.loads(path.read_bytes())["layers"]]
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}; restore it") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise StoreError(f"{path}: damaged; pack the model again") from error


def _layer(raw: dict[str, Any]) -> LayerSources:
    fields = tuple(
        FieldSources(str(f["name"]), getattr(torch, f["dtype"]), tuple((int(n), int(s)) for n, s in f["strides"]))
        for f in raw["fields"]
    )
    spans = tuple(tuple(tuple((int(a), int(b), int(c)) for a, b, c in feed) for feed in row) for row in raw["spans"])
    return LayerSources(fields, spans)
