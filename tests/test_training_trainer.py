"""The Trainer of transformers over a tiered model: accumulation, clipping, schedule, evaluation, saving, going on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

import moetier
from moetier.training.trainer import CommitOnSave
from training import assert_close, batch, load_reference, load_trained

pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("ignore")  # of the Trainer's own doings


class Data(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 16

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        return {name: rows[0] for name, rows in batch(number, rows=1).items()}


def trainer(model: Any, optimizer: Any, out: Path, callbacks: list[Any]) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=6,
        save_steps=3,
        logging_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_grad_norm=0.5,
        learning_rate=0.05,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    return Trainer(model, arguments, train_dataset=Data(), optimizers=(optimizer, None), callbacks=callbacks)


def logged(made: Trainer) -> list[float]:
    """Losses and norms, step by step."""
    return [entry[name] for entry in made.state.log_history if "loss" in entry for name in ("loss", "grad_norm")]


def test_trains_stops_resumes_evaluates_and_saves(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = checkpoint("qwen3_moe", torch.float32)
    settings = {"lr": 0.05, "momentum": 0.9}
    with torch.enable_grad():
        plain = load_reference(folder, implementation="grouped_mm")
        theirs = trainer(plain, torch.optim.SGD(plain.parameters(), **settings), tmp_path / "plain", [])
        theirs.train()
        model = load_trained(folder, tmp_path / "run")
        mine = trainer(model, moetier.SGD(model, **settings), tmp_path / "out", [CommitOnSave()])
        mine.train()
        assert logged(mine) == pytest.approx(logged(theirs), rel=1e-5)
        assert_close(model, plain, 1e-5)
        loss = mine.evaluate(Data())["eval_loss"]
        assert loss == pytest.approx(theirs.evaluate(Data())["eval_loss"], rel=1e-5)
        model.moetier.close()

        saved = tmp_path / "out" / "checkpoint-3"
        model = load_trained(folder, tmp_path / "run", train_step=3)
        optimizer = moetier.SGD(model, **settings)
        assert optimizer.resume() == {"step": 3, "extra": None}
        again = trainer(model, optimizer, tmp_path / "out", [CommitOnSave()])
        again.train(resume_from_checkpoint=str(saved))
        assert logged(again) == logged(mine) and again.evaluate(Data())["eval_loss"] == loss
        model.moetier.close()
        whole = load_reference(tmp_path / "out" / "checkpoint-6", implementation="grouped_mm")
        exported = trainer(whole, torch.optim.SGD(whole.parameters(), lr=0.1), tmp_path / "x", [])
        assert exported.evaluate(Data())["eval_loss"] == pytest.approx(loss, rel=1e-6)
