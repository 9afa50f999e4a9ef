"""A store in memory, for tests of what is above stores. Counts what is written, and can refuse to write."""

from __future__ import annotations

from collections.abc import Sequence

from moetier.access import ExpertKey
from moetier.errors import StoreError
from moetier.record import PAGE, RecordLayout, round_up


class MemoryStore:
    """Records of these layouts, zeros at first. `refuse` is the write after which every one fails."""

    def __init__(self, layouts: Sequence[RecordLayout], experts: Sequence[int]):
        self._layouts, self._counts = list(layouts), list(experts)
        self.data = {
            ExpertKey(layer, expert): bytearray(layout.nbytes)
            for layer, (layout, count) in enumerate(zip(layouts, experts, strict=True))
            for expert in range(count)
        }
        self.writes = 0
        self.refuse: int | None = None

    @property
    def layers(self) -> int:
        return len(self._layouts)

    @property
    def experts(self) -> int:
        return max(self._counts)

    @property
    def records(self) -> int:
        return sum(self._counts)

    @property
    def slot_nbytes(self) -> int:
        return max(round_up(layout.nbytes, PAGE) for layout in self._layouts)

    def layout(self, layer: int) -> RecordLayout:
        return self._layouts[layer]

    def phase(self, key: ExpertKey) -> int:
        return 0

    def segments(self, key: ExpertKey) -> int:
        return 1

    def read(self, key: ExpertKey, segment: int, into: memoryview) -> int:
        into[: len(self.data[key])] = self.data[key]
        return len(into)

    def write(self, key: ExpertKey, segment: int, data: memoryview) -> int:
        self.writes += 1
        if self.refuse is not None and self.writes > self.refuse:
            raise StoreError(f"{key}: the disk is full")
        self.data[key][:] = data
        return len(data)

    def close(self) -> None:
        pass
