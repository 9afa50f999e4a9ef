"""What a step of a run consists of: where each written record lies, its checksums, and what was attached.

Knows JSON, digests and folder names; reads no record. docs/run-folder.md has the format.
"""

from __future__ import annotations

import json
import os
import re
import reprlib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from moetier.access import ExpertKey
from moetier.errors import ConfigError, StoreError
from moetier.record import PAGE, RecordLayout, round_up
from moetier.stores.packed_index import (
    Contents,
    digest,
    layout_as_dict,
    layout_from_dict,
    whole_number,
)

FORMAT = "moetier run step"
VERSION = 1
MANIFEST = "step.json"
BLOCK = 4 << 20  # bytes of the file that one checksum covers
_FOLDER = re.compile(r"step-(\d{1,18})\.(\d{1,18})")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


@lru_cache(maxsize=1024)
def blocks(nbytes: int, phase: int) -> tuple[tuple[int, int], ...]:
    """The parts of a record that have a checksum each, in bytes from its start: cut on pages of the file."""
    return tuple(
        (max(0, begin - phase), min(begin + BLOCK - phase, nbytes)) for begin in range(0, phase + nbytes, BLOCK)
    )


def checksum(family: str, key: ExpertKey, block: int, data: memoryview) -> int:
    """The checksum of a block. It begins with whose it is, so that bytes in another's place are found out."""
    return zlib.crc32(data, zlib.crc32(f"{family}/{key.layer}/{key.expert}/{block}".encode()))


class Stored:
    """A version of a record in a data file: it begins `phase` bytes behind `offset`, a multiple of a page.

    `nbytes` are its whole pages, `sums` the checksums of its `blocks`. `checked[block]` is 1 once this process has
    written the block, or compared it with its checksum.
    """

    __slots__ = ("checked", "nbytes", "offset", "phase", "sums")

    def __init__(self, offset: int, nbytes: int, phase: int, sums: Sequence[int], checked: bool):
        self.offset, self.nbytes, self.phase, self.sums = offset, nbytes, phase, tuple(sums)
        self.checked = bytearray([checked] * len(self.sums))


@dataclass(frozen=True, slots=True)
class FamilyTable:
    """The records of a family that were ever written. `layouts` and `experts` (how many) go by layer."""

    layouts: tuple[RecordLayout, ...]
    experts: tuple[int, ...]
    records: Mapping[ExpertKey, Stored]


@dataclass(frozen=True, slots=True)
class Manifest:
    """One committed step. Of two with the same step, and of a later step with a lower sequence, the former is void."""

    step: int
    sequence: int  # counts commits
    families: Mapping[str, FamilyTable]
    attachments: Mapping[str, Contents] = field(default_factory=dict)
    extra: Any = None

    @property
    def folder(self) -> str:
        """Name of the step's folder."""
        return f"step-{self.step}.{self.sequence}"

    def save(self, folder: Path) -> None:
        """Write it into the step's folder; raises OSError. The folder itself is the caller's to sync."""
        body = {
            "format": FORMAT,
            "version": VERSION,
            "step": self.step,
            "sequence": self.sequence,
            "families": {name: _table_as_dict(table) for name, table in self.families.items()},
            "attachments": {
                name: {"bytes": item.nbytes, "checksum": item.checksum} for name, item in self.attachments.items()
            },
            "extra": self.extra,
        }
        with open(folder / MANIFEST, "wb") as file:
            text = json.dumps(body | {"digest": digest(body)}, separators=(",", ":"))  # in the order of `extra`
            file.write(text.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """The manifest in a step's folder. Raises `StoreError` naming the file; the way out is the caller's to add."""
        path = folder / MANIFEST
        try:
            raw = json.loads(path.read_text("utf-8"))
        except OSError as error:
            raise StoreError(f"{path}: cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError):
            raise StoreError(f"{path}: damaged: not JSON") from None
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise StoreError(f"{path}: not a step of a run")
        if raw.get("version") != VERSION:
            raise StoreError(
                f"{path}: version {reprlib.repr(raw.get('version'))} of the format; this moetier reads {VERSION}: use "
                "the moetier that wrote it"
            )
        if raw.pop("digest", None) != digest(raw):
            raise StoreError(f"{path}: damaged or edited: it does not match its digest")
        try:
            manifest = cls(
                whole_number(raw["step"]),
                whole_number(raw["sequence"]),
                {check_name(name, "family"): _table_from_dict(item) for name, item in raw["families"].items()},
                {
                    check_name(name, "attachment"): Contents(
                        whole_number(item["bytes"]), whole_number(item["checksum"])
                    )
                    for name, item in raw["attachments"].items()
                },
                raw["extra"],
            )
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise StoreError(f"{path}: damaged ({reprlib.repr(error)})") from error
        if manifest.folder != folder.name:
            raise StoreError(f"{path}: belongs to {manifest.folder}, not here")
        return manifest


def numbers_of(folder: str) -> tuple[int, int] | None:
    """(sequence, step) of a step's folder, by its name; None for any other name."""
    match = _FOLDER.fullmatch(folder)
    return (int(match[2]), int(match[1])) if match else None


def check_name(name: str, what: str) -> str:
    """The name, if it can be that of a file; else `ConfigError`."""
    if not _NAME.fullmatch(name) or name == MANIFEST:
        raise ConfigError(f"{what} {name!r}: not a name; use letters, digits, '_', '-' and '.', other than {MANIFEST}")
    return name


def payload(layout: RecordLayout) -> int:
    """Bytes of a record up to the end of its last field; what a layout has behind it is padding."""
    last = layout.fields[-1]
    return last.offset + last.nbytes


def pages(layout: RecordLayout, phase: int) -> int:
    """Bytes of the whole pages that a record takes up."""
    return round_up(phase + payload(layout), PAGE)


def _table_as_dict(table: FamilyTable) -> dict[str, Any]:
    kinds = list(dict.fromkeys(table.layouts))
    rows: list[list[list[Any]]] = [[] for _ in table.layouts]
    for key, item in sorted(table.records.items()):
        rows[key.layer].append([key.expert, item.offset, item.phase, list(item.sums)])
    return {
        "layouts": [layout_as_dict(layout) for layout in kinds],
        "layers": [
            {"layout": kinds.index(layout), "experts": experts, "records": row}
            for layout, experts, row in zip(table.layouts, table.experts, rows, strict=True)
        ],
    }


def _table_from_dict(raw: dict[str, Any]) -> FamilyTable:
    kinds = [layout_from_dict(item) for item in raw["layouts"]]
    layouts = tuple(kinds[whole_number(layer["layout"])] for layer in raw["layers"])
    experts = tuple(whole_number(layer["experts"]) for layer in raw["layers"])
    records: dict[ExpertKey, Stored] = {}
    spans: list[tuple[int, int]] = []
    for number, layer in enumerate(raw["layers"]):
        for row in layer["records"]:
            expert, offset, phase = map(whole_number, row[:3])
            sums = [whole_number(value) for value in row[3]]
            nbytes = pages(layouts[number], phase)
            expected = len(blocks(payload(layouts[number]), phase))
            if expert >= experts[number] or offset % PAGE or phase >= PAGE or len(sums) != expected:
                raise ValueError(f"record {number}/{expert}")
            records[ExpertKey(number, expert)] = Stored(offset, nbytes, phase, sums, checked=False)
            spans.append((offset, offset + nbytes))
    spans.sort()
    if any(first[1] > second[0] for first, second in pairwise(spans)):
        raise ValueError("records overlap")
    return FamilyTable(layouts, experts, records)
