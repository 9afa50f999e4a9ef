"""How a training run divides memory: slots for weights, optimizer states and gradients out of one budget.

Arithmetic only. Every step reads and writes all three of an expert's records, so each kind gets the same share of its
own records; where that is not a slot each, the least is one of each. With a GPU, resident weights and activations are
in its memory, and what is left there are slots for weights once more, from which is computed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from moetier.errors import CapacityError
from moetier.plan import Machine, Plan, Workload, format_size, make_plan, parse_slots

# beside a resident weight: its gradient and two moments; of half-precision ones the moments are fp32, and a master
RESIDENT_FLOAT, RESIDENT_HALF = 3.0, 7.0
LEAST = 1  # slots of each kind
ACTIVATIONS = 4  # on a CPU, a part of the slots' room: there it saves more than slots do (docs/LOG.md, 2026-11-22)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of a slot of each kind. That of a state is at most this: the optimizer is not known when memory is divided.

    `resident` are the bytes that training takes for a byte of resident weights, beside the weight. With a device,
    `host` is what the run takes in host memory besides slots; the workload's own numbers are of the device then.
    """

    weights: int
    state: int
    gradients: int
    resident: float
    host: int = 0


@dataclass(frozen=True, slots=True)
class Division:
    """Slots of each kind; those of states as bytes, which the optimizer's own records are cut from."""

    weights: int
    gradients: int
    state_nbytes: int
    state_slots: int | None  # asked for
    device: int | None = None  # slots of weights on the device, if there is one


def divide(
    workload: Workload,
    machine: Machine,
    sizes: Sizes,
    weights: str | int | None = None,
    state: str | int | None = None,
    gradients: str | int | None = None,
) -> Division:
    """Divide the budgets. Numbers (or shares) that were asked for hold, and the others follow `weights` then.

    `weights` are asked for in the fastest tier: with a device in its memory, and host memory is divided as it is.
    Raises `CapacityError` with the smallest budget in bytes where there is not a slot of each.
    """
    records = workload.records
    if machine.device_nbytes is not None:
        device = _device_slots(workload, machine.device_nbytes, sizes, weights)
        below = replace(workload, resident_nbytes=0, workspace_nbytes=sizes.host)
        return replace(divide(below, Machine(machine.host_nbytes), sizes, None, state, gradients), device=device)
    given = {"slots": weights, "state_slots": state, "gradient_slots": gradients}
    asked = [None if kind is None else min(records, parse_slots(kind, records, n)) for n, kind in given.items()]
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


def _device_slots(workload: Workload, nbytes: int, sizes: Sizes, asked: str | int | None) -> int:
    """Slots of weights on a device of so many bytes, or those asked for."""
    if asked is not None:
        return min(workload.records, parse_slots(asked, workload.records))
    fixed = fixed_nbytes(workload, sizes)
    slots = min(workload.records, (nbytes - fixed) // sizes.weights)
    if slots < LEAST:
        raise CapacityError(
            f"device_memory {format_size(nbytes)} leaves no room to train: the minimum is "
            f"{format_size(fixed + sizes.weights)} ({fixed + sizes.weights} bytes): {format_size(fixed)} for what is "
            f"no expert and the activations of {workload.context} tokens, and a slot for an expert's weights",
            minimum_slots=LEAST,
        )
    return slots


def fixed_nbytes(workload: Workload, sizes: Sizes) -> int:
    """What a run takes besides slots: the resident weights with all that training adds to them, and working memory."""
    return workload.resident_nbytes + int(workload.resident_nbytes * sizes.resident) + workload.workspace_nbytes


def as_planned(workload: Workload, sizes: Sizes, division: Division) -> Workload:
    """The workload whose plan has all of a training run's memory in it, that of the fastest tier's side."""
    others = division.state_nbytes + division.gradients * sizes.gradients if division.device is None else 0
    return replace(
        workload,
        resident_nbytes=workload.resident_nbytes + int(workload.resident_nbytes * sizes.resident),
        kv_nbytes=0,
        workspace_nbytes=workload.workspace_nbytes + others,
        slice_nbytes=0,  # training needs whole records
    )


def training_plan(workload: Workload, machine: Machine, sizes: Sizes, division: Division) -> Plan:
    """The plan of a training run: slots of weights in every tier, and all that it takes on host and device."""
    planned = as_planned(workload, sizes, division)
    if division.device is None:
        return make_plan(planned, machine, division.weights)
    slots = division.weights * sizes.weights
    given = Machine(planned.workspace_nbytes + slots, machine.device_nbytes)  # just the host slots that there are
    host = sizes.host + slots + division.state_nbytes + division.gradients * sizes.gradients
    return replace(make_plan(planned, given, division.device), machine=machine, host_total_nbytes=host)


def activation_share(workload: Workload, machine: Machine, sizes: Sizes) -> int:
    """Bytes that activations take from the slots by default: none on a GPU, whose math is cheap."""
    if machine.device_nbytes is not None:
        return 0
    least = fixed_nbytes(workload, sizes) + LEAST * (sizes.weights + sizes.state + sizes.gradients)
    return max(0, machine.host_nbytes - least) // ACTIVATIONS


def unused_nbytes(plan: Plan) -> int:
    """What a plan leaves of the memory in which the model computes."""
    if plan.machine.device_nbytes is None:
        return plan.machine.host_nbytes - plan.host_total_nbytes
    return plan.machine.device_nbytes - plan.device_total_nbytes
