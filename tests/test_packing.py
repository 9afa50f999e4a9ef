"""Packing survives what can happen to it: killed at any moment, a full disk, a bad one, the wrong folder."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import random
import signal
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moetier import ConfigError, StoreError
from moetier.access import ExpertKey
from moetier.packing import Checkpoint, datafile, pack
from moetier.packing.draft import Draft
from moetier.packing.verify import verify
from moetier.profile import Profile
from moetier.stores import packed
from moetier.stores.diskio import aligned_buffer
from moetier.stores.packed import PackedStore, cuts
from moetier.stores.packed_index import DRAFT, INDEX, JOURNAL, RESIDENT, Contents, PackedIndex
from packs import mapped, own, sums

Get = Callable[..., Any]
MOMENTS = 12
STEPS = ("pwrite", "fsync", "replace", "ftruncate", "posix_fallocate", "unlink")


@pytest.fixture(scope="module")
def model(checkpoint: Get, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Never write to it."""
    return mapped(own(checkpoint("qwen3_moe"), tmp_path_factory.mktemp("packing") / "model"))


@pytest.fixture(scope="module")
def whole(model: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What an undisturbed pack makes."""
    out = tmp_path_factory.mktemp("packing") / "out"
    pack(model, out)
    return sums(out)


def at_step(patch: pytest.MonkeyPatch, number: int, act: Callable[[], None]) -> Callable[[], int]:
    """Call `act` at the given step of those that change the disk; returns how many there were so far.

    A write is torn: half of it is done first.
    """
    numbers = itertools.count(1)  # drawn by several threads
    last = 0

    def stepping(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def step(*args: Any, **kwargs: Any) -> Any:
            nonlocal last
            last = next(numbers)
            if last == number:
                if name == "pwrite":
                    real(args[0], args[1][: len(args[1]) // 8192 * 4096], args[2])
                act()
            return real(*args, **kwargs)

        return step

    for name in STEPS:
        patch.setattr(os, name, stepping(name))
    append = Draft._append

    def torn(draft: Draft, data: bytes) -> None:
        nonlocal last
        last = next(numbers)
        if last == number:
            append(draft, data[: len(data) // 2])
            act()
        append(draft, data)

    patch.setattr(Draft, "_append", torn)
    return lambda: last


def killed_at(model: Checkpoint, out: Path, number: int) -> bool:
    """Pack in a child process that is killed at that step; whether it was."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # forking with threads about
        child = os.fork()
    if child == 0:  # pragma: no cover
        try:
            with pytest.MonkeyPatch.context() as patch:
                at_step(patch, number, lambda: os.kill(os.getpid(), signal.SIGKILL))
                pack(model, out)
        except BaseException:
            os._exit(3)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.fixture(scope="module")
def steps(model: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> int:
    """How many steps an undisturbed pack has."""
    out = tmp_path_factory.mktemp("packing") / "counted"
    with pytest.MonkeyPatch.context() as patch:
        count = at_step(patch, -1, lambda: None)
        pack(model, out)
        return count()


@pytest.mark.parametrize("seed", range(MOMENTS))
def test_killed_at_any_moment(
    seed: int, steps: int, model: Checkpoint, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice in a row; after each, the folder is a whole store or none, and the third pack ends with the same files."""
    out, draw = tmp_path / "out", random.Random(seed)
    assert steps > 3 * len(model.maps[0].recipes)
    first = 1 + (steps - 1) * seed // (MOMENTS - 1)  # from the first step to the last
    assert killed_at(model, out, first)
    for _ in range(2):
        if (out / INDEX).exists():
            assert list(verify(PackedIndex.load(out))) == []
        else:
            with pytest.raises(StoreError, match=r"packing has not ended there|no such folder|not a packed store"):
                PackedIndex.load(out)
        killed_at(model, out, draw.randint(1, max(1, steps // 2)))
    pack(model, out)
    left = sums(out)
    assert {name: left[name] for name in whole} == whole
    assert set(left) - set(whole) <= {JOURNAL}  # if even the last clearing up was killed


def test_what_is_done_is_not_done_again(model: Checkpoint, steps: int, whole: dict[str, str], tmp_path: Path) -> None:
    assert killed_at(model, tmp_path / "out", steps * 2 // 3)
    seen: list[tuple[int, int]] = []
    result = pack(model, tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    assert 0 < result.resumed_nbytes < seen[-1][1]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen) and seen[-1][0] == seen[-1][1]
    assert sums(tmp_path / "out") == whole


def test_a_journal_that_lies_is_not_believed(
    model: Checkpoint, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a power failure: the journal is on the disk, some of what it names is not; and its end is garbage."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(
            PackedIndex, "save", lambda index: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error"))
        )
        with pytest.raises(StoreError, match="packing stopped: Input/output error; what is done is kept"):
            pack(model, out)
    assert not (out / INDEX).exists() and (out / DRAFT).exists()
    with open(out / "experts-00001.bin", "r+b") as file:
        file.seek(5 * 4096 + 17)
        file.write(b"torn")
    os.truncate(out / "experts-00002.bin", 4096)
    (out / RESIDENT).write_bytes(b"")
    with open(out / JOURNAL, "ab") as file:
        file.write(b"record 0 99 1 1\nrecord 77 0 1 1\nrecord x\n\0\0\0\0record 2 1")
    assert pack(model, out).resumed_nbytes > 0
    assert sums(out) == whole


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, int], None]]:
    """`full(room, error)`: after so many writes of records the disk fails."""
    real = os.pwrite

    def set_room(room: int, error: int) -> None:
        def pwrite(*args: Any) -> int:
            nonlocal room
            room -= 1
            if room < 0:
                raise OSError(error, os.strerror(error))
            return real(*args)

        monkeypatch.setattr(datafile.os, "pwrite", pwrite)

    yield set_room


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO], ids=["full", "failing"])
def test_a_bad_disk(
    error: int,
    full: Callable[[int, int], None],
    model: Checkpoint,
    whole: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    full(7, error)
    with pytest.raises(StoreError, match=rf"experts-0000\d\.bin: packing stopped: {os.strerror(error)}; what is done"):
        pack(model, out)
    assert not (out / INDEX).exists()
    monkeypatch.undo()
    assert pack(model, out).resumed_nbytes > 0
    assert sums(out) == whole


def test_a_disk_that_is_too_small_is_told_at_once(
    model: Checkpoint, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.statvfs

    class Small:
        f_bavail, f_frsize = 3, 4096

    monkeypatch.setattr(os, "statvfs", lambda path: Small())
    with pytest.raises(StoreError, match=r"more are needed \(\d+ bytes\), 12.0 KiB are free on its disk; make room"):
        pack(model, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.bin"))
    monkeypatch.setattr(os, "statvfs", real)
    pack(model, tmp_path / "out")
    assert sums(tmp_path / "out") == whole


def test_one_at_a_time(model: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out" / JOURNAL, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another `moetier pack` is at work there"):
            pack(model, tmp_path / "out")


def test_places_that_cannot_be(model: Checkpoint, tmp_path: Path) -> None:
    before = sums(model.folder)
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "link").symlink_to(model.folder)
    places = {
        model.folder: "inside the model folder",
        model.folder / "store": "inside the model folder",
        tmp_path / "link" / "store": "inside the model folder",
        model.folder.parent: "contains the model folder",
        tmp_path / "file": "a file; give a folder",
        tmp_path / "full": "holds notes.txt and is no packed store",
    }
    for place, message in places.items():
        for again in (False, True):
            with pytest.raises(ConfigError, match=message):
                pack(model, place, again=again)
    assert sums(model.folder) == before
    assert os.listdir(tmp_path / "full") == ["notes.txt"]


def test_a_folder_with_another_store_or_draft(
    model: Checkpoint, whole: dict[str, str], checkpoint: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, other = tmp_path / "out", mapped(checkpoint("mixtral"), "mixtral")
    pack(other, out)
    before = sums(out)
    with pytest.raises(ConfigError, match=r"holds a packed store of another checkpoint .*; give --replace"):
        pack(model, out)
    assert sums(out) == before
    assert pack(other, out).was_there
    index = PackedIndex.load(out)
    (out / "tokenizer.json").write_text("{}")  # as if it belonged to the other model
    replace(index, contents=index.contents | {"tokenizer.json": Contents(2, 0)}).save()
    assert not pack(model, out, again=True).was_there
    assert sums(out) == whole
    with monkeypatch.context() as patch:
        patch.setattr(PackedIndex, "save", lambda index: (_ for _ in ()).throw(OSError(errno.EIO, "bad")))
        with pytest.raises(StoreError):
            pack(other, tmp_path / "draft")
    with pytest.raises(ConfigError, match="holds an unfinished pack of another model"):
        pack(model, tmp_path / "draft")
    pack(model, tmp_path / "draft", again=True)
    assert sums(tmp_path / "draft") == whole


def test_a_checkpoint_that_changes_meanwhile(checkpoint: Get, tmp_path: Path) -> None:
    changing = mapped(own(checkpoint("qwen3_moe"), tmp_path / "model"))

    def change(done: int, total: int) -> None:
        with open(changing.folder / "model.safetensors", "r+b") as file:
            file.seek(-100_000, os.SEEK_END)
            file.write(os.urandom(90_000))

    with pytest.raises(StoreError, match="the checkpoint was changed while it was packed"):
        pack(changing, tmp_path / "out", progress=change)
    assert not (tmp_path / "out" / INDEX).exists()


def test_hot_experts_lie_together(model: Checkpoint, whole: dict[str, str], tmp_path: Path) -> None:
    """In the order of their use, and nothing else is different."""
    uses = np.array([[0, 5, 0, 9, 1, 0, 7, 0]] * 3)
    profile = Profile(3, 8, uses=uses, accesses=np.array([20, 20, 20]))
    index = pack(model, tmp_path / "out", profile=profile).index
    for row in index.records:
        assert [expert for _, expert in sorted((r.offset, e) for e, r in enumerate(row))] == [3, 6, 1, 4, 0, 2, 5, 7]
    plain = pack(model, tmp_path / "plain").index
    assert list(verify(index)) == []
    assert [[r.checksum for r in row] for row in index.records] == [[r.checksum for r in row] for row in plain.records]
    assert sums(tmp_path / "plain") == whole
    assert sums(tmp_path / "out") != whole


def test_records_larger_than_a_request(model: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts cover the record once, begin on pages of the file, and are about even."""
    monkeypatch.setattr(packed, "REQUEST_NBYTES", 8192)
    for nbytes, phase in [(1, 0), (4096, 0), (8192, 0), (8193, 0), (20480, 0), (30000, 8), (8190, 8), (70000, 63)]:
        parts = cuts(nbytes, phase)
        assert parts[0][0] == 0 and parts[-1][1] == nbytes
        assert all(a[1] == b[0] for a, b in itertools.pairwise(parts))
        assert all((begin + phase) % 4096 == 0 for begin, _ in parts[1:])
        assert all(0 < end - begin <= 8192 for begin, end in parts)
        assert len(parts) == -(-(phase + nbytes) // 8192)
    index = pack(model, tmp_path / "out").index
    store = PackedStore(index)
    try:
        key = ExpertKey(0, 5)
        assert store.segments(key) == 2
        into = bytearray(store.layout(0).nbytes)
        for segment in (1, 0):
            store.read(key, segment, memoryview(into))
        raw = (tmp_path / "out" / "experts-00000.bin").read_bytes()
        offset = index.record(key).offset
        assert bytes(into) == raw[offset : offset + len(into)]
    finally:
        store.close()


def test_a_read_is_one_call_without_a_copy(model: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All pages land in the slot: no scratch page in front or behind."""
    store = PackedStore(pack(model, tmp_path / "out").index)
    real, calls = os.preadv, []

    def preadv(fd: int, parts: list[memoryview], offset: int) -> int:
        calls.append([len(part) for part in parts])
        return real(fd, parts, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    try:
        if not store.direct:
            pytest.skip("no direct I/O here")
        slot = aligned_buffer(store.slot_nbytes)
        store.read(ExpertKey(2, 4), 0, slot[: store.layout(2).nbytes])
        assert calls == [[store.slot_nbytes]]
    finally:
        store.close()
