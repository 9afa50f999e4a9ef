"""The words the residency core speaks: which expert, which access, in which phase.

Knows nothing about bytes, devices or time in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple


class ExpertKey(NamedTuple):
    """One expert of one MoE layer. `layer` counts MoE layers only, from 0, in the order a forward visits them."""

    layer: int
    expert: int


class Phase(IntEnum):
    """What kind of step an access belongs to; admission policies look at it."""

    PREFILL = 0
    DECODE = 1


class Part(IntEnum):
    """Which part of a training step an access belongs to; the order of layers follows from it, up or down."""

    SERVE = 0  # none: a forward without a backward, as in inference and evaluation
    FORWARD = 1
    BACKWARD = 2
    UPDATE = 3  # of the records, by the optimizer


@dataclass(frozen=True, slots=True)
class Access:
    """One (step, layer): the union of the experts that the step's tokens need there.

    An access is atomic: its keys are classified together against residency at its start, and none of them is evicted
    while the access still needs it. New facts become new fields here, never new parameters of policy hooks.
    """

    time: int  # number of this access since the model was loaded; strictly increasing
    layer: int
    keys: tuple[ExpertKey, ...]  # distinct, ascending by expert
    tokens: tuple[int, ...] = ()  # tokens routed to each key, in the order of `keys`; empty if unknown
    phase: Phase = Phase.DECODE
    sequence: int = 0  # which stream of tokens, for policies that keep per-sequence records; 0 if several at once
    mass: tuple[float, ...] = ()  # sum of the gate weights of each key's tokens, in the order of `keys`; may be unknown
    writes: bool = False  # its user may change the records: it gets none that is being written home
    part: Part = Part.SERVE
