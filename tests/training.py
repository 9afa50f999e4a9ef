"""What tests of training share: a tiered model in training, its reference in memory, and how they are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

import moetier
from families import FAMILIES, VOCAB
from moetier.access import Access, ExpertKey
from moetier.experts import per_expert_parameters
from moetier.training import reference
from moetier.training.optimizers.clipping import coefficient, norm_of, scale_, squared_norm

NAME = "qwen3_moe"  # 3 layers of 8 experts, 3 of them per token

OPTIMIZERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "sgd": (moetier.SGD, torch.optim.SGD, {"lr": 0.05, "weight_decay": 0.01}),
    "momentum": (moetier.SGD, torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}),
    "adamw": (moetier.AdamW, torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
}
"""moetier's optimizer, torch's, and what both are given."""

GENTLE = OPTIMIZERS | {"adamw": (moetier.AdamW, torch.optim.AdamW, {"lr": 0.001, "weight_decay": 0.1})}
"""For other orders of sums: AdamW's first steps have the size of its rate however small a gradient is."""


def batch(step: int, rows: int = 2, length: int = 8) -> dict[str, torch.Tensor]:
    """The tokens of a step; always the same ones."""
    ids = torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1000 + step))
    return {"input_ids": ids, "labels": ids}


def model_class(name: str = NAME) -> Any:
    return getattr(transformers, FAMILIES[name].model)


def load_trained(checkpoint: Path, run: Path, name: str = NAME, **options: Any) -> Any:
    """A tiered model in training, at a quarter of the slots."""
    given = {"slots": 6, "context": 64, "model_class": model_class(name)} | options
    return moetier.from_pretrained(checkpoint, train=str(run), **given).train()


def load_reference(checkpoint: Path, name: str = NAME, implementation: str = reference.NAME, **options: Any) -> Any:
    """The same model, all in memory, with the arithmetic of tiered experts; or another implementation's."""
    made = model_class(name).from_pretrained(
        checkpoint, **{"dtype": "auto", "experts_implementation": implementation} | options
    )
    return made.train()


def expert_modules(model: Any) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "has_gate") and hasattr(module, "is_transposed")]


def clip_reference(model: Any, max_norm: float) -> float:
    """Clip as moetier's optimizers do: the exact norm of the gradients, an expert at a time."""
    modules = expert_modules(model)
    stacked = [[getattr(module, name) for name in per_expert_parameters(module)] for module in modules]
    of_experts = {id(p) for parameters in stacked for p in parameters}
    squares = [squared_norm([p.grad]) for p in model.parameters() if id(p) not in of_experts and p.grad is not None]
    for parameters in stacked:
        squares += [squared_norm([p.grad[expert] for p in parameters]) for expert in range(len(parameters[0]))]
    norm = norm_of(squares)
    scale_([p.grad for p in model.parameters() if p.grad is not None], coefficient(norm, max_norm))
    return norm


def trained_experts(model: Any) -> dict[ExpertKey, dict[str, torch.Tensor]]:
    """Copies of all experts' weights as they are trained by now."""
    engine = model.moetier.training.engine
    engine.catch_up_all()
    found = {}
    for layer, count in enumerate(engine.ledger.counts):
        keys = tuple(ExpertKey(layer, expert) for expert in range(count))
        for lease in engine.weights.stream(Access(0, layer, keys)):
            found[lease.key] = {name: field.clone() for name, field in lease.fields.items()}
    return found


def differences(model: Any, other: Any) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """(name, trained tensor, the other model's) of everything: experts one by one, and the resident weights."""
    modules = expert_modules(other)
    for key, fields in trained_experts(model).items():
        for name, field in fields.items():
            yield f"{key} {name}", field, getattr(modules[key.layer], name).data[key.expert]
    own = {name: p for name, p in model.named_parameters() if not name.endswith(".proxy.weight")}
    theirs = dict(other.named_parameters())
    assert own.keys() == {n for n in theirs if not any(f".experts.{f}" in n for f in per_expert_parameters(modules[0]))}
    for name, parameter in own.items():
        yield name, parameter.data, theirs[name].data


def assert_same(model: Any, other: Any) -> None:
    """Every weight has the same bits."""
    for name, mine, theirs in differences(model, other):
        assert torch.equal(mine, theirs), name


def assert_close(model: Any, other: Any, within: float) -> None:
    """Every weight is within this much of the largest of its tensor."""
    for name, mine, theirs in differences(model, other):
        off = (mine - theirs).abs().max().item() / theirs.abs().max().item()
        assert off <= within, (name, off)


def loop(
    model: Any,
    optimizer: Any,
    steps: range,
    *,
    accumulate: int = 1,
    scheduler: Any = None,
    before_step: Callable[[Any], Any] | None = None,
    after_step: Callable[[int], Any] | None = None,
    **inputs: Any,
) -> list[float]:
    """A plain loop; the losses."""
    losses = []
    with torch.enable_grad():
        for step in steps:
            for part in range(accumulate):
                loss = model(**batch(step * accumulate + part), use_cache=False, **inputs).loss / accumulate
                loss.backward()
                losses.append(loss.item())
            if before_step is not None:
                before_step(model)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            optimizer.zero_grad()
            if after_step is not None:
                after_step(step)
    return losses
