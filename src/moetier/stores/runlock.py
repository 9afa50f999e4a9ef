"""One writer, or any number of readers, of a folder: across processes and within one.

The lock is the process's own: a forked child (a data loader's worker) does not keep it alive, and the system takes it
away from a process that dies.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
from pathlib import Path

from moetier.errors import ConfigError, StoreError

LOCK = "lock"
_WRITER = -1
_here: dict[tuple[int, int], tuple[int, int]] = {}  # of this process: inode -> descriptor, readers (or _WRITER)
_guard = threading.Lock()


class FolderLock:
    """Held from construction to `close`. Raises `ConfigError` where somebody else has the folder."""

    def __init__(self, folder: Path, write: bool):
        self._pid = os.getpid()
        self._inode: tuple[int, int] | None = None
        path = folder / LOCK
        with _guard:
            try:
                # by name: closing any descriptor of the file would give up a lock that this process has already
                found = os.stat(path)
                fd, users = _here.get((found.st_dev, found.st_ino), (-1, 0))
            except FileNotFoundError:
                if not write:
                    return  # a copy of a run, and nobody can be writing it
                fd, users = -1, 0
            if users and (write or users == _WRITER):
                raise ConfigError(f"{folder}: this process has it open already; close that first")
            if not users:
                fd = _lock(path, write)
            found = os.fstat(fd)
            self._inode = found.st_dev, found.st_ino
            _here[self._inode] = fd, _WRITER if write else users + 1

    def close(self) -> None:
        """Let others have it; again is harmless."""
        with _guard:
            if self._inode is None or self._pid != os.getpid():
                return
            fd, users = _here[self._inode]
            if users > 1:
                _here[self._inode] = fd, users - 1
            else:
                del _here[self._inode]
                os.close(fd)
            self._inode = None


def _lock(path: Path, write: bool) -> int:
    fd = -1
    try:
        fd = os.open(path, (os.O_RDWR | os.O_CREAT if write else os.O_RDONLY) | os.O_CLOEXEC, 0o666)
        fcntl.lockf(fd, (fcntl.LOCK_EX if write else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        if write:
            with contextlib.suppress(OSError):  # for people only
                os.ftruncate(fd, 0)
                os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        return fd
    except OSError as error:
        if fd >= 0:
            os.close(fd)
        if fd >= 0 and error.errno in (errno.EACCES, errno.EAGAIN):
            raise ConfigError(
                f"{path.parent}: another process{_number(path)} has it open; wait until it ends, or end it"
            ) from None
        raise StoreError(f"{path}: the folder cannot be locked: {error.strerror}") from error


def _number(path: Path) -> str:
    try:
        return f" ({int(path.read_text())})"
    except (OSError, ValueError):
        return ""
