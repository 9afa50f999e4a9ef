"""What a packed store holds besides records: the other weights, the shards' headers, configuration and tokenizer.

The other weights become one ordinary safetensors file. Every tensor keeps its address modulo a cache line, because
float32 products can depend on that; where the format leaves no gap, a tensor of filling makes one.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from moetier.record import FIELD_ALIGNMENT
from moetier.stores.diskio import DiskFile
from moetier.stores.packed_index import PADDING, RESIDENT, SHARDS, Contents, sync_folder
from moetier.stores.packed_sources import SOURCES, LayerSources, save_sources
from moetier.stores.shards import Shards

CHUNK = 4 << 20
COPIED = ("*.json", "*.model", "*.txt", "*.jinja", "*.py", "*.md", "LICENSE*", "NOTICE*")
"""Files of a model folder that go into the store as they are; the weights' own index is kept with the headers."""
_INDEX = "model.safetensors.index.json"


def resident_header(shards: Shards, names: Sequence[str]) -> tuple[bytes, list[str]]:
    """The header of the file of these tensors, and all tensors in order; filling has names that begin with PADDING."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    order: list[str] = []
    offset = 0
    for name in names:
        entry = shards.tensors[name]
        gap = (entry.offset - offset) % FIELD_ALIGNMENT
        if gap and entry.nbytes:
            filling = f"{PADDING}.{len(order)}"
            header[filling] = {"dtype": "U8", "shape": [gap], "data_offsets": [offset, offset + gap]}
            order.append(filling)
            offset += gap
        end = offset + entry.nbytes
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [offset, end]}
        order.append(name)
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % FIELD_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, order


class Summed:
    """A file being written, with the size and checksum of what went in."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.nbytes = self.checksum = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append."""
        self._file.write(data)
        self.nbytes += len(data)
        self.checksum = zlib.crc32(data, self.checksum)


def write_resident(folder: Path, shards: Shards, names: Sequence[str], progress: Callable[[int], None]) -> Contents:
    """Write the tensors that are no experts' as an ordinary safetensors file."""
    header, order = resident_header(shards, names)
    described = json.loads(header[8:])
    buffer = memoryview(bytearray(CHUNK))
    sources = [DiskFile(path, "buffered") for path in shards.files]
    try:
        with open(folder / RESIDENT, "wb") as file:
            out = Summed(file)
            out.write(header)
            for name in order:
                begin, end = described[name]["data_offsets"]
                if name.startswith(PADDING):
                    out.write(bytes(end - begin))
                    continue
                entry = shards.tensors[name]
                for done in range(0, entry.nbytes, CHUNK):
                    part = buffer[: min(CHUNK, entry.nbytes - done)]
                    sources[entry.file].read_into(entry.offset + done, part)
                    out.write(part)
                    progress(len(part))
            file.flush()
            os.fsync(file.fileno())
    finally:
        for source in sources:
            source.close()
    return Contents(out.nbytes, out.checksum)


def small_files(model: Path, shards: Shards, layers: Sequence[LayerSources] | None) -> dict[str, bytes]:
    """The contents of all other files of a store, by their name in it.

    `layers` is None where the original files cannot be made again; what only serves for that is left out then.
    """
    found: dict[str, bytes] = {}
    for pattern in COPIED:
        for path in sorted(model.glob(pattern)):
            if path.is_file() and path.name != _INDEX:
                found[path.name] = path.read_bytes()
    described = [{"name": path.name, "bytes": path.stat().st_size} for path in shards.files]
    found[f"{SHARDS}/files.json"] = (json.dumps(described) + "\n").encode()
    for path in shards.files:
        with open(path, "rb") as file:
            head = file.read(8)
            found[f"{SHARDS}/{path.name}.header"] = head + file.read(int.from_bytes(head, "little"))
    if layers is not None:
        found[f"{SHARDS}/{SOURCES}"] = save_sources(layers)
    if (model / _INDEX).is_file():
        found[f"{SHARDS}/{_INDEX}"] = (model / _INDEX).read_bytes()
    return found


def write_small(folder: Path, name: str, content: bytes) -> Contents:
    """Write one of them."""
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path.parent)
    return Contents(len(content), zlib.crc32(content))
