"""A family of records of a run: its newest versions in a data file, and behind them what they began as.

Knows one data file, its checksums and the store below; knows no steps or manifests. A record is written whole, to
pages of its own, and only then takes the place of the version before: whoever reads gets one or the other, and a write
that fails changes nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from moetier.access import ExpertKey
from moetier.errors import ConfigError, MoetierError, StoreError
from moetier.record import PAGE, RecordLayout
from moetier.stores import ExpertStore
from moetier.stores.diskio import aligned_buffer
from moetier.stores.extents import ExtentFile
from moetier.stores.manifest import FamilyTable, Stored, blocks, checksum, pages, payload

Initial = Callable[[ExpertKey, memoryview], None]  # fills a record (contiguous bytes) that was never written
Verify = Literal["first", "always"]


class Records:
    """The written records of one family: where the newest version of each is, and which of them are held by steps.

    `failed` are records whose newest version could not be written: no step may be made of the others. Safe for
    concurrent reads and writes, of different records.
    """

    def __init__(self, name: str, file: ExtentFile, layouts: Sequence[RecordLayout], experts: Sequence[int]):
        self.name, self.file = name, file
        known: dict[RecordLayout, RecordLayout] = {}
        trimmed = (RecordLayout(layout.fields, payload(layout)) for layout in layouts)
        self.layouts = tuple(known.setdefault(layout, layout) for layout in trimmed)  # equal ones are one object
        self.experts = tuple(experts)
        self.failed: dict[ExpertKey, str] = {}
        self.written_nbytes = 0  # to the disk, since opening
        self._table: dict[ExpertKey, Stored] = {}
        self._unsynced: dict[ExpertKey, Stored] = {}  # written since the last `sync` that went well
        self._sync_failed = False
        self._lock = threading.Lock()
        self._age = 0  # counts rollbacks

    def take(self, key: ExpertKey) -> Stored | None:
        """The newest version, held until `give_back`; None where the record was never written."""
        with self._lock:
            stored = self._table.get(key)
            if stored is not None:
                self.file.hold(stored.offset)
            return stored

    def give_back(self, stored: Stored) -> None:
        """The end of a `take`."""
        self.file.release(stored.offset)

    def read(self, key: ExpertKey, stored: Stored, which: range, into: memoryview, again: bool = False) -> int:
        """Read some blocks into their places in `into`; returns the bytes read.

        Blocks that this process did not write are compared with their checksums the first time, with `again` every
        time. Raises `StoreError` for damage; `into` then holds anything.
        """
        bounds = blocks(payload(self.layouts[key.layer]), stored.phase)
        nbytes = 0
        for block in which:
            begin, end = bounds[block]
            part = into[begin:end]
            self.file.read_into(stored.offset + stored.phase + begin, part)
            if again or not stored.checked[block]:
                if checksum(self.name, key, block, part) != stored.sums[block]:
                    raise StoreError(
                        f"{self.file.path}: {self.name} of layer {key.layer}, expert {key.expert} (at byte "
                        f"{stored.offset}) are damaged: they do not match their checksum; restore the file, or go on "
                        "from another step"
                    )
                stored.checked[block] = 1
            nbytes += end - begin
        return nbytes

    def write(self, key: ExpertKey, phase: int, data: memoryview) -> int:
        """Make `data` (the whole record) the newest version; returns its bytes. Raises `StoreError`."""
        nbytes = payload(self.layouts[key.layer])
        if len(data) < nbytes:
            raise ValueError(f"{len(data)} bytes are no record of {nbytes}")
        age = self._age
        try:
            stored = self._put(key, phase, data[:nbytes])
        except BaseException as error:
            with self._lock:
                if age == self._age:
                    self.failed[key] = str(error)
            raise
        with self._lock:
            if age != self._age:  # rolled back meanwhile
                self.file.release(stored.offset)
                return nbytes
            self._replace(key, stored)
            self.failed.pop(key, None)
        return nbytes

    def _put(self, key: ExpertKey, phase: int, data: memoryview) -> Stored:
        size = pages(self.layouts[key.layer], phase)
        offset = self.file.allocate(size)
        sums = []
        try:
            for block, (begin, end) in enumerate(blocks(len(data), phase)):
                part = data[begin:end]
                sums.append(checksum(self.name, key, block, part))
                # the first block begins behind the phase, the others on a page of the file
                self.file.write(offset + (begin + phase if begin else 0), 0 if begin else phase, part)
        except BaseException:
            self.file.release(offset)
            raise
        with self._lock:
            self.written_nbytes += size
        return Stored(offset, size, phase, sums, checked=True)

    def _replace(self, key: ExpertKey, stored: Stored) -> None:
        before = self._table.get(key)
        self._table[key] = self._unsynced[key] = stored
        if before is not None:
            self.file.release(before.offset)

    def snapshot(self) -> FamilyTable:
        """All newest versions, each held until the table is released."""
        with self._lock:
            for stored in self._table.values():
                self.file.hold(stored.offset)
            return FamilyTable(self.layouts, self.experts, dict(self._table))

    def release(self, table: FamilyTable) -> None:
        """The end of a step: what only it held is free."""
        for stored in table.records.values():
            self.file.release(stored.offset)

    def reset(self, records: Mapping[ExpertKey, Stored]) -> None:
        """Go back to these versions (which a step holds); all newer ones are gone."""
        with self._lock:
            for stored in records.values():
                self.file.hold(stored.offset)
            for stored in self._table.values():
                self.file.release(stored.offset)
            self._table = dict(records)
            self._age += 1
            self.failed, self._unsynced, self._sync_failed = {}, {}, False

    def sync(self) -> None:
        """Everything written survives a power failure when this returns. Raises `StoreError`.

        After a failure the system may take what it could not write for written. So the next time all of it is
        written again, to other pages, from what can be read back and has the right checksums.
        """
        if self._sync_failed:
            self._write_again()
        with self._lock:
            written = dict(self._unsynced)
        try:
            self.file.sync()
        except BaseException:
            self._sync_failed = True
            raise
        with self._lock:
            for key, stored in written.items():
                if self._unsynced.get(key) is stored:
                    del self._unsynced[key]

    def _write_again(self) -> None:
        with self._lock:
            suspects = list(self._unsynced)
        buffer = aligned_buffer(max(map(payload, self.layouts), default=0) + PAGE)
        for key in suspects:
            stored = self.take(key)
            if stored is None:
                continue
            try:
                data = buffer[stored.phase : stored.phase + payload(self.layouts[key.layer])]
                self.read(key, stored, range(len(stored.sums)), data, again=True)
                renewed = self._put(key, stored.phase, data)
            finally:
                self.give_back(stored)
            with self._lock:
                if self._table.get(key) is stored:
                    self._replace(key, renewed)
                else:  # written anew meanwhile, by its owner
                    self.file.release(renewed.offset)
        self._sync_failed = False

    def check(self, key: ExpertKey, stored: Stored) -> None:
        """Read a version (which somebody holds) and compare all of it. Raises `StoreError` for damage."""
        buffer = aligned_buffer(stored.nbytes)
        self.read(key, stored, range(len(stored.sums)), buffer[stored.phase :], again=True)


class RunFamily:
    """A family as a cache sees it: an `ExpertStore` and a `WritableStore`.

    A record that was never written is read from `base`, or made by `initial`, or zeros. `verify` "first" compares a
    record with its checksums when it is first read after opening the run, "always" at every read.

    A record must not be read in parts while it is written: the cache does not, and others should read a step.
    """

    kind = "run"

    def __init__(
        self,
        folder: Path,
        records: Records,
        base: ExpertStore | None = None,
        initial: Initial | None = None,
        verify: Verify = "first",
        write: bool = True,
    ):
        self.folder, self.base = folder, base
        self._records, self._initial, self._write = records, initial, write
        self._again = verify == "always"
        self._layouts = (
            records.layouts if base is None else tuple(base.layout(layer) for layer in range(len(records.layouts)))
        )
        own = max(pages(layout, 0) for layout in records.layouts)
        self._slot_nbytes = own if base is None else max(own, base.slot_nbytes)
        self._closed = False

    @property
    def name(self) -> str:
        """Of the family."""
        return self._records.name

    @property
    def layers(self) -> int:
        """MoE layers."""
        return len(self._layouts)

    @property
    def experts(self) -> int:
        """Experts of the layer that has most."""
        return max(self._records.experts)

    @property
    def records(self) -> int:
        """Experts over all layers."""
        return sum(self._records.experts)

    @property
    def slot_nbytes(self) -> int:
        """Bytes a slot needs to hold any record."""
        return self._slot_nbytes

    @property
    def direct(self) -> bool:
        """Whether reads bypass the page cache."""
        return self._records.file.direct and bool(getattr(self.base, "direct", True))

    @property
    def written_nbytes(self) -> int:
        """Bytes written to the data file since the run was opened, whole pages."""
        return self._records.written_nbytes

    def written(self, key: ExpertKey) -> bool:
        """Whether the record was ever written, now or in the step that the run goes on from."""
        stored = self._records.take(key)
        if stored is not None:
            self._records.give_back(stored)
        return stored is not None

    def layout(self, layer: int) -> RecordLayout:
        """How the records of a layer lie in a slot; the base's, where there is one."""
        return self._layouts[layer]

    def phase(self, key: ExpertKey) -> int:
        """The base's, so that a record keeps its place in the slot when it is written."""
        return 0 if self.base is None else self.base.phase(key)

    def segments(self, key: ExpertKey) -> int:
        """Number of parts a record is read in, written or not."""
        if self.base is not None:
            return self.base.segments(key)
        return len(blocks(payload(self._records.layouts[key.layer]), 0))

    def read(self, key: ExpertKey, segment: int, into: memoryview) -> int:
        """Read one part; `StoreError` names the file where the bytes cannot be had, or are not those written."""
        self._check(key)
        stored = self._records.take(key)
        if stored is not None:
            try:
                count, parts = len(stored.sums), self.segments(key)
                which = range(segment * count // parts, (segment + 1) * count // parts)
                return self._records.read(key, stored, which, into, self._again)
            finally:
                self._records.give_back(stored)
        if self.base is not None:
            return self.base.read(key, segment, into)
        if segment == 0 and self._initial is not None:
            self._initial(key, into)
        elif segment == 0:
            np.frombuffer(into, np.uint8)[:] = 0
        return 0

    def write(self, key: ExpertKey, segment: int, data: memoryview) -> int:
        """Write the record: all of it with segment 0, nothing with the others, so that versions cannot mix.

        The bytes are safe from a power failure once the run commits a step.
        """
        self._check(key)
        if not self._write:
            raise StoreError(f"{self.folder}: the run was opened for reading; open it with write=True")
        return 0 if segment else self._records.write(key, self.phase(key), data)

    def close(self) -> None:
        """Close the base; the data file is the run's, which closes it."""
        self._closed = True
        if self.base is not None:
            self.base.close()

    def _check(self, key: ExpertKey) -> None:
        if self._closed:
            raise MoetierError(f"{self.folder}: the store of {self.name!r} is closed")
        if not (0 <= key.layer < self.layers and 0 <= key.expert < self._records.experts[key.layer]):
            raise ConfigError(f"{key}: {self.name!r} has no such record")


def same_layouts(first: Sequence[RecordLayout], second: Sequence[RecordLayout]) -> bool:
    """Whether records of both have the same fields in the same places; padding behind them may differ."""
    return len(first) == len(second) and all(a.fields == b.fields for a, b in zip(first, second, strict=True))


def described(layouts: Sequence[RecordLayout], experts: Sequence[int]) -> str:
    """A family's records, for an error message."""
    fields = {f"{f.name} {str(f.dtype).removeprefix('torch.')} {list(f.shape)}" for la in layouts for f in la.fields}
    return f"{len(layouts)} layers of {max(experts)} experts ({', '.join(sorted(fields))})"
