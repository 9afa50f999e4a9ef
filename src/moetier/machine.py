"""What the machine has: memory that a run could take, limits of control groups included."""

from __future__ import annotations

from pathlib import Path

import torch

HEADROOM = 0.8  # share of the free memory that a run without a budget takes

_LIMITS = (
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),  # version 1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),  # version 2
)


def available_host_nbytes() -> int:
    """Host memory that can still be taken, in bytes: free and reclaimable, within the process's control group."""
    available = 0
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    for limit_path, usage_path in _LIMITS:
        try:
            limit, usage = int(Path(limit_path).read_text()), int(Path(usage_path).read_text())
        except (OSError, ValueError):  # no such version, or "max"
            continue
        available = min(available, max(0, limit - usage))
    return available


def default_host_nbytes() -> int:
    """The host budget when none is given."""
    return int(available_host_nbytes() * HEADROOM)


def default_device_nbytes(device: torch.device) -> int:
    """The device budget when none is given."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(free * HEADROOM)
