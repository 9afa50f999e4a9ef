"""The Trainer of transformers with tiered experts: as in memory, stopped and resumed, evaluated, exported."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import TrainerCallback, TrainingArguments

import moetier
from families import VOCAB
from moetier.stores.runfolder import RunFolder
from training import NAME, assert_close, batch, load_reference, load_trained, model_class, trained_experts

Get = Callable[..., Any]

CHECKPOINTING = {f.name for f in fields(TrainingArguments)} & {"activation_checkpointing"} or {"gradient_checkpointing"}


@pytest.fixture(autouse=True)
def with_gradients() -> Iterator[None]:
    with torch.enable_grad():
        yield


def samples(count: int, seed: int = 0, length: int = 8) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(3, VOCAB, (count, length), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in ids]


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    given: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "max_steps": 6,
        "learning_rate": 0.01,
        "weight_decay": 0.1,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 1,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 2,
        "seed": 7,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "log_level": "error",
    }
    return TrainingArguments(str(folder), **(given | options))


class Until(TrainerCallback):
    """Ends the process's training after a step, saved or not."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class Runs:
    """Models that train in run folders below a folder, closed in the end."""

    def __init__(self, checkpoint: Path, folder: Path):
        self.checkpoint, self.folder, self.models = checkpoint, folder, list[Any]()

    def trainer(self, name: str = "run", kind: Any = None, load: Any = None, until: int = 0, **options: Any) -> Any:
        """A model with dropout in its attention (so that random states matter) and its Trainer."""
        self.models.append(load_trained(self.checkpoint, self.folder / name, **(load or {})))
        named = {key: options.pop(key) for key in ("optimizers", "optimizer_cls_and_kwargs") if key in options}
        return made(
            kind or moetier.Trainer, self.models[-1], arguments(self.folder / f"{name}-out", **options), until, **named
        )

    def close(self) -> None:
        for model in self.models:
            model.moetier.close()
        self.models.clear()


def made(kind: Any, model: Any, args: Any, until: int = 0, **named: Any) -> Any:
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    callbacks = [Until(until)] if until else []
    data = {"train_dataset": samples(20), "eval_dataset": samples(6, 1)}
    return kind(model=model, args=args, callbacks=callbacks, **data, **named)


@pytest.fixture
def runs(checkpoint: Get, tmp_path: Path) -> Iterator[Runs]:
    runs = Runs(checkpoint(NAME, torch.float32), tmp_path)
    yield runs
    runs.close()


def everything(trainer: Any) -> dict[str, torch.Tensor]:
    """All weights, and the resident state of the optimizer."""
    model = trainer.model
    found = {f"{key} {name}": t for key, own in trained_experts(model).items() for name, t in own.items()}
    found |= {name: p.data.clone() for name, p in model.named_parameters() if not name.endswith("proxy.weight")}
    for number, entries in trainer.optimizer.state_dict()["state"].items():
        found |= {f"{number}.{name}": value.clone() for name, value in entries.items()}
    return found


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


KINDS = {
    "plain": {"max_grad_norm": 0.0},
    "clipped": {"max_grad_norm": 0.3},
    "accumulated, clipped": {"gradient_accumulation_steps": 3, "max_grad_norm": 0.3},
    "checkpointed": {"gradient_accumulation_steps": 2, **dict.fromkeys(CHECKPOINTING, True)},
    "sgd": {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.05},
}


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_the_trainer_in_memory(kind: str, runs: Runs, checkpoint: Get, tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "no"} | KINDS[kind]
    mine = runs.trainer(load={"slots": "25%"}, **options)
    assert mine.model.moetier.plan.slots == 6  # of 24, and a token uses 3 of 8 in each of 3 layers
    mine.train()
    plain = load_reference(checkpoint(NAME, torch.float32), implementation="grouped_mm")
    theirs = made(transformers.Trainer, plain, arguments(tmp_path / "memory", **options))
    theirs.train()
    assert losses(mine) == pytest.approx(losses(theirs), rel=1e-6)
    norms = [[e["grad_norm"] for e in each.state.log_history if "grad_norm" in e] for each in (mine, theirs)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5) and len(norms[0]) == 6
    assert mine.evaluate()["eval_loss"] == pytest.approx(theirs.evaluate()["eval_loss"], rel=1e-6)
    if kind == "sgd":  # in Adam, the sign of a gradient of nearly nothing decides about a whole step
        assert_close(mine.model, plain, 1e-5)


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_accumulation_steps": 3, "save_steps": 1, "max_grad_norm": 0.3}, {"save_strategy": "epoch"}],
    ids=["steps", "accumulated", "epochs"],
)
def test_resumed_is_as_never_stopped(options: dict[str, Any], runs: Runs) -> None:
    """Across an epoch's end (10 batches of 2), with dropout, a schedule, and evaluations that use the generators."""
    options = {"max_steps": 14, "eval_strategy": "steps", "eval_steps": 3, "save_steps": 4} | options
    whole = runs.trainer("whole", **options)
    whole.train()
    first = runs.trainer(until=11, **options)
    first.train()
    first.model.moetier.close()
    torch.manual_seed(99)
    second = runs.trainer(**options)
    at = second.model.moetier.training.run.step
    assert at in (8, 10, 11)
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 14 and losses(second) == losses(whole)
    evaluations = [[e for e in each.state.log_history if "eval_loss" in e] for each in (second, whole)]
    assert [e["eval_loss"] for e in evaluations[0]] == [e["eval_loss"] for e in evaluations[1]]
    assert_equal(everything(second), everything(whole))
    assert len(losses(whole)) == len(set(losses(whole))) == 14
