"""What an expert costs on this machine: on the CPU, on the link, on the device, off the disk. Measured at load.

Everything is measured where a run will use it: real slots of the arenas (still empty), records of the store, the
model's own experts module, the engine's copies and reads. See `costs` for what is made of it.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch

from moetier.arenas import DeviceArena
from moetier.cache import ExpertCache
from moetier.costs import Cost, Costs
from moetier.experts import expert_math, outputs_of
from moetier.fences import Fence
from moetier.measure import measure_disk, measure_h2d
from moetier.misses import make_miss_policy
from moetier.residency import Residency

DISK_NBYTES = 256 * 2**20  # read side by side at most: they take memory beside the arenas
TOKENS = (1, 2, 4, 16, 64)
SECONDS = 1.6  # of measuring, about; a first run of anything slow comes on top
COLD_NBYTES = 64 * 2**20  # of records that are used in turn, so that weights come from memory as they will


@dataclass(frozen=True, slots=True)
class Calibration:
    """The costs, and what they rest on: (tokens, seconds) of an expert as measured, and the threads that computed."""

    costs: Costs
    record_nbytes: int
    cpu: tuple[tuple[int, float], ...]
    device: tuple[tuple[int, float], ...]  # empty without a device
    threads: int
    seconds: float  # that measuring took

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "costs": self.costs.to_dict(),
            "record_nbytes": self.record_nbytes,
            "cpu": [list(point) for point in self.cpu],
            "device": [list(point) for point in self.device],
            "threads": self.threads,
            "seconds": self.seconds,
        }


def serve_in_place(cache: ExpertCache, name: str, module: Any, top_k: int) -> Calibration | None:
    """Have a cache choose by `name`, of `misses.CPU_EXPERTS`, which misses the CPU computes; the measured costs.

    Without a device nothing is chosen, and a warning says so. Raises `ConfigError` for an unknown name.
    """
    if name == "off":
        return None
    if cache.device is None:
        warnings.warn("cpu_experts is not used: the model computes on the CPU", RuntimeWarning, stacklevel=2)
        return None
    found = calibrate(cache, module, 0, top_k)
    core = cache.core if isinstance(cache.core, Residency) else cache.core.core
    core.misses = make_miss_policy(name, found.costs)
    return found


def calibrate(cache: ExpertCache, module: Any, layer: int = 0, top_k: int = 8, seconds: float = SECONDS) -> Calibration:
    """Measure with the experts `module` of a layer and a cache that has not served yet: its slots are written to.

    The disk is measured only where there is a device: without one every expert is computed on the CPU anyway.
    """
    begin = time.perf_counter()
    bench = Bench(cache, module, layer)
    points = bench.cpu(seconds * (0.35 if cache.device else 0.9))
    costs = Costs(Cost.fit(points))
    device: tuple[tuple[int, float], ...] = ()
    if cache.device is not None:
        device = bench.device(seconds * 0.1)
        link = measure_h2d(cache, bench.slots, seconds * 0.1)
        assert link is not None
        nbytes = cache.store.layout(layer).nbytes
        width = max(1, min(top_k, DISK_NBYTES // nbytes))
        disk = measure_disk(cache.store, width, cache.readers, seconds * 0.25)
        costs = Costs(
            cpu=costs.cpu,
            device=Cost.fit(device),
            link=nbytes / link.gbps / 1e9,  # the latency of one is over while another's bytes move
            disk=nbytes / disk.gbps / 1e9,
            disk_latency=disk.latency,
            in_place=bench.rows(seconds * 0.05),
        )
        costs = replace(costs, contention=bench.contention(costs.cpu, seconds * 0.15))
    nbytes = cache.store.layout(layer).nbytes
    return Calibration(costs, nbytes, points, device, torch.get_num_threads(), time.perf_counter() - begin)


class Bench:
    """The experts of one layer in the first slots of an empty cache, used in turn."""

    def __init__(self, cache: ExpertCache, module: Any, layer: int):
        self._cache, self._module = cache, module
        self._layout = cache.store.layout(layer)
        enough = 1 + COLD_NBYTES // self._layout.nbytes
        self.slots = max(1, min(enough, *(arena.slots for arena in (cache.host, cache.device) if arena is not None)))
        host_slots = max(1, min(enough, cache.host.slots))
        self._fields = [cache.host.views(slot, self._layout, 0) for slot in range(host_slots)]
        generator = torch.Generator().manual_seed(0)
        for tensor in self._fields[0].values():  # values as weights have them: zeros, or garbage, may cost other times
            tensor.copy_(torch.randn(tensor.shape, generator=generator).mul_(0.02))
        for fields in self._fields[1:]:
            for name, tensor in fields.items():
                tensor.copy_(self._fields[0][name])
        weight = self._fields[0]["down_proj"]
        self._width = outputs_of(weight, module.is_transposed)
        self._dtype = weight.dtype

    def cpu(self, seconds: float) -> tuple[tuple[int, float], ...]:
        """Seconds of an expert in host memory, by tokens; the medians of what fits into the time."""
        found: list[tuple[int, float]] = []
        end = time.perf_counter() + seconds
        with torch.no_grad():
            for tokens in TOKENS:
                if len(found) > 1 and 3 * found[-1][1] * tokens / found[-1][0] > end - time.perf_counter():
                    break  # a large expert: what is known has to do
                found.append((tokens, self._cpu(tokens, seconds / len(TOKENS))))
        return tuple(found)

    def _cpu(self, tokens: int, seconds: float) -> float:
        rows = torch.randn(tokens, self._width).to(self._dtype)
        turn = 0

        def once() -> None:
            nonlocal turn
            turn = (turn + 1) % len(self._fields)
            expert_math(self._module, rows, self._fields[turn])

        return _timed(once, seconds)

    def device(self, seconds: float) -> tuple[tuple[int, float], ...]:
        """The same where tier 0 is, launches included."""
        arena = self._cache.device
        assert arena is not None
        for slot in range(self.slots):
            arena.fill(slot, self._cache.host.record(slot, 0, self._layout.nbytes))
        views = [arena.views(slot, self._layout) for slot in range(self.slots)]
        found = []
        with torch.no_grad():
            for tokens in TOKENS:
                rows = torch.zeros(tokens, self._width, dtype=self._dtype, device=arena.device)

                def once(rows: torch.Tensor = rows) -> None:
                    for fields in views[:8]:
                        expert_math(self._module, rows, fields)
                    _wait_for(arena.device)

                found.append((tokens, _timed(once, seconds / len(TOKENS)) / len(views[:8])))
        return tuple(found)

    def rows(self, seconds: float) -> float:
        """A token's rows to the host, and results back."""
        arena = self._cache.device
        if not isinstance(arena, DeviceArena):
            return 0.0
        hidden = torch.zeros(1, self._width, dtype=self._dtype, device=arena.device)

        def once() -> None:
            arena.from_host(arena.to_host([hidden], arena.mark()))
            _wait_for(arena.device)

        return _timed(once, seconds)

    def contention(self, alone: Cost, seconds: float) -> float:
        """The share by which the CPU's math takes longer while records are copied to the device all the time."""
        arena, host = self._cache.device, self._cache.host
        assert arena is not None
        stop, slot = threading.Event(), 0

        def wait(fence: Fence | None) -> None:
            if fence is not None:
                fence.synchronize()

        def copy() -> None:
            nonlocal slot
            fences: list[Fence | None] = []
            while not stop.is_set():
                slot = (slot + 1) % self.slots
                fences.append(arena.fill(slot, host.record(slot, 0, self._layout.nbytes)))
                if len(fences) > 2:
                    wait(fences.pop(0))
            for fence in fences:
                wait(fence)

        thread = threading.Thread(target=copy, name="moetier calibration", daemon=True)
        thread.start()
        try:
            with torch.no_grad():
                beside = self._cpu(1, seconds)
        finally:
            stop.set()
            thread.join()
        return max(0.0, beside / alone(1) - 1)


def _timed(once: Callable[[], None], seconds: float) -> float:
    """The median of runs for so long; three at least, one if that is too long; the first does not count."""
    times: list[float] = []
    begin = time.perf_counter()
    once()
    end = begin + seconds
    least = 3 if time.perf_counter() < end else 1
    while len(times) < least or (time.perf_counter() < end and len(times) < 200):
        begin = time.perf_counter()
        once()
        times.append(time.perf_counter() - begin)
    return median(times)


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.cuda.current_stream(device).synchronize()
