"""The controller of prefetching: told numbers, it must turn off what hurts and keep what helps."""

from __future__ import annotations

import random
import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetier.prefetch_control import LADDER, Baseline, Controller, State, Step


class Machine:
    """Accesses with random misses; a prefetch setting spares some, each miss costs `read`, each access on `extra`."""

    def __init__(self, seed: int = 0, read: float = 5e-3, spares: float = 0.0, extra: float = 0.0, noise: float = 0.0):
        self.random = random.Random(seed)
        self.read, self.spares, self.extra, self.noise = read, spares, extra, noise
        self.seconds = self.alone = 0.0  # with the controller; without any prefetching

    def run(self, controller: Controller, accesses: int) -> None:
        for _ in range(accesses):
            controller.passed()
            setting = controller.setting
            misses = sum(self.random.random() < 0.3 for _ in range(4))
            spared = 0 if setting is None else sum(self.random.random() < self.spares for _ in range(misses))
            base = 4e-3 * (1 + self.noise * self.random.gauss(0, 1))
            period = base + (misses - spared) * self.read
            period += self.extra * controller.predicts
            self.seconds += period
            self.alone += base + misses * self.read
            if controller.measures:
                controller.record(Step(max(0.0, period), misses - spared, spared), setting is not None)


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("seed", range(3))
def test_what_hurts_goes_off_and_costs_next_to_nothing(seed: int, noise: float) -> None:
    machine, controller = Machine(seed, extra=1e-3, noise=noise), Controller()
    machine.run(controller, 64 * 2 * controller.patience)
    assert controller.state is State.OFF and controller.setting is None and not controller.predicts
    machine.run(controller, 20_000)
    assert machine.seconds <= 1.01 * machine.alone
    assert controller.trials > 1, "it is tried again"
    told = re.fullmatch(r"(off|trial): cost (.*) ms, saved 0.0 ms per 100 accesses at p ≥ .*", controller.words())
    assert told is not None and 80 < float(told[2]) < 120, "what is told is what it costs"


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("seed", range(3))
def test_what_helps_stays_on(seed: int, noise: float) -> None:
    machine, controller = Machine(seed, spares=0.5, extra=2e-4, noise=noise), Controller()
    machine.run(controller, 64 * 2 * controller.patience)
    assert controller.words().startswith("on: cost")
    before = machine.seconds, machine.alone
    on = 0
    for _ in range(10_000):
        machine.run(controller, 1)
        on += controller.setting is not None
    assert on > 8_000
    assert machine.seconds - before[0] < 0.8 * (machine.alone - before[1])
    assert controller.gained > 0 and controller.gained > controller.paid


def test_a_change_of_the_machine_is_noticed_both_ways() -> None:
    machine, controller = Machine(spares=0.5, extra=1e-4), Controller()
    machine.run(controller, 3000)
    assert controller.words().startswith("on")
    machine.spares, machine.extra = 0.0, 3e-3
    machine.run(controller, 1500)
    assert controller.state is State.OFF
    machine.spares, machine.extra = 0.5, 0.0
    machine.run(controller, 64 * 40)
    assert controller.words().startswith("on")


def test_great_harm_ends_a_window_early() -> None:
    machine, controller = Machine(extra=20e-3), Controller(window=1000)
    machine.run(controller, 1000)
    assert controller.state is State.LEARNING
    machine.run(controller, 60)
    assert controller.setting is None


def test_trials_become_rare_when_they_fail() -> None:
    machine, controller = Machine(extra=2e-3), Controller(window=16, rest=2)
    trials = []
    for _ in range(4):
        machine.run(controller, 5_000)
        trials.append(controller.trials)
    gaps = [b - a for a, b in pairwise(trials)]
    assert trials[0] >= 3 and gaps[-1] <= 3 < trials[0] + gaps[0]


def test_the_warmup_predicts_and_prefetches_nothing() -> None:
    machine, controller = Machine(), Controller(window=10, warmup=25)
    states = []
    for _ in range(50):
        machine.run(controller, 1)
        states.append(controller.state)
    assert [states.count(state) for state in (State.LEARNING, State.WARMING)] == [10 + 10, 25]
    assert states[-1] is State.TRIAL and states.index(State.WARMING) == 10


def test_baseline_between_and_beyond() -> None:
    baseline = Baseline()
    assert baseline.seconds(0, 1) is None
    for misses in (1, 3):
        for _ in range(4):
            baseline.learn(Step(2.0 + misses, misses))
    assert [baseline.seconds(0, misses) for misses in (0, 1, 2, 3, 5)] == pytest.approx([2, 3, 4, 5, 7])
    assert baseline.seconds(1, 1) is None, "another kind of access"
    baseline.learn(Step(1000.0, 1))
    assert (baseline.seconds(0, 1) or 0) < 6, "a pause of the machine counts little"


def test_gain_and_cost_of_one_access() -> None:
    controller = Controller(window=8)
    for misses in (0, 1, 2) * 4:
        controller.record(Step(1.0 + misses, misses), False)
    for _ in range(9):
        controller.passed()
    assert controller.state is State.TRIAL
    controller.record(Step(1.25, misses=0, spared=2, regretted=1), True)
    assert controller.gained == pytest.approx(1.0), "it would have missed one more"
    assert controller.paid == pytest.approx(0.25)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(
    data=st.lists(
        st.tuples(st.floats(allow_nan=True, allow_infinity=True), st.integers(0, 8), st.integers(0, 8)), max_size=400
    )
)
def test_any_numbers_are_survived(data: list[tuple[float, int, int]]) -> None:
    controller = Controller(window=4, rest=1, patience=2)
    for seconds, misses, spared in data:
        controller.passed()
        controller.record(Step(seconds, misses, spared), controller.setting is not None)
        assert controller.setting in (None, *LADDER)
        assert controller.words() and set(controller.report()) >= {"state", "words", "gained_seconds"}


def test_giving_up_is_a_pause_that_doubles() -> None:
    controller = Controller(window=8, rest=2)
    rests = []
    for _ in range(4):
        while controller.state is not State.TRIAL:
            controller.passed()
        controller.give_up("nothing is missing")
        assert controller.setting is None and not controller.measures
        assert controller.words() == "off: nothing is missing"
        rest = 0
        while controller.state is State.OFF:
            controller.passed()
            rest += 1
        rests.append(rest)
    assert rests == [17, 33, 65, 129]
