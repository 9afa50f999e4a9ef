"""Hot and cold experts in training: what it does to which expert, wherever the records are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import moetier
from moetier.access import ExpertKey
from training import NAME, batch, load_trained, trained_experts

Get = Callable[..., Any]
BOTH = "hot-cold(hot=adamw, cold=sgd, threshold=0.6, half_life=1, cold_lr=20)"


@pytest.fixture
def train(checkpoint: Get, tmp_path: Path) -> Any:
    """`train(experts, slots=6)`: the experts after some steps of AdamW with this optimizer for the experts."""
    models: list[Any] = []

    def run(experts: str, steps: range = range(8), folder: str = "", **options: Any) -> Any:
        how = {name: options.pop(name) for name in ("idle", "update") if name in options}
        models.append(load_trained(checkpoint(NAME, torch.float32), tmp_path / (folder or str(len(models))), **options))
        model = models[-1]
        optimizer = moetier.AdamW(model, lr=0.01, weight_decay=0.1, experts=experts, **how)
        optimizer.resume()
        for step in steps:  # of so few tokens that most experts have none
            with torch.enable_grad():
                model(**batch(step, rows=1, length=3), use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return model

    yield run
    for model in models:
        model.moetier.close()


def assert_same(mine: Any, theirs: Any) -> None:
    experts = trained_experts(theirs)
    for key, fields in trained_experts(mine).items():
        for name, field in fields.items():
            assert torch.equal(field, experts[key][name]), (key, name)


@pytest.mark.parametrize(("idle", "side"), [("dense", "cold"), ("skip", "hot")])
def test_where_all_are_hot_or_all_cold_it_is_one_optimizer(idle: str, side: str, train: Get) -> None:
    assert_same(
        train(f"hot-cold(threshold={int(side == 'cold')}, {side}=momentum)", idle=idle), train("momentum", idle=idle)
    )


def test_slots_and_times_change_no_bit(train: Get) -> None:
    few, many = train(BOTH, slots=3, state_slots=1, gradient_slots=1), train(BOTH, slots="100%")
    usage = few.moetier.training.engine.applied.usage
    shares = [usage.share(ExpertKey(layer, expert)) for layer in range(3) for expert in range(8)]
    assert 0 < min(shares) < 0.6 <= max(shares)  # there are experts of both kinds
    assert_same(few, many)
    assert_same(train(BOTH, update="backward"), many)


def test_cold_experts_leave_the_state_alone(train: Get) -> None:
    model = train("hot-cold(threshold=1, cold=sgd)")
    state = model.moetier.training.engine.applied.state
    assert sum(link["copies"] for link in state.stats()["links"].values()) == 0
    assert not model.moetier.training.engine.ledger.begun.any()
    assert model.moetier.training.engine.ledger.updates.sum() > 0


def test_a_stopped_run_goes_on_as_if_it_had_not_been(train: Get) -> None:
    whole = train(BOTH)
    first = train(BOTH, range(3), folder="stopped")
    first.moetier.commit()
    first.moetier.close()
    assert_same(train(BOTH, range(3, 8), folder="stopped"), whole)
