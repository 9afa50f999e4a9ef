"""Threads against cores: how many cores this process may use, who else is on them, and whether a run wants too many.

Torch's parallel loops end in a barrier: each waits for its slowest thread. A thread that cannot run because another
program has its core holds up all the others, so one compute thread too many costs far more than one too few. Knows the
kernel's files (`/proc`, control groups of version 1 and 2) and arithmetic; nothing of torch, models or caches.

What it cannot see: neighbours of low priority (nice, SCHED_IDLE) count like others, although they make way.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

from moetier.errors import ConfigError

MAX_FACTOR = 4  # times the usable cores: more compute threads than that are a mistake, not a choice
_TOLERANCE = 0.5  # cores: below that neither the count of neighbours nor the need of readers is certain
_SAMPLE_SECONDS = 0.2
_ROOT = Path("/")


def reader_cores(direct: bool) -> float:
    """Cores that all disk readers together keep busy, at a GB/s or so, by the kind of their reads (docs/LOG.md)."""
    return 0.25 if direct else 0.6


def default_readers() -> int:
    """Disk readers of a run: a fifth brings nothing more, and more than there are cores are in the math's way."""
    return min(4, max(2, math.floor(usable_cores())))


def usable_cores() -> float:
    """Cores this process may use, in cores' worth of time: its affinity mask, or its control groups' quota if less."""
    allowed = float(len(os.sched_getaffinity(0)))
    quota = quota_cores()
    return allowed if quota is None else min(allowed, quota)


def busy_neighbours(seconds: float = _SAMPLE_SECONDS) -> float:
    """Cores that others keep busy right now, of those this process may run on; watches for so many seconds.

    Time that a hypervisor takes away counts too. Good to about 10 ms / `seconds` per core. 0 where /proc tells nothing.
    """
    watch = CoreWatch()
    time.sleep(seconds)
    return watch.neighbours()


class CoreWatch:
    """From its making on: what others did on the cores of this process, and how long its threads waited for one."""

    def __init__(self, root: Path = _ROOT):
        self._root = root
        self._cores = os.sched_getaffinity(0)
        self._begin = time.perf_counter()
        self._busy = _busy_seconds(self._cores, root)
        self._own = time.process_time()
        self._delays = _run_delays(root)

    @property
    def seconds(self) -> float:
        """How long it has been watching."""
        return time.perf_counter() - self._begin

    def neighbours(self) -> float:
        """Cores kept busy by others, on average since the beginning; 0 where /proc tells nothing."""
        busy = _busy_seconds(self._cores, self._root)
        if self._busy is None or busy is None:
            return 0.0
        others = busy - self._busy - (time.process_time() - self._own)
        return min(float(len(self._cores)), max(0.0, others / max(self.seconds, 1e-3)))

    def delayed_seconds(self) -> float:
        """Thread-seconds in which threads of this process could run and had no core; ended threads do not count."""
        before = self._delays
        return sum(max(0.0, delay - before.get(thread, 0.0)) for thread, delay in _run_delays(self._root).items())


@dataclass(frozen=True, slots=True)
class Cores:
    """What there is to run on, in cores."""

    usable: float  # affinity and quota
    neighbours: float = 0.0  # kept busy by others, within the affinity mask
    allowed: float = math.inf  # the affinity mask alone

    @property
    def free(self) -> float:
        """Cores that nobody else uses: neighbours take from the mask, a quota caps what is left."""
        return max(0.0, min(self.usable, self.allowed - self.neighbours))

    @classmethod
    def now(cls, watch: CoreWatch | None = None) -> Cores:
        """As the machine is; neighbours as `watch` saw them, or sampled over a moment."""
        if watch is None or watch.seconds < _SAMPLE_SECONDS:
            watch = watch or CoreWatch()
            time.sleep(max(0.0, _SAMPLE_SECONDS - watch.seconds))
        return cls(usable_cores(), watch.neighbours(), float(len(os.sched_getaffinity(0))))


def fitting_threads(cores: Cores, reader_cores: float = 0.0) -> int:
    """The most compute threads that find a core each, beside readers that need `reader_cores`; at least 1."""
    return max(1, math.floor(cores.free - reader_cores + _TOLERANCE))


def oversubscribed(compute: int, reader_cores: float, cores: Cores) -> str | None:
    """One line on why `compute` threads are too many and what to set, or None where they are not."""
    fitting = fitting_threads(cores, reader_cores)
    if compute <= fitting:
        return None
    because = [f"this process may use {cores.usable:g} cores"]
    if cores.neighbours >= 0.05:
        because.append(f"other programs keep {cores.neighbours:.1f} busy")
    if reader_cores >= 0.05:
        because.append(f"disk readers need about {reader_cores:.1f}")
    return (
        f"{compute} compute threads are too many: {', '.join(because)}. A step waits "
        f"for its slowest thread and can take many times longer; set --threads {fitting} (in Python: "
        f"torch.set_num_threads({fitting}), or OMP_NUM_THREADS={fitting} before the start)"
    )


