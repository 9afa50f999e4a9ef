"""Blocks of a field that are not as a file has them: rows are read aside, cast, and columns picked from them."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from moetier.record import Field
from moetier.stores.diskio import aligned_buffer

_WINDOW_NBYTES = 1 << 20

ReadRows = Callable[[int, memoryview], int]  # fills the view with whole stored rows from this one on; bytes read


class _Windows(threading.local):
    """Each thread's own memory for rows that are cast or picked from before they reach their place."""

    memory = memoryview(b"")


_windows = _Windows()


def fill_block(
    read: ReadRows, stored: torch.dtype, field: Field, rows: range, columns: range | None, into: memoryview
) -> int:
    """Fill `into` with `rows` of a field, of each the `columns` (None: all), from rows of the `stored` dtype."""
    width = field.nbytes // field.shape[0] // field.dtype.itemsize
    row_nbytes = width * stored.itemsize
    target = torch.frombuffer(into, dtype=field.dtype).view(len(rows), -1)
    total, step = 0, max(1, _WINDOW_NBYTES // row_nbytes)
    for first in range(rows.start, rows.stop, step):
        count = min(step, rows.stop - first)
        window = _window(count * row_nbytes)
        total += read(first, window)
        block = torch.frombuffer(window, dtype=stored).view(count, width)
        picked = block if columns is None else block[:, columns.start : columns.stop]
        target[first - rows.start : first - rows.start + count].copy_(picked)
    return total


def _window(nbytes: int) -> memoryview:
    if len(_windows.memory) < nbytes:
        _windows.memory = aligned_buffer(max(nbytes, _WINDOW_NBYTES))
    return _windows.memory[:nbytes]
