"""A pack under way: its plan, the journal of what is done, and who may go on with it.

A draft is a folder with a plan (`moetier-packing.json`: the index without checksums) and no index. Every record or file
that has been written gets a line in the journal. The journal is not trusted: who goes on with a draft reads what it
names and compares checksums, so that neither a kill nor a power failure can leave a bad record behind.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from moetier.access import ExpertKey
from moetier.errors import ConfigError, StoreError
from moetier.stores.diskio import DiskFile, aligned_buffer
from moetier.stores.packed_index import (
    DRAFT,
    INDEX,
    JOURNAL,
    RESIDENT,
    SHARDS,
    Contents,
    PackedIndex,
    checksum,
    is_inside,
    listed,
    sync_folder,
    write_durably,
)

_RECORD = re.compile(rb"record (\d+) (\d+) (\d+) ([01])")
_FILE = re.compile(rb"file (\d+) (\d+) (.+)")
_OURS = ("experts-*.bin", RESIDENT, f".{INDEX}.tmp", f".{DRAFT}.tmp")
_NOT_PLANNED = ("contents", "lossy", "versions")
CHUNK = 4 << 20


class Draft:
    """The journal of one pack, locked against a second one. A context manager.

    `records` holds checksum and exactness of the records that are done, `contents` the other files.
    """

    def __init__(self, index: PackedIndex):
        self.index, self.folder = index, index.folder
        self.records: dict[ExpertKey, tuple[int, bool]] = {}
        self.contents: dict[str, Contents] = {}
        self._file: BinaryIO | None = None

    def __enter__(self) -> Draft:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = open(self.folder / JOURNAL, "ab+", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise ConfigError(f"{self.folder}: another `moetier pack` is at work there; wait for it") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not (self.folder / DRAFT).exists():  # nothing begun, or all done
            (self.folder / JOURNAL).unlink(missing_ok=True)
        if self._file is not None:
            self._file.close()

    def begin(self) -> None:
        """Write the plan down, unless it is there already. Raises `ConfigError` if another one is."""
        plan = plan_of(self.index)
        path = self.folder / DRAFT
        if path.exists():
            try:
                found = json.loads(path.read_text("utf-8"))
            except ValueError:
                found = None
            if found != plan:
                raise ConfigError(
                    f"{self.folder}: holds an unfinished pack of another model, or with other options; give --replace "
                    "to throw it away, or another folder"
                )
            return
        write_durably(path, (json.dumps(plan, separators=(",", ":")) + "\n").encode())

    def recover(self, progress: Callable[[int], None]) -> None:
        """Find out what is done, by reading it; `progress` is told of the bytes of records that are."""
        assert self._file is not None
        self._file.seek(0)
        *lines, torn = self._file.read().split(b"\n")
        if torn:
            self._append(b"\n")  # the line that a kill tore off matches nothing, and must not swallow the next one
        buffer = aligned_buffer(self.index.slot_nbytes)
        files: dict[int, DiskFile | None] = {}
        try:
            for line in lines:
                if match := _RECORD.fullmatch(line):
                    key = ExpertKey(int(match[1]), int(match[2]))
                    if self._holds(key, int(match[3]), buffer, files):
                        self.records[key] = int(match[3]), match[4] == b"1"
                        progress(self.index.region(key))
                elif match := _FILE.fullmatch(line):
                    name, found = match[3].decode(errors="replace"), Contents(int(match[1]), int(match[2]))
                    if is_inside(name) and contents_of(self.folder / name) == found:
                        self.contents[name] = found
        finally:
            for file in files.values():
                if file is not None:
                    file.close()

    def _holds(self, key: ExpertKey, expected: int, buffer: memoryview, files: dict[int, DiskFile | None]) -> bool:
        if key in self.records or key.layer >= len(self.index.records):
            return False
        if key.expert >= len(self.index.records[key.layer]):
            return False
        record = self.index.record(key)
        if record.file not in files:
            path = self.folder / self.index.files[record.file][0]
            files[record.file] = DiskFile(path) if path.is_file() else None
        file, region = files[record.file], buffer[: self.index.region(key)]
        if file is None or file.size < record.offset + len(region):
            return False
        try:
            file.read_into(record.offset, region)
        except StoreError:  # a page that cannot be read may be written again
            return False
        return checksum(key, region) == expected

    def record_done(self, key: ExpertKey, found: int, exact: bool) -> None:
        """A record is written."""
        self.records[key] = found, exact
        self._append(b"record %d %d %d %d\n" % (key.layer, key.expert, found, exact))

    def file_done(self, name: str, found: Contents) -> None:
        """A file without records is written."""
        self.contents[name] = found
        self._append(b"file %d %d %s\n" % (found.nbytes, found.checksum, name.encode()))

    def _append(self, data: bytes) -> None:
        assert self._file is not None
        try:
            self._file.write(data)
        except OSError as error:
            raise StoreError(f"{self.folder / JOURNAL}: cannot be written: {error.strerror}") from error

    def close_for_good(self) -> None:
        """The index is written: the draft is no more."""
        (self.folder / DRAFT).unlink(missing_ok=True)
        sync_folder(self.folder)

    def clear(self) -> None:
        """Remove the store or draft that is there, the index first: what is left must never be taken for a store."""
        assert self._file is not None
        self._file.seek(0)
        found = [_FILE.fullmatch(line) for line in self._file.read().split(b"\n")]
        named = (match[3].decode(errors="replace") for match in found if match)
        copies = {*listed(self.folder), *(name for name in named if is_inside(name))}
        for name in (INDEX, DRAFT, *copies):
            (self.folder / name).unlink(missing_ok=True)
            if name in (INDEX, DRAFT):
                sync_folder(self.folder)
        self._file.truncate(0)
        for pattern in _OURS:
            for path in self.folder.glob(pattern):
                path.unlink()
        if (self.folder / SHARDS).is_dir():
            shutil.rmtree(self.folder / SHARDS)


def plan_of(index: PackedIndex) -> dict[str, Any]:
    """What two packs must have in common for the second to go on with the first."""
    body = index.as_dict() | {"format": "moetier packed store, unfinished"}
    return {name: json.loads(json.dumps(value)) for name, value in body.items() if name not in _NOT_PLANNED}


def contents_of(path: Path) -> Contents | None:
    """Size and checksum of a file; None where there is none."""
    nbytes = total = 0
    try:
        with open(path, "rb", buffering=0) as file:
            while chunk := file.read(CHUNK):
                nbytes, total = nbytes + len(chunk), zlib.crc32(chunk, total)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return None
    return Contents(nbytes, total)


def refuse_foreign(folder: Path) -> None:
    """Raise `ConfigError` for a folder that holds something else than a store or draft."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder}: a file; give a folder for the store")
    if not folder.exists() or (folder / INDEX).exists() or (folder / DRAFT).exists():
        return
    foreign = [name for name in sorted(os.listdir(folder)) if name not in (JOURNAL, f".{DRAFT}.tmp", f".{INDEX}.tmp")]
    if foreign:
        raise ConfigError(f"{folder}: holds {foreign[0]} and is no packed store; give a new or empty folder")
