"""How memory is divided between weights, optimizer states and gradients."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetier.errors import CapacityError, ConfigError
from moetier.plan import Machine, Workload, make_plan
from moetier.training.budget import Sizes, as_planned, divide, fixed_nbytes

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
