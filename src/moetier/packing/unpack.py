"""Make the checkpoint again from which a packed store was made: the same files, byte for byte.

Every byte comes from a record or file whose checksum is compared on the way. Casts that lose bits have no way back;
such a store says so and is refused.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import torch

from moetier.access import ExpertKey
from moetier.errors import ConfigError, StoreError, UnsupportedModelError
from moetier.packing.draft import contents_of
from moetier.packing.files import CHUNK
from moetier.packing.verify import Reader
from moetier.packing.workers import in_parallel
from moetier.stores.opening import original_files, original_shards
from moetier.stores.packed_index import PADDING, RESIDENT, SHARDS, PackedIndex, sync_folder
from moetier.stores.packed_sources import SOURCES, LayerSources, load_sources

THREADS = 4
_SCRATCH = ".unpacking"
_AGAIN = "pack the model again, or restore the file"


def unpack(
    index: PackedIndex,
    out: Path,
    *,
    threads: int = THREADS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Path]:
    """Write the original files into the new or empty folder `out`; returns them.

    The files appear there when all of them are whole. Raises `UnsupportedModelError` for a store with records that were
    cast with a loss, `ConfigError` for a folder that cannot be used, `StoreError` for damage and for a full disk.
    """
    if index.lossy:
        raise UnsupportedModelError(
            f"{index.folder}: the original files cannot be made again from this store ({index.lossy}); keep the "
            "checkpoint it was packed from"
        )
    out = Path(out)
    target = out.resolve()
    if target == index.folder.resolve() or index.folder.resolve() in target.parents:
        raise ConfigError(f"{out}: inside the store {index.folder}; give another folder")
    if out.exists() and (not out.is_dir() or set(os.listdir(out)) - {_SCRATCH}):
        raise ConfigError(f"{out}: exists and is not an empty folder; give a new one")
    scratch = out / _SCRATCH
    try:
        shutil.rmtree(scratch, ignore_errors=True)  # of one that was killed
        scratch.mkdir(parents=True)
        try:
            _Unpacker(index, scratch, threads, progress).run()
            names = sorted(os.listdir(scratch))
            for name in names:
                os.replace(scratch / name, out / name)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        sync_folder(out)
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{error.filename or out}: could not be written: {error.strerror or error}") from error
    return [out / name for name in names]


class _Unpacker:
    def __init__(self, index: PackedIndex, folder: Path, threads: int, progress: Callable[[int, int], None]):
        self.index, self.folder, self.threads = index, folder, threads
        self.shards = original_shards(index.folder)
        self.sources = load_sources(index.folder / SHARDS / SOURCES)
        self._progress = progress
        self._done = 0
        self._total = sum(index.region(key) for key in index.placed()) + index.contents[RESIDENT].nbytes
        self._fds: list[int] = []

    def run(self) -> None:
        """Write all files."""
        self._check_files()
        sizes = {name: nbytes for name, nbytes in original_files(self.index.folder)}
        try:
            for path in self.shards.files:
                self._fds.append(os.open(self.folder / path.name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666))
                header = (self.index.folder / SHARDS / f"{path.name}.header").read_bytes()
                self._write(len(self._fds) - 1, 0, memoryview(header))
            self._copy_resident()
            with Reader(self.index) as reader:
                work = lambda key: self._put_back(reader, key)  # noqa: E731
                for key, _ in in_parallel(work, self.index.placed(), self.threads):
                    self._advance(self.index.region(key))
            for fd, path in zip(self._fds, self.shards.files, strict=True):
                os.fsync(fd)
                expected = sizes[path.name]
                if os.fstat(fd).st_size != expected:
                    raise StoreError(f"{path.name}: came out with {os.fstat(fd).st_size} bytes instead of {expected}")
        finally:
            for fd in self._fds:
                os.close(fd)
        self._copy_small()

    def _advance(self, nbytes: int) -> None:
        self._done += nbytes
        self._progress(self._done, self._total)

    def _check_files(self) -> None:
        """Everything but records and the resident file, which are checked while they are read."""
        for name, expected in self.index.contents.items():
            if name != RESIDENT and contents_of(self.index.folder / name) != expected:
                raise StoreError(f"{self.index.folder / name}: damaged or edited since it was packed; {_AGAIN}")

    def _copy_resident(self) -> None:
        path = self.index.folder / RESIDENT
        total = 0
        with open(path, "rb", buffering=0) as file:
            head = file.read(8)
            header = file.read(int.from_bytes(head, "little"))
            total = zlib.crc32(header, zlib.crc32(head))
            for name, described in json.loads(header).items():
                if name == "__metadata__":
                    continue
                entry = None if name.startswith(f"{PADDING}.") else self.shards.tensors[name]
                begin, end = described["data_offsets"]
                done = 0
                while done < end - begin:
                    chunk = file.read(min(CHUNK, end - begin - done))
                    if not chunk:
                        raise StoreError(f"{path}: truncated; {_AGAIN}")
                    total = zlib.crc32(chunk, total)
                    if entry is not None:
                        self._write(entry.file, entry.offset + done, memoryview(chunk))
                    done += len(chunk)
                    self._advance(len(chunk))
        if total != self.index.contents[RESIDENT].checksum:
            raise StoreError(f"{path}: damaged: its bytes do not match their checksum; {_AGAIN}")

    def _put_back(self, reader: Reader, key: ExpertKey) -> None:
        """One record's bytes to where they came from."""
        layer: LayerSources = self.sources[key.layer]
        layout = self.index.layouts[key.layer]
        views = layout.views(torch.frombuffer(reader.record(key), dtype=torch.uint8))
        for item, feed in zip(layer.fields, layer.spans[key.expert], strict=True):
            bytes_ = memoryview(item.restore(views[item.name]).view(torch.uint8).numpy())  # type: ignore[arg-type]
            begin = 0
            for file, offset, nbytes in feed:
                self._write(file, offset, bytes_[begin : begin + nbytes])
                begin += nbytes

    def _write(self, file: int, offset: int, data: memoryview) -> None:
        done = 0
        try:
            while done < len(data):
                done += os.pwrite(self._fds[file], data[done:], offset + done)
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.shards.files[file].name) from error

    def _copy_small(self) -> None:
        for name in self.index.contents:
            path = Path(name)
            kept = path.parent == Path(SHARDS) and path.name.endswith(".index.json")
            if (path.parent == Path(".") and name != RESIDENT) or kept:
                with open(self.folder / path.name, "wb") as file:
                    file.write((self.index.folder / name).read_bytes())
                    file.flush()
                    os.fsync(file.fileno())
