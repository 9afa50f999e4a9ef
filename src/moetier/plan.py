"""Sizing: how many slots a memory budget gives, what else needs memory, and whether that is enough.

Arithmetic only. Slot bytes are the rounded bytes that an arena really takes, not the raw bytes of an expert.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from moetier.errors import CapacityError, ConfigError

PAGE = 4096  # bytes: buffers for slices are whole pages
_UNITS = {"": 1, "b": 1}
_UNITS |= {prefix + suffix: 1000**power for power, prefix in enumerate("kmgt", 1) for suffix in ("b",)}
_UNITS |= {prefix + suffix: 1024**power for power, prefix in enumerate("kmgt", 1) for suffix in ("", "ib", "i")}


def parse_size(text: str | int, what: str = "size") -> int:
    """Bytes from `8GiB`, `500 MB`, `2g` (binary) or a plain number. Raises `ConfigError` naming `what`."""
    if isinstance(text, int) and not isinstance(text, bool):
        if text < 0:
            raise ConfigError(f"{what} must not be negative, got {text}")
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(text).lower())
    if match is None or match[2] not in _UNITS:
        raise ConfigError(f"{what}: {text!r} is not a size; write bytes or a number with a unit, such as 8GiB or 500MB")
    return int(float(match[1]) * _UNITS[match[2]])


def format_size(nbytes: float) -> str:
    """Bytes for people, in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"


def parse_slots(text: str | int, records: int, name: str = "slots") -> int:
    """A number of slots, or a share of all experts such as `25%`; errors say `name`."""
    if isinstance(text, str) and text.strip().endswith("%"):
        try:
            share = float(text.strip()[:-1])
        except ValueError:
            raise ConfigError(f"{name}: {text!r} is not a share; write a percentage such as 25%") from None
        if not 0 < share <= 100:
            raise ConfigError(f"{name}: {text!r} must be above 0% and at most 100%")
        return max(1, round(records * share / 100))
    try:
        slots = int(text)
    except ValueError:
        raise ConfigError(f"{name}: {text!r} is neither a number of slots nor a share such as 25%") from None
    if slots < 1:
        raise CapacityError(f"{name}: at least 1 slot is needed, got {slots}", minimum_slots=1)
    return slots


@dataclass(frozen=True, slots=True)
class Workload:
    """What a model needs: counts, and bytes."""

    layers: int  # MoE layers
    records: int  # experts over all layers
    top_k: int  # experts a token uses per layer
    record_nbytes: int  # raw bytes of one expert
    slot_nbytes: int  # what an arena takes for it
    resident_nbytes: int  # all weights that are not experts
    kv_nbytes: int  # attention cache (and other decoding state) for `context` tokens
    context: int
    workspace_nbytes: int  # activations, read buffers
    slice_nbytes: int = 0  # the smallest buffer that an expert can be computed through; 0: whole records only
    slices_reread: bool = False  # a slice is strided in its file, so each one reads the whole field


@dataclass(frozen=True, slots=True)
class Machine:
    """The memory a run may take; `device_nbytes` is None without a GPU. Beside the interpreter's own memory."""

    host_nbytes: int
    device_nbytes: int | None = None


class Status(StrEnum):
    """Whether a plan is good."""

    OK = "ok"
    BELOW_RECOMMENDED = "below recommended"
    CHUNKED = "chunked"  # no slot: experts stream in slices
    BUDGET_EXHAUSTED = "budget exhausted"
    UNKNOWN_EXPERT_SIZE = "unknown expert size"
    EMPTY = "empty"


@dataclass(frozen=True, slots=True)
class TierPlan:
    """One tier's share: `name` is device or host; nbytes = slots x slot bytes."""

    name: str
    slots: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class ChunkPlan:
    """The ring of buffers that slices of experts stream through where there is no memory for a slot."""

    buffers: int
    nbytes: int  # of one


SLICE_NBYTES = 4 << 20  # large enough for full bandwidth; larger ones only make the first one later
MOST_BUFFERS = 8
LEAST_BUFFERS = 2  # one is read while the other computes


@dataclass(frozen=True, slots=True)
class Plan:
    """The slots per tier (fastest first), what the run will take in all, and what to change if it is not enough."""

    workload: Workload
    machine: Machine
    tiers: tuple[TierPlan, ...]
    recommended_slots: int
    status: Status
    advice: str
    host_total_nbytes: int
    device_total_nbytes: int
    chunks: ChunkPlan | None = None  # only with the status CHUNKED

    @property
    def slots(self) -> int:
        """Slots of the fastest tier."""
        return self.tiers[0].slots if self.tiers else 0


def recommended_slots(workload: Workload) -> int:
    """Twice the experts that a token uses, in every layer: the knee of the hit curves (arXiv 2505.16056)."""
    return min(workload.records, workload.layers * 2 * workload.top_k)


