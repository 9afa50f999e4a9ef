"""The needs of a trace as two arrays: what statistics and exports work on, without an object per access."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moetier.trace import Trace

__all__ = ["Needs", "needs_of"]


class Needs(NamedTuple):
    """One entry per need, that is per distinct expert of an access, in the order a run asks for them."""

    access: NDArray[np.int64]  # number of the access (step and layer), from 0
    record: NDArray[np.int64]  # layer * num_experts + expert


def needs_of(trace: Trace) -> Needs:
    """The needs of the steps as recorded; experts of an access ascend, as in `Trace.accesses`."""
    if not trace.tokens:
        return Needs(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))
    step = np.cumsum(np.diff(trace.step, prepend=trace.step[0]) != 0)
    access = step[:, None, None] * trace.layers + np.arange(trace.layers)[None, :, None]
    codes = np.sort((access * trace.num_experts + trace.experts)[trace.experts >= 0])
    codes = codes[np.diff(codes, prepend=-1) != 0]
    return Needs(codes // trace.num_experts, codes % trace.records)
