"""Sizes, shares and plans: exact arithmetic, every status with its advice, totals within the budgets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetier import CapacityError, ConfigError, Machine, Workload, make_plan
from moetier.plan import Plan, Status, format_size, parse_size, parse_slots, recommended_slots

MIB, GIB = 1 << 20, 1 << 30
WORKLOAD = Workload(
    layers=4,
    records=64,
    top_k=2,
    record_nbytes=MIB - 100,
    slot_nbytes=MIB,
    resident_nbytes=10 * MIB,
    kv_nbytes=2 * MIB,
    context=4096,
    workspace_nbytes=3 * MIB,
)
FIXED = 15 * MIB


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        (0, 0),
        (123, 123),
        ("0", 0),
        ("123", 123),
        ("123b", 123),
        ("1k", 1024),
        ("1K", 1024),
        ("1kb", 1000),
        ("1KiB", 1024),
        ("1ki", 1024),
        ("500MB", 500_000_000),
        ("500 MB", 500_000_000),
        (" 2 g ", 2 * GIB),
        ("8GiB", 8 * GIB),
        ("1.5gib", GIB + GIB // 2),
        ("0.5k", 512),
        ("2TB", 2 * 10**12),
        ("2t", 2 << 40),
    ],
)
def test_sizes(text: str | int, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1", "1..5g", "1e9", "1 XB", "1 G i B", "8 GiBs", "nan", "½g", True, None]
)
def test_what_is_not_a_size(text: Any) -> None:
    with pytest.raises(ConfigError, match=r"host_memory: .* is not a size; write bytes or a number with a unit"):
        parse_size(text, "host_memory")


def test_negative_sizes() -> None:
    with pytest.raises(ConfigError, match="device_memory must not be negative, got -5"):
        parse_size(-5, "device_memory")


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"), (GIB, "1.0 GiB"), (3 << 40, "3.0 TiB")],
)
def test_sizes_for_people(nbytes: int, text: str) -> None:
    assert format_size(nbytes) == text


@given(st.integers(0, 1 << 50))
def test_a_plain_number_is_itself(nbytes: int) -> None:
    assert parse_size(nbytes) == parse_size(str(nbytes)) == parse_size(f"{nbytes} B") == nbytes


@pytest.mark.parametrize(
    ("text", "slots"), [(1, 1), ("1", 1), (" 12 ", 12), ("25%", 16), ("100%", 64), ("0.1%", 1), (" 50 %", 32), (99, 99)]
)
def test_slots(text: str | int, slots: int) -> None:
    assert parse_slots(text, 64) == slots


@pytest.mark.parametrize("text", ["", "many", "1.5", "%", "x%", "0%", "-1%", "100.1%", "nan%"])
def test_what_is_no_number_of_slots(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^slots: "):
        parse_slots(text, 64)


@pytest.mark.parametrize("slots", [0, -3, "0", "-1"])
def test_too_few_slots(slots: int | str) -> None:
    with pytest.raises(CapacityError, match="at least 1 slot is needed") as caught:
        parse_slots(slots, 64)
    assert caught.value.minimum_slots == 1


def test_recommended_is_twice_the_experts_of_a_token_in_every_layer() -> None:
    assert recommended_slots(WORKLOAD) == 16
    assert recommended_slots(replace(WORKLOAD, top_k=16)) == 64


def test_one_tier() -> None:
    plan = make_plan(WORKLOAD, Machine(FIXED + 20 * MIB + 5))
    assert plan.status is Status.OK and plan.advice == ""
    assert [(tier.name, tier.slots, tier.nbytes) for tier in plan.tiers] == [("host", 20, 20 * MIB)]
    assert plan.slots == 20 and plan.recommended_slots == 16
    assert plan.host_total_nbytes == FIXED + 20 * MIB and plan.device_total_nbytes == 0


def test_everything_fits() -> None:
    plan = make_plan(WORKLOAD, Machine(GIB))
    assert plan.slots == 64 and plan.status is Status.OK
    assert plan.advice == "every expert fits: after the first use nothing is loaded again"


def test_slots_override_the_budget() -> None:
    assert make_plan(WORKLOAD, Machine(0), slots=20).slots == 20
    assert make_plan(WORKLOAD, Machine(GIB), slots=20).slots == 20
    assert make_plan(WORKLOAD, Machine(GIB), slots=1000).slots == 64


def test_two_tiers() -> None:
    """The device holds the other weights and the attention cache; the host only the workspace and its slots."""
    plan = make_plan(WORKLOAD, Machine(3 * MIB + 40 * MIB + 7, FIXED + 18 * MIB + 9))
    assert [(tier.name, tier.slots, tier.nbytes) for tier in plan.tiers] == [
        ("device", 18, 18 * MIB),
        ("host", 40, 40 * MIB),
    ]
    assert plan.status is Status.OK and plan.slots == 18
    assert plan.device_total_nbytes == FIXED + 18 * MIB and plan.host_total_nbytes == 43 * MIB
    less = make_plan(WORKLOAD, plan.machine, slots=5)
    assert [tier.slots for tier in less.tiers] == [5, 40]
    assert less.status is Status.BELOW_RECOMMENDED and "device_memory 31.0 MiB or more" in less.advice


def test_below_recommended() -> None:
    plan = make_plan(WORKLOAD, Machine(FIXED + 15 * MIB))
    assert plan.status is Status.BELOW_RECOMMENDED and plan.slots == 15
    assert plan.advice == "15 slots are below the recommended 16; give host_memory 31.0 MiB or more to be fast"
    assert make_plan(WORKLOAD, Machine(31 * MIB)).status is Status.OK


def minimum_of(plan: Plan) -> int:
    return int(plan.advice.partition("(")[2].partition(" bytes")[0])


@pytest.mark.parametrize(
    ("machine", "flag"),
    [
        (Machine(0), "host_memory"),
        (Machine(FIXED + MIB - 1), "host_memory"),
        (Machine(GIB, FIXED + MIB - 1), "device_memory"),
        (Machine(4 * MIB - 1, GIB), "host_memory"),
        (Machine(0, 0), "device_memory"),
    ],
)
def test_budget_exhausted(machine: Machine, flag: str) -> None:
    """The advice names the flag and the minimum, which works; one byte less does not."""
    plan = make_plan(WORKLOAD, machine)
    assert plan.status is Status.BUDGET_EXHAUSTED
    assert plan.advice.startswith(flag + " ") and "is recommended" in plan.advice
    name = "host_nbytes" if flag == "host_memory" else "device_nbytes"
    roomy = replace(machine, host_nbytes=GIB) if flag == "device_memory" else machine
    minimum = minimum_of(plan)
    assert make_plan(WORKLOAD, replace(roomy, **{name: minimum})).status is not Status.BUDGET_EXHAUSTED
    assert make_plan(WORKLOAD, replace(roomy, **{name: minimum - 1})).status is Status.BUDGET_EXHAUSTED


def test_no_experts() -> None:
    plan = make_plan(replace(WORKLOAD, records=0, layers=0), Machine(GIB))
    assert plan.status is Status.EMPTY and plan.tiers == () and plan.slots == 0
    assert "no experts: run it without moetier" in plan.advice


def test_unknown_expert_size() -> None:
    plan = make_plan(replace(WORKLOAD, slot_nbytes=0, record_nbytes=0), Machine(GIB))
    assert plan.status is Status.UNKNOWN_EXPERT_SIZE and plan.tiers == ()
    assert "config.json" in plan.advice


nbytes = st.integers(0, 1 << 40)
workloads = st.builds(
    Workload,
    layers=st.integers(1, 100),
    records=st.integers(1, 100_000),
    top_k=st.integers(1, 64),
    record_nbytes=st.integers(1, 1 << 30),
    slot_nbytes=st.integers(1, 1 << 30),
    resident_nbytes=nbytes,
    kv_nbytes=nbytes,
    context=st.integers(1, 1 << 20),
    workspace_nbytes=nbytes,
)


@given(workloads, st.builds(Machine, nbytes, st.none() | nbytes))
def test_totals_stay_within_the_budgets(workload: Workload, machine: Machine) -> None:
    plan = make_plan(workload, machine)
    assert plan.recommended_slots <= workload.records
    for tier in plan.tiers:
        assert 0 <= tier.slots <= workload.records and tier.nbytes == tier.slots * workload.slot_nbytes
    if plan.status in (Status.OK, Status.BELOW_RECOMMENDED):
        assert plan.host_total_nbytes <= machine.host_nbytes
        assert plan.device_total_nbytes <= (machine.device_nbytes or 0)
        assert all(tier.slots >= 1 for tier in plan.tiers)
        assert (plan.status is Status.OK) == (plan.slots >= plan.recommended_slots)
    else:
        assert plan.status is Status.BUDGET_EXHAUSTED and plan.advice
        assert any(tier.slots < 1 for tier in plan.tiers)


@given(workloads, nbytes, st.integers(0, 1 << 30))
def test_more_memory_never_gives_fewer_slots(workload: Workload, budget: int, more: int) -> None:
    assert make_plan(workload, Machine(budget + more)).slots >= make_plan(workload, Machine(budget)).slots


def test_below_one_slot_slices_stream() -> None:
    """From two buffers of the smallest size on, to the byte; the totals stay within the budget."""
    work = replace(WORKLOAD, slice_nbytes=64 * 1024)
    least = FIXED + 2 * 64 * 1024
    for budget in range(least, FIXED + MIB, 100_003):
        plan = make_plan(work, Machine(budget))
        assert plan.status is Status.CHUNKED and plan.slots == 0 and plan.chunks is not None
        assert 2 <= plan.chunks.buffers <= 8 and plan.chunks.nbytes >= work.slice_nbytes
        assert plan.chunks.nbytes % 4096 == 0
        assert FIXED + plan.chunks.buffers * plan.chunks.nbytes == plan.host_total_nbytes <= budget
        assert "nothing is cached" in plan.advice and "From 16.0 MiB on" in plan.advice
    assert minimum_of(make_plan(work, Machine(0))) == least
    assert make_plan(work, Machine(least - 1)).status is Status.BUDGET_EXHAUSTED
    assert make_plan(work, Machine(FIXED + MIB)).chunks is None


def test_slices_that_read_whole_fields_are_few() -> None:
    work = replace(WORKLOAD, slice_nbytes=64 * 1024, slices_reread=True)
    plan = make_plan(work, Machine(FIXED + MIB - 1))
    assert plan.chunks is not None and plan.chunks.buffers == 2 and plan.chunks.nbytes > 500_000


def test_no_slices_on_a_gpu_or_where_they_are_no_smaller() -> None:
    work = replace(WORKLOAD, slice_nbytes=64 * 1024)
    assert make_plan(work, Machine(GIB, FIXED + MIB - 1)).status is Status.BUDGET_EXHAUSTED
    large = make_plan(replace(work, slice_nbytes=MIB), Machine(FIXED + MIB - 1))
    assert large.status is Status.BUDGET_EXHAUSTED and minimum_of(large) == FIXED + MIB
