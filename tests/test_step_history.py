"""The history of step settings: what was appended comes back, through pruning and JSON, to the last bit."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moetier.errors import ConfigError
from moetier.training.optimizers.adam import AdamSettings
from moetier.training.optimizers.history import StepHistory

RATES = st.one_of(st.sampled_from([0.0, 1e-4, 0.1]), st.floats(0, 1e300, allow_subnormal=True))


@settings(max_examples=150, derandomize=True, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("append"), RATES, st.booleans()),
            st.tuples(st.just("prune"), st.integers(0, 40), st.booleans()),
            st.tuples(st.just("save"), st.just(0), st.booleans()),
        ),
        max_size=40,
    )
)
def test_it_holds_what_a_plain_list_holds(actions: list[tuple[str, float, bool]]) -> None:
    history, plain, pruned = StepHistory[AdamSettings](), [AdamSettings(lr=0.0)], 0
    for action, number, repeat in actions:
        if action == "append":
            plain.append(plain[-1] if repeat else AdamSettings(lr=number, betas=(0.1, 0.2), weight_decay=number / 3))
            assert history.append(plain[-1]).step == len(plain) - 1
        elif action == "prune":
            history.prune(int(number))
            pruned = max(pruned, min(int(number), len(plain) - 1))
        else:
            history = StepHistory.from_json(AdamSettings(lr=0.0), json.loads(json.dumps(history.to_json())))
        assert (history.first, history.last) == (pruned + 1, len(plain) - 1)
        assert len(history) == history.last - pruned
    for after in range(pruned, len(plain)):
        steps = history.missed(after)
        assert [hyper.step for hyper in steps] == list(range(after + 1, len(plain)))
        assert [hyper.settings for hyper in steps] == plain[after + 1 :]


def test_a_constant_rate_takes_one_run_and_pruning_frees_the_rest() -> None:
    history = StepHistory[AdamSettings]()
    for _ in range(1000):
        history.append(AdamSettings(lr=1e-3))
    assert history.runs == 1
    for step in range(1000):
        history.append(AdamSettings(lr=1e-3 / (step + 1)))
    history.prune(1990)
    assert history.runs == 10
    assert [hyper.lr for hyper in history.missed(1990, 1992)] == [1e-3 / 991, 1e-3 / 992]


def test_steps_it_does_not_hold_are_an_error() -> None:
    history = StepHistory[AdamSettings]()
    for _ in range(5):
        history.append(AdamSettings(lr=1e-3))
    history.prune(3)
    for after, through in ((2, None), (3, 6)):
        with pytest.raises(ConfigError, match="the history of settings holds 4 to 5"):
            history.missed(after, through)
    assert history.missed(5) == [] and history.missed(2, 2) == []


@pytest.mark.parametrize(
    "saved",
    [
        {},
        {"last": 3, "runs": [[2, {"lr": 0.1}], [1, {"lr": 0.2}]]},
        {"last": 1, "runs": [[2, {"lr": 0.1}]]},
        {"last": "x", "runs": []},
        {"last": 3, "runs": [[1, {"speed": 0.1}]]},
        {"last": 3, "runs": [[1, {"lr": -0.1}]]},
        None,
    ],
)
def test_what_is_damaged_is_refused(saved: object) -> None:
    with pytest.raises(ConfigError, match=r"saved history of settings|saved settings|lr: -0\.1"):
        StepHistory.from_json(AdamSettings(lr=0.0), saved)


def test_a_learning_rate_that_is_a_tensor_is_kept_as_the_number_it_is() -> None:
    history = StepHistory[AdamSettings]()
    rate = torch.tensor(1e-3)
    history.append(AdamSettings(lr=0.0).updated({"lr": rate, "betas": [0.9, torch.tensor(0.5)]}))
    rate.fill_(7.0)
    assert history.missed(0)[0].settings == AdamSettings(lr=torch.tensor(1e-3).item(), betas=(0.9, 0.5))
