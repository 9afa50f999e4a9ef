"""`Shards`: what it finds agrees with the safetensors library, and every damage gets its own refusal."""

from __future__ import annotations

import errno
import json
import os
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from moetier.errors import CheckpointError
from moetier.stores.diskio import DiskFile
from moetier.stores.shards import _BITS, Shards

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = [np.uint8, np.int16, np.float16, np.float32, np.float64, np.bool_]


def pack(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def field(begin: Any, end: Any, shape: Any = None, dtype: Any = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def one(**changes: Any) -> bytes:
    return pack({"w": field(0, 4) | changes}, b"abcd")


GOOD = one()


def sharded(folder: Path, weight_map: object = None, **shards: bytes) -> None:
    """A folder with shards `<key>.safetensors` and an index; by default two shards holding v and w."""
    shards = shards or {"a": pack({"v": field(0, 2)}, b"xy"), "b": GOOD}
    for name, content in shards.items():
        (folder / f"{name}.safetensors").write_bytes(content)
    weight_map = {"v": "a.safetensors", "w": "b.safetensors"} if weight_map is None else weight_map
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def refused(folder: Path, words: str) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        Shards.open(folder)
    assert words in str(caught.value)
    assert str(folder) in str(caught.value)
    return caught.value


HEADERS: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "truncated: 0 bytes"),
    "seven bytes": (GOOD[:7], "truncated: 7 bytes"),
    "cut in header": (GOOD[:20], "truncated: its header is"),
    "cut in data": (GOOD[:-1], "truncated: its tensors end at"),
    "header bomb": (struct.pack("<Q", 2**62) + b"{}", "over the format's limit"),
    "header bomb within the limit": (struct.pack("<Q", 99_000_000) + b"{}", "header is 99000000 bytes long"),
    "not JSON": (pack(b"PK\x03\x04 no"), "the header is not JSON"),
    "NUL after JSON": (pack(b"{}\0"), "the header is not JSON"),
    "not UTF-8": (pack(b'{"\xff": 1}'), "the header is not JSON"),
    "deep JSON": (pack(b"[" * 100_000), "the header is not JSON"),
    "NaN": (one(shape=[float("nan")]), "has the shape [nan]"),
    "huge number": (pack(b'{"w": ' + b"9" * 5000 + b"}"), "the header is not JSON"),
    "a list": (pack([1, 2]), "not a JSON object"),
    "entry is a list": (pack({"w": [1]}), "not by an object"),
    "no dtype": (pack({"w": {"shape": [4], "data_offsets": [0, 4]}}, b"abcd"), "has the dtype None"),
    "dtype unknown": (one(dtype="F128"), "has the dtype 'F128'"),
    "no shape": (one(shape=None), "has the shape None"),
    "shape a string": (one(shape="4"), "has the shape '4'"),
    "negative dim": (one(shape=[-4]), "has the shape [-4]"),
    "bool dim": (one(shape=[4, True]), "has the shape [4, True]"),
    "float dim": (one(shape=[4.0]), "has the shape [4.0]"),
    "dim over 2**63": (one(shape=[0, 2**64]), "has the shape"),
    "overflow": (one(shape=[2**62, 4, 0]), "is too large"),
    "three offsets": (one(data_offsets=[0, 2, 4]), "has data_offsets"),
    "negative offset": (one(data_offsets=[-4, 0]), "has data_offsets"),
    "begin after end": (one(data_offsets=[4, 0]), "after its end at 0"),
    "size disagrees": (one(shape=[5]), "has 4 bytes, but shape [5] of U8 needs 5"),
    "size of dtype disagrees": (one(dtype="F32"), "needs 16"),
    "half a byte": (pack({"w": field(0, 2, [3], "F4")}, b"ab"), "does not fill whole bytes"),
    "out of range": (pack({"w": field(96, 100)}, b"abcd"), "leaves a gap before it"),
    "gap": (pack({"v": field(0, 2), "w": field(4, 6)}, b"abcdef"), "'w' leaves a gap before it"),
    "overlap": (pack({"v": field(0, 4), "w": field(2, 6)}, b"abcdef"), "overlaps the tensor before it"),
    "same bytes": (pack({"v": field(0, 4), "w": field(0, 4)}, b"abcd"), "overlaps the tensor before it"),
    "bytes left over": (GOOD + b"!", "1 bytes follow the last tensor"),
    "metadata of numbers": (pack({"__metadata__": {"a": 1}}), "`__metadata__`"),
    "duplicate tensor": (pack(b'{"w": 1, "v": 2, "w": 3}'), "has the key 'w' twice"),
    "duplicate field": (pack(b'{"w": {"dtype": "U8", "dtype": "U8"}}'), "has the key 'dtype' twice"),
    "lone surrogate": (pack(b'{"\\ud800": {"dtype": "U8"}}'), "not valid text"),
}
STRICTER = {"duplicate tensor"}  # the library keeps the last one


