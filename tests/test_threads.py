"""Cores and threads: what the kernel's files say, and when a run is told that it wants too many."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moetier import threads
from moetier.errors import ConfigError
from moetier.threads import Cores, CoreWatch, check_threads, fitting_threads, oversubscribed, quota_cores, usable_cores

V2 = "31 23 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate"
V1 = "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct"
V1_DOCKER = "32 31 0:29 /docker/abc /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu"
OTHER = "40 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd"


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("membership", "mount", "files", "cores"),
    [
        ("0::/a/b", V2, {"a/b/cpu.max": "max 100000", "a/cpu.max": "150000 100000"}, 1.5),
        ("0::/a/b", V2, {"a/b/cpu.max": "50000 100000", "a/cpu.max": "150000 100000"}, 0.5),
        ("0::/a", V2, {"a/cpu.max": "max 100000", "b/cpu.max": "10000 100000"}, None),
        ("0::/../gone", V2, {"cpu.max": "400000 100000"}, 4.0),
        ("3:cpu,cpuacct:/x", V1, {"cpu/x/cpu.cfs_quota_us": "200000", "cpu/x/cpu.cfs_period_us": "100000"}, 2.0),
        ("3:cpu,cpuacct:/x", V1, {"cpu/x/cpu.cfs_quota_us": "-1", "cpu/x/cpu.cfs_period_us": "100000"}, None),
        ("3:cpu:/docker/abc", V1_DOCKER, {"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3.0),
        ("1:name=systemd:/", OTHER, {"systemd/cpu.max": "100000 100000"}, None),
        ("0::/a", V2, {"a/cpu.max": "rubbish"}, None),
    ],
)  # fmt: skip
def test_quota(membership: str, mount: str, files: dict[str, str], cores: float | None, tmp_path: Path) -> None:
    made = {"proc/self/cgroup": membership + "\n", "proc/self/mountinfo": OTHER + "\n" + mount + "\n"}
    made |= {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    assert quota_cores(machine(tmp_path, made)) == cores


def test_no_proc_no_quota(tmp_path: Path) -> None:
    assert quota_cores(tmp_path) is None
    assert CoreWatch(tmp_path).neighbours() == 0.0
    assert CoreWatch(tmp_path).delayed_seconds() == 0.0


def test_a_quota_caps_the_affinity_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = len(os.sched_getaffinity(0))
    monkeypatch.setattr(threads, "quota_cores", lambda: 0.5)
    assert usable_cores() == 0.5
    monkeypatch.setattr(threads, "quota_cores", lambda: 1000.0)
    assert usable_cores() == allowed
    monkeypatch.setattr(threads, "quota_cores", lambda: None)
    assert usable_cores() == allowed


def test_neighbours_are_what_is_busy_without_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second in which core 0 was busy with others for 0.8 s, half of it stolen, and for 0.1 s with this process."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2})
    tick = os.sysconf("SC_CLK_TCK")
    now = {"perf_counter": 10.0, "process_time": 1.0}
    monkeypatch.setattr(time, "perf_counter", lambda: now["perf_counter"])
    monkeypatch.setattr(time, "process_time", lambda: now["process_time"])
    before = (
        "cpu 0 0 0 0 0 0 0 0\ncpu0 0 0 0 0 0 0 0 0 0 0\ncpu1 0 0 0 0 0 0 0 0 0 0\ncpu2 5 5 5 5 5 5 5 5 0 0\nintr 1\n"
    )
    watch = CoreWatch(machine(tmp_path, {"proc/stat": before}))
    used = int(0.1 * tick), int(0.4 * tick), int(0.4 * tick)
    after = f"cpu0 {used[0]} {used[1]} 0 {tick} 50 0 0 {used[2]} 0 0\ncpu1 {tick} 0 0 0 0 0 0 0 0 0\n"
    after += "cpu2 5 5 5 900 900 5 5 5 0 0\n"
    machine(tmp_path, {"proc/stat": after})
    now |= {"perf_counter": 11.0, "process_time": 1.1}
    assert watch.neighbours() == pytest.approx(0.8, abs=0.02)


def test_threads_that_wait_for_a_core_are_seen(tmp_path: Path) -> None:
    watch = CoreWatch(machine(tmp_path, {"proc/self/task/1/schedstat": "5 1000000000 1\n"}))
    machine(
        tmp_path, {"proc/self/task/1/schedstat": "9 1500000000 2\n", "proc/self/task/2/schedstat": "1 250000000 1\n"}
    )
    assert watch.delayed_seconds() == pytest.approx(0.75)
    assert threads.delayed(2, watch, busy_seconds=1.0) is not None
    assert threads.delayed(2, watch, busy_seconds=10.0) is None  # not worth a word
    assert threads.delayed(1, watch, busy_seconds=1.0) is None  # nothing to reduce


def test_a_busy_child_is_a_neighbour() -> None:
    """On the real machine: others may be busy too, and then they are neighbours as well."""
    script = "import time; end = time.time() + 20\nwhile time.time() < end: pass"
    child = subprocess.Popen([sys.executable, "-c", script])
    try:
        time.sleep(0.3)
        assert threads.busy_neighbours(0.5) > 0.2
    finally:
        child.kill()
        child.wait()


def test_usable_cores_of_this_machine() -> None:
    assert 0 < usable_cores() <= len(os.sched_getaffinity(0))
    cores = Cores.now()
    assert 0 <= cores.free <= cores.usable


@pytest.mark.parametrize(
    ("cores", "readers", "fitting"),
    [
        (Cores(2.0), 0.25, 2),
        (Cores(2.0, 1.0, 2.0), 0.25, 1),
        (Cores(2.0, 2.0, 2.0), 0.25, 1),
        (Cores(4.0, 30.0, 64.0), 0.0, 4),  # a quota on a large machine: neighbours are elsewhere
        (Cores(4.0, 62.0, 64.0), 0.0, 2),
        (Cores(0.5), 0.0, 1),
        (Cores(16.0, 0.3, 16.0), 0.6, 15),
    ],
)
def test_fitting_threads(cores: Cores, readers: float, fitting: int) -> None:
    assert fitting_threads(cores, readers) == fitting
    assert oversubscribed(fitting, readers, cores) is None
    told = oversubscribed(fitting + 1, readers, cores)
    assert told is not None
    assert f"--threads {fitting} " in told and "\n" not in told
    assert f"OMP_NUM_THREADS={fitting}" in told
    assert (f"{cores.neighbours:.1f} busy" in told) == (cores.neighbours > 0)


def test_too_many_threads_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "usable_cores", lambda: 1.5)
    check_threads(1)
    check_threads(8)
    for wrong in (0, -1, 9, 10**9):
        with pytest.raises(ConfigError, match=r"from 1 to 8, 4 times the 1\.5 cores"):
            check_threads(wrong)
