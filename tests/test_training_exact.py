"""Accumulation, clipping, decay, auxiliary loss and checkpointing at once, at a quarter of the slots.

Every step uses more experts than there are slots. `MOETIER_TRAINING_STEPS` is how many steps there are; few by default.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moetier.experts import per_expert_parameters
from moetier.training.optimizers.clipping import coefficient, norm_of, scale_, squared_norm
from training import (
    GENTLE,
    NAME,
    assert_close,
    assert_same,
    batch,
    clip_reference,
    expert_modules,
    load_reference,
    load_trained,
    loop,
)

STEPS = range(int(os.environ.get("MOETIER_TRAINING_STEPS", "3")))
MAX_NORM = 0.5
Get = Callable[..., Any]


@pytest.fixture
def trained(checkpoint: Get, tmp_path: Path) -> Iterator[Get]:
    """A model that trains with a quarter of the slots, of every kind."""
    models: list[Any] = []

    def get(dtype: torch.dtype = torch.float32) -> Any:
        models.append(prepared(load_trained(checkpoint(NAME, dtype), tmp_path / str(len(models)), slots="25%")))
        return models[-1]

    yield get
    for model in models:
        model.moetier.close()


def prepared(model: Any) -> Any:
    """With checkpointing, and an auxiliary loss that counts."""
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.config.router_aux_loss_coef = model.router_aux_loss_coef = 0.1
    return model


def run(model: Any, optimizer: Any, before_step: Any = None) -> list[float]:
    return loop(model, optimizer, STEPS, accumulate=2, output_router_logits=True, before_step=before_step)


@pytest.mark.parametrize("kind", GENTLE)
def test_the_bits_of_the_reference(kind: str, checkpoint: Get, trained: Get) -> None:
    make, theirs, settings = GENTLE[kind]
    model, plain = trained(), prepared(load_reference(checkpoint(NAME, torch.float32)))
    optimizer = make(model, fused=True, max_grad_norm=MAX_NORM, **settings)
    other = theirs(plain.parameters(), fused=True, **settings)
    norms: list[float] = []
    losses = run(model, optimizer)
    assert losses == run(plain, other, lambda plain: norms.append(clip_reference(plain, MAX_NORM)))
    assert optimizer.grad_norm == norms[-1] and max(norms) > MAX_NORM  # it was clipped
    assert_same(model, plain)
    engine = model.moetier.training.engine
    assert engine.weights.host.slots == 6 and int((engine.ledger.updates > 0).sum()) > 12  # of 24 experts
    assert engine.weights.stats()["links"]["host→disk"]["copies"] > 0  # changed experts left their slots


@pytest.mark.parametrize("kind", GENTLE)
def test_within_a_millionth_of_stock_transformers(kind: str, checkpoint: Get, trained: Get) -> None:
    make, theirs, settings = GENTLE[kind]
    model = trained()
    plain = prepared(load_reference(checkpoint(NAME, torch.float32), implementation="grouped_mm"))
    optimizer = make(model, max_grad_norm=MAX_NORM, **settings)
    other = theirs(plain.parameters(), **settings)
    losses = run(model, optimizer)
    clip = lambda plain: torch.nn.utils.clip_grad_norm_(plain.parameters(), MAX_NORM)  # noqa: E731
    assert losses == pytest.approx(run(plain, other, clip), rel=1e-6)
    if kind != "adamw":  # there, the sign of a gradient of nearly nothing decides about a whole step
        assert_close(model, plain, 1e-6)


@pytest.mark.parametrize("kind", GENTLE)
def test_half_precision_with_masters(kind: str, checkpoint: Get, trained: Get) -> None:
    """The same recipe in memory: bf16 weights with fp32 masters and moments; experts' gradients add up in fp32, those
    of the other parameters as torch adds them, in bf16."""
    make, theirs, settings = GENTLE[kind]
    model, plain = trained(torch.bfloat16), prepared(load_reference(checkpoint(NAME, torch.bfloat16)))
    optimizer = make(model, fused=True, max_grad_norm=MAX_NORM, **settings)
    recipe = Masters(plain, lambda masters: theirs(masters, fused=True, **settings))
    losses = run(model, optimizer)
    found: list[float] = []
    norms: list[float] = []
    with torch.enable_grad():
        for step in STEPS:
            for part in range(2):
                loss = plain(**batch(2 * step + part), use_cache=False, output_router_logits=True).loss / 2
                loss.backward()
                found.append(loss.item())
                recipe.collect()
            norms.append(recipe.clip())
            recipe.step()
    assert losses == found
    assert optimizer.grad_norm == norms[-1] and max(norms) > MAX_NORM  # it was clipped
    assert_same(model, plain)


class Masters:
    """A plain optimizer on fp32 copies of a bf16 model's parameters."""

    def __init__(self, model: Any, make: Any):
        stacked = {id(getattr(m, name)) for m in expert_modules(model) for name in per_expert_parameters(m)}
        masters = [(p, p.detach().float().requires_grad_()) for p in model.parameters()]
        self.experts = [pair for pair in masters if id(pair[0]) in stacked]
        self.others = [pair for pair in masters if id(pair[0]) not in stacked]
        self.optimizer = make([master for _, master in masters])

    def collect(self) -> None:
        for p, master in self.experts:
            assert p.grad is not None
            master.grad = p.grad.float() if master.grad is None else master.grad + p.grad.float()
            p.grad = None

    def clip(self) -> float:
        gradients = [p.grad for p, _ in self.others]
        squares = [squared_norm([gradient]) for gradient in gradients]
        for (_, up), (_, down) in zip(self.experts[::2], self.experts[1::2], strict=True):  # of a layer
            squares += [squared_norm([up.grad[expert], down.grad[expert]]) for expert in range(len(up))]
        norm = norm_of(squares)
        scale_([*gradients, *(master.grad for _, master in self.experts)], coefficient(norm, MAX_NORM))
        return norm

    def step(self) -> None:
        for p, master in self.others:
            master.grad, p.grad = p.grad.float(), None
        self.optimizer.step()
        for p, master in [*self.experts, *self.others]:
            p.data.copy_(master.data)
            master.grad = None
