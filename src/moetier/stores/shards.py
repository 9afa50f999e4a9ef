"""Which bytes of which file hold which tensor of a safetensors checkpoint. Reads headers and the index, never weights.

Guarantees: everything `Shards` lists lies inside its file and has the size that its shape and dtype need, nothing in
a file is claimed twice, and a folder's index leads to no file outside it. Whatever the safetensors library refuses is
refused here; so are a name that occurs twice and sizes beyond 2**63 - 1. Nothing is ever unpickled.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import reprlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from moetier.errors import CheckpointError, StoreError
from moetier.stores.diskio import DiskFile

_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_MAX_JSON = 100_000_000  # bytes: the limit of the safetensors library for a header, used for the index too
_MAX_SIZE = 2**63 - 1
_SAMPLE = 4096  # bytes
_SAMPLES = 64  # per file
_AGAIN = "download the file again"
_ADVICE = {
    errno.ENOENT: "it is part of the checkpoint: download it",
    errno.EACCES: "make it readable for this user",
    errno.EIO: "check the disk",
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: `nbytes` bytes at byte `offset` of `files[file]`, counted from the file's start.

    `dtype` is the safetensors code, such as "BF16"; `shape` counts elements.
    """

    name: str
    file: int
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Shards:
    """The files of a checkpoint and the tensors in them, by name.

    `known` and `seen` are fingerprint and witness where the files themselves are not there: those of a packed store's
    checkpoint.
    """

    files: tuple[Path, ...]
    tensors: dict[str, TensorEntry]
    known: str = ""
    seen: str = ""

    def __deepcopy__(self, memo: object) -> Shards:
        """Itself: nothing in it changes, and there may be many tensors."""
        return self

    @classmethod
    def open(cls, folder: Path) -> Shards:
        """The checkpoint in a model folder: its model.safetensors, or else the shards that its index names.

        (In that order, as transformers looks for them.) Raises `CheckpointError` naming the file and the way out.
        """
        try:
            present = sorted(os.listdir(folder))
        except OSError as error:
            raise CheckpointError(
                f"{folder}: cannot be read as a model folder: {error.strerror}; give the folder with the model's files"
            ) from error
        if _SINGLE in present:
            return cls.from_files([_inside(folder, _SINGLE, folder / _SINGLE)])
        if _INDEX not in present:
            raise CheckpointError(_nothing_found(folder, present))
        index = _inside(folder, _INDEX, folder / _INDEX)
        weight_map = _read_index(index)
        names = sorted(set(weight_map.values()))
        shards = cls.from_files([_inside(folder, name, index) for name in names])
        numbers = {name: number for number, name in enumerate(names)}
        for tensor, name in weight_map.items():
            entry = shards.tensors.get(tensor)
            if entry is None or entry.file != numbers[name]:
                where = "no shard holds it" if entry is None else f"{names[entry.file]} holds it"
                raise CheckpointError(
                    f"{index}: names {name} for the tensor {tensor!r}, but {where}; index and shards are not from the "
                    "same checkpoint: download both again"
                )
        return shards

    @classmethod
    def from_headers(cls, files: Sequence[tuple[Path, Path, int]], fingerprint: str, witness: str) -> Shards:
        """A checkpoint whose files are not there: (file as it was called, file with its header, its size in bytes)."""
        tensors: dict[str, TensorEntry] = {}
        for number, (_, kept, size) in enumerate(files):
            with _opened(kept) as file:
                raw = _read(file, 0, file.size)
            if len(raw) != 8 + int.from_bytes(raw[:8], "little"):
                raise CheckpointError(f"{kept}: damaged: not the header of a safetensors file")
            header = _parse(kept, raw[8:], "the header")
            tensors |= {entry.name: entry for entry in _entries(kept, number, header, len(raw), size)}
        return cls(tuple(path for path, _, _ in files), tensors, fingerprint, witness)

    @classmethod
    def from_files(cls, files: Sequence[Path]) -> Shards:
        """The checkpoint in these files; links are followed. Raises `CheckpointError` as `open` does."""
        tensors: dict[str, TensorEntry] = {}
        for number, path in enumerate(files):
            for entry in _read_header(path, number):
                first = tensors.setdefault(entry.name, entry)
                if first is not entry:
                    raise CheckpointError(
                        f"{path}: holds the tensor {entry.name!r}, and so does {files[first.file]}; the files are not "
                        "from one checkpoint: keep only those that belong together"
                    )
        return cls(tuple(files), tensors)

    def fingerprint(self) -> str:
        """A short hash of this very checkpoint: every tensor's place, and a sample of each file's bytes.

        Copies of a checkpoint have the same one, fine-tuned versions another. Raises `StoreError` as reads do.
        """
        if self.known:
            return self.known
        digest = hashlib.sha256(repr(sorted(self.tensors.values(), key=lambda entry: entry.name)).encode())
        for path in self.files:
            with DiskFile(path, "buffered") as file:
                sample = bytearray(min(_SAMPLE, file.size))
                file.read_into((file.size - len(sample)) // 2, memoryview(sample))
            digest.update(sample)
        return digest.hexdigest()[:16]

    def witness(self) -> str:
        """A hash that sees more changes than the fingerprint: of samples spread evenly over every file.

        A change that touches less than a 64th of a file may go unseen. Raises `StoreError` as reads do.
        """
        if self.known:
            return self.seen
        digest = hashlib.sha256()
        sample = memoryview(bytearray(_SAMPLE))
        for path in self.files:
            with DiskFile(path, "buffered") as file:
                digest.update(f"{file.size} ".encode())
                last = max(0, file.size - _SAMPLE)
                for offset in sorted({last * number // (_SAMPLES - 1) for number in range(_SAMPLES)}):
                    part = sample[: min(_SAMPLE, file.size - offset)]
                    file.read_into(offset, part)
                    digest.update(part)
        return digest.hexdigest()[:16]


def _nothing_found(folder: Path, present: list[str]) -> str:
    message = f"{folder}: no checkpoint here; looked for {_SINGLE} and {_INDEX}"
    if shards := [name for name in present if name.endswith(".safetensors")]:
        return f"{message}, found {shards[0]} without the index: download {_INDEX} too"
    if pickles := [name for name in present if name.endswith(_PICKLES)]:
        return (
            f"{message}, found only {pickles[0]}: pickles can run code and are never loaded. Take a revision with "
            "safetensors files, or, if you trust the file, convert it: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    return f"{message}: download the model's safetensors files into the folder"


def _inside(folder: Path, name: str, source: Path) -> Path:
    """The path of `name` in `folder`. Raises `CheckpointError` where it leads out of it; `source` is who named it.

    A hub cache is the exception: its snapshots/<revision> folders link to the blobs folder of the same repository.
    """
    path = folder / name
    if os.path.isabs(name) or ".." in Path(name).parts:
        raise CheckpointError(f"{source}: names the file {name!r}, outside of its folder; {_AGAIN} from its author")
    real, root = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    homes = [root]
    for snapshot in (root, *root.parents):
        cache = snapshot.parent.parent
        if snapshot.parent.name == "snapshots" and cache.name.startswith("models--"):
            homes.append(cache / "blobs")
    if not any(real.is_relative_to(home) for home in homes):
        raise CheckpointError(
            f"{path}: a link that leads out of the folder, to {real}; put the file itself into the folder"
        )
    return path


def _read_index(index: Path) -> dict[str, str]:
    with _opened(index) as file:
        if file.size > _MAX_JSON:
            raise CheckpointError(f"{index}: {file.size} bytes, too large for an index; {_AGAIN}")
        content = _parse(index, _read(file, 0, file.size), "the index")
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no `weight_map` from tensors to files; {_AGAIN}")
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            raise CheckpointError(
                f"{index}: names {reprlib.repr(name)} for the tensor {tensor!r}, which is no file name; {_AGAIN}"
            )
        if not name.endswith(".safetensors") or not name.isprintable():
            raise CheckpointError(
                f"{index}: names {name!r} for the tensor {tensor!r}; only .safetensors files are read: {_AGAIN}"
            )
    return weight_map


def _read_header(path: Path, number: int) -> Iterator[TensorEntry]:
    with _opened(path) as file:
        size = file.size
        if size < 8:
            raise CheckpointError(f"{path}: truncated: {size} bytes, too few for any safetensors file; {_AGAIN}")
        length = int.from_bytes(_read(file, 0, 8), "little")
        if length > _MAX_JSON:
            raise CheckpointError(
                f"{path}: damaged or not a safetensors file: its header would be {length} bytes long, over the "
                f"format's limit of {_MAX_JSON}; {_AGAIN}"
            )
        if length > size - 8:
            raise CheckpointError(
                f"{path}: truncated: its header is {length} bytes long, the file has {size - 8} for it; {_AGAIN}"
            )
        header = _parse(path, _read(file, 8, length), "the header")
    yield from _entries(path, number, header, 8 + length, size)


def _entries(path: Path, number: int, header: dict[str, Any], data: int, size: int) -> Iterator[TensorEntry]:
    """The tensors that a header lists, checked against the size of the file; data begins at byte `data`."""
    _check_metadata(path, header.pop("__metadata__", None))
    entries = [_entry(path, number, data, name, fields) for name, fields in header.items()]
    entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
    end = data
    for entry in entries:
        if entry.offset != end:
            fault = "overlaps the tensor before it" if entry.offset < end else "leaves a gap before it"
            _refuse(path, entry.name, f"{fault}: it starts at byte {entry.offset}, not {end}")
        end += entry.nbytes
    if end > size:
        raise CheckpointError(
            f"{path}: truncated: its tensors end at byte {end} (the last is {entries[-1].name!r}), the file at "
            f"{size}; {_AGAIN}"
        )
    if end < size:
        raise CheckpointError(f"{path}: {size - end} bytes follow the last tensor, which ends at {end}; {_AGAIN}")
    yield from entries


def _entry(path: Path, number: int, data: int, name: str, fields: object) -> TensorEntry:
    if not isinstance(fields, dict):
        _refuse(path, name, f"is described by {reprlib.repr(fields)}, not by an object")
    if not _is_text(name):
        _refuse(path, name, "has a name that is not valid text")
    dtype, shape, span = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    bits = _BITS.get(dtype) if isinstance(dtype, str) else None
    if not isinstance(dtype, str) or bits is None:
        _refuse(path, name, f"has the dtype {reprlib.repr(dtype)}, which the format does not know")
    if not isinstance(shape, list) or not all(map(_is_size, shape)):
        _refuse(path, name, f"has the shape {reprlib.repr(shape)}; dimensions are whole numbers from 0 to 2**63 - 1")
    if not isinstance(span, list) or len(span) != 2 or not all(map(_is_size, span)):
        _refuse(path, name, f"has data_offsets {reprlib.repr(span)}; two whole numbers from 0 to 2**63 - 1 are needed")
    begin, end = span
    if begin > end:
        _refuse(path, name, f"begins at data offset {begin}, after its end at {end}")
    elements = 1
    for size in shape:
        elements *= size
        if elements > _MAX_SIZE:
            _refuse(path, name, f"is too large: its shape is {reprlib.repr(shape)}")
    needed, rest = divmod(elements * bits, 8)
    if rest:
        _refuse(path, name, f"does not fill whole bytes: shape {reprlib.repr(shape)} of {dtype}")
    if needed != end - begin:
        _refuse(path, name, f"has {end - begin} bytes, but shape {reprlib.repr(shape)} of {dtype} needs {needed}")
    return TensorEntry(name, number, dtype, tuple(shape), data + begin, end - begin)


def _check_metadata(path: Path, metadata: object) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: corrupt header: `__metadata__` is not a map from text to text; {_AGAIN}")


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value <= _MAX_SIZE  # type(): a bool is an int to isinstance


def _is_text(name: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in name)


def _refuse(path: Path, name: str, fault: str) -> NoReturn:
    raise CheckpointError(f"{path}: corrupt header: the tensor {name!r} {fault}; {_AGAIN}")


def _parse(path: Path, raw: bytearray, what: str) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise CheckpointError(f"{path}: {what} has the key {twice!r} twice; {_AGAIN}")
        return result

    try:
        content = json.loads(raw.decode(), object_pairs_hook=once)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {what} is not JSON ({error}); damaged, or another format: {_AGAIN}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: {what} is not a JSON object but {reprlib.repr(content)}; {_AGAIN}")
    return content


@contextmanager
def _opened(path: Path) -> Iterator[DiskFile]:
    """The file, its failures told as `CheckpointError`."""
    try:
        with DiskFile(path, "buffered") as file:
            yield file
    except CheckpointError:
        raise
    except StoreError as error:
        cause = error.__cause__
        advice = _ADVICE.get(cause.errno or 0) if isinstance(cause, OSError) else None
        raise CheckpointError(f"{error}; {advice or 'it is part of the checkpoint'}") from error


def _read(file: DiskFile, offset: int, nbytes: int) -> bytearray:
    raw = bytearray(nbytes)
    file.read_into(offset, memoryview(raw))
    return raw
