"""The policy for training steps: it knows what comes next, and beats what does not; and traces as training steps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetier.access import Access, ExpertKey, Part, Phase
from moetier.errors import ConfigError
from moetier.policies import make_policy
from moetier.simulate.config import SimulationConfig
from moetier.simulate.run import simulate_accesses
from moetier.trace.synthetic import environments
from moetier.trace.training import GRADIENTS, STATES, WEIGHTS, training_steps

LAYERS, EXPERTS = 4, 8
F, B, U, S = Part.FORWARD, Part.BACKWARD, Part.UPDATE, Part.SERVE


def k(layer: int, expert: int) -> ExpertKey:
    return ExpertKey(layer, expert)


def access(part: Part, layer: int, *experts: int) -> Access:
    return Access(1, layer, tuple(k(layer, expert) for expert in experts), part=part)


def ranked(accesses: Sequence[Access], *residents: ExpertKey) -> list[ExpertKey]:
    """The order in which these would go after the accesses."""
    policy = make_policy("zigzag", LAYERS, EXPERTS, len(residents))
    for one in accesses:
        policy.on_access(one)
    for key in residents:
        policy.on_insert(key, accesses[-1])
    return list(policy.victims(accesses[-1]))


def step(*experts: int, parts: Sequence[Part] = (F, B, U)) -> list[Access]:
    ways = {F: range(LAYERS), S: range(LAYERS), B: range(LAYERS - 1, -1, -1), U: range(LAYERS)}
    return [access(part, layer, *experts) for part in parts for layer in ways[part]]


def test_forward_knows_that_backward_comes_down() -> None:
    up = [*step(0, 1, parts=(F, B)) * 9, *(access(F, layer, 0, 1) for layer in range(3))]
    # after forward of layer 2: layer 3 is next, then backward 3, 2, 1, 0
    assert ranked(up, k(0, 0), k(1, 0), k(2, 0), k(3, 0)) == [k(0, 0), k(1, 0), k(2, 0), k(3, 0)]


def test_backward_needs_what_forward_needed_and_nothing_else() -> None:
    down = [*step(0, 1, 2, parts=(F, B)), *step(0, 1, parts=(F,)), access(B, 3, 0, 1), access(B, 2, 0, 1)]
    # 2 of layer 1 was not used in this forward; layer 3 is done
    found = ranked(down, k(1, 0), k(1, 2), k(3, 0), k(0, 1))
    assert found[2:] == [k(0, 1), k(1, 0)]


def test_an_update_needs_what_backward_has_used() -> None:
    seen = [*step(0, 1, 2), *step(0, 1, parts=(F, B)), access(U, 0, 0), access(U, 0, 1), access(U, 1, 0)]
    # 1 of layer 1 is still to come, at once; of layer 3 only 0 and 1; layer 0 is next in forward
    found = ranked(seen, k(1, 1), k(1, 0), k(3, 1), k(3, 2), k(0, 0))
    assert found[-2:] == [k(3, 1), k(1, 1)] and found[0] == k(3, 2) and found.index(k(0, 0)) > found.index(k(1, 0))


def test_recomputation_in_backward_is_learnt() -> None:
    """Checkpointing: backward asks for a layer to compute it again, and once more for gradients."""
    twice = [access(B, layer, 0, 1) for layer in (3, 2, 1, 0) for _ in range(2)]
    seen = [*step(0, 1, parts=(F,)), *twice, *step(0, 1, parts=(F,)), *twice[:4], access(B, 1, 0, 1)]
    assert ranked(seen, k(1, 0), k(0, 0), k(2, 0))[-1] == k(1, 0), "it comes again at once"
    seen.append(access(B, 1, 0, 1))
    assert ranked(seen, k(1, 0), k(0, 0), k(2, 0)) == [k(2, 0), k(1, 0), k(0, 0)]


def test_updates_in_passing_change_nothing() -> None:
    """An idle expert catches up before the forward that needs it; or backward updates what it has just used."""
    plain = [*step(0, 1, parts=(F, B)) * 3, *(access(F, layer, 0, 1) for layer in range(3))]
    passing = []
    for one in plain:
        if one.part is F and one.layer:
            passing.append(access(U, one.layer, 1))
        passing.append(one)
        if one.part is B and one.layer:
            passing.append(access(U, one.layer, 0))
    residents = [k(layer, expert) for layer in range(LAYERS) for expert in (0, 1, 5)]
    assert ranked(passing, *residents) == ranked(plain, *residents)


def test_a_graph_that_is_thrown_away_is_forgotten() -> None:
    seen = [*step(0, parts=(F, B)), *step(5, parts=(F,)), *step(0, parts=(S,)), *step(0, parts=(F,))]
    assert ranked(seen, k(0, 5), k(0, 0), k(1, 0)) == [k(0, 5), k(0, 0), k(1, 0)]


def test_evaluation_goes_round() -> None:
    served = [*step(0, parts=(S,)), *step(0, parts=(S,)), access(S, 0, 0), access(S, 1, 0)]
    assert ranked(served, k(0, 0), k(1, 0), k(2, 0), k(3, 0)) == [k(1, 0), k(0, 0), k(3, 0), k(2, 0)]


def test_gradients_and_states_have_orders_of_their_own() -> None:
    of_gradients = [*step(0, parts=(B, U, B, U)), access(B, 3, 0), access(B, 2, 0)]
    assert ranked(of_gradients, k(3, 0), k(1, 0), k(0, 0)) == [k(3, 0), k(0, 0), k(1, 0)]
    of_states = [*step(0, parts=(U, U)), access(U, 0, 0), access(U, 1, 0)]
    assert ranked(of_states, k(0, 0), k(1, 0), k(2, 0), k(3, 0)) == [k(1, 0), k(0, 0), k(3, 0), k(2, 0)]


@pytest.mark.parametrize("one_by_one", [False, True])
def test_an_update_of_single_experts_is_one_pass(one_by_one: bool) -> None:
    whole = [*step(0, 1, 2), *step(0, 1, 2, parts=(F, B)), access(U, 0, 0, 1, 2), access(U, 1, 0, 1, 2)]
    found = []
    for one in whole:
        parts = [(key,) for key in one.keys] if one_by_one and one.part is U else [one.keys]
        found += [Access(1, one.layer, keys, part=one.part) for keys in parts]
    residents = [k(layer, 0) for layer in range(LAYERS)]
    assert ranked(found, *residents) == [k(1, 0), k(0, 0), k(3, 0), k(2, 0)]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from(Part), st.integers(0, 3), st.sets(st.integers(0, 7), max_size=4))))
def test_any_order_of_accesses_gives_a_distance(visits: list[tuple[Part, int, set[int]]]) -> None:
    policy = make_policy("zigzag", LAYERS, EXPERTS, 4)
    for part, layer, experts in visits:
        policy.on_access(access(part, layer, *sorted(experts)))
        distance = policy._look_ahead()  # type: ignore[attr-defined]
        assert np.isfinite(distance).all() and (distance >= 0).all()


def test_memory_is_checked() -> None:
    with pytest.raises(ConfigError, match="memory must be at least 0 and below 1, got 1"):
        make_policy("zigzag(memory=1)", 2, 2, 2)


# -- against others ----------------------------------------------------------------------------------------------------


def hit_rate(policy: str, accesses: list[Access], share: float) -> float:
    config = SimulationConfig(policy, int(share * 6 * 16))
    return simulate_accesses(accesses, 6, 16, config).hit_rate


@pytest.mark.parametrize(
    "parts", [WEIGHTS, WEIGHTS[:3], GRADIENTS, STATES], ids=["weights", "frozen", "grads", "states"]
)
def test_better_than_lru_and_not_far_from_the_best_possible(parts: tuple[Part, ...]) -> None:
    forwards = environments(40, 6, 16, 2, batch=4, envs=8, episode=8, seed=3).accesses()
    accesses = training_steps(forwards, parts)
    lru, zigzag, best = (hit_rate(policy, accesses, 0.25) for policy in ("lru", "zigzag", "belady-forced"))
    assert lru + 0.35 * (best - lru) < zigzag <= best


def test_where_every_expert_is_needed_it_is_the_best_possible() -> None:
    forwards = [Access(time, time % 6, tuple(k(time % 6, e) for e in range(16))) for time in range(6 * 12)]
    accesses = training_steps(forwards, WEIGHTS[:3])
    assert hit_rate("zigzag", accesses, 0.5) >= hit_rate("belady-forced", accesses, 0.5) - 0.02


# -- traces as training steps ------------------------------------------------------------------------------------------


def test_training_steps() -> None:
    forwards = [access(S, layer, *experts) for experts in ((0, 1), (2,), (1, 3)) for layer in range(2)]
    found = training_steps(forwards, accumulate=2)
    shown = [(a.part, a.layer, [key.expert for key in a.keys]) for a in found]
    first = [(F, 0, [0, 1]), (F, 1, [0, 1]), (B, 1, [0, 1]), (B, 0, [0, 1])]
    second = [(F, 0, [2]), (F, 1, [2]), (B, 1, [2]), (B, 0, [2]), (U, 0, [0, 1, 2]), (U, 1, [0, 1, 2])]
    assert shown[:10] == first + second and shown[10:12] == [(F, 0, [1, 3]), (F, 1, [1, 3])]
    assert [a.time for a in found] == list(range(1, len(found) + 1))
    assert all(a.writes == (a.part is U) and a.phase is Phase.PREFILL for a in found)
    evaluated = training_steps(forwards, evaluate=2)
    assert [a.part for a in evaluated[6:8]] == [S, S] and evaluated[8].part is F
    assert {a.part for a in training_steps(forwards, STATES)} == {U}
    with pytest.raises(ConfigError, match="accumulate must be at least 1"):
        training_steps(forwards, accumulate=0)
