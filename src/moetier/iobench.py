"""What disk, memory and the link to a GPU give: every request size and depth, direct and buffered, from cold caches.

Reads files as the engine does (`stores.diskio`, threads, random offsets), in interleaved rounds, and takes medians. The
buffered reads begin with the files' page cache dropped; whether that worked is checked, not assumed. A cache inside the
disk, or in the host of a virtual machine, cannot be seen from here. Knows nothing of models; torch only for the GPU.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import itertools
import math
import mmap
import os
import random
import shutil
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moetier.errors import ConfigError, StoreError
from moetier.plan import format_size
from moetier.stores.diskio import ALIGNMENT, DiskFile, aligned_buffer

SIZES = tuple(1 << shift for shift in range(16, 24))  # bytes of a request: 64 KiB to 8 MiB
DEPTHS = (1, 2, 4, 8, 16)  # requests at a time, a thread each
MINIMUM = max(SIZES) * max(DEPTHS)  # bytes to read from: as many as are in flight at most
ROUNDS = 3  # aimed at; a slow disk gets fewer, a fast one more
_NEAR = 0.05  # of the best bandwidth: settings this close to it count as fast, and the one with least CPU is taken
_WARM = 0.02  # of the pages still cached: more than that and a buffered reading is not cold

Mode = Literal["direct", "buffered"]


@dataclass(frozen=True, slots=True, order=True)
class Setting:
    """A way to read: bytes of a request, requests at a time, direct or buffered."""

    size: int
    depth: int
    mode: Mode


@dataclass(frozen=True, slots=True)
class Sample:
    """One short measurement; `cached` is the share of the wanted pages that were in memory before (None: unknown)."""

    nbytes: int
    seconds: float
    cpu_seconds: float  # of this process, kernel time included
    cached: float | None = None


@dataclass(slots=True)
class Reading:
    """All samples of a setting."""

    setting: Setting
    samples: list[Sample] = field(default_factory=list)

    @property
    def bytes_per_second(self) -> float:
        """The median."""
        return statistics.median(sample.nbytes / sample.seconds for sample in self.samples)

    @property
    def core_seconds_per_gb(self) -> float:
        """CPU time per 10^9 bytes, the median."""
        return statistics.median(sample.cpu_seconds / sample.nbytes * 1e9 for sample in self.samples)

    @property
    def cached(self) -> float | None:
        """The largest share of pages that were cached before a sample; None where it could not be found out."""
        known = [sample.cached for sample in self.samples if sample.cached is not None]
        return max(known) if len(known) == len(self.samples) else None


def find_files(path: Path) -> list[Path]:
    """The file, or the files below a folder, that are large enough for the largest request; largest first.

    Raises `ConfigError` where they hold too little, naming the way out.
    """
    if not path.exists():
        raise ConfigError(f"{path}: not found; give a file or folder on the disk to measure")
    try:
        found = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        sizes = {file.resolve(): file.stat().st_size for file in found}
    except OSError as error:
        raise ConfigError(f"{path}: cannot be searched: {error.strerror}") from error
    large = [file for file, size in sorted(sizes.items(), key=lambda item: -item[1]) if size >= max(SIZES)][:64]
    if sum(sizes[file] for file in large) < MINIMUM:
        raise ConfigError(
            f"{path}: at least {format_size(MINIMUM)} in files of {format_size(max(SIZES))} or more are needed to "
            "measure with; give the folder of a model, or --write-size 1GiB to write a temporary file there"
        )
    return large


@contextlib.contextmanager
def temporary_file(folder: Path, nbytes: int) -> Iterator[Path]:
    """A file of so many random bytes, on the disk and removed at the end, however that comes.

    Raises `ConfigError` for a size too small or a folder without room.
    """
    if nbytes < MINIMUM:
        raise ConfigError(f"--write-size {format_size(nbytes)}: at least {format_size(MINIMUM)} are needed")
    if not folder.is_dir():
        raise ConfigError(f"{folder}: not a folder; --write-size writes a temporary file into it")
    free = shutil.disk_usage(folder).free
    if nbytes > 0.9 * free:
        raise ConfigError(f"--write-size {format_size(nbytes)}: {folder} has {format_size(free)} free; take less")
    path = folder / f".moetier-bench-io.{os.getpid()}.tmp"
    draw = np.random.default_rng(0)  # random: a disk may compress
    try:
        try:
            with path.open("wb") as file:
                for begin in range(0, nbytes, 8 << 20):
                    file.write(draw.bytes(min(8 << 20, nbytes - begin)))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written: {error.strerror}") from error
        yield path
    finally:
        path.unlink(missing_ok=True)


class DiskBench:
    """Measures the disk under some files. Use it as a context manager: it keeps them open."""

    def __init__(self, files: Sequence[Path], sizes: Sequence[int] = SIZES, depths: Sequence[int] = DEPTHS):
        self.sizes, self.depths = tuple(sizes), tuple(depths)
        self.no_direct: str | None = None  # why direct reads were not measured
        self._open = contextlib.ExitStack()
        self._files: dict[Mode, list[DiskFile]] = {"direct": [], "buffered": []}
        try:
            for file in files:
                self._files["buffered"].append(self._open.enter_context(DiskFile(file, "buffered")))
            for file in files:
                self._files["direct"].append(self._open.enter_context(DiskFile(file, "direct")))
            self._files["direct"][0].read_into(0, aligned_buffer(ALIGNMENT))
        except StoreError as error:
            if len(self._files["buffered"]) < len(files):
                self._open.close()
                raise
            self.no_direct = str(error)
        for opened in self._files["buffered"]:
            with _descriptor(opened.path) as descriptor, contextlib.suppress(OSError):
                os.fdatasync(descriptor)  # dirty pages cannot be dropped
        self._buffers = [aligned_buffer(max(self.sizes)) for _ in range(max(self.depths))]
        for buffer in self._buffers:
            np.frombuffer(buffer, np.uint8).fill(1)  # the first touch of a page is no part of a read
        self._draw = random.Random(0)

    @property
    def nbytes(self) -> int:
        """What there is to read."""
        return sum(file.size for file in self._files["buffered"])

    def run(self, seconds: float, progress: Callable[[int, int], None] | None = None) -> list[Reading]:
        """Measure all settings for about so many seconds in all; those that there was no time for have no samples."""
        modes: list[Mode] = ["buffered"] if self.no_direct else ["direct", "buffered"]
        readings = [Reading(Setting(s, d, m)) for m in modes for s in self.sizes for d in self.depths]
        each = min(1.0, max(0.01, 0.7 * seconds / (len(readings) * ROUNDS)))
        begin = time.perf_counter()
        order, done = list(readings), 0
        while True:  # interleaved, so that a disk that changes its pace does so for all of them
            self._draw.shuffle(order)
            for reading in order:
                if time.perf_counter() - begin >= seconds:
                    return readings
                reading.samples.append(self.sample(reading.setting, each))
                done += 1
                if progress is not None:
                    progress(done, len(readings) * ROUNDS)

    def sample(self, setting: Setting, seconds: float) -> Sample:
        """Read at random offsets, each at most once, for about so many seconds."""
        files = self._files[setting.mode]
        ends = list(itertools.accumulate(file.size // setting.size for file in files))

        def place_of(index: int) -> tuple[DiskFile, int]:
            number = bisect.bisect_right(ends, index)
            before = ends[number - 1] if number else 0
            return files[number], (index - before) * setting.size

        order = np.random.default_rng(self._draw.randrange(2**32)).permutation(ends[-1]).tolist()
        cached = None
        if setting.mode == "buffered":
            for file in files:
                drop_cache(file.path)
            looked_at = [place_of(index) for index in order[:64]]
            cached = cached_share([(file.path, offset, setting.size) for file, offset in looked_at])
        todo, lock, ready = iter(order), threading.Lock(), threading.Barrier(setting.depth + 1)
        read = [0] * setting.depth
        errors: list[BaseException] = []
        deadline = math.inf

        def work(number: int) -> None:
            into = self._buffers[number][: setting.size]
            ready.wait()
            while time.perf_counter() < deadline and not errors:
                with lock:
                    index = next(todo, None)
                if index is None:
                    return
                try:
                    file, offset = place_of(index)
                    file.read_into(offset, into)
                except BaseException as error:
                    errors.append(error)
                    return
                read[number] += setting.size

        threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(setting.depth)]
        for thread in threads:
            thread.start()
        cpu, begin = time.process_time(), time.perf_counter()
        ready.wait()
        deadline = begin + seconds
        for thread in threads:
            thread.join()
        end = time.perf_counter()
        if errors:
            raise errors[0]
        return Sample(sum(read), end - begin, time.process_time() - cpu, cached)

    def close(self) -> None:
        """Close the files."""
        self._open.close()

    def __enter__(self) -> DiskBench:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def best(readings: Sequence[Reading]) -> Reading | None:
    """Of the settings within 5 % of the highest bandwidth, the one that takes least CPU per byte; None without any."""
    measured = [reading for reading in readings if reading.samples]
    top = max((reading.bytes_per_second for reading in measured), default=0.0)
    near = [reading for reading in measured if reading.bytes_per_second >= (1 - _NEAR) * top]
    return min(near, key=lambda reading: (reading.core_seconds_per_gb, reading.setting.depth), default=None)


def warm(readings: Sequence[Reading]) -> tuple[int, int]:
    """Buffered settings that were not cold, and those of which that is not known."""
    buffered = [reading for reading in readings if reading.setting.mode == "buffered" and reading.samples]
    unknown = sum(reading.cached is None for reading in buffered)
    return sum((reading.cached or 0.0) > _WARM for reading in buffered), unknown


# -- the page cache ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _descriptor(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def drop_cache(path: Path) -> None:
    """Ask the kernel to forget the pages of a file; it keeps those that are dirty, or mapped by somebody."""
    with _descriptor(path) as descriptor:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def cached_share(ranges: Sequence[tuple[Path, int, int]]) -> float | None:
    """Share of the pages of (file, offset, bytes) that are in memory; None where the kernel does not tell.

    By mincore(2), which tells only the owner of a file, or who may write it. (preadv2 with RWF_NOWAIT would start a
    readahead, and so change what it looks at.)
    """
    libc = ctypes.CDLL(None, use_errno=True)
    pages = resident = 0
    for path in {path for path, _, _ in ranges}:
        found = path.stat()
        if os.geteuid() not in (0, found.st_uid) and not os.access(path, os.W_OK):
            return None
        if not found.st_size:  # emptied meanwhile: the read will tell
            continue
        with _descriptor(path) as descriptor, mmap.mmap(descriptor, found.st_size, prot=mmap.PROT_READ) as mapped:
            view = np.frombuffer(mapped, np.uint8)
            base = int(view.ctypes.data)
            del view
            for _, offset, nbytes in [one for one in ranges if one[0] == path]:
                first = offset // mmap.PAGESIZE * mmap.PAGESIZE
                count = max(0, -(-(min(offset + nbytes, found.st_size) - first) // mmap.PAGESIZE))
                states = (ctypes.c_ubyte * count)()
                length = ctypes.c_size_t(count * mmap.PAGESIZE)
                if libc.mincore(ctypes.c_void_p(base + first), length, states):
                    return None
                pages += count
                resident += sum(state & 1 for state in states)
    return resident / pages if pages else None


# -- memory and GPU ----------------------------------------------------------------------------------------------------


def measure_memory(nbytes: int = 256 << 20, rounds: int = 5) -> float:
    """Bytes per second of a copy from memory to memory by one thread, each byte counted once; median."""
    source, target = np.ones(nbytes, np.uint8), np.zeros(nbytes, np.uint8)
    found = []
    for _ in range(rounds):
        begin = time.perf_counter()
        np.copyto(target, source)
        found.append(nbytes / (time.perf_counter() - begin))
    return statistics.median(found)


def measure_gpu(nbytes: int = 64 << 20, rounds: int = 9) -> dict[str, Any] | None:
    """Bytes per second between page-locked host memory and the GPU, each way, medians; None without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    host = torch.ones(nbytes, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    found: dict[str, list[float]] = {"host_to_device": [], "device_to_host": []}
    for name, (target, source) in {"host_to_device": (device, host), "device_to_host": (host, device)}.items():
        for number in range(rounds + 1):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            target.copy_(source, non_blocking=True)
            end.record()
            end.synchronize()
            if number:  # the first one warms up
                found[name].append(nbytes / (begin.elapsed_time(end) / 1e3))
    rates = {name: statistics.median(values) for name, values in found.items()}
    return {"name": torch.cuda.get_device_name(), "bytes": nbytes, **rates}
