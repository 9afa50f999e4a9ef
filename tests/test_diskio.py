"""`DiskFile.read_into`: exact at every offset, length and address, or a `StoreError` that says what happened."""

from __future__ import annotations

import ctypes
import errno
import os
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moetier.errors import ConfigError, StoreError
from moetier.stores import diskio
from moetier.stores.diskio import ALIGNMENT, DiskFile, aligned_buffer

SIZE = 3 * (1 << 20) + 1234
CONTENT = random.Random(0).randbytes(SIZE)
Preadv = Callable[[int, list[memoryview], int], int]
real_preadv: Preadv = os.preadv


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("diskio") / "data"
    path.write_bytes(CONTENT)
    return path


def opened(path: Path, mode: Any) -> DiskFile:
    try:
        file = DiskFile(path, mode)
        file.read_into(0, aligned_buffer(1))
    except StoreError as error:
        assert mode == "direct" and "O_DIRECT" in str(error)
        pytest.skip("this file system refuses O_DIRECT")
    return file


both = pytest.mark.parametrize("mode", ["direct", "buffered"])


def check(file: DiskFile, offset: int, length: int, phase: int) -> None:
    """Read with a destination at address `phase` modulo the page; nothing around it may change."""
    buffer = aligned_buffer(phase + length + 64)
    buffer[:] = b"\xaa" * len(buffer)
    file.read_into(offset, buffer[phase : phase + length])
    assert buffer[phase : phase + length] == CONTENT[offset : offset + length]
    assert bytes(buffer[:phase]) == b"\xaa" * phase
    assert bytes(buffer[phase + length :]) == b"\xaa" * 64


near = st.builds(lambda page, step: max(page * ALIGNMENT + step, 0), st.integers(0, 600), st.integers(-2, 2))
offsets = st.one_of(st.integers(0, SIZE), near, st.just(SIZE))
lengths = st.one_of(st.integers(0, 3 * ALIGNMENT), near, st.integers(0, SIZE))
phases = st.one_of(st.none(), st.integers(0, ALIGNMENT - 1))


@both
@settings(max_examples=200, deadline=None)
@given(offset=offsets, length=lengths, phase=phases)
@example(offset=0, length=SIZE, phase=None)
@example(offset=0, length=SIZE, phase=1)
@example(offset=5, length=SIZE - 5, phase=None)
@example(offset=SIZE - 1, length=1, phase=0)
@example(offset=ALIGNMENT - 1, length=1, phase=None)
@example(offset=ALIGNMENT - 1, length=2, phase=None)
@example(offset=1, length=ALIGNMENT - 1, phase=None)
@example(offset=0, length=ALIGNMENT, phase=None)
def test_exact_anywhere(path: Path, mode: str, offset: int, length: int, phase: int | None) -> None:
    """`phase` None: destination and offset have the same remainder, so that nothing need be copied."""
    length = min(length, SIZE - offset)
    with opened(path, mode) as file:
        check(file, offset, length, offset % ALIGNMENT if phase is None else phase)


@both
@pytest.mark.parametrize("same", [True, False])
def test_short_and_interrupted_reads(path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, same: bool) -> None:
    """The disk gives few bytes at a time and signals interrupt: the caller does not notice."""
    rng = random.Random(1)

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        if rng.random() < 0.3:
            raise InterruptedError(errno.EINTR, "Interrupted system call")
        got = real_preadv(fd, buffers, offset)
        short = min(got, rng.choice([1, 511, 512, 4096, 5000, 70_000]))
        done = 0
        for buffer in buffers:  # what did not arrive is not to be relied on
            start = max(short - done, 0)
            done += len(buffer)
            if start < len(buffer):
                buffer[start:] = b"\x55" * (len(buffer) - start)
        return short

    with opened(path, mode) as file:
        monkeypatch.setattr(os, "preadv", preadv)
        for _ in range(30):
            offset = rng.randrange(SIZE)
            length = min(rng.randrange(200_000), SIZE - offset)
            check(file, offset, length, (offset + (not same) * 7) % ALIGNMENT)


