"""The C library's allocator, told to give large blocks back.

glibc raises the size from which a block is a mapping of its own whenever such a block is freed, up to 32 MiB. The
activations of a step then come from the heap, which stays at its largest and, with holes between what lives longer,
grows from step to step: a training loop of 4,096 tokens took 1.5 times the memory that was in use. But the pages of a
new mapping have to be made, which for what comes and goes with every expert is half as much work as computing it: these
blocks come from the heap, and its end stays.
"""

from __future__ import annotations

import ctypes
import os

LARGE = 8 << 20  # bytes from which on a block is a mapping of its own
KEPT = 64 << 20  # free bytes at the end of the heap that stay with the process
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
_VARIABLE = "MALLOC_MMAP_THRESHOLD_"


def give_large_blocks_back() -> bool:
    """For this process from now on. Leaves alone what the environment says; False where nothing was changed."""
    if _VARIABLE in os.environ or "mmap_threshold" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # not in every C library
    return mallopt is not None and bool(mallopt(_M_MMAP_THRESHOLD, LARGE) and mallopt(_M_TRIM_THRESHOLD, KEPT))


def give_holes_back() -> None:
    """Between two steps: the free pages of the heap, so that it does not grow from step to step."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
