"""The order of copies and kernels on a GPU, kept with events: per slot, what must have ended before what may begin.

Knows streams and events of CUDA, and slots by number; no bytes, no records, no policies. Nothing here makes the host
wait. Who calls when, and why that is enough, is in docs/gpu.md.

Not locked: between a fill and a use of the same slot there is always the residency core, and its lock.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Protocol

import torch


class Fence(Protocol):
    """Something on its way on the device, such as a CUDA event."""

    def query(self) -> bool:
        """Whether it has ended."""

    def synchronize(self) -> None:
        """Wait for it, without the interpreter's lock."""


class SlotFences:
    """Per slot of a device arena: the copy that fills it, and its last uses, one per stream that used it."""

    def __init__(self, slots: int):
        self._fill: list[Any] = [None] * slots
        self._uses: list[dict[int, Any]] = [{} for _ in range(slots)]

    def before_overwriting(self, slot: int, stream: Any) -> None:
        """`stream` goes on when nobody reads or writes the slot any more."""
        self.before_reading(slot, stream)
        for event in list(self._uses[slot].values()):
            stream.wait_event(event)

    def before_reading(self, slot: int, stream: Any) -> None:
        """`stream` goes on when the slot is filled."""
        fill = self._fill[slot]
        if fill is None:
            return
        if fill.query():
            self._fill[slot] = None  # there for every stream, and for good
        else:
            stream.wait_event(fill)

    def filling(self, slot: int, fill: Any) -> None:
        """`fill` is the event behind the copy into the slot; what used it before was waited for by that copy."""
        self._fill[slot] = fill
        self._uses[slot] = {}

    def used(self, slot: int, stream: Any) -> None:
        """What is queued on `stream` so far uses the slot."""
        uses = self._uses[slot]
        event = uses.get(stream.cuda_stream)
        if event is None:
            event = uses[stream.cuda_stream] = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(stream)


class CopyClock:
    """How long a link was busy: the union of the times between pairs of timing events, by the device's own clock.

    Times are taken between events that lie near each other: a distance has seven digits only.
    """

    def __init__(self) -> None:
        self._open: deque[tuple[Any, Any]] = deque()
        self._latest: Any = None  # the last end so far
        self._seconds = 0.0

    def add(self, begin: Any, end: Any) -> None:
        """A copy lies between two timing events that were recorded."""
        self._open.append((begin, end))
        if len(self._open) > 64:
            self._settle()

    def seconds(self) -> float:
        """Seconds with a copy under way, of the copies that have ended."""
        self._settle()
        return self._seconds

    def _settle(self) -> None:
        while self._open and self._open[0][1].query():
            try:
                begin, end = self._open.popleft()
            except IndexError:  # another thread looks too
                return
            busy = begin.elapsed_time(end)
            if self._latest is not None:
                later = self._latest.elapsed_time(end)
                if later <= 0:  # beside others all the time
                    continue
                busy = min(busy, later)
            self._latest = end
            self._seconds += busy / 1e3
