"""Forwards whose backward is still to come, in order: backward visits them from the newest to the oldest.

That makes the next accesses of a backward exactly known, which is what a prefetch or an eviction policy can use. Knows
nothing of torch: autograd's graph holds on to a `Use` for as long as a backward through it is possible.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator

from moetier.access import Access


class Use:
    """A forward's access. Its backward is possible for as long as somebody holds on to this."""

    __slots__ = ("__weakref__", "access")

    def __init__(self, access: Access):
        self.access = access


class Tape:
    """The uses that have not been played back. One for a model; any thread may call."""

    def __init__(self) -> None:
        self._uses: list[weakref.ref[Use]] = []
        self._lock = threading.Lock()

    def record(self, access: Access) -> Use:
        """A forward that may be followed by a backward; keep the result for as long as it may."""
        use = Use(access)
        with self._lock:
            if self._uses and self._uses[-1]() is None:  # graphs that were thrown away leave from the end
                self._uses = [ref for ref in self._uses if ref() is not None]
            self._uses.append(weakref.ref(use))
        return use

    def play(self, use: Use) -> None:
        """Its backward begins. A second backward through a retained graph finds it gone, which is all right."""
        with self._lock:
            for number in range(len(self._uses) - 1, -1, -1):
                if self._uses[number]() is use:
                    del self._uses[number]
                    return

    def coming(self) -> Iterator[Access]:
        """The accesses whose backward is still to come, as forward made them, the next one first."""
        with self._lock:
            refs = list(self._uses)
        for ref in reversed(refs):
            use = ref()
            if use is not None:
                yield use.access
