"""Arenas: one allocation per tier, cut into equal slots, with tensor views of the records in them.

Knows addresses and devices; decides nothing. What orders copies against kernels on a GPU is in `fences`.
"""

from __future__ import annotations

import contextlib
import mmap
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from moetier.fences import CopyClock, Fence, SlotFences
from moetier.record import RecordLayout, round_up

CHUNK = 4 * 2**20  # bytes of a copy that others may overtake: 0.1 to 0.4 ms on a bus


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
        self._held: dict[int, list[Fence]] = {}

    def hold(self, slot: int, fence: Fence) -> None:
        """A copy reads this slot until `fence` passes, though it was reported already: see `wait_unread`."""
        held = [other for other in self._held.get(slot, ()) if not other.query()]
        self._held[slot] = [*held, fence]

    def wait_unread(self, slot: int) -> None:
        """Wait until no copy reads the slot any more. Every worker calls it before it writes there."""
        for fence in self._held.get(slot, ()):
            fence.synchronize()
        self._held.pop(slot, None)

    def _lock_pages(self) -> bool:
        # registered in place: torch's own pinned allocator would round a large arena up to a power of two
        status = int(torch.cuda.cudart().cudaHostRegister(self._bytes.data_ptr(), self._bytes.numel(), 0))  # type: ignore[no-untyped-call]
        if status:
            # the error stays on this thread's record, and the next kernel would be blamed for it: let one take it off
            with contextlib.suppress(RuntimeError):
                torch.ones(1, device="cuda").add_(1)
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
    """Slots in GPU memory. Copies are enqueued on streams of their own, ordered against the math by events.

    A copy has two ends. *Readable*, when it is enqueued: `views` makes the stream that will compute wait for it, on the
    device. *Finished*, when its fence has passed: then its source may be overwritten (`HostArena.hold`). A slot is
    filled after the kernels and copies that were said to use it (`used`). So the host never waits for the device here,
    but for `save`, whose bytes it needs, and for `fill_behind`, which keeps the link free for others.
    """

    def __init__(self, slots: int, slot_nbytes: int, device: torch.device):
        self.slots, self.device = slots, device
        self.slot_nbytes = round_up(slot_nbytes, 512)  # what the caching allocator rounds to
        self._bytes = torch.empty(slots * self.slot_nbytes, dtype=torch.uint8, device=device)
        # two for demand, so that one copy's wait for its slot is over before the other's bytes are through
        self._lanes = [self._stream(), self._stream()]
        self._behind, self._out, self._rows = self._stream(), self._stream(), self._stream()
        self._turn = 0
        self._fences = SlotFences(slots)
        self._clock = CopyClock()
        self._views: list[dict[int, dict[str, torch.Tensor]]] = [{} for _ in range(slots)]

    def _stream(self) -> Any:
        stream: Any = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        # the allocator may have given memory that kernels still use, and may give it on when copies still do
        stream.wait_stream(torch.cuda.current_stream(self.device))
        self._bytes.record_stream(stream)
        return stream

    def record(self, slot: int, nbytes: int) -> torch.Tensor:
        """The bytes of the record in a slot, as a flat uint8 tensor on the device."""
        begin = slot * self.slot_nbytes
        return self._bytes[begin : begin + nbytes]

    def fill(self, slot: int, source: torch.Tensor) -> Fence:
        """Enqueue the copy of a record from page-locked host memory; the fence passes when the source may be reused."""
        self._turn = (self._turn + 1) % len(self._lanes)
        return self._enqueue(slot, [source], self._lanes[self._turn])

    def fill_behind(self, slot: int, source: torch.Tensor) -> Fence:
        """Like `fill`, but in chunks, of which two at most are enqueued: a demand copy never waits for more.

        For prefetches, and sources that are not page locked. Called by a worker, which waits between the chunks.
        """
        return self._enqueue(slot, list(torch.split(source, CHUNK)), self._behind)

    def _enqueue(self, slot: int, chunks: Sequence[torch.Tensor], stream: Any) -> Fence:
        begin = slot * self.slot_nbytes
        ends: list[Any] = []
        with torch.cuda.stream(stream):
            self._fences.before_overwriting(slot, stream)
            try:
                for chunk in chunks:
                    if len(ends) > 1:
                        ends[-2].synchronize()  # this worker only
                    started = self._event(stream)
                    self._copy(self._bytes[begin : begin + chunk.numel()], chunk)
                    ends.append(self._event(stream))
                    self._clock.add(started, ends[-1])
                    begin += chunk.numel()
            finally:
                if ends:  # of a copy that failed half way too: it still writes
                    self._fences.filling(slot, ends[-1])
        done: Fence = ends[-1]
        return done

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def _event(self, stream: Any) -> Any:
        # blocking: a thread that waits for it sleeps, and leaves its core to the math
        event = torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
        event.record(stream)
        return event

    def save(self, slot: int, target: torch.Tensor) -> None:
        """Copy a record to page-locked host memory, after the kernels that last used it; returns when it is there.

        Called by a worker.
        """
        with torch.cuda.stream(self._out):
            self._fences.before_overwriting(slot, self._out)  # kernels may have changed it
            self._copy(target, self.record(slot, target.numel()))
            done = self._event(self._out)
        done.synchronize()

    def mark(self) -> Fence:
        """What is queued on the current stream so far, for `to_host`."""
        event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        done: Fence = event
        return done

    def to_host(self, tensors: Sequence[torch.Tensor], mark: Fence) -> list[torch.Tensor]:
        """Copies in page-locked memory of what was there at the mark; kernels queued later are not waited for."""
        with torch.cuda.stream(self._rows):
            self._rows.wait_event(mark)
            copies = [_page_locked(tensor.shape, tensor.dtype) for tensor in tensors]
            for copy, tensor in zip(copies, tensors, strict=True):
                self._copy(copy, tensor)
                tensor.record_stream(self._rows)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(self._rows)
        done.synchronize()
        return copies

    def from_host(self, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        """The tensors one below the other, enqueued to the device on the current stream."""
        packed = _page_locked(torch.Size([sum(len(part) for part in rows), *rows[0].shape[1:]]), rows[0].dtype)
        torch.cat(list(rows), out=packed)
        return packed.to(self.device, non_blocking=True)

    def used(self, slot: int) -> None:
        """The kernels queued so far on the current stream use this slot."""
        self._fences.used(slot, torch.cuda.current_stream(self.device))

    def views(self, slot: int, layout: RecordLayout) -> dict[str, torch.Tensor]:
        """The record's fields on the device, for kernels that are queued on the current stream from now on.

        Asked for at every lease: the stream waits for a fill that is under way. The tensors are made once.
        """
        self._fences.before_reading(slot, torch.cuda.current_stream(self.device))
        views = self._views[slot].get(id(layout))
        if views is None:
            views = self._views[slot][id(layout)] = layout.views(self.record(slot, layout.nbytes))
        return views

    def busy_seconds(self) -> float:
        """Seconds that copies into the arena took so far, by the device's clock; overlapping ones counted once."""
        return self._clock.seconds()

    def close(self) -> None:
        """Wait for the copies under way; afterwards their host memory may go."""
        for stream in (*self._lanes, self._behind, self._out):
            stream.synchronize()


def _page_locked(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    # of torch's own cache, which waits for copies before it gives memory out again
    return torch.empty(shape, dtype=dtype, pin_memory=True)


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
