"""Stores: where every expert's bytes are at home."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from moetier.access import ExpertKey
from moetier.record import RecordLayout


class ExpertStore(Protocol):
    """Home of all records. Reads may come from many threads at once; each part of a record is read on its own."""

    @property
    def layers(self) -> int:
        """MoE layers."""

    @property
    def experts(self) -> int:
        """Experts of the layer that has most."""

    @property
    def slot_nbytes(self) -> int:
        """Bytes a slot needs to hold any record at any phase, a multiple of the page size."""

    def layout(self, layer: int) -> RecordLayout:
        """How the records of a layer lie in a slot."""

    def phase(self, key: ExpertKey) -> int:
        """Where in its page-aligned slot the record should start, so that a direct read needs no copy; in bytes."""

    def segments(self, key: ExpertKey) -> int:
        """Number of parts the record is read in."""

    def read(self, key: ExpertKey, segment: int, into: memoryview) -> int:
        """Read one part of the record into its place in `into` (the whole record); returns the bytes read.

        Raises `StoreError` naming the file when the bytes cannot be had.
        """

    def close(self) -> None:
        """Release files; reads afterwards are errors."""


@runtime_checkable
class SlicedStore(ExpertStore, Protocol):
    """What a store has beyond `ExpertStore` when a record can be read piece by piece, in less memory than it takes."""

    def sliceable(self, layer: int) -> bool:
        """Whether every field of every record of the layer can be read by `read_block`."""

    def read_block(self, key: ExpertKey, field: str, rows: range, columns: range | None, into: memoryview) -> int:
        """Fill `into` with a block of a field, its rows one behind the other; returns the bytes read for it.

        `rows` count the field's first dimension, `columns` its second (None: all of them, or a field with one
        dimension). Reading only some columns may cost reading all. Raises `StoreError` naming the file.
        """


@runtime_checkable
class WritableStore(Protocol):
    """What a store has beyond `ExpertStore` when changed records may be written home. A checkpoint never has it."""

    def write(self, key: ExpertKey, segment: int, data: memoryview) -> int:
        """Write one part, from its place in `data` (the whole record); returns the bytes written.

        A read that begins after all parts were written gives the new bytes. Raises `StoreError` naming the file.
        """
