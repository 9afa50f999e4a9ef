"""The examples run, and go on where they were stopped."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with torch.enable_grad():
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_train_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    folder, saved = str(tmp_path / "run"), str(tmp_path / "saved")
    run(monkeypatch, "train_loop.py", "--run", folder, "--steps", "10")
    run(monkeypatch, "train_loop.py", "--run", folder, "--steps", "30", "--save", saved)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert len(losses) == 3 and losses[2] < losses[1] < losses[0]  # ten steps, then twenty more
    run(monkeypatch, "train_loop.py", saved, "--run", str(tmp_path / "again"), "--steps", "1")
    assert float(re.findall(r"loss ([\d.]+)", capsys.readouterr().out)[0]) < losses[0]  # it has learnt


def test_finetune_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"{n} bottles of beer on the wall, {n} bottles of beer." for n in range(60, 0, -1)))
    given = [str(text), "--run", str(tmp_path / "run"), "--length", "32"]
    run(monkeypatch, "finetune_trainer.py", *given, "--steps", "2")
    run(monkeypatch, "finetune_trainer.py", *given, "--steps", "4", "--save", str(tmp_path / "saved"))
    found = re.findall(r"perplexity at step (\d+): ([\d.]+)", capsys.readouterr().out)
    assert [int(step) for step, _ in found] == [0, 2, 2, 4]
    before, middle, again, after = (float(value) for _, value in found)
    assert before > middle and middle == again > after
    assert (tmp_path / "saved/model.safetensors.index.json").is_file()
