"""Which learning rates experts follow, with the optimizer of the parameters and with one of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import moetier
from moetier.errors import ConfigError
from training import NAME, load_trained


@pytest.fixture
def model(checkpoint: Callable[..., Any], tmp_path: Path) -> Any:
    made = load_trained(checkpoint(NAME, torch.float32), tmp_path / "run")
    yield made
    made.moetier.close()


def settings(optimizer: Any) -> list[Any]:
    return [each.group() for each in optimizer.upcoming()[0]]


def test_without_an_optimizer_of_their_own_experts_follow_everything(model: Any) -> None:
    optimizer = moetier.AdamW(model, lr=0.1, betas=(0.8, 0.9), weight_decay=0.3)
    optimizer.param_groups[0]["betas"] = (0.7, 0.9)  # as OneCycleLR does
    assert settings(optimizer) == [{"lr": 0.1, "weight_decay": 0.3, "betas": (0.7, 0.9), "eps": 1e-8}] * 3


def test_another_optimizer_follows_rate_and_decay_and_keeps_its_own_settings(model: Any) -> None:
    optimizer = moetier.AdamW(model, lr=0.1, betas=(0.8, 0.9), weight_decay=0.3, experts="adamw(beta2=0.5)")
    assert len(optimizer.param_groups) == 1
    assert settings(optimizer) == [{"lr": 0.1, "weight_decay": 0.3, "betas": (0.9, 0.5), "eps": 1e-8}] * 3


def test_a_rate_of_their_own_is_a_group_that_schedules_reach(model: Any) -> None:
    optimizer = moetier.AdamW(model, lr=0.1, weight_decay=0.3, experts="adafactor(lr=0.5, d=2)")
    resident, experts = optimizer.param_groups
    assert len(experts["params"]) == 3 and len(resident["params"]) > 3
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / 4)
    assert resident["lr"] == 0.025
    assert [(each["lr"], each["weight_decay"], each["d"]) for each in settings(optimizer)] == [(0.125, 0.3, 2)] * 3
    assert schedule.get_last_lr() == [0.025, 0.125]


def test_groups_and_a_rate_of_their_own_exclude_each_other(model: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"sets weight_decay, and there are groups of parameters: set it in the group"
    ):
        moetier.AdamW(model, [{"params": model.parameters()}], experts="sgd(weight_decay=0)")
