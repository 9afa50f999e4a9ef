"""A file of page-aligned extents: which of its bytes are free, and how whole pages get into the others.

Knows offsets, holds and system calls; knows no records, checksums or manifests. An extent belongs to whoever holds it;
when the last hold is released its pages are free, and the next one to ask may get them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from bisect import bisect_right, insort
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from moetier.errors import StoreError
from moetier.record import PAGE, round_up
from moetier.stores.checkpoint import IOMode
from moetier.stores.diskio import DiskFile, aligned_buffer

_SCRATCH = 1 << 20
_GROWTH = 256 << 20  # a file grows by an eighth of its size, and by this much at most
_REFUSED = (errno.EINVAL, errno.EOPNOTSUPP)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class FreeSpace:
    """Which bytes of a file nobody uses: gaps below `end`, and everything from there on. Decides, and does no I/O."""

    def __init__(self, used: Iterable[tuple[int, int]] = ()):
        """`used` are (offset, bytes) that do not overlap (else ValueError)."""
        self.end = 0
        self._gaps: list[tuple[int, int]] = []  # (begin, end), ascending; no two touch, and none touches `self.end`
        for offset, nbytes in sorted(used):
            if offset < self.end:
                raise ValueError(f"the bytes from {offset} on are used twice")
            if offset > self.end:
                self._gaps.append((self.end, offset))
            self.end = offset + nbytes

    def take(self, nbytes: int) -> int:
        """The lowest offset where so many bytes are free; they are used from now on."""
        for number, (begin, end) in enumerate(self._gaps):
            if end - begin >= nbytes:
                self._gaps[number : number + 1] = [(begin + nbytes, end)] if end - begin > nbytes else []
                return begin
        offset = self.end
        self.end += nbytes
        return offset

    def give(self, offset: int, nbytes: int) -> None:
        """These bytes are free again."""
        begin, end = offset, offset + nbytes
        place = bisect_right(self._gaps, (begin, end))
        if place < len(self._gaps) and self._gaps[place][0] == end:
            end = self._gaps.pop(place)[1]
        if place and self._gaps[place - 1][1] == begin:
            begin = self._gaps.pop(place - 1)[0]
        if end == self.end:
            self.end = begin
        else:
            insort(self._gaps, (begin, end))

    @property
    def nbytes(self) -> int:
        """Bytes in gaps."""
        return sum(end - begin for begin, end in self._gaps)


class _Scratch(threading.local):
    """Each thread's own aligned memory, for ragged ends and for data that lie anywhere."""

    def __init__(self) -> None:
        pages = aligned_buffer(2 * PAGE)
        self.head, self.tail = pages[:PAGE], pages[PAGE:]
        self.block = aligned_buffer(_SCRATCH)


_scratch = _Scratch()


