"""`moetier bench io`: what is read, that it is cold, what is refused, and that nothing is left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from moetier import iobench
from moetier.cli import app
from moetier.errors import ConfigError, StoreError
from moetier.iobench import DiskBench, Reading, Sample, Setting, best, cached_share, drop_cache, find_files, warm

MIB = 1 << 20


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 MiB on the disk."""
    path = tmp_path_factory.mktemp("io") / "large.bin"
    with path.open("wb") as out:
        out.write(np.random.default_rng(0).bytes(16 * MIB))
        out.flush()
        os.fsync(out.fileno())
    return path


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few MiB are enough."""
    for name, value in {"SIZES": (64 << 10, MIB), "DEPTHS": (1, 2), "MINIMUM": 2 * MIB}.items():
        monkeypatch.setattr(iobench, name, value)
    monkeypatch.setattr(DiskBench.__init__, "__defaults__", ((64 << 10, MIB), (1, 2)))
    monkeypatch.setattr(iobench, "measure_memory", lambda: 5e9)


def run(*args: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["bench", "io", *map(str, args)])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def needs_cold_reads(path: Path) -> None:
    drop_cache(path)
    if cached_share([(path, 0, 16 * MIB)]) != 0.0:
        pytest.skip("this file system keeps its pages")


def test_the_page_cache_is_dropped_and_that_is_seen(file: Path) -> None:
    needs_cold_reads(file)
    file.read_bytes()
    assert cached_share([(file, 0, 16 * MIB)]) == 1.0
    drop_cache(file)
    assert cached_share([(file, 0, 16 * MIB), (file, 5000, 9000)]) == 0.0
    with file.open("rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # no readahead
        os.pread(opened.fileno(), 4096, 8 * MIB)
    share = cached_share([(file, 8 * MIB, 4096), (file, 0, 4096)])
    assert share == 0.5


def test_samples_read_what_they_say(file: Path) -> None:
    """Every offset at most once; the rates are bytes over seconds; a buffered sample begins cold."""
    needs_cold_reads(file)
    with DiskBench([file], (64 << 10, MIB), (1, 4)) as bench:
        assert bench.nbytes == 16 * MIB
        for mode in ("direct", "buffered"):
            if mode == "direct" and bench.no_direct:
                continue
            sample = bench.sample(Setting(MIB, 4, mode), 60.0)  # ends when all is read
            assert sample.nbytes == 16 * MIB
            assert 0 < sample.seconds < 30 and sample.cpu_seconds >= 0
            assert sample.cached == (None if mode == "direct" else 0.0)
            short = bench.sample(Setting(64 << 10, 1, mode), 0.001)
            assert short.nbytes < 16 * MIB, "the time was over"


def test_all_settings_in_rounds(file: Path) -> None:
    with DiskBench([file], (64 << 10, MIB), (1, 2)) as bench:
        seen: list[int] = []
        readings = bench.run(0.5, lambda done, total: seen.append(done))
        assert len({reading.setting for reading in readings}) == len(readings) == (4 if bench.no_direct else 8)
        assert sum(len(reading.samples) for reading in readings) == len(seen) > 0
        counts = [len(reading.samples) for reading in readings]
        assert max(counts) - min(counts) <= 1  # interleaved
        assert bench.run(0.0)[0].samples == []


def test_a_file_that_shrinks_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(4 * MIB))
    with DiskBench([path], (MIB,), (2,)) as bench:
        os.truncate(path, MIB)
        with pytest.raises(StoreError, match="truncated"):
            bench.sample(Setting(MIB, 2, "buffered"), 5.0)


def test_the_best_is_fast_and_then_cheap() -> None:
    def reading(size: int, rate: float, cpu: float) -> Reading:
        return Reading(Setting(size, 4, "direct"), [Sample(int(rate), 1.0, cpu * rate / 1e9)])

    fastest, near, slow = reading(1, 1e9, 0.5), reading(2, 0.97e9, 0.1), reading(3, 0.5e9, 0.01)
    assert best([fastest, near, slow]) is near
    assert best([fastest, slow]) is fastest
    assert best([Reading(Setting(1, 1, "direct"))]) is None
    three = Reading(Setting(1, 1, "direct"), [Sample(10, 1.0, 1e-9), Sample(30, 1.0, 3e-9), Sample(20, 1.0, 9e-9)])
    assert three.bytes_per_second == 20 and three.core_seconds_per_gb == pytest.approx(0.1)


def test_what_is_not_cold_is_told() -> None:
    def reading(*cached: float | None) -> Reading:
        return Reading(Setting(1, 1, "buffered"), [Sample(1, 1.0, 0.0, share) for share in cached])

    assert warm([reading(0.0, 0.5), reading(0.0), reading(None, 0.0), Reading(Setting(1, 1, "buffered"))]) == (1, 1)


def test_the_largest_files_of_a_folder(tmp_path: Path, small: None) -> None:
    (tmp_path / "sub").mkdir()
    for name, size in {"a": MIB, "sub/b": 3 * MIB, "tiny": 100}.items():
        (tmp_path / name).write_bytes(bytes(size))
    (tmp_path / "link").symlink_to(tmp_path / "sub" / "b")  # as in the hub's cache: counted once
    assert [path.name for path in find_files(tmp_path)] == ["b", "a"]
    (tmp_path / "sub" / "b").unlink()
    (tmp_path / "link").unlink()
    with pytest.raises(ConfigError, match="--write-size 1GiB"):
        find_files(tmp_path)
    with pytest.raises(ConfigError, match="not found"):
        find_files(tmp_path / "none")


def test_the_command(file: Path, small: None, tmp_path: Path) -> None:
    out = tmp_path / "io.json"
    result = run(file, "--seconds", 1.5, "--json", out)
    told = json.loads(out.read_text())
    assert {(row["mode"], row["size"], row["depth"]) for row in told["disk"]} >= {
        ("buffered", size, depth) for size in (64 << 10, MIB) for depth in (1, 2)
    }
    measured = [row for row in told["disk"] if row["bytes_per_second"] is not None]
    assert measured and all(row["bytes_per_second"] > 0 and row["samples"] > 0 for row in measured)
    assert told["best"] in measured
    assert told["memory_copy_bytes_per_second"] == 5e9
    words = " ".join(result.stdout.split())
    assert "buffered: GB/s (core-seconds per GB)" in words and "best: " in words
    if told["gpu"] is None:
        assert "GPU: none found" in words
    if told["engine"] is not None:
        assert re.search(r"--readers \d+ --io (direct|buffered)", words)


def test_a_temporary_file_is_removed(tmp_path: Path, small: None) -> None:
    run(tmp_path, "--write-size", "4MiB", "--seconds", 0.3)
    assert list(tmp_path.iterdir()) == []
    assert "at least 2.0 MiB" in run(tmp_path, "--write-size", "1MiB", code=2).stderr
    assert "free" in run(tmp_path, "--write-size", "900TiB", code=2).stderr
    assert "not a folder" in run(tmp_path / "none", "--write-size", "4MiB", code=2).stderr
    assert "--json" in run(tmp_path, "--json", tmp_path, code=2).stderr
    assert "--write-size 1GiB" in run(tmp_path, code=2).stderr


def test_an_interrupt_removes_the_temporary_file(tmp_path: Path) -> None:
    listen = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # in the background it is ignored
    )
    command = [sys.executable, "-c", f"{listen}; from moetier.cli import main; main()", "bench", "io", str(tmp_path)]
    child = subprocess.Popen([*command, "--write-size", "130MiB"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        end = time.monotonic() + 90
        while not list(tmp_path.iterdir()) and time.monotonic() < end and child.poll() is None:
            time.sleep(0.02)
        assert list(tmp_path.iterdir())
        time.sleep(0.2)
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=90)
    finally:
        child.kill()
        child.wait()
    assert list(tmp_path.iterdir()) == []
    assert child.returncode == 130 and b"Traceback" not in errors and b"interrupted" in errors
