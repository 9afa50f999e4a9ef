"""How a training run divides host memory: slots for weights, optimizer states and gradients out of one budget.

Arithmetic only. Every step reads and writes all three of an expert's records, so each kind gets the same share of its
own records; where that is not a slot each, the least is one of each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from moetier.errors import CapacityError
from moetier.plan import Machine, Workload, format_size, parse_slots

# beside a resident weight: its gradient and two moments; of half-precision ones the moments are fp32, and a master
RESIDENT_FLOAT, RESIDENT_HALF = 3.0, 7.0
LEAST = 1  # slots of each kind


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of a slot of each kind. That of a state is at most this: the optimizer is not known when memory is divided.

    `resident` are the bytes that training takes for a byte of resident weights, beside the weight.
    """

    weights: int
    state: int
    gradients: int
    resident: float


@dataclass(frozen=True, slots=True)
class Division:
    """Slots of each kind; those of states as bytes, which the optimizer's own records are cut from."""

    weights: int
    gradients: int
    state_nbytes: int
    state_slots: int | None  # asked for


def divide(
    workload: Workload,
    machine: Machine,
    sizes: Sizes,
    weights: str | int | None = None,
    state: str | int | None = None,
    gradients: str | int | None = None,
) -> Division:
    """Divide the host budget. Numbers (or shares) that were asked for hold, and the others follow `weights` then.

    Raises `CapacityError` with the smallest budget in bytes where there is not a slot of each.
    """
    records = workload.records
    asked = [None if kind is None else min(records, parse_slots(kind, records)) for kind in (weights, state, gradients)]
    if asked[0] is not None:
        own = asked[0]
        states = own if asked[1] is None else asked[1]
        return Division(own, own if asked[2] is None else asked[2], states * sizes.state, states)
    together = sizes.weights + sizes.state + sizes.gradients
    fixed = fixed_nbytes(workload, sizes)
    room = machine.host_nbytes - fixed
    if room < LEAST * together:
        raise CapacityError(
            f"host_memory {format_size(machine.host_nbytes)} leaves no room to train: the minimum is "
            f"{format_size(fixed + together)} ({fixed + together} bytes): {format_size(fixed)} for what is no expert, "
            "and a slot each for an expert's weights, optimizer state and gradients",
            minimum_slots=LEAST,
        )
    count = min(records, room // together)
    chosen = [count if kind is None else kind for kind in asked]
    return Division(chosen[0] or count, chosen[2] or count, (chosen[1] or count) * sizes.state, asked[1])


def fixed_nbytes(workload: Workload, sizes: Sizes) -> int:
    """What a run takes besides slots: the resident weights with all that training adds to them, and working memory."""
    return workload.resident_nbytes + int(workload.resident_nbytes * sizes.resident) + workload.workspace_nbytes


def as_planned(workload: Workload, sizes: Sizes, division: Division) -> Workload:
    """The workload whose plan has all of a training run's memory in it, with `division.weights` slots."""
    return replace(
        workload,
        resident_nbytes=workload.resident_nbytes + int(workload.resident_nbytes * sizes.resident),
        kv_nbytes=0,
        workspace_nbytes=workload.workspace_nbytes + division.state_nbytes + division.gradients * sizes.gradients,
        slice_nbytes=0,  # training needs whole records
    )