class ExtentFile:
    """A file that grows by extents. Reads and writes may come from many threads at once.

    Direct I/O is used where the file system allows it (`io` as for `DiskFile`). With `write` the file is made if it
    does not exist. All of it is free at first: see `claim`. Raises `StoreError` naming the file, for a full disk too; a
    write that fails leaves the file usable.
    """

    def __init__(self, path: Path, io: IOMode = "auto", write: bool = True):
        self.path = path
        self._fds: list[int] = []
        self._lock = threading.Lock()
        self._space = FreeSpace()
        self._extents: dict[int, list[int]] = {}  # offset -> bytes, holds
        self._unsynced = self._direct = False
        try:
            if write:
                self._fds.append(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666))
        except OSError as error:
            raise _failed(path, "cannot be opened for writing", error) from error
        try:
            self._file = DiskFile(path, io)
            if write and self._file.direct:
                self._fds.append(os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_DIRECT))
                self._direct = True
        except BaseException as error:
            self._close_fds()
            if isinstance(error, OSError) and not isinstance(error, StoreError):
                raise _failed(path, "cannot be opened for writing", error) from error
            raise
        self._size = self._file.size

    @property
    def direct(self) -> bool:
        """Whether reads bypass the page cache."""
        return self._file.direct

    @property
    def size(self) -> int:
        """Bytes that the file takes up: those in use, and those that are free for the next records."""
        return self._size

    @property
    def used(self) -> int:
        """Bytes in extents that somebody holds."""
        with self._lock:
            return self._space.end - self._space.nbytes

    def claim(self, used: Iterable[tuple[int, int]]) -> None:
        """Begin with these (offset, bytes) in use, each held once per mention, and all others free.

        Raises ValueError where they overlap.
        """
        extents: dict[int, list[int]] = {}
        for offset, nbytes in used:
            extent = extents.setdefault(offset, [nbytes, 0])
            if extent[0] != nbytes:
                raise ValueError(f"the bytes from {offset} on are used twice")
            extent[1] += 1
        self._space = FreeSpace((offset, nbytes) for offset, (nbytes, _) in extents.items())
        self._extents = extents

    def allocate(self, nbytes: int) -> int:
        """The offset of whole pages for so many bytes, held once. Raises `StoreError` when the disk is full."""
        nbytes = round_up(nbytes, PAGE)
        with self._lock:
            offset = self._space.take(nbytes)
            if offset + nbytes > self._size:
                try:
                    self._grow(offset + nbytes)
                except OSError as error:
                    self._space.give(offset, nbytes)
                    with contextlib.suppress(OSError):
                        os.ftruncate(self._fd(), self._size)  # what the disk had set aside already
                    raise _failed(self.path, f"growing it to {offset + nbytes} bytes failed", error) from error
            self._extents[offset] = [nbytes, 1]
            return offset

    def _grow(self, needed: int) -> None:
        """Have the disk set bytes aside: a full disk is found out here, and neighbours lie side by side."""
        for size in (max(needed, self._size + min(self._size // 8 // PAGE * PAGE, _GROWTH)), needed):
            try:
                os.posix_fallocate(self._fd(), self._size, size - self._size)
            except OSError as error:
                if error.errno in FULL and size > needed:
                    continue
                if error.errno not in _REFUSED:
                    raise
                os.ftruncate(self._fd(), size)
            self._size = size
            return

    def hold(self, offset: int) -> None:
        """Keep the bytes of the extent there as they are until one more `release`."""
        with self._lock:
            self._extents[offset][1] += 1

    def release(self, offset: int) -> None:
        """Give up one hold; with the last one the bytes are free."""
        with self._lock:
            extent = self._extents[offset]
            extent[1] -= 1
            if not extent[1]:
                del self._extents[offset]
                self._space.give(offset, extent[0])

    def read_into(self, offset: int, into: memoryview) -> None:
        """Fill `into` with the file's bytes from `offset` on; see `DiskFile.read_into`."""
        self._file.read_into(offset, into)

    def write(self, offset: int, lead: int, data: memoryview) -> None:
        """Write whole pages from `offset` (a multiple of a page) on: `lead` zeros (< a page), `data`, zeros.

        Data that begin `lead` bytes behind a page in memory go to the disk as they are; others are copied first.
        """
        bytes_ = np.frombuffer(data, np.uint8)
        try:
            if bytes_.ctypes.data % PAGE == lead and lead + len(data) >= PAGE:
                self._put(offset, _pages(lead, data))
                return
            total = round_up(lead + len(data), PAGE)
            for done in range(0, total, _SCRATCH):
                size = min(total - done, _SCRATCH)
                block = np.frombuffer(_scratch.block, np.uint8, size)
                begin, end = max(0, done - lead), min(len(data), done + size - lead)
                before = lead + begin - done
                block[:before] = 0
                np.copyto(block[before : before + end - begin], bytes_[begin:end])
                block[before + end - begin :] = 0
                self._put(offset + done, [_scratch.block[:size]])
        except OSError as error:
            raise _failed(self.path, f"writing {len(data)} bytes at offset {offset} failed", error) from error
        finally:
            self._unsynced = True  # behind the bytes: a `sync` that began meanwhile may have missed them

    def _put(self, offset: int, parts: list[memoryview]) -> None:
        while parts:
            try:
                done = os.pwritev(self._fd(self._direct), parts, offset)
            except InterruptedError:
                continue
            except OSError as error:
                if error.errno not in _REFUSED or not self._direct or self._file.mode == "direct":
                    raise
                self._direct = False  # the file system refuses direct writes after all
                continue
            if done == 0:
                raise OSError(errno.EIO, "the disk takes no more bytes")
            offset += done
            parts = _behind(parts, done)

    def _fd(self, number: int = 0) -> int:
        if not self._fds:
            raise OSError(errno.EBADF, "the file is closed")
        return self._fds[number]

    def sync(self) -> None:
        """Everything written survives a power failure when this returns."""
        if not self._unsynced:
            return
        self._unsynced = False  # before: a write that ends meanwhile sets it again
        try:
            os.fdatasync(self._fd())
        except OSError as error:
            self._unsynced = True
            raise _failed(self.path, "its bytes could not be brought to the disk", error) from error

    def trim(self) -> None:
        """Give the disk back what is free at the end."""
        with self._lock:
            if self._fds and self._space.end < self._size:
                try:
                    os.ftruncate(self._fds[0], self._space.end)
                except OSError as error:
                    raise _failed(self.path, f"cutting it to {self._space.end} bytes failed", error) from error
                self._size = self._space.end

    def close(self) -> None:
        """Close the file; again is harmless. No read or write may be under way in another thread."""
        self._close_fds()
        self._file.close()

    def _close_fds(self) -> None:
        while self._fds:
            os.close(self._fds.pop())


def _pages(lead: int, data: memoryview) -> list[memoryview]:
    """The same bytes as whole, aligned pages: ragged ends in scratch pages, the interior where it is."""
    first = -lead % PAGE
    last = (len(data) - first) % PAGE
    parts = [data[first : len(data) - last]]
    if lead:
        _scratch.head[:lead] = bytes(lead)
        _scratch.head[lead:] = data[:first]
        parts.insert(0, _scratch.head)
    if last:
        _scratch.tail[:last] = data[len(data) - last :]
        _scratch.tail[last:] = bytes(PAGE - last)
        parts.append(_scratch.tail)
    return [part for part in parts if len(part)]


def _behind(parts: list[memoryview], done: int) -> list[memoryview]:
    """What is left after the first `done` bytes."""
    for number, part in enumerate(parts):
        if done < len(part):
            return [part[done:], *parts[number + 1 :]]
        done -= len(part)
    return []


def _failed(path: Path, what: str, error: OSError) -> StoreError:
    cause = "the file is closed" if error.errno == errno.EBADF else error.strerror or str(error)
    hint = "; make room on its disk" if error.errno in FULL else ""
    failure = StoreError(f"{path}: {what}: {cause}{hint}")
    failure.errno = error.errno
    return failure
