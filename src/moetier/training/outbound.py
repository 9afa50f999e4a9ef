"""Gradients on their way from a GPU to host memory: copied behind the kernels that make them, a few at a time.

A ring of page-locked buffers. Nothing here makes the device wait, and the host waits for one copy only: that of the
oldest gradient, when it is received. Knows streams, events and buffers; what becomes of a gradient is the engine's
business.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from moetier.access import ExpertKey
from moetier.arenas import HostArena
from moetier.record import PAGE, RecordLayout, round_up

DEPTH = 4  # gradients under way: while the host sums one up, others are computed and copied


class Outbound:
    """For gradients of experts with these `layouts`, one a layer, computed on `device`."""

    def __init__(self, layouts: Sequence[RecordLayout], device: torch.device, depth: int = DEPTH):
        self._layouts, self._device = list(layouts), device
        nbytes = max(round_up(layout.nbytes, PAGE) for layout in layouts)
        self._host = HostArena(depth, nbytes, page_locked=True)
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._free = list(range(depth))
        self._under_way: deque[tuple[ExpertKey, int, list[str], Any]] = deque()

    @property
    def full(self) -> bool:
        """Whether one has to be received before another can be sent."""
        return not self._free

    @property
    def under_way(self) -> int:
        """Gradients that were sent and not received."""
        return len(self._under_way)

    def send(self, key: ExpertKey, gradients: Mapping[str, torch.Tensor]) -> None:
        """Enqueue the copy of an expert's gradient, which kernels that are queued on the current stream make.

        The tensors may be dropped at once: their memory is not given to others before it was copied.
        """
        computed: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        computed.record(torch.cuda.current_stream(self._device))
        slot = self._free.pop()
        views = self._host.views(slot, self._layouts[key.layer], 0)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(computed)
            for name, gradient in gradients.items():
                self._copy(views[name], gradient)
                gradient.record_stream(self._stream)
            copied: Any = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            copied.record(self._stream)
        self._under_way.append((key, slot, list(gradients), copied))

    @contextmanager
    def receive(self) -> Iterator[tuple[ExpertKey, dict[str, torch.Tensor]]]:
        """The oldest that was sent, in host memory, for the length of the block. Waits for its copy."""
        key, slot, names, copied = self._under_way.popleft()
        copied.synchronize()
        try:
            views = self._host.views(slot, self._layouts[key.layer], 0)
            yield key, {name: views[name] for name in names}
        finally:
            self._free.append(slot)

    def drop(self) -> None:
        """Forget all that is under way. Later copies come behind them on the same stream, so nobody has to wait."""
        while self._under_way:
            self._free.append(self._under_way.popleft()[1])

    def close(self) -> None:
        """Wait for the copies under way, and give the buffers back."""
        self._stream.synchronize()
        self.drop()
        self._host.close()

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source, non_blocking=True)


def outbound_nbytes(slot_nbytes: int) -> int:
    """Host memory of the buffers, for records of this size."""
    return DEPTH * slot_nbytes
