"""Byte ranges of one file, read as fast as the disk gives them. Knows nothing of tensors, records or checkpoints.

Guarantees:
- `DiskFile.read_into` fills its destination exactly or raises `StoreError`; a failed read leaves the file usable;
- any offset, length and destination address is accepted, with direct I/O too;
- reads of one file may run in many threads at once; the GIL is released while bytes move.

With direct I/O the kernel wants file offset, length and address in multiples of `ALIGNMENT`. Where destination and
offset have the same remainder, one vectored read puts the aligned interior straight into the destination and the two
ragged ends into scratch pages. Otherwise the bytes go through a scratch block and are copied, at about the cost of
one pass over memory: lay out destinations so that the remainders agree (`aligned_buffer` helps).
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import stat
import threading
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np

from moetier.errors import ConfigError, StoreError

ALIGNMENT = 4096
"""Bytes. Direct reads start and end at multiples of this, in the file and in memory."""

_SCRATCH = 1 << 20
_REFUSED = (errno.EINVAL, errno.EOPNOTSUPP)


def aligned_buffer(nbytes: int) -> memoryview:
    """A zeroed, writable, page-aligned buffer of `nbytes` bytes, freed when its last view goes.

    Raises ValueError for a negative size, OSError where memory is short.
    """
    if nbytes < 0:
        raise ValueError(f"a buffer of {nbytes} bytes cannot be made")
    if nbytes == 0:
        return memoryview(bytearray())
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return memoryview(pages)[:nbytes]


class _Scratch(threading.local):
    """Each thread's own aligned memory: one page per ragged end, one block for reads that must be copied."""

    def __init__(self) -> None:
        pages = aligned_buffer(2 * ALIGNMENT)
        self.head, self.tail = pages[:ALIGNMENT], pages[ALIGNMENT:]
        self.block = aligned_buffer(_SCRATCH)


_scratch = _Scratch()


