"""A tiered model in a plain training loop: bit for bit what the same arithmetic gives in memory, whatever is resident."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import moetier
from training import (
    NAME,
    assert_same,
    load_reference,
    load_trained,
    loop,
)

STEPS = range(int(os.environ.get("MOETIER_TRAINING_STEPS", "6")))
Get = Callable[..., Any]

OPTIMIZERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "sgd": (moetier.SGD, torch.optim.SGD, {"lr": 0.05, "weight_decay": 0.01}),
    "momentum": (moetier.SGD, torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}),
    "adamw": (moetier.AdamW, torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
}


@pytest.fixture
def trained(checkpoint: Get, tmp_path: Path) -> Any:
    """`trained(slots=4)`: a model that trains in a run folder of its own; closed after the test."""
    models: list[Any] = []

    def get(name: str = NAME, dtype: torch.dtype = torch.float32, run: str = "", **options: Any) -> Any:
        folder = tmp_path / (run or f"run{len(models)}")
        models.append(load_trained(checkpoint(name, dtype), folder, name, **options))
        return models[-1]

    yield get
    for model in models:
        model.moetier.close()


def pair(checkpoint: Get, model: Any, kind: str, **options: Any) -> tuple[Any, Any, Any]:
    """Optimizers of a tiered model and of its reference, and the reference."""
    mine, theirs, settings = OPTIMIZERS[kind]
    plain = load_reference(checkpoint(NAME, torch.float32))
    return (
        mine(model, fused=True, **settings, **options),
        theirs(plain.parameters(), fused=True, **settings),
        plain,
    )


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_plain_loop(kind: str, checkpoint: Get, trained: Get) -> None:
    model = trained()
    optimizer, other, plain = pair(checkpoint, model, kind)
    assert loop(model, optimizer, STEPS) == loop(plain, other, STEPS)
    assert_same(model, plain)
