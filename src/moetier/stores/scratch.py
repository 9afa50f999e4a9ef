"""Records that live only as long as the process: gradients that do not fit in memory between backward and update.

A record that was never written is zeros, and costs no read. One that was cleared is zeros too, and is not written when
its slot is given up. There are no checksums; the file has no name, so that nothing is left of a process that is killed.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moetier.access import ExpertKey
from moetier.errors import ConfigError, StoreError
from moetier.record import PAGE, RecordLayout, round_up
from moetier.stores.checkpoint import IOMode
from moetier.stores.extents import ExtentFile
from moetier.stores.packed import cuts


class ScratchStore:
    """An `ExpertStore` and `WritableStore` without a past, in a nameless file of `folder`; its records begin as zeros.

    Reads and writes of different records may come from many threads at once. Raises `StoreError` where the file cannot
    be made.
    """

    kind = "scratch"

    def __init__(
        self, folder: Path, layouts: Sequence[RecordLayout], experts: Sequence[int], io: IOMode = "auto"
    ) -> None:
        """`layouts` and `experts` (how many) go by layer."""
        if not layouts or len(layouts) != len(experts):
            raise ConfigError("a scratch store needs a layout and a number of experts for every layer")
        known: dict[RecordLayout, RecordLayout] = {}
        self._layouts = tuple(known.setdefault(layout, layout) for layout in layouts)  # equal ones are one object
        self._experts = tuple(experts)
        self.folder = folder
        path = folder / f".scratch-{os.getpid()}-{id(self):x}.bin"
        self._file = ExtentFile(path, io)
        try:
            path.unlink()
        except OSError as error:
            self._file.close()
            raise StoreError(f"{path}: cannot be unlinked: {error.strerror}") from error
        self._places: dict[ExpertKey, int] = {}
        self._cleared: set[ExpertKey] = set()
        self._lock = threading.Lock()
        self.written_nbytes = 0

    @property
    def layers(self) -> int:
        """MoE layers."""
        return len(self._layouts)

    @property
    def experts(self) -> int:
        """Experts of the layer that has most."""
        return max(self._experts)

    @property
    def records(self) -> int:
        """Experts over all layers."""
        return sum(self._experts)

    @property
    def slot_nbytes(self) -> int:
        """Bytes a slot needs to hold any record."""
        return max(round_up(layout.nbytes, PAGE) for layout in self._layouts)

    @property
    def direct(self) -> bool:
        """Whether reads bypass the page cache."""
        return self._file.direct

    @property
    def nbytes(self) -> int:
        """Bytes of the disk in use."""
        return self._file.used

    def layout(self, layer: int) -> RecordLayout:
        """How the records of a layer lie in a slot."""
        return self._layouts[layer]

    def phase(self, key: ExpertKey) -> int:
        """Records begin on a page."""
        return 0

    def segments(self, key: ExpertKey) -> int:
        """Read requests of a record."""
        return len(cuts(self._layouts[key.layer].nbytes, 0))

    def written(self, key: ExpertKey) -> bool:
        """Whether the record is on the disk; if not, it reads as zeros."""
        with self._lock:
            return key in self._places

    def clear(self, key: ExpertKey) -> None:
        """Make the record zeros: what is on the disk is forgotten, and writes are ignored until it is used again.

        So a cache may still hold the old bytes, changed, and give up their slot without writing them. Reading the
        record is using it; who fills the slot without a read says so with `use`.
        """
        with self._lock:
            self._cleared.add(key)
            self._forget(key)

    def use(self, key: ExpertKey) -> None:
        """From now on the record's slot holds something again: the next write of it counts."""
        with self._lock:
            self._cleared.discard(key)

    def read(self, key: ExpertKey, segment: int, into: memoryview) -> int:
        """Read one part into its place, or make the record zeros; returns the bytes read. Raises `StoreError`."""
        with self._lock:
            self._cleared.discard(key)
            place = self._places.get(key)
            if place is not None:
                self._file.hold(place)
        if place is None:
            if segment == 0:
                np.frombuffer(into, np.uint8)[:] = 0
            return 0
        try:
            begin, end = cuts(self._layouts[key.layer].nbytes, 0)[segment]
            self._file.read_into(place + begin, into[begin:end])
            return end - begin
        finally:
            self._file.release(place)

    def write(self, key: ExpertKey, segment: int, data: memoryview) -> int:
        """Write the record, all of it with segment 0, unless it was cleared; returns the bytes. Raises `StoreError`."""
        with self._lock:
            if segment or key in self._cleared:
                return 0
        nbytes = self._layouts[key.layer].nbytes
        place = self._file.allocate(nbytes)
        try:
            self._file.write(place, 0, data[:nbytes])
        except BaseException:
            self._file.release(place)
            raise
        with self._lock:
            self.written_nbytes += nbytes
            if key in self._cleared:  # meanwhile
                self._file.release(place)
            else:
                self._forget(key)
                self._places[key] = place
        return nbytes

    def _forget(self, key: ExpertKey) -> None:
        place = self._places.pop(key, None)
        if place is not None:
            self._file.release(place)

    def close(self) -> None:
        """Close the file; its space is free."""
        self._file.close()