@pytest.mark.parametrize("damage", HEADERS)
def test_damaged_header(tmp_path: Path, damage: str) -> None:
    content, words = HEADERS[damage]
    (tmp_path / SINGLE).write_bytes(content)
    refused(tmp_path, words)
    if damage not in STRICTER:
        with pytest.raises(SafetensorError), safe_open(tmp_path / SINGLE, "np"):
            pass


def _outside(folder: Path) -> Path:
    path = folder.parent / "outside.safetensors"
    path.write_bytes(GOOD)
    return path


def _symlink_out(folder: Path) -> None:
    sharded(folder, {"w": "b.safetensors"})
    (folder / "b.safetensors").unlink()
    (folder / "b.safetensors").symlink_to(_outside(folder))


def _replaced(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        sharded(folder)
        (folder / "b.safetensors").unlink()
        make(folder / "b.safetensors")

    return damage


SWAPPED = {"w": "a.safetensors", "v": "b.safetensors"}
FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda f: None, f"looked for {SINGLE} and {INDEX}: download"),
    "a pickle only": (lambda f: (f / "pytorch_model.bin").write_bytes(b"."), "never loaded"),
    "shards without index": (lambda f: (f / "a.safetensors").write_bytes(GOOD), "without the index"),
    "shard missing": (_replaced(lambda p: None), "b.safetensors: cannot be opened: No such file"),
    "shard a folder": (_replaced(lambda p: p.mkdir()), "not a regular file"),
    "shard a FIFO": (_replaced(os.mkfifo), "not a regular file"),
    "shard a link to itself": (_replaced(lambda p: p.symlink_to(p)), "symbolic links"),
    "shard truncated": (_replaced(lambda p: p.write_bytes(GOOD[:-1])), "b.safetensors: truncated"),
    "index not JSON": (lambda f: (f / INDEX).write_text("{"), "the index is not JSON"),
    "index a list": (lambda f: (f / INDEX).write_text("[]"), "not a JSON object"),
    "index without map": (lambda f: (f / INDEX).write_text("{}"), "has no `weight_map`"),
    "map empty": (lambda f: sharded(f, {}), "has no `weight_map`"),
    "map a list": (lambda f: sharded(f, ["w"]), "has no `weight_map`"),
    "map to numbers": (lambda f: sharded(f, {"w": 1}), "names 1 for the tensor 'w'"),
    "map to a pickle": (lambda f: sharded(f, {"w": "pytorch_model.bin"}), "only .safetensors files are read"),
    "map to a NUL": (lambda f: sharded(f, {"w": "\0.safetensors"}), "only .safetensors files are read"),
    "map twice": (lambda f: (f / INDEX).write_text('{"w": "a", "w": "b"}'), "the index has the key 'w' twice"),
    "path up": (lambda f: sharded(f, {"w": f"../{_outside(f).name}"}), "outside of its folder"),
    "path absolute": (lambda f: sharded(f, {"w": str(_outside(f))}), "outside of its folder"),
    "link out of the folder": (_symlink_out, "a link that leads out of the folder"),
    "tensor in no shard": (lambda f: sharded(f, {"u": "b.safetensors"}), "no shard holds it"),
    "tensor in another shard": (lambda f: sharded(f, SWAPPED), "but b.safetensors holds it"),
    "tensor in two shards": (lambda f: sharded(f, SWAPPED, a=GOOD, b=GOOD), "holds the tensor 'w', and so does"),
}


@pytest.mark.parametrize("damage", FOLDERS)
def test_damaged_folder(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    make, words = FOLDERS[damage]
    make(folder)
    refused(folder, words)


def test_folder_itself(tmp_path: Path) -> None:
    refused(tmp_path / "absent", "No such file")
    (tmp_path / SINGLE).write_bytes(GOOD)
    refused(tmp_path / SINGLE, "Not a directory")


@pytest.mark.parametrize("call", ["open", "preadv"])
@pytest.mark.parametrize(("code", "words"), [(errno.EACCES, "make it readable"), (errno.EIO, "check the disk")])
def test_system_call_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int, words: str) -> None:
    def fail(*arguments: object) -> int:
        raise OSError(code, os.strerror(code))

    (tmp_path / SINGLE).write_bytes(GOOD)
    monkeypatch.setattr(os, call, fail)
    assert os.strerror(code) in str(refused(tmp_path, words))