def delayed(compute: int, watch: CoreWatch, busy_seconds: float) -> str | None:
    """The same after a run, from what was seen: how long runnable threads waited, against what they computed.

    `busy_seconds` is the time in which the run had something to compute. None where the wait was below a fifth of it.
    """
    waited = watch.delayed_seconds()
    if compute <= 1 or busy_seconds <= 0 or waited < 0.2 * busy_seconds:
        return None
    neighbours = watch.neighbours()
    return (
        f"threads that could run waited {waited:.1f} s for a core, in {watch.seconds:.1f} s; other programs kept "
        f"{neighbours:.1f} of {len(os.sched_getaffinity(0))} cores busy. Fewer compute threads than {compute} may be "
        "faster: try --threads "
        f"{min(compute - 1, fitting_threads(Cores(usable_cores(), neighbours, len(os.sched_getaffinity(0)))))}"
    )


def check_threads(threads: int, name: str = "threads") -> None:
    """Raise `ConfigError` for a number of compute threads that no machine like this one can use."""
    cores = usable_cores()
    limit = MAX_FACTOR * math.ceil(cores)
    if not 1 <= threads <= limit:
        raise ConfigError(
            f"{name}: must be from 1 to {limit}, {MAX_FACTOR} times the {cores:g} cores that this process may use, got "
            f"{threads}; more threads than cores make every step slower"
        )


def quota_cores(root: Path = _ROOT) -> float | None:
    """The smallest CPU quota of this process's control groups, in cores; None without one."""
    quotas = []
    for folder, top in _cpu_groups(root):
        while True:
            quotas.append(_quota(folder))
            if folder == top or top not in folder.parents:
                break
            folder = folder.parent
    return min((quota for quota in quotas if quota is not None), default=None)


def _cpu_groups(root: Path) -> list[tuple[Path, Path]]:
    """Folder of the process's group and of its hierarchy's top, for every hierarchy that can hold a CPU quota."""
    try:
        memberships = (root / "proc/self/cgroup").read_text().splitlines()
        mounts = (root / "proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return []
    found = []
    for mount in mounts:
        head, _, tail = mount.partition(" - ")
        fields, kind = head.split(), tail.split()
        if len(fields) < 5 or len(kind) < 3 or kind[0] not in ("cgroup", "cgroup2"):
            continue
        if kind[0] == "cgroup" and "cpu" not in kind[2].split(","):
            continue
        for membership in memberships:
            _, controllers, path = membership.split(":", 2)
            if ("cpu" in controllers.split(",")) if kind[0] == "cgroup" else not controllers:
                top = root / fields[4].lstrip("/")
                inside = path if fields[3] == "/" else path.removeprefix(fields[3])  # a mount may show a part only
                folder = top / inside.lstrip("/")
                found.append((folder if folder.is_dir() else top, top))
    return found


def _quota(folder: Path) -> float | None:
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            numbers = " ".join((folder / name).read_text() for name in names).split()
            quota, period = int(numbers[0]), int(numbers[1])
        except (OSError, ValueError, IndexError):  # no such version, or "max"
            continue
        if quota > 0 and period > 0:
            return quota / period
    return None


def _busy_seconds(cores: set[int], root: Path) -> float | None:
    """Seconds that the cores were not idle, since the machine started; None where that cannot be known."""
    try:
        lines = (root / "proc/stat").read_text().splitlines()
    except OSError:
        return None
    ticks, known = 0, False
    for line in lines:
        name, *counts = line.split()
        if name[:3] == "cpu" and name[3:].isdigit() and int(name[3:]) in cores and len(counts) >= 8:
            user, nice, system, _, _, irq, softirq, stolen = map(int, counts[:8])  # not idle, not waiting for a disk
            ticks += user + nice + system + irq + softirq + stolen
            known = True
    return ticks / os.sysconf("SC_CLK_TCK") if known else None


def _run_delays(root: Path) -> dict[str, float]:
    """Per thread of this process, the seconds it was ready to run and had no core."""
    delays = {}
    for task in (root / "proc/self/task").glob("*"):
        try:
            delays[task.name] = int((task / "schedstat").read_text().split()[1]) / 1e9
        except (OSError, ValueError, IndexError):  # it ended, or the kernel does not count
            continue
    return delays
