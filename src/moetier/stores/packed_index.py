"""The index of a packed store: which record lies where, and what it is a copy of. docs/packed-store.md has the format.

Knows JSON, sizes and checksums; reads no record and knows no model. A folder is a store if and only if it holds a whole
index: that file is written last, and replaced in one step.
"""

from __future__ import annotations

import hashlib
import json
import os
import reprlib
import zlib
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from moetier.access import ExpertKey
from moetier.errors import StoreError
from moetier.record import PAGE, Field, RecordLayout, round_up

FORMAT = "moetier packed store"
VERSION = 1
INDEX = "moetier-store.json"
DRAFT = "moetier-packing.json"
JOURNAL = "moetier-packing.journal"
RESIDENT = "resident.safetensors"
SHARDS = "shards"
PADDING = "moetier.padding"  # tensors of the resident file that only take up room
CHECKSUM = "crc32"
_AGAIN = "pack the model again (moetier pack MODEL {0} --replace)"


@dataclass(frozen=True, slots=True)
class Record:
    """One expert's bytes: they begin `phase` bytes behind byte `offset` (a multiple of a page) of `files[file]`.

    `checksum` covers the whole pages from `offset` on; see `checksum`.
    """

    file: int
    offset: int
    phase: int
    checksum: int


@dataclass(frozen=True, slots=True)
class Contents:
    """A file of the store that holds no records, with its size in bytes and the checksum of all of it."""

    nbytes: int
    checksum: int


@dataclass(frozen=True)
class PackedIndex:
    """What a packed store holds. `layouts[layer]` and `records[layer][expert]` go by MoE layer.

    `fingerprint` and `witness` say of which checkpoint, `dtype` what `moetier pack` was asked for. `lossy` is empty, or
    says why the original files cannot be made again from this store.
    """

    folder: Path
    model: str
    fingerprint: str
    witness: str
    dtype: str
    layouts: tuple[RecordLayout, ...]
    records: tuple[tuple[Record, ...], ...]
    files: tuple[tuple[str, int], ...]  # name, bytes
    contents: dict[str, Contents] = field(default_factory=dict)
    lossy: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    def region(self, key: ExpertKey) -> int:
        """Bytes of the whole pages that a record occupies."""
        return round_up(self.record(key).phase + self.layouts[key.layer].nbytes, PAGE)

    def placed(self) -> list[ExpertKey]:
        """All records, in the order of their places in the files."""
        keys = [ExpertKey(layer, expert) for layer, row in enumerate(self.records) for expert in range(len(row))]
        return sorted(keys, key=lambda key: (self.record(key).file, self.record(key).offset))

    def record(self, key: ExpertKey) -> Record:
        """Where a record lies."""
        return self.records[key.layer][key.expert]

    @property
    def slot_nbytes(self) -> int:
        """Bytes a slot needs to hold any record: whole pages."""
        return max(self.region(key) for key in self.placed())

    def save(self) -> None:
        """Write the index in one step, and make sure that it stays. Everything it names must be on the disk before."""
        body = self.as_dict()
        text = dumps(body | {"digest": digest(body)}) + "\n"
        write_durably(self.folder / INDEX, text.encode())

    def as_dict(self) -> dict[str, Any]:
        """The index as JSON takes it, without its digest."""
        kinds = list(dict.fromkeys(self.layouts))
        return {
            "format": FORMAT,
            "version": VERSION,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "witness": self.witness,
            "dtype": self.dtype,
            "page": PAGE,
            "checksum": CHECKSUM,
            "lossy": self.lossy,
            "versions": self.versions,
            "files": [{"name": name, "bytes": nbytes} for name, nbytes in self.files],
            "contents": {
                name: {"bytes": item.nbytes, "checksum": item.checksum} for name, item in sorted(self.contents.items())
            },
            "layouts": [layout_as_dict(layout) for layout in kinds],
            "layers": [
                {
                    "layout": kinds.index(layout),
                    "records": [[r.file, r.offset, r.phase, r.checksum] for r in row],
                }
                for layout, row in zip(self.layouts, self.records, strict=True)
            ],
        }

    @classmethod
    def load(cls, folder: Path) -> PackedIndex:
        """The index of a finished store. Raises `StoreError` naming the file and the way out.

        Sizes of all files are compared with the index; no record is read.
        """
        path = folder / INDEX
        try:
            raw = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            raise StoreError(_no_store(folder)) from None
        except OSError as error:
            raise StoreError(f"{path}: cannot be read: {error.strerror}; make it readable for this user") from error
        except (ValueError, RecursionError):
            raise StoreError(f"{path}: damaged: not JSON; {_AGAIN.format(folder)}") from None
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise StoreError(f"{path}: not the index of a packed store; {_AGAIN.format(folder)}")
        if raw.get("version") != VERSION:
            raise StoreError(
                f"{path}: version {reprlib.repr(raw.get('version'))} of the format; this moetier reads {VERSION}: use "
                "the moetier that packed it, or " + _AGAIN.format(folder)
            )
        if raw.pop("digest", None) != digest(raw):
            raise StoreError(f"{path}: damaged or edited: it does not match its digest; {_AGAIN.format(folder)}")
        try:
            index = cls._parse(folder, raw)
            index._check()
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise StoreError(f"{path}: damaged ({reprlib.repr(error)}); {_AGAIN.format(folder)}") from error
        index._check_sizes()
        return index

    @classmethod
    def _parse(cls, folder: Path, raw: dict[str, Any]) -> PackedIndex:
        if raw["checksum"] != CHECKSUM or raw["page"] != PAGE:
            raise ValueError(f"checksum {raw['checksum']!r}, page {raw['page']!r}")
        kinds = [layout_from_dict(item) for item in raw["layouts"]]
        return cls(
            folder,
            str(raw["model"]),
            str(raw["fingerprint"]),
            str(raw["witness"]),
            str(raw["dtype"]),
            tuple(kinds[layer["layout"]] for layer in raw["layers"]),
            tuple(tuple(Record(*map(whole_number, row)) for row in layer["records"]) for layer in raw["layers"]),
            tuple((_name(item["name"]), whole_number(item["bytes"])) for item in raw["files"]),
            {
                _name(name): Contents(whole_number(item["bytes"]), whole_number(item["checksum"]))
                for name, item in raw["contents"].items()
            },
            str(raw["lossy"]),
            {str(name): str(version) for name, version in raw["versions"].items()},
        )

    def _check(self) -> None:
        """Records lie in their files, on pages, and do not overlap."""
        if not self.layouts or not all(self.records):
            raise ValueError("no records")
        ends: dict[int, list[tuple[int, int]]] = {}
        for key in self.placed():
            record = self.record(key)
            end = record.offset + self.region(key)
            if record.offset % PAGE or not record.phase < PAGE or end > self.files[record.file][1]:
                raise ValueError(f"{key} lies at {record.offset} of {self.files[record.file][0]}")
            ends.setdefault(record.file, []).append((record.offset, end))
        for spans in ends.values():
            if any(first[1] > second[0] for first, second in pairwise(spans)):
                raise ValueError("records overlap")

    def _check_sizes(self) -> None:
        sizes = [*self.files, *((name, item.nbytes) for name, item in self.contents.items())]
        for name, nbytes in sizes:
            path = self.folder / name
            try:
                found = path.stat().st_size
            except OSError as error:
                raise StoreError(
                    f"{path}: part of the packed store, but {(error.strerror or str(error)).lower()}; restore it, or "
                    + _AGAIN.format(self.folder)
                ) from error
            if found != nbytes:
                fault = "truncated" if found < nbytes else "too long"
                raise StoreError(
                    f"{path}: {fault}: {found} bytes instead of {nbytes}; restore it, or {_AGAIN.format(self.folder)}"
                )


