"""Stand-ins for a GPU in training: a second arena in host memory, or device arenas on the fake CUDA."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fake_cuda
from moetier.arenas import DeviceArena, HostArena
from moetier.options import Options
from moetier.plan import Machine, parse_size
from moetier.training import attach, caches

CPU = torch.device("cpu")


def two_tiers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that are trained on the CPU get a device tier above the host's, with `device_memory` bytes."""

    def machine(options: Options, device: torch.device) -> Machine:
        sizes = (options.host_memory or "64MiB", options.device_memory or "64MiB")
        return Machine(*(parse_size(size) for size in sizes))

    monkeypatch.setattr(attach, "budgets", machine)


def late_device(monkeypatch: pytest.MonkeyPatch, seed: int = 0, haste: float = 0.05) -> fake_cuda.FakeCuda:
    """The same on the fake CUDA, whose copies are late both ways. `isinstance(cache.device, DeviceArena)` holds."""
    cuda = fake_cuda.install(monkeypatch, seed, haste)
    monkeypatch.setattr(caches, "fast_arena", DeviceArena)
    monkeypatch.setattr(caches, "HostArena", lambda slots, nbytes, page_locked=False: HostArena(slots, nbytes, True))
    return cuda


def kernels_at_once(monkeypatch: pytest.MonkeyPatch, cuda: fake_cuda.FakeCuda) -> None:
    """torch's own kernels run when they are called, so the compute stream has to be where they are queued by then."""
    views = DeviceArena.views

    def there(self: DeviceArena, *arguments: Any) -> dict[str, torch.Tensor]:
        fields = views(self, *arguments)
        cuda.current().synchronize()
        return fields

    monkeypatch.setattr(DeviceArena, "views", there)
