"""The packed store: every expert one contiguous, page-aligned record, as the math wants it.

A read lands in the slot as it comes from the disk: no conversion, and with direct I/O no copy. Knows records and files;
knows no model. `packed_index` says where what is, `moetier.packing` makes the store.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from moetier.access import ExpertKey
from moetier.record import PAGE, RecordLayout, round_up
from moetier.stores.blocks import read_block
from moetier.stores.checkpoint import IOMode
from moetier.stores.diskio import DiskFile
from moetier.stores.packed_index import PackedIndex

REQUEST_NBYTES = 4 << 20  # one read request at most: few calls per record, and enough of them to share among threads


class PackedStore:
    """The records of a packed store. Never writes; safe for concurrent reads.

    Raises `StoreError` where a file cannot be opened.
    """

    kind = "packed"

    def __init__(self, index: PackedIndex, io: IOMode = "auto"):
        self.index = index
        whole = {layout: _whole_pages(layout) for layout in index.layouts}  # equal ones are one object
        self._layouts = tuple(
            layout if any(record.phase for record in row) else whole[layout]
            for layout, row in zip(index.layouts, index.records, strict=True)
        )
        self._cuts = {
            (layer, phase): cuts(layout.nbytes, phase)
            for layer, layout in enumerate(self._layouts)
            for phase in {record.phase for record in index.records[layer]}
        }
        self._files: list[DiskFile] = []
        try:
            for name, _ in index.files:
                self._files.append(DiskFile(index.folder / name, io))
        except BaseException:
            self.close()
            raise

    @property
    def folder(self) -> Path:
        """Where the store is."""
        return self.index.folder

    @property
    def layers(self) -> int:
        """MoE layers."""
        return len(self._layouts)

    @property
    def experts(self) -> int:
        """Experts of the layer that has most."""
        return max(len(row) for row in self.index.records)

    @property
    def records(self) -> int:
        """Experts over all layers."""
        return sum(len(row) for row in self.index.records)

    @property
    def slot_nbytes(self) -> int:
        """Bytes a slot needs: the largest record in whole pages."""
        return self.index.slot_nbytes

    @property
    def direct(self) -> bool:
        """Whether reads bypass the page cache."""
        return all(file.direct for file in self._files)

    def layout(self, layer: int) -> RecordLayout:
        """How the records of a layer lie in a slot; in whole pages, so that the end of a read needs no copy."""
        return self._layouts[layer]

    def phase(self, key: ExpertKey) -> int:
        """0, but for float32 weights whose bits depend on where in a cache line the checkpoint has them (< 64)."""
        return self.index.record(key).phase

    def segments(self, key: ExpertKey) -> int:
        """Read requests of a record: one per `REQUEST_NBYTES` begun."""
        return len(self._cuts[key.layer, self.phase(key)])

    def read(self, key: ExpertKey, segment: int, into: memoryview) -> int:
        """Read one part into its place in `into` (the whole record); `StoreError` names the file when it cannot be."""
        record = self.index.record(key)
        begin, end = self._cuts[key.layer, record.phase][segment]
        self._files[record.file].read_into(record.offset + record.phase + begin, into[begin:end])
        return end - begin

    def read_pages(self, key: ExpertKey, into: memoryview) -> None:
        """Read the pages that hold a record as they are in the file: what its checksum is of, padding included."""
        record = self.index.record(key)
        self._files[record.file].read_into(record.offset, into)

    def sliceable(self, layer: int) -> bool:
        """Records are what the math wants: always."""
        return True

    def read_block(self, key: ExpertKey, field: str, rows: range, columns: range | None, into: memoryview) -> int:
        """Read a block of a field; some columns only are picked out of whole rows."""
        record = self.index.record(key)
        shape = next(f for f in self._layouts[key.layer].fields if f.name == field)
        start = record.offset + record.phase + shape.offset

        def span(begin: int, target: memoryview) -> None:
            self._files[record.file].read_into(start + begin, target)

        return read_block(span, shape, shape.dtype, rows, columns, into)

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()


def cuts(nbytes: int, phase: int) -> tuple[tuple[int, int], ...]:
    """The parts of a record, in bytes from its start: as even as whole pages of the file allow."""
    total = phase + nbytes
    count = max(1, -(-total // REQUEST_NBYTES))
    size = round_up(-(-total // count), PAGE)
    bounds = [*range(0, total, size), total]
    return tuple((max(0, a - phase), b - phase) for a, b in pairwise(bounds))


def _whole_pages(layout: RecordLayout) -> RecordLayout:
    return RecordLayout(layout.fields, round_up(layout.nbytes, PAGE))