def test_accepts(tmp_path: Path) -> None:
    """Tensors the index does not name, empty ones, scalars, any order, unknown fields, every dtype of the library."""
    header: dict[str, Any] = {"z": field(4, 5, []), "e": field(4, 4, [3, 0]), "w": field(0, 4) | {"more": 1}}
    header["__metadata__"] = None
    sharded(tmp_path, {"w": "b.safetensors"}, b=pack(header, b"abcde"))
    shards = Shards.open(tmp_path)
    assert shards.files == (tmp_path / "b.safetensors",)
    assert [entry.nbytes for entry in shards.tensors.values()] == [4, 0, 1]
    assert shards.tensors["z"].shape == ()

    (tmp_path / SINGLE).write_bytes(GOOD)  # wins over the index, as in transformers
    assert Shards.open(tmp_path).files == (tmp_path / SINGLE,)

    end, fields = 0, {}
    for dtype, bits in _BITS.items():
        fields[dtype] = field(end, end + bits, [8], dtype)
        end += bits
    (tmp_path / SINGLE).write_bytes(pack(fields, bytes(end)))
    with safe_open(tmp_path / SINGLE, "np") as library:
        assert set(library.keys()) == set(Shards.open(tmp_path).tensors)


@pytest.mark.parametrize("within", ["", "text"])
def test_hub_cache(tmp_path: Path, within: str) -> None:
    repository = tmp_path / "hub" / "models--org--name"
    folder = repository / "snapshots" / "0123abc" / within
    blobs = repository / "blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    sharded(folder)
    for path in list(folder.iterdir()):
        path.rename(blobs / path.name.replace(".", ""))
        path.symlink_to(os.path.relpath(blobs / path.name.replace(".", ""), folder))
    assert set(Shards.open(folder).tensors) == {"v", "w"}
    (tmp_path / "short").symlink_to(folder)
    assert set(Shards.open(tmp_path / "short").tensors) == {"v", "w"}
    assert set(Shards.from_files(sorted(folder.glob("*.safetensors"))).tensors) == {"v", "w"}

    (blobs / "bsafetensors").unlink()
    refused(folder, "it is part of the checkpoint: download it")
    other = tmp_path / "hub" / "models--org--other" / "blobs"
    other.mkdir(parents=True)
    (other / "b").write_bytes(GOOD)
    (folder / "b.safetensors").unlink()
    (folder / "b.safetensors").symlink_to(other / "b")
    refused(folder, "leads out of the folder")


arrays = st.builds(
    lambda dtype, shape, seed: np.random.default_rng(seed).integers(0, 2, shape).astype(dtype),
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 5), max_size=3),
    st.integers(0, 99),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.dictionaries(st.text(max_size=8), arrays, max_size=4), min_size=1, max_size=3))
def test_round_trip(parts: list[dict[str, np.ndarray]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weight_map: dict[str, str] = {"0": "0.safetensors"}
        for number, part in enumerate(parts):
            tensors = {f"{number}{key}": value for key, value in part.items()}
            if number == 0:
                tensors["0"] = np.arange(3.0)
            save_file(tensors, folder / f"{number}.safetensors", metadata={"format": "np"})
            weight_map |= dict.fromkeys(tensors, f"{number}.safetensors")
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        shards = Shards.open(folder)
        assert set(shards.tensors) == set(weight_map)
        for number, path in enumerate(shards.files):
            with DiskFile(path) as file:
                for key, expected in load_file(path).items():
                    entry = shards.tensors[key]
                    got = np.empty(expected.shape, expected.dtype)
                    assert (entry.file, entry.shape, entry.nbytes) == (number, expected.shape, expected.nbytes)
                    if entry.nbytes:
                        file.read_into(entry.offset, memoryview(got.reshape(-1)).cast("B"))
                    np.testing.assert_array_equal(got, expected)


BASE = pack({"v": field(0, 2), "w": field(2, 6, [1, 4], "I8"), "__metadata__": {"a": "b"}}, b"abcdef")
PLACES = st.integers(0, len(BASE) - 1)
BYTES = st.sampled_from(b'0123456789 -.eE"{}[],:\\UI\0')


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(PLACES, BYTES), max_size=3))
def test_agrees_with_the_library(changes: list[tuple[int, int]]) -> None:
    """Whatever the library refuses is refused. What only we refuse names a duplicate."""
    content = bytearray(BASE)
    for place, byte in changes:
        content[place] = byte
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / SINGLE
        path.write_bytes(content)
        try:
            with safe_open(path, "np") as library:
                keys = {key: library.get_slice(key).get_shape() for key in library.keys()}  # noqa: SIM118
        except SafetensorError:
            with pytest.raises(CheckpointError):
                Shards.open(path.parent)
            return
        try:
            shards = Shards.open(path.parent)
        except CheckpointError as error:
            assert "twice" in str(error)
            return
        assert {key: list(entry.shape) for key, entry in shards.tensors.items()} == keys
