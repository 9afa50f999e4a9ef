"""The disk's own speed when it reads and writes at once: plain direct reads and writes, and nothing else.

Knows nothing of moetier.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from common import MIB, seconds_of

READS = 0.6  # share of reads among the bytes: about that of a training step at 25 % of the slots
BLOCK = 4 * MIB


class MixedDisk:
    """One file of `nbytes`, which is written whole the first time."""

    def __init__(self, path: Path, nbytes: int):
        self.path, self.blocks, self._next = path, nbytes // BLOCK, 0
        if not path.is_file() or path.stat().st_size != self.blocks * BLOCK:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as file:
                for _ in range(self.blocks):
                    file.write(os.urandom(BLOCK))
                os.fsync(file.fileno())

    def bandwidth(self, nbytes: int, threads: int = 4) -> float:
        """Bytes/s of `nbytes` in all, in blocks of 4 MiB, three of five of them reads, by so many threads."""
        count = max(5, nbytes // BLOCK)
        start, self._next = self._next, self._next + count
        todo = [((start + i) % self.blocks, (i * READS) % 1 < READS) for i in range(count)]
        fd = os.open(self.path, os.O_RDWR | os.O_DIRECT)

        def move(request: tuple[int, bool], buffer: mmap.mmap) -> int:
            block, reads = request
            return (os.preadv if reads else os.pwritev)(fd, [buffer], block * BLOCK)

        try:
            return count * BLOCK / seconds_of(todo, threads, BLOCK, move)
        finally:
            os.close(fd)