class DiskFile:
    """One open file, read with direct I/O where the file system allows it and buffered where it does not.

    `mode` "auto" falls back to buffered reads, for good, the first time the file system refuses a direct one;
    "direct" raises instead; "buffered" never tries. `direct` tells which is in use, `size` is in bytes, at opening.

    Raises `StoreError` where the file cannot be opened or is not a regular file, `ConfigError` for an unknown mode.
    """

    def __init__(self, path: Path, mode: Literal["auto", "direct", "buffered"] = "auto"):
        if mode not in ("auto", "direct", "buffered"):
            raise ConfigError(f"unknown read mode {mode!r}: use auto, direct or buffered")
        self.path, self.mode = path, mode
        self.direct = False
        self._buffered_fd = self._direct_fd = -1
        try:
            self._buffered_fd = _open(path, 0)
            found = os.fstat(self._buffered_fd)
            if not stat.S_ISREG(found.st_mode):
                raise StoreError(f"{path}: not a regular file; only regular files can be read")
            self.size = found.st_size
            if mode != "buffered":
                self._open_direct(found)
        except BaseException:
            self.close()
            raise

    def _open_direct(self, buffered: os.stat_result) -> None:
        try:
            self._direct_fd = _open(self.path, os.O_DIRECT)
        except StoreError as error:
            cause = error.__cause__
            if not isinstance(cause, OSError) or cause.errno not in _REFUSED:
                raise
            if self.mode == "direct":
                raise _no_direct(self.path) from error
            return
        if not os.path.samestat(buffered, os.fstat(self._direct_fd)):
            raise StoreError(f"{self.path}: replaced while it was being opened; open it again")
        self.direct = True

    def read_into(self, offset: int, into: memoryview) -> None:
        """Fill `into` with the bytes of the file from `offset` (bytes) on.

        `into` must be a writable, contiguous, one-dimensional view of format "B" (else ValueError, as for a negative
        offset). Raises `StoreError` when the file ends too early, the disk reports an error, or the file is closed;
        `into` then holds unspecified bytes.
        """
        if into.readonly or into.ndim != 1 or into.format != "B" or not into.c_contiguous:
            raise ValueError("`into` must be a writable, contiguous, one-dimensional memoryview of bytes")
        if offset < 0:
            raise ValueError(f"a file has no offset {offset}")
        total = len(into)
        done = 0
        while done < total:
            rest = into[done:] if done else into
            try:
                done += self._read_some(offset + done, rest)
            except InterruptedError:
                continue
            except StoreError:
                raise
            except OSError as error:
                raise StoreError(
                    f"{self.path}: reading {total} bytes at offset {offset} failed at byte {offset + done}: "
                    f"{_cause(error)}"
                ) from error

    def _read_some(self, offset: int, into: memoryview) -> int:
        """Read at least one byte of a non-empty `into`, in one system call where nothing goes wrong."""
        if self.direct:
            try:
                got = self._read_direct(offset, into)
            except OSError as error:
                if error.errno not in _REFUSED:
                    raise
                if self.mode == "direct":
                    raise _no_direct(self.path) from error
                self.direct = False
                got = 0
            if got > 0:
                return got
        # Also the end of a direct read that stopped before the first wanted byte: this one is exact to the byte.
        got = os.preadv(self._buffered_fd, [into], offset)
        if got == 0:
            raise StoreError(
                f"{self.path}: ends at byte {offset}, but {len(into)} more bytes are needed "
                f"(it had {self.size} when opened); it is truncated or was changed: restore the file"
            )
        return got

    def _read_direct(self, offset: int, into: memoryview) -> int:
        """Read what one direct system call gives. The wanted bytes that arrived: none if it stopped before them."""
        skip = offset % ALIGNMENT
        wanted = len(into)
        address = ctypes.addressof(ctypes.c_char.from_buffer(into))
        if address % ALIGNMENT != skip or skip + wanted < ALIGNMENT:
            block = _scratch.block
            wanted = min(wanted, len(block) - skip)
            target = block[: -(-(skip + wanted) // ALIGNMENT) * ALIGNMENT]
            got = min(os.preadv(self._direct_fd, [target], offset - skip) - skip, wanted)
            if got > 0:
                # numpy lets other threads run while it copies; a memoryview assignment does not.
                np.copyto(np.frombuffer(into, np.uint8, got), np.frombuffer(block, np.uint8, got, skip))
            return got
        lead = -skip % ALIGNMENT
        trail = (wanted - lead) % ALIGNMENT
        end = wanted - trail
        parts = [into[lead:end]] if end > lead else []
        if lead:
            parts.insert(0, _scratch.head)
        if trail:
            parts.append(_scratch.tail)
        got = min(os.preadv(self._direct_fd, parts, offset - skip) - skip, wanted)
        if lead and got > 0:
            arrived = min(lead, got)
            into[:arrived] = _scratch.head[skip : skip + arrived]
        if got > end:
            into[end:got] = _scratch.tail[: got - end]
        return got

    def close(self) -> None:
        """Close the file; again is harmless. No read may be under way in another thread."""
        fds = (self._buffered_fd, self._direct_fd)
        self._buffered_fd = self._direct_fd = -1
        for fd in fds:
            if fd >= 0:
                os.close(fd)

    def __enter__(self) -> DiskFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _open(path: Path, flags: int) -> int:
    try:
        # O_NONBLOCK: opening a FIFO must not wait for a writer. It changes nothing for regular files.
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | flags)
    except OSError as error:
        raise StoreError(f"{path}: cannot be opened: {error.strerror}") from error


def _no_direct(path: Path) -> StoreError:
    return StoreError(f"{path}: its file system refuses direct I/O (O_DIRECT); use mode auto or buffered")


def _cause(error: OSError) -> str:
    if error.errno == errno.EBADF:
        return "the file is closed"
    return error.strerror or str(error)
