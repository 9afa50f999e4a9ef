"""Blocks of a field from a reader of byte spans: whole rows as they are, some columns picked out of whole rows, casts.

What `SlicedStore.read_block` of every store is made of. Knows neither files nor records.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from moetier.record import Field
from moetier.stores.diskio import aligned_buffer

WINDOW_NBYTES = 1 << 20  # read aside at once

Span = Callable[[int, memoryview], None]  # fill the memory from a byte of the stored field on


class _Windows(threading.local):
    """Each thread's own memory for rows that are cast or picked from before they reach their block."""

    memory = memoryview(b"")


_windows = _Windows()


def _window(nbytes: int) -> memoryview:
    if len(_windows.memory) < nbytes:
        _windows.memory = aligned_buffer(max(nbytes, WINDOW_NBYTES))
    return _windows.memory[:nbytes]


def read_block(
    span: Span, field: Field, stored: torch.dtype, rows: range, columns: range | None, into: memoryview
) -> int:
    """Fill `into` with a block of a field that `span` reads in the dtype `stored`; returns the bytes read."""
    width = field.nbytes // field.shape[0] // field.dtype.itemsize
    row_nbytes = width * stored.itemsize
    if stored == field.dtype and columns is None:
        span(rows.start * row_nbytes, into)
        return len(into)
    target = torch.frombuffer(into, dtype=field.dtype).view(len(rows), -1)
    step = max(1, WINDOW_NBYTES // row_nbytes)
    for first in range(rows.start, rows.stop, step):
        count = min(step, rows.stop - first)
        window = _window(count * row_nbytes)
        span(first * row_nbytes, window)
        block = torch.frombuffer(window, dtype=stored).view(count, width)
        picked = block if columns is None else block[:, columns.start : columns.stop]
        target[first - rows.start : first - rows.start + count].copy_(picked)
    return len(rows) * row_nbytes
