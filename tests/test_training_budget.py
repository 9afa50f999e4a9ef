"""How memory is divided between weights, optimizer states and gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetier.errors import CapacityError, ConfigError
from moetier.plan import Machine, Workload, make_plan
from moetier.training.budget import Sizes, as_planned, divide, fixed_nbytes, training_plan

SIZES = Sizes(weights=4096, state=8192, gradients=4096, resident=3.0)


def workload(records: int = 64, resident: int = 10_000, workspace: int = 5_000) -> Workload:
    return Workload(
        layers=4,
        records=records,
        top_k=2,
        record_nbytes=4000,
        slot_nbytes=4096,
        resident_nbytes=resident,
        kv_nbytes=777,
        context=16,
        workspace_nbytes=workspace,
    )


@settings(derandomize=True, deadline=None)
@given(st.integers(1, 500), st.integers(0, 10_000_000))
def test_all_of_it_stays_within_the_budget(records: int, budget: int) -> None:
    load, machine = workload(records), Machine(budget)
    try:
        division = divide(load, machine, SIZES)
    except CapacityError as error:
        assert budget < fixed_nbytes(load, SIZES) + 16384 and "the minimum is" in str(error)
        return
    plan = make_plan(as_planned(load, SIZES, division), machine, division.weights)
    assert plan.host_total_nbytes <= budget
    assert plan.slots == division.weights >= 1 and division.gradients >= 1
    assert division.weights == records or plan.host_total_nbytes > budget - 16384


def test_the_minimum_that_is_named_works() -> None:
    least = fixed_nbytes(workload(), SIZES) + 16384
    assert divide(workload(), Machine(least), SIZES).weights == 1
    with pytest.raises(CapacityError, match=rf"\({least} bytes\)"):
        divide(workload(), Machine(least - 1), SIZES)


def test_what_is_asked_for_holds_and_the_others_follow_the_weights() -> None:
    division = divide(workload(), Machine(0), SIZES, weights="25%")
    assert (division.weights, division.state_slots, division.gradients) == (16, 16, 16)
    division = divide(workload(), Machine(0), SIZES, weights=16, state=3, gradients="50%")
    assert (division.weights, division.state_slots, division.gradients) == (16, 3, 32)
    with pytest.raises(ConfigError, match="neither a number of slots nor a share"):
        divide(workload(), Machine(0), SIZES, weights=16, state="few")


@settings(derandomize=True, deadline=None)
@given(st.integers(1, 500), st.integers(0, 3_000_000), st.integers(0, 10_000_000))
def test_with_a_device_both_stay_within_their_budgets(records: int, device: int, host: int) -> None:
    """Resident weights and activations are on the device only, states and gradients on the host only."""
    load, machine, sizes = workload(records), Machine(host, device), replace(SIZES, host=3_000)
    try:
        division = divide(load, machine, sizes)
    except CapacityError as error:
        short = "device_memory" if device < fixed_nbytes(load, SIZES) + 4096 else "host_memory"
        assert str(error).startswith(short) and (short != "host_memory" or host < 3_000 + 16384)
        return
    plan = training_plan(load, machine, sizes, division)
    assert plan.device_total_nbytes <= device and plan.host_total_nbytes <= host
    assert [tier.slots for tier in plan.tiers] == [division.device, division.weights]
    assert division.device == records or plan.device_total_nbytes > device - 4096
    assert division.weights == records or plan.host_total_nbytes > host - 16384


def test_with_a_device_slots_are_its_own() -> None:
    division = divide(workload(), Machine(3 * 16384, 0), SIZES, weights="25%", gradients=5)
    assert (division.device, division.weights, division.gradients) == (16, 3, 5)
    least = fixed_nbytes(workload(), SIZES) + 4096
    with pytest.raises(CapacityError, match=rf"device_memory .* \({least} bytes\).* activations of 16 tokens"):
        divide(workload(), Machine(10**9, least - 1), SIZES)
    assert divide(workload(), Machine(10**9, least), SIZES).device == 1
