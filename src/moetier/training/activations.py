"""Room for what experts' up projections gave in forward, so that backward need not compute it again.

A forward that finds no room keeps nothing, and its backward computes again: the bits are the same. One allocation,
made when it is first needed: blocks of this size from the heap would be pages made zero in every step. Knows nothing of
experts, graphs or plans.
"""

from __future__ import annotations

import threading
from collections import deque

import torch

from moetier.record import PAGE, round_up


class Activations:
    """`nbytes` of room on a device, given out in blocks. `kept` and `recomputed` count layers' forwards."""

    def __init__(self, nbytes: int, device: torch.device):
        self.nbytes, self.kept, self.recomputed = nbytes, 0, 0
        self._device = device
        self._room: torch.Tensor | None = None
        self._used: list[tuple[int, int]] = []  # begin and end of every block, ascending
        self._lock = threading.Lock()
        # blocks that nobody holds any more: a garbage collection may end one at any moment, also within `take`
        self._left: deque[int] = deque()

    def block(self) -> Block:
        """One layer's in one forward; without room in it yet."""
        return Block(self)

    def report(self) -> dict[str, int]:
        """The room, and how many layers' forwards kept theirs or left it to backward."""
        return {"nbytes": self.nbytes, "kept": self.kept, "recomputed": self.recomputed}

    def take(self, nbytes: int) -> tuple[int, torch.Tensor] | None:
        """Where a block begins, and its bytes; None where there is no room."""
        with self._lock:
            while self._left:
                left = self._left.popleft()
                self._used = [span for span in self._used if span[0] != left]
            size = round_up(nbytes, PAGE)
            begin = self._gap(size)
            if begin is None:
                self.recomputed += 1
                return None
            if self._room is None:
                self._room = torch.empty(self.nbytes, dtype=torch.uint8, device=self._device)
            self._used = sorted([*self._used, (begin, begin + size)])
            self.kept += 1
            return begin, self._room[begin : begin + nbytes]

    def give_back(self, begin: int) -> None:
        """A block that was taken."""
        self._left.append(begin)

    def _gap(self, nbytes: int) -> int | None:
        """The first place for so many bytes."""
        begin = 0
        for used_begin, used_end in self._used:
            if begin + nbytes <= used_begin:
                return begin
            begin = used_end
        return begin if begin + nbytes <= self.nbytes else None


class Block:
    """The up projections of one layer's experts in one forward. Its room is free again when nobody holds it."""

    __slots__ = ("_begin", "_owner", "_up")

    def __init__(self, owner: Activations):
        self._owner = owner
        self._begin: int | None = None
        self._up: torch.Tensor | None = None

    def room(self, rows: int, width: int, dtype: torch.dtype) -> torch.Tensor | None:
        """[rows, width] to compute into, which is then kept; None where there is no room."""
        taken = self._owner.take(rows * width * dtype.itemsize)
        if taken is None:
            return None
        self._begin, raw = taken
        self._up = raw.view(dtype).view(rows, width)
        return self._up

    @property
    def up(self) -> torch.Tensor | None:
        """What forward computed, [S, width], in the order of its sorted rows; None if it was not kept, or is gone."""
        return self._up

    def free(self) -> None:
        """Not needed any more."""
        begin, self._begin, self._up = self._begin, None, None
        if begin is not None:
            self._owner.give_back(begin)

    def __del__(self) -> None:
        self.free()
