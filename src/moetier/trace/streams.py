"""Which tokens run in one step: as recorded, or regrouped into concurrent streams."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moetier.access import Phase

if TYPE_CHECKING:
    from moetier.trace import Trace


class Step(NamedTuple):
    """One forward pass: its tokens' rows in the trace; the sequence, or 0 if there are several."""

    rows: NDArray[np.int64]
    phase: Phase
    sequence: int


def recorded_steps(trace: Trace) -> Iterator[Step]:
    """Steps as they were recorded."""
    if trace.tokens == 0:
        return
    edges = np.flatnonzero(np.diff(trace.step)) + 1
    for rows in np.split(np.arange(trace.tokens), edges):
        sequences = trace.sequence[rows]
        sequence = int(sequences[0]) if (sequences == sequences[0]).all() else 0
        yield Step(rows, Phase(int(trace.phase[rows].min())), sequence)


def in_streams(trace: Trace, batch: int) -> Iterator[Step]:
    """`batch` streams side by side, each taking the next sequence when one ends; prefills run alone."""
    waiting = deque(trace.sequences())
    steps_of = _steps_by_sequence(trace)
    streams: list[deque[NDArray[np.int64]]] = []
    while True:
        while waiting and len(streams) < batch:
            sequence = waiting.popleft()
            steps = deque(steps_of[sequence])
            while steps and trace.phase[steps[0][0]] == Phase.PREFILL:
                yield Step(steps.popleft(), Phase.PREFILL, sequence)
            if steps:
                streams.append(steps)
        if not streams:
            return
        rows = np.concatenate([steps.popleft() for steps in streams])
        yield Step(rows, Phase.DECODE, int(trace.sequence[rows[0]]) if batch == 1 else 0)
        streams = [steps for steps in streams if steps]


def _steps_by_sequence(trace: Trace) -> dict[int, list[NDArray[np.int64]]]:
    order = np.argsort(trace.sequence, kind="stable")
    sequence, step = trace.sequence[order], trace.step[order]
    edges = np.flatnonzero((np.diff(sequence) != 0) | (np.diff(step) != 0)) + 1
    steps: dict[int, list[NDArray[np.int64]]] = {}
    for rows in np.split(order, edges):
        if len(rows):
            steps.setdefault(int(trace.sequence[rows[0]]), []).append(rows)
    return steps