def listed(folder: Path) -> list[str]:
    """The files without records that an index names, as far as it can be read."""
    try:
        return [_name(name) for name in json.loads((folder / INDEX).read_text("utf-8"))["contents"]]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return []


def is_store(folder: Path) -> bool:
    """Whether a folder holds a packed store, finished or begun."""
    return (folder / INDEX).exists() or (folder / DRAFT).exists()


def checksum(key: ExpertKey, region: memoryview) -> int:
    """The checksum of a record's pages. It begins with the key, so that a record in another's place is found out."""
    return zlib.crc32(region, zlib.crc32(f"{key.layer}/{key.expert}".encode()))


def digest(body: dict[str, Any]) -> str:
    """What tells a damaged index from a whole one."""
    return hashlib.sha256(dumps(body).encode()).hexdigest()


def write_durably(path: Path, content: bytes) -> None:
    """Make a file of these bytes, whole or not at all, that survives a power failure."""
    draft = path.with_name(f".{path.name}.tmp")
    with open(draft, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power failure."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _no_store(folder: Path) -> str:
    if (folder / DRAFT).exists():
        return f"{folder}: packing has not ended there; run the same `moetier pack` again, it goes on where it stopped"
    if not folder.is_dir():
        return f"{folder}: no such folder; make a store with `moetier pack MODEL {folder}`"
    return f"{folder}: not a packed store, {INDEX} is missing; make one with `moetier pack MODEL OUT`"


def layout_as_dict(layout: RecordLayout) -> dict[str, Any]:
    """A layout as JSON takes it."""
    fields = [
        {
            "name": item.name,
            "dtype": str(item.dtype).removeprefix("torch."),
            "shape": list(item.shape),
            "offset": item.offset,
            "bytes": item.nbytes,
        }
        for item in layout.fields
    ]
    return {"bytes": layout.nbytes, "fields": fields}


def layout_from_dict(raw: dict[str, Any]) -> RecordLayout:
    """What `layout_as_dict` gave. Raises ValueError, TypeError, KeyError or AttributeError for anything else."""
    fields = []
    end = 0
    for item in raw["fields"]:
        dtype = getattr(torch, str(item["dtype"]))
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"dtype {item['dtype']!r}")
        shape = tuple(map(whole_number, item["shape"]))
        offset, nbytes = whole_number(item["offset"]), whole_number(item["bytes"])
        if offset < end or torch.Size(shape).numel() * dtype.itemsize != nbytes:
            raise ValueError(f"field {item['name']!r}")
        end = offset + nbytes
        fields.append(Field(str(item["name"]), dtype, shape, offset, nbytes))
    if not fields or end != whole_number(raw["bytes"]):
        raise ValueError("layout")
    return RecordLayout(tuple(fields), end)


def whole_number(value: Any) -> int:
    """The value, if it is an offset, a size or a number of things; else ValueError."""
    if type(value) is not int or not 0 <= value < 1 << 63:  # type(): a bool is an int to isinstance
        raise ValueError(f"{value!r} is no count")
    return value


def is_inside(name: str) -> bool:
    """Whether a file of this name would lie in the folder."""
    path = Path(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and name.isprintable()


def _name(value: Any) -> str:
    if not is_inside(str(value)):
        raise ValueError(f"{value!r} leads out of the folder")
    return str(value)


def dumps(value: Any) -> str:
    """JSON that is the same for the same value."""
    return json.dumps(value, separators=(",", ":"), sort_keys=True)
