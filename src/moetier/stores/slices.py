"""Experts cut into slices: a store whose records are slices of another store's records.

A slice is some outputs of one of an expert's matrices, all of their inputs: every dot product stays whole, so that
products of the slices side by side are the product of the matrix. Knows shapes and byte counts; reads through
`SlicedStore.read_block`; knows no models, threads or buffers.

Findings (docs/LOG.md, "Products of slices"): the bits stay the same where a slice has at least 16 outputs, begins on
a multiple of 16 of them, and lies in memory as the whole matrix would, modulo a cache line. `GRANULE` is four times
that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from moetier.access import ExpertKey
from moetier.record import FIELD_ALIGNMENT, PAGE, Field, RecordLayout, round_up
from moetier.stores import SlicedStore
from moetier.stores.checkpoint import SEGMENT_NBYTES

GRANULE = 64  # outputs: slices begin on multiples of it, and have that many at least


@dataclass(frozen=True, slots=True)
class Cut:
    """A slice that every expert of a layer has: `outputs` of a field (of a bias: all of its numbers)."""

    layer: int
    field: Field
    outputs: range
    width: int  # outputs of the whole field
    columns: bool  # outputs are the field's second dimension
    layout: RecordLayout  # of the slice alone


def divide(outputs: int, most: int, granule: int = 0) -> list[range]:
    """Cut `outputs` into as few ranges of at most `most` as granules allow, of about equal length.

    What is no multiple of the granule goes to the last range, none of which is shorter than a granule. `most` must be
    at least `least_outputs`.
    """
    granule = granule or GRANULE
    if outputs <= most:
        return [range(outputs)]
    units, ragged = divmod(outputs, granule)
    count = -(-outputs // most)
    while True:
        small, larger = divmod(units, count)
        sizes = [(small + (number < larger)) * granule for number in range(count)]
        sizes[-1] += ragged
        if max(sizes) <= most:
            break
        count += 1
    edges = [sum(sizes[:number]) for number in range(count + 1)]
    return [range(begin, end) for begin, end in pairwise(edges)]


def least_outputs(outputs: int) -> int:
    """The largest range that `divide` cannot avoid."""
    return outputs if outputs < 2 * GRANULE else GRANULE + outputs % GRANULE


def _shape(field: Field, is_transposed: bool) -> tuple[int, int]:
    """Outputs of a field, and bytes per output."""
    outputs = field.shape[1] if is_transposed and len(field.shape) == 2 else field.shape[0]
    return outputs, field.nbytes // outputs


def can_cut(layout: RecordLayout, is_transposed: bool) -> bool:
    """Whether products of slices of these matrices have the bits of whole ones.

    A transposed matrix is a row of outputs per input. Where these rows do not all start on 16 bytes, in the slice as in
    the whole, float32 products of two and three tokens come out different.
    """
    matrices = [field for field in layout.fields if len(field.shape) == 2]
    return not is_transposed or all(field.nbytes // field.shape[0] % 16 == 0 for field in matrices)


def least_buffer(layout: RecordLayout, is_transposed: bool) -> int:
    """The smallest buffer, in bytes, that slices of these records can pass through; whole pages."""
    needed = []
    for field in layout.fields:
        outputs, nbytes = _shape(field, is_transposed)
        needed.append((outputs if len(field.shape) == 1 else least_outputs(outputs)) * nbytes)
    return round_up(max(needed), PAGE) + PAGE


def cut(layer: int, layout: RecordLayout, order: Sequence[str], is_transposed: bool, buffer_nbytes: int) -> list[Cut]:
    """The slices of a layer's experts for buffers of a size (`least_buffer` or more), fields in the given order."""
    cuts = []
    for name in order:
        field = next(field for field in layout.fields if field.name == name)
        outputs, nbytes = _shape(field, is_transposed)
        columns = is_transposed and len(field.shape) == 2
        matrix = len(field.shape) == 2
        for part in divide(outputs, (buffer_nbytes - PAGE) // nbytes) if matrix else [range(outputs)]:
            shape = (field.shape[0], len(part)) if columns else (len(part), *field.shape[1:])
            small = RecordLayout.of([(name, field.dtype, shape)])
            cuts.append(Cut(layer, field, part, outputs, columns and len(part) < outputs, small))
    return cuts


class SliceStore:
    """Slices as records: `ExpertKey(number of the cut, expert)`. Takes a store that has `read_block`."""

    def __init__(self, store: SlicedStore, cuts: Sequence[Cut], buffer_nbytes: int):
        self.cuts, self.slot_nbytes = tuple(cuts), buffer_nbytes
        self._store = store

    @property
    def layers(self) -> int:
        """Cuts of all layers."""
        return len(self.cuts)

    @property
    def experts(self) -> int:
        """Experts of the layer that has most."""
        return self._store.experts

    def layout(self, layer: int) -> RecordLayout:
        """Of the slice: one field."""
        return self.cuts[layer].layout

    def phase(self, key: ExpertKey) -> int:
        """Where in a page the slice lies in the whole record, so that direct reads and products find it alike."""
        cut = self.cuts[key.layer]
        begin = self._store.phase(ExpertKey(cut.layer, key.expert)) + cut.field.offset
        if cut.columns:
            return begin % FIELD_ALIGNMENT  # slices begin on cache lines of a row
        return (begin + cut.outputs.start * (cut.field.nbytes // cut.width)) % PAGE

    def segments(self, key: ExpertKey) -> int:
        """Read requests of about a MiB."""
        return len(self._parts(self.cuts[key.layer]))

    def read(self, key: ExpertKey, segment: int, into: memoryview) -> int:
        """Read one part of the slice; returns the bytes read for it."""
        cut = self.cuts[key.layer]
        part = self._parts(cut)[segment]
        expert = ExpertKey(cut.layer, key.expert)
        if cut.columns:
            row_nbytes = len(cut.outputs) * cut.field.dtype.itemsize
            target = into[part.start * row_nbytes : part.stop * row_nbytes]
            return self._store.read_block(expert, cut.field.name, part, cut.outputs, target)
        row_nbytes = cut.field.nbytes // cut.field.shape[0]
        first = self._rows(cut).start
        target = into[(part.start - first) * row_nbytes : (part.stop - first) * row_nbytes]
        return self._store.read_block(expert, cut.field.name, part, None, target)

    def close(self) -> None:
        """Close the store."""
        self._store.close()

    @staticmethod
    def _rows(cut: Cut) -> range:
        """The rows of the field that the slice is made of, or picked from."""
        return range(cut.field.shape[0]) if cut.layout.fields[0].shape[0] == cut.field.shape[0] else cut.outputs

    def _parts(self, cut: Cut) -> list[range]:
        rows = self._rows(cut)
        step = max(1, SEGMENT_NBYTES // (cut.field.nbytes // cut.field.shape[0]))
        return [range(first, min(first + step, rows.stop)) for first in range(rows.start, rows.stop, step)]
