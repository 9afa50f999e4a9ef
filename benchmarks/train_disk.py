"""The disk's own speed when it reads and writes at once: plain direct reads and writes, and nothing else.

Knows nothing of moetier.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from pathlib import Path

from common import MIB

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
        todo = iter([((start + i) % self.blocks, (i * READS) % 1 < READS) for i in range(count)])
        lock, errors = threading.Lock(), []
        fd = os.open(self.path, os.O_RDWR | os.O_DIRECT)

        def work() -> None:
            buffer = mmap.mmap(-1, BLOCK)
            buffer.write(os.urandom(BLOCK))
            ready.wait()
            try:
                while True:
                    with lock:
                        item = next(todo, None)
                    if item is None:
                        return
                    block, reads = item
                    move = os.preadv if reads else os.pwritev
                    if move(fd, [buffer], block * BLOCK) != BLOCK:
                        raise OSError(f"{self.path}: short {'read' if reads else 'write'}")
            except BaseException as error:
                errors.append(error)

        ready = threading.Barrier(threads + 1)
        workers = [threading.Thread(target=work) for _ in range(threads)]
        for worker in workers:
            worker.start()
        ready.wait()
        begin = time.perf_counter()
        for worker in workers:
            worker.join()
        seconds = time.perf_counter() - begin
        os.close(fd)
        if errors:
            raise errors[0]
        return count * BLOCK / seconds
