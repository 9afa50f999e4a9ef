"""Arenas: one allocation per tier, cut into equal slots, with tensor views of the records in them.

Knows addresses and devices; decides nothing. On a GPU it also keeps the fences that order copies against kernels.
"""

from __future__ import annotations

import mmap
import warnings
from typing import Any

import torch

from moetier.record import RecordLayout, round_up


class HostArena:
    """Slots in host memory, page aligned; page locked when a GPU copies from them."""

    def __init__(self, slots: int, slot_nbytes: int, page_locked: bool = False):
        self.slots, self.slot_nbytes = slots, slot_nbytes
        self.device = torch.device("cpu")
        pages = mmap.mmap(-1, slots * slot_nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._bytes = torch.frombuffer(pages, dtype=torch.uint8)
        self.page_locked = page_locked and self._lock_pages()
        self._memory = memoryview(self._bytes.numpy())  # type: ignore[arg-type]
        self._views: list[dict[tuple[int, int], dict[str, torch.Tensor]]] = [{} for _ in range(slots)]

    def _lock_pages(self) -> bool:
        # registered in place: torch's own pinned allocator would round a large arena up to a power of two
        status = int(torch.cuda.cudart().cudaHostRegister(self._bytes.data_ptr(), self._bytes.numel(), 0))  # type: ignore[no-untyped-call]
        if status:
            warnings.warn(
                f"host memory could not be page locked (CUDA error {status}); copies to the GPU will be slower. "
                "Raise the locked-memory limit (ulimit -l) or lower host_memory.",
                RuntimeWarning,
                stacklevel=3,
            )
        return not status

    def touch(self) -> None:
        """Have the kernel provide every page now; what is in the slots is lost."""
        self._bytes.zero_()

    def close(self) -> None:
        """Give the page lock back; the memory itself goes with the last view."""
        if self.page_locked:
            torch.cuda.cudart().cudaHostUnregister(self._bytes.data_ptr())  # type: ignore[no-untyped-call]
            self.page_locked = False

    def memory(self, slot: int, phase: int, nbytes: int) -> memoryview:
        """The writable bytes of a record that starts `phase` bytes into a slot."""
        begin = slot * self.slot_nbytes + phase
        return self._memory[begin : begin + nbytes]

    def record(self, slot: int, phase: int, nbytes: int) -> torch.Tensor:
        """The same bytes as a flat uint8 tensor."""
        begin = slot * self.slot_nbytes + phase
        return self._bytes[begin : begin + nbytes]

    def views(self, slot: int, layout: RecordLayout, phase: int) -> dict[str, torch.Tensor]:
        """A record's fields. Made once per slot, layout and phase: making views costs microseconds, and few differ."""
        kind = (phase, id(layout))
        views = self._views[slot].get(kind)
        if views is None:
            views = self._views[slot][kind] = layout.views(self.record(slot, phase, layout.nbytes))
        return views


class DeviceArena:
    """Slots in GPU memory. Copies run on their own stream.

    Two fences order them against the math, both recorded on the compute stream or waited for by it, so the host never
    blocks on the device: a slot is filled only after the kernels that last read it (`release` records an event that
    the next copy into the slot waits for), and kernels start only after the copy (`fill` returns when it is done).
    """

    def __init__(self, slots: int, slot_nbytes: int, device: torch.device):
        self.slots, self.device = slots, device
        self.slot_nbytes = round_up(slot_nbytes, 512)  # what the caching allocator rounds to
        self._bytes = torch.empty(slots * self.slot_nbytes, dtype=torch.uint8, device=device)
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._last_use: list[Any] = [None] * slots
        self._views: list[dict[int, dict[str, torch.Tensor]]] = [{} for _ in range(slots)]

    def record(self, slot: int, nbytes: int) -> torch.Tensor:
        """The bytes of the record in a slot, as a flat uint8 tensor on the device."""
        begin = slot * self.slot_nbytes
        return self._bytes[begin : begin + nbytes]

    def fill(self, slot: int, source: torch.Tensor) -> None:
        """Copy a record from (page-locked) host memory; returns when the source may be reused. Called by a worker."""
        with torch.cuda.stream(self._stream):
            if self._last_use[slot] is not None:
                self._stream.wait_event(self._last_use[slot])
            self.record(slot, source.numel()).copy_(source, non_blocking=True)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(self._stream)
        done.synchronize()  # this worker only; the compute stream goes on

    def save(self, slot: int, target: torch.Tensor) -> None:
        """Copy a record to (page-locked) host memory, after the kernels that last used it. Called by a worker."""
        with torch.cuda.stream(self._stream):
            if self._last_use[slot] is not None:
                self._stream.wait_event(self._last_use[slot])
            target.copy_(self.record(slot, target.numel()), non_blocking=True)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(self._stream)
        done.synchronize()

    def used(self, slot: int) -> None:
        """The kernels queued so far on the compute stream use this slot."""
        event = self._last_use[slot] or torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        self._last_use[slot] = event

    def views(self, slot: int, layout: RecordLayout) -> dict[str, torch.Tensor]:
        """The record's fields on the device; made once per slot and layout."""
        views = self._views[slot].get(id(layout))
        if views is None:
            views = self._views[slot][id(layout)] = layout.views(self.record(slot, layout.nbytes))
        return views


class HostTierArena:
    """The interface of `DeviceArena` over ordinary memory: a fast tier for machines without a GPU.

    For tests and benchmarks of two tiers: there is no faster memory in it, and nothing to fence.
    """

    def __init__(self, slots: int, slot_nbytes: int):
        self.slots, self.slot_nbytes = slots, slot_nbytes
        self.device = torch.device("cpu")
        self._arena = HostArena(slots, slot_nbytes)

    def record(self, slot: int, nbytes: int) -> torch.Tensor:
        """The bytes of the record in a slot, as a flat uint8 tensor."""
        return self._arena.record(slot, 0, nbytes)

    def fill(self, slot: int, source: torch.Tensor) -> None:
        """Copy a record in. Called by a worker."""
        self.record(slot, source.numel()).copy_(source)

    def save(self, slot: int, target: torch.Tensor) -> None:
        """Copy a record out. Called by a worker."""
        target.copy_(self.record(slot, target.numel()))

    def used(self, slot: int) -> None:
        """Nothing runs behind the caller's back here."""

    def views(self, slot: int, layout: RecordLayout) -> dict[str, torch.Tensor]:
        """The record's fields; made once per slot and layout."""
        return self._arena.views(slot, layout, 0)
