"""A file of records being written, past the page cache where the file system allows it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

_REFUSED = (errno.EINVAL, errno.EOPNOTSUPP)


class DataFile:
    """A file of a known size, allocated at once so that neighbours lie side by side on the disk.

    `write` may be called from many threads. Raises `OSError` naming the file, a full disk at opening included.
    """

    def __init__(self, path: Path, nbytes: int):
        self.path = path
        self._fds: list[int] = []
        try:
            self._fds.append(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666))
            try:
                os.posix_fallocate(self._fds[0], 0, nbytes)
            except OSError as error:
                if error.errno not in _REFUSED:
                    raise
            os.ftruncate(self._fds[0], nbytes)
            self._direct = self._open_direct()
        except OSError as error:
            self.close()
            raise self._named(error) from error

    def _open_direct(self) -> bool:
        try:
            self._fds.append(os.open(self.path, os.O_WRONLY | os.O_CLOEXEC | os.O_DIRECT))
        except OSError as error:
            if error.errno not in _REFUSED:
                raise
            return False
        return True

    def write(self, offset: int, pages: memoryview) -> None:
        """Write whole pages from page-aligned memory to a multiple of a page."""
        done = 0
        try:
            while done < len(pages):
                try:
                    done += os.pwrite(self._fds[self._direct], pages[done:], offset + done)
                except OSError as error:
                    if error.errno not in _REFUSED or not self._direct:
                        raise
                    self._direct = False
        except OSError as error:
            raise self._named(error) from error

    def sync(self) -> None:
        """Everything written survives a power failure when this returns."""
        try:
            os.fsync(self._fds[0])
        except OSError as error:
            raise self._named(error) from error

    def close(self) -> None:
        """Close the file; again is harmless."""
        while self._fds:
            os.close(self._fds.pop())

    def _named(self, error: OSError) -> OSError:
        return OSError(error.errno, error.strerror, str(self.path))