def plan_chunks(workload: Workload, nbytes: int) -> ChunkPlan | None:
    """Buffers for slices within so many bytes; None where they do not suffice, or experts cannot be cut.

    A slice that makes the store read its whole field is made as large as can be: there are fewer of them then.
    """
    least = workload.slice_nbytes
    if least <= 0 or nbytes < LEAST_BUFFERS * least:
        return None
    wanted = nbytes // LEAST_BUFFERS if workload.slices_reread else min(nbytes // 4, SLICE_NBYTES)
    size = max(least, wanted // PAGE * PAGE)
    return ChunkPlan(min(MOST_BUFFERS, nbytes // size), size)


def make_plan(workload: Workload, machine: Machine, slots: int | None = None) -> Plan:
    """Divide the budgets; `slots` overrides the size of the fastest tier. A bad budget is a status, not an error."""
    size = workload.slot_nbytes
    if workload.records == 0:
        return Plan(workload, machine, (), 0, Status.EMPTY, "the model has no experts: run it without moetier", 0, 0)
    if size <= 0:
        advice = "the size of an expert is unknown; open the checkpoint with its config.json"
        return Plan(workload, machine, (), 0, Status.UNKNOWN_EXPERT_SIZE, advice, 0, 0)
    fixed = workload.resident_nbytes + workload.kv_nbytes + workload.workspace_nbytes
    recommended = recommended_slots(workload)

    def fit(budget: int, wanted: int | None = None) -> int:
        return max(0, min(workload.records, wanted if wanted is not None else budget // size))

    if machine.device_nbytes is None:
        top = fit(machine.host_nbytes - fixed, slots)
        tiers: tuple[TierPlan, ...] = (TierPlan("host", top, top * size),)
        host_total, device_total, flag, budget = fixed + top * size, 0, "host_memory", machine.host_nbytes
    else:
        top = fit(machine.device_nbytes - fixed, slots)
        staging = workload.workspace_nbytes
        host = fit(machine.host_nbytes - staging)
        tiers = (TierPlan("device", top, top * size), TierPlan("host", host, host * size))
        host_total, device_total = staging + host * size, fixed + top * size
        flag, budget = ("device_memory", machine.device_nbytes) if top < 1 else ("host_memory", machine.host_nbytes)
    if machine.device_nbytes is None and tiers[0].slots < 1:
        chunks = plan_chunks(workload, machine.host_nbytes - fixed)
        if chunks is not None:
            return _chunked_plan(workload, machine, chunks, fixed)
    if min(tier.slots for tier in tiers) < 1:
        least = size
        if machine.device_nbytes is None and workload.slice_nbytes:
            least = min(size, LEAST_BUFFERS * workload.slice_nbytes)
        minimum = (
            fixed + least
            if flag != "host_memory" or machine.device_nbytes is None
            else workload.workspace_nbytes + size
        )
        advice = (
            f"{flag} {format_size(budget)} leaves no slot for an expert; the minimum is {format_size(minimum)} "
            f"({minimum} bytes), {format_size(fixed + recommended * size)} is recommended"
        )
        status = Status.BUDGET_EXHAUSTED
    elif tiers[0].slots < recommended:
        need = fixed + recommended * size
        advice = (
            f"{tiers[0].slots} slots are below the recommended {recommended}; give {tiers[0].name}_memory "
            f"{format_size(need)} or more to be fast"
        )
        status = Status.BELOW_RECOMMENDED
    else:
        status, advice = Status.OK, ""
        if tiers[0].slots == workload.records:
            advice = "every expert fits: after the first use nothing is loaded again"
    return Plan(workload, machine, tiers, recommended, status, advice, host_total, device_total)


def _chunked_plan(workload: Workload, machine: Machine, chunks: ChunkPlan, fixed: int) -> Plan:
    """No slot, but buffers for slices: it runs, and nothing is cached."""
    recommended = recommended_slots(workload)
    one, good = fixed + workload.slot_nbytes, fixed + recommended * workload.slot_nbytes
    nbytes = chunks.buffers * chunks.nbytes
    reread = ", and read several times over because they are strided in the file" if workload.slices_reread else ""
    advice = (
        f"host_memory {format_size(machine.host_nbytes)} leaves no slot for an expert: experts stream in slices of "
        f"{format_size(chunks.nbytes)}{reread}; nothing is cached, every use of an expert reads it. "
        f"From {format_size(one)} on experts are cached, {format_size(good)} is recommended"
    )
    tiers = (TierPlan("host", 0, nbytes),)
    return Plan(workload, machine, tiers, recommended, Status.CHUNKED, advice, fixed + nbytes, 0, chunks)
