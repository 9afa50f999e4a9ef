"""Read everything in a packed store and compare it with its checksums, or with the checkpoint it was made from."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from moetier.access import ExpertKey
from moetier.errors import StoreError
from moetier.packing.draft import contents_of
from moetier.packing.workers import in_parallel
from moetier.stores.checkpoint import CheckpointStore, IOMode
from moetier.stores.diskio import aligned_buffer
from moetier.stores.packed import PackedStore
from moetier.stores.packed_index import PackedIndex, checksum

THREADS = 4


@dataclass(frozen=True, slots=True)
class Damage:
    """What is wrong with a record (`key`) or a file of a store."""

    path: Path
    fault: str
    key: ExpertKey | None = None

    def __str__(self) -> str:
        """One line for people."""
        what = "" if self.key is None else f"layer {self.key.layer}, expert {self.key.expert}: "
        return f"{self.path}: {what}{self.fault}"


class Reader:
    """Reads whole records and compares their checksums; from many threads at once. A context manager."""

    def __init__(self, index: PackedIndex, io: IOMode = "auto"):
        self.index = index
        self._local = threading.local()
        self._store = PackedStore(index, io)

    def region(self, key: ExpertKey) -> memoryview:
        """A record's pages, valid until this thread asks for the next ones. Raises `StoreError` if they are damaged."""
        if not hasattr(self._local, "buffer"):
            self._local.buffer = aligned_buffer(self.index.slot_nbytes)
        region: memoryview = self._local.buffer[: self.index.region(key)]
        self._store.read_pages(key, region)
        if checksum(key, region) != self.index.record(key).checksum:
            raise StoreError(
                f"{self.path(key)}: layer {key.layer}, expert {key.expert}: damaged: does not match its checksum"
            )
        return region

    def record(self, key: ExpertKey) -> memoryview:
        """The record itself, checked."""
        phase = self.index.record(key).phase
        return self.region(key)[phase : phase + self.index.layouts[key.layer].nbytes]

    def path(self, key: ExpertKey) -> Path:
        """The file of a record."""
        return self.index.folder / self.index.files[self.index.record(key).file][0]

    def close(self) -> None:
        """Close the files."""
        self._store.close()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *cause: object) -> None:
        self.close()


def total_nbytes(index: PackedIndex) -> int:
    """Bytes that `verify` reads."""
    return sum(index.region(key) for key in index.placed()) + sum(item.nbytes for item in index.contents.values())


def verify(
    index: PackedIndex,
    checkpoint: CheckpointStore | None = None,
    *,
    threads: int = THREADS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[Damage]:
    """Yield everything that is damaged, as it is found.

    With `checkpoint` every record is also compared with what the engine would read from there.
    """
    total, done = total_nbytes(index), 0
    progress(done, total)
    for name, expected in index.contents.items():
        path = index.folder / name
        try:
            found = contents_of(path)
        except OSError as error:
            found = None
            yield Damage(path, f"cannot be read: {error.strerror}")
        else:
            if found != expected:
                yield Damage(path, "missing" if found is None else "changed: its bytes do not match their checksum")
        done += expected.nbytes
        progress(done, total)
    scratch = threading.local()

    with Reader(index) as reader:

        def examine(key: ExpertKey) -> str:
            try:
                record = reader.record(key)
            except StoreError as error:
                return (
                    str(error)
                    .removeprefix(f"{reader.path(key)}: ")
                    .removeprefix(f"layer {key.layer}, expert {key.expert}: ")
                )
            if checkpoint is None:
                return ""
            if not hasattr(scratch, "buffer"):
                scratch.buffer = aligned_buffer(index.slot_nbytes)
            other = scratch.buffer[: len(record)]
            torch.frombuffer(other, dtype=torch.uint8).zero_()
            for segment in range(checkpoint.segments(key)):
                checkpoint.read(key, segment, other)
            same = torch.equal(torch.frombuffer(record, dtype=torch.uint8), torch.frombuffer(other, dtype=torch.uint8))
            return "" if same else "differs from the checkpoint"

        for key, fault in in_parallel(examine, index.placed(), threads):
            if fault:
                yield Damage(reader.path(key), fault, key)
            done += index.region(key)
            progress(done, total)