@both
def test_disk_error_leaves_the_file_usable(path: Path, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    def fail(fd: int, buffers: list[memoryview], offset: int) -> int:
        if offset >= 2 << 20:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real_preadv(fd, buffers, offset)

    with opened(path, mode) as file:
        direct = file.direct
        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(StoreError, match=r"offset 2097200 .*Input/output error") as caught:
            file.read_into((2 << 20) + 48, aligned_buffer(100))
        assert str(path) in str(caught.value)
        monkeypatch.undo()
        check(file, (2 << 20) + 48, 100, 48)
        assert file.direct == direct


@both
@pytest.mark.parametrize("size", [0, 100, 4096, 5000])
@pytest.mark.parametrize("phase", [0, 50])
def test_truncated_after_opening(tmp_path: Path, mode: str, size: int, phase: int) -> None:
    path = tmp_path / "data"
    path.write_bytes(CONTENT[:10_000])
    with opened(path, mode) as file:
        os.truncate(path, size)
        for offset in (50, 4000, 4146, 9000):
            with pytest.raises(StoreError, match=rf"ends at byte .*{file.size} when opened"):
                file.read_into(offset, aligned_buffer(8192)[phase : phase + 10_000 - offset])
        check(file, 0, size, phase)


@both
def test_end_of_file(path: Path, mode: str) -> None:
    with opened(path, mode) as file:
        assert file.size == SIZE
        for offset in (SIZE - 5, SIZE, SIZE + 10_000, 2**62):
            for phase in (0, offset % ALIGNMENT):
                with pytest.raises(StoreError, match=r"ends at byte|Invalid argument|too large"):
                    file.read_into(offset, aligned_buffer(2 * ALIGNMENT)[phase : phase + 20])
        check(file, SIZE - 5, 5, 0)


@both
def test_many_threads(path: Path, mode: str) -> None:
    barrier = threading.Barrier(8)

    def work(seed: int) -> None:
        rng = random.Random(seed)
        barrier.wait()
        for _ in range(25):
            offset = rng.randrange(SIZE)
            check(file, offset, min(rng.randrange(300_000), SIZE - offset), rng.choice([0, offset % ALIGNMENT]))

    with opened(path, mode) as file, ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))


def refuse_direct_reads(monkeypatch: pytest.MonkeyPatch, file: DiskFile) -> list[int]:
    calls = []
    refusing = file._direct_fd

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        if fd == refusing:
            calls.append(offset)
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    return calls


def test_direct_refused_while_reading(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(path, "direct").close()
    with DiskFile(path) as file:
        assert file.direct
        calls = refuse_direct_reads(monkeypatch, file)
        check(file, 10, 50_000, 10)
        check(file, 10, 50_000, 0)
        assert not file.direct
        assert len(calls) == 1
    monkeypatch.undo()
    with DiskFile(path, "direct") as file:
        refuse_direct_reads(monkeypatch, file)
        with pytest.raises(StoreError, match="data: its file system refuses direct I/O"):
            file.read_into(0, aligned_buffer(10))


def test_direct_refused_at_opening(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_open = os.open

    def refuse(name: Path, flags: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_open(name, flags)

    monkeypatch.setattr(os, "open", refuse)
    with DiskFile(path) as file:
        assert not file.direct
        check(file, 10, 50_000, 3)
    with pytest.raises(StoreError, match="data: its file system refuses direct I/O"):
        DiskFile(path, "direct")


def test_cannot_open(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(StoreError, match="absent: cannot be opened: No such file"):
        DiskFile(tmp_path / "absent")
    with pytest.raises(StoreError, match="not a regular file"):
        DiskFile(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(StoreError, match="not a regular file"):
        DiskFile(tmp_path / "fifo")
    with pytest.raises(ConfigError, match="use auto, direct or buffered"):
        DiskFile(tmp_path / "absent", "fast")  # type: ignore[arg-type]
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_closed(path: Path) -> None:
    with DiskFile(path) as file:
        pass
    file.close()
    with pytest.raises(StoreError, match="the file is closed"):
        file.read_into(0, aligned_buffer(10))


def test_unusable_destinations(path: Path) -> None:
    words = memoryview((ctypes.c_uint32 * 4)())
    with DiskFile(path) as file:
        for into in (memoryview(b"1234"), memoryview(bytearray(8))[::2], words, words.cast("B", (4, 4))):
            with pytest.raises(ValueError, match="writable, contiguous"):
                file.read_into(0, into)
        with pytest.raises(ValueError, match="no offset -1"):
            file.read_into(-1, aligned_buffer(1))


def test_aligned_buffer() -> None:
    for nbytes in (0, 1, 4096, 10_000):
        buffer = aligned_buffer(nbytes)
        assert bytes(buffer) == bytes(nbytes)
        assert buffer.format == "B" and not buffer.readonly
        if nbytes:
            assert ctypes.addressof(ctypes.c_char.from_buffer(buffer)) % ALIGNMENT == 0
    with pytest.raises(ValueError, match="-1 bytes"):
        aligned_buffer(-1)
    assert diskio._SCRATCH % ALIGNMENT == 0
