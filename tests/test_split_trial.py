"""Which way small steps are shared: the faster one is found, a collapse ends torch's way at once."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from moetier.split_trial import HOLD, SETTLING, SOONEST, TRIED, SplitTrial

TRIALS = 2 * (TRIED + SETTLING)


def run(trial: SplitTrial, steps: int, seconds: Callable[[bool], float]) -> list[bool]:
    """The ways that so many steps went."""
    ways = []
    for _ in range(steps):
        ways.append(trial.crew)
        trial.record(seconds(trial.crew))
    return ways


@pytest.mark.parametrize("faster", [True, False])
def test_both_ways_are_tried_and_the_faster_is_kept(faster: bool) -> None:
    trial = SplitTrial()
    ways = run(trial, TRIALS + HOLD, lambda crew: 1.0 if crew == faster else 1.2)
    assert ways[: TRIED + SETTLING] == [True] * (TRIED + SETTLING)
    assert ways[TRIED + SETTLING : TRIALS] == [False] * (TRIED + SETTLING)
    assert ways[TRIALS:] == [faster] * HOLD


def test_a_tie_goes_to_the_crew() -> None:
    trial = SplitTrial()
    run(trial, TRIALS, lambda crew: 1.0)
    assert trial.crew


def test_a_collapse_ends_torchs_way_after_two_steps() -> None:
    trial = SplitTrial()
    run(trial, TRIALS + 5, lambda crew: 1.2 if crew else 1.0)
    assert not trial.crew
    run(trial, 1, lambda crew: 4.0)
    assert not trial.crew  # one slow step may be anything
    run(trial, 1, lambda crew: 4.0)
    assert trial.crew
    assert run(trial, HOLD, lambda crew: 1.2) == [True] * HOLD


def test_a_collapse_ends_a_trial() -> None:
    trial = SplitTrial()
    ways = run(trial, TRIALS, lambda crew: 1.0 if crew else 4.0)
    assert ways.count(False) == SETTLING + 2


def test_trials_become_rarer_while_the_verdict_stays_and_frequent_when_it_changes() -> None:
    trial = SplitTrial()
    ways = run(trial, 4000, lambda crew: 1.0 if crew else 1.2)
    assert 10 * ways.count(False) < len(ways) // 2
    steps = 0
    while trial.crew and steps < 5000:  # the machine has become quiet
        run(trial, 1, lambda crew: 1.2 if crew else 1.0)
        steps += 1
    run(trial, 2 * TRIED, lambda crew: 1.2 if crew else 1.0)
    assert not trial.crew
    assert steps < 3000


@pytest.mark.parametrize("chosen", [True, False])
def test_a_machine_that_slows_down_the_chosen_way_is_noticed(chosen: bool) -> None:
    trial = SplitTrial()
    run(trial, TRIALS + 4, lambda crew: 1.0 if crew == chosen else 1.2)
    assert trial.crew == chosen
    run(trial, SOONEST + TRIALS, lambda crew: 1.5 if crew == chosen else 1.2)
    assert trial.crew != chosen


def test_a_machine_that_slows_down_both_changes_nothing_for_long() -> None:
    trial = SplitTrial()
    run(trial, TRIALS + 4, lambda crew: 1.0 if crew else 1.2)
    ways = run(trial, 400, lambda crew: 2.0 if crew else 2.4)
    assert ways.count(False) <= 3 * (TRIED + SETTLING)


def test_changing_back_and_forth_is_counted() -> None:
    trial = SplitTrial()
    run(trial, TRIALS, lambda crew: 1.0 if crew else 1.2)
    assert trial.changes == 2
    assert trial.report() == "experts"
