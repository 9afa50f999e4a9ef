"""Checkpoints of training: what goes on from one is bit for bit what never stopped; errors leave the last one."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moetier
from combinations import covering
from moetier.errors import StoreError
from moetier.stores.extents import ExtentFile
from moetier.stores.runfolder import RunFolder
from training import batch, load_trained, loop, trained_experts

Get = Callable[..., Any]


class Run:
    """A model, its optimizer and its scheduler, as a training script would make them; with dropout."""

    def __init__(self, checkpoint: Path, folder: Path, optimizer: Any = moetier.AdamW, **options: Any):
        own = {name: options.pop(name) for name in ("idle", "update", "experts", "max_grad_norm") if name in options}
        self.model = load_trained(checkpoint, folder, **options)
        for layer in self.model.model.layers:
            layer.self_attn.attention_dropout = 0.1
        self.optimizer = optimizer(self.model, lr=0.01, weight_decay=0.1, **own)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 0.9**step)
        self.found = self.optimizer.resume(scheduler=self.scheduler)

    @property
    def step(self) -> int:
        return 0 if self.found is None else int(self.found["step"])

    def train(self, steps: range, commit_at: tuple[int, ...] = ()) -> list[float]:
        def after(step: int) -> None:
            if step + 1 in commit_at:
                self.model.moetier.commit(scheduler=self.scheduler, extra={"seen": step + 1})

        return loop(self.model, self.optimizer, steps, scheduler=self.scheduler, after_step=after)

    def close(self) -> None:
        self.model.moetier.close()

    def everything(self) -> dict[str, torch.Tensor]:
        """All weights, and the resident state of the optimizer."""
        found = {
            f"{key} {name}": t for key, fields in trained_experts(self.model).items() for name, t in fields.items()
        }
        found |= {name: p.data.clone() for name, p in self.model.named_parameters()}
        for number, entries in self.optimizer.state_dict()["state"].items():
            found |= {f"{number}.{name}": value.clone() for name, value in entries.items()}
        return found


def seed() -> None:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


KINDS = [
    pytest.param({"dtype": torch.float32}, {}, id="float32"),
    pytest.param({"dtype": torch.bfloat16}, {}, id="bfloat16"),
    pytest.param({"dtype": torch.float32}, {"idle": "skip", "slots": 2, "max_grad_norm": 1.0}, id="skip, clipped"),
    pytest.param({"dtype": torch.float32}, {"update": "backward", "slots": 3, "writeback": "periodic"}, id="backward"),
    pytest.param({"dtype": torch.float32}, {"optimizer": moetier.SGD, "writeback": "writethrough"}, id="sgd"),
]


class Failing:
    """Writes of experts' records fail from the `after`-th on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, code: int, after: int):
        self.refused, left, plain = 0, after, ExtentFile.write

        def write(file: ExtentFile, offset: int, phase: int, data: memoryview) -> None:
            nonlocal left
            left -= 1
            if left >= 0:
                plain(file, offset, phase, data)
                return
            self.refused += 1
            raise StoreError(f"{file.path}: cannot be written: {os.strerror(code)}")

        monkeypatch.setattr(ExtentFile, "write", write)
        self.end = lambda: monkeypatch.setattr(ExtentFile, "write", plain)


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_goes_on_as_if_it_had_never_stopped(
    kind: dict[str, Any], options: dict[str, Any], checkpoint: Get, tmp_path: Path
) -> None:
    folder = checkpoint("qwen3_moe", **kind)
    seed()
    whole = Run(folder, tmp_path / "whole", **options)
    losses = whole.train(range(6), commit_at=(2,))
    expected = whole.everything()
    whole.close()
    seed()
    first = Run(folder, tmp_path / "run", **options)
    assert first.train(range(4), commit_at=(2, 3)) == losses[:4]  # the last step is lost
    first.close()
    torch.manual_seed(99)
    random.seed(99)
    second = Run(folder, tmp_path / "run", **options)
    assert second.found == {"step": 3, "extra": {"seen": 3}}
    assert second.train(range(3, 6)) == losses[3:]
    assert_equal(second.everything(), expected)
    second.close()
    again = Run(folder, tmp_path / "run", train_step=2, **options)  # and from the step before
    assert again.train(range(2, 6)) == losses[2:]
    assert_equal(again.everything(), expected)
    again.close()


def test_a_run_without_a_checkpoint_begins_anew(checkpoint: Get, tmp_path: Path) -> None:
    folder = checkpoint("qwen3_moe", torch.float32)
    losses = []
    for _ in range(2):
        seed()
        run = Run(folder, tmp_path / "run")
        assert run.found is None
        losses.append(run.train(range(2)))
        run.close()
    assert losses[0] == losses[1]


def test_the_generators_are_those_of_the_checkpoint(checkpoint: Get, tmp_path: Path) -> None:
    folder = checkpoint("qwen3_moe", torch.float32)
    run = Run(folder, tmp_path / "run")
    run.train(range(1), commit_at=(1,))
    expected = (torch.rand(2).tolist(), random.random(), np.random.rand())
    run.close()
    run = Run(folder, tmp_path / "run")
    assert (torch.rand(2).tolist(), random.random(), np.random.rand()) == expected
    run.close()


def test_what_a_user_can_do_wrong(checkpoint: Get, tmp_path: Path) -> None:
    folder = checkpoint("qwen3_moe", torch.float32)
    run = Run(folder, tmp_path / "run")
    with torch.enable_grad():
        run.model(**batch(0), use_cache=False).loss.backward()
    with pytest.raises(moetier.ConfigError, match="gradients that no step has taken"):
        run.model.moetier.commit(scheduler=run.scheduler)
    run.model.zero_grad()  # of the model: the experts' too
    with pytest.raises(moetier.ConfigError, match=r"extra: .* a checkpoint keeps what JSON can"):
        run.model.moetier.commit(extra=object())
    for step in range(2):  # few tokens: most experts are idle
        with torch.enable_grad():
            run.model(**batch(step, 1, 2), use_cache=False).loss.backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
    run.model.moetier.commit(scheduler=run.scheduler)
    with pytest.raises(moetier.ConfigError, match="has an optimizer already"):
        moetier.AdamW(run.model)
    run.close()
    model = load_trained(folder, tmp_path / "run")
    with pytest.raises(moetier.ConfigError, match="trained with optimizer adamw, not sgd; give the same"):
        moetier.SGD(model)
    model.moetier.close()
    model = load_trained(folder, tmp_path / "run")
    with torch.enable_grad(), pytest.raises(moetier.ConfigError, match="owe steps that only its optimizer"):
        model(**batch(0), use_cache=False)
    with pytest.raises(moetier.ConfigError, match="owe steps that only its optimizer"):
        model.save_pretrained(tmp_path / "exported")
    optimizer = moetier.AdamW(model, lr=0.01, weight_decay=0.1)
    with pytest.raises(moetier.ConfigError, match=r"call optimizer.resume\(\) before the first step"):
        loop(model, optimizer, range(1))
    with pytest.raises(moetier.ConfigError, match=r"made with the parts \['scheduler'\], given are \[\]"):
        optimizer.resume()
    model.moetier.close()
    with pytest.raises(moetier.StoreError, match="not the checkpoint that was given"):
        load_trained(checkpoint("qwen3_moe", torch.bfloat16), tmp_path / "run")
    with pytest.raises(moetier.ConfigError, match="has no step 7"):
        load_trained(folder, tmp_path / "run", train_step=7)
    with pytest.raises(moetier.ConfigError, match="holds no run yet"):
        load_trained(folder, tmp_path / "new", train_step=7)


@pytest.mark.parametrize(("code", "after"), covering([errno.ENOSPC, errno.EIO], [0, 3, 40], strength=1))
def test_a_disk_that_fails_stops_the_run_and_leaves_the_checkpoint(
    code: int, after: int, checkpoint: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint("qwen3_moe", torch.float32)
    seed()
    run = Run(folder, tmp_path / "run")
    run.train(range(2), commit_at=(2,))
    failing = Failing(monkeypatch, code, after)
    with pytest.raises(moetier.StoreError, match=os.strerror(code)):
        run.train(range(2, 4))
        run.model.moetier.commit(scheduler=run.scheduler)
    assert failing.refused
    failing.end()
    run.close()
    with RunFolder.open(tmp_path / "run", write=False) as opened:
        assert opened.steps() == [2] and not list(opened.verify())
    run = Run(folder, tmp_path / "run")
    assert run.step == 2
    losses = run.train(range(2, 4))
    run.close()
    seed()
    whole = Run(folder, tmp_path / "whole")
    assert whole.train(range(4))[2:] == losses
    whole.close()


def test_a_commit_that_found_the_disk_full_can_be_tried_again(
    checkpoint: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint("qwen3_moe", torch.float32)
    run = Run(folder, tmp_path / "run", slots=24)
    run.train(range(2))
    failing = Failing(monkeypatch, errno.ENOSPC, 5)
    with pytest.raises(moetier.StoreError, match="No space left"):
        run.model.moetier.commit(scheduler=run.scheduler)
    failing.end()
    run.model.moetier.commit(scheduler=run.scheduler)
    expected = run.everything()
    run.close()
    run = Run(folder, tmp_path / "run", slots=24)
    assert_equal(run.everything(), expected)
    run.close()


@pytest.mark.parametrize("slots", [1, 6])
def test_who_handles_an_error_of_a_forward_can_commit(
    slots: int, checkpoint: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the traceback holds on to what the forward had leased, to make updates there."""
    run = Run(checkpoint("qwen3_moe", torch.float32), tmp_path / "run", slots=slots)
    run.train(range(1))

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run.model.model.layers[1].mlp.experts.act_fn, "forward", stop)
    try:
        run.model(**batch(1), use_cache=False)
    except KeyboardInterrupt:
        run.model.moetier.commit(scheduler=run.scheduler)
    else:
        raise AssertionError("the forward was not interrupted")
    expected = run.everything()
    run.close()
    run = Run(checkpoint("qwen3_moe", torch.float32), tmp_path / "run", slots=slots)
    assert_equal(run.everything(), expected)
    run.close()


def test_the_same_process_goes_back_to_a_step(checkpoint: Get, tmp_path: Path) -> None:
    run = Run(checkpoint("qwen3_moe", torch.float32), tmp_path / "run", keep=4)
    losses = run.train(range(3), commit_at=(2, 3))
    session, expected = run.model.moetier.training, run.everything()
    losses += run.train(range(3, 5), commit_at=(4,))
    for _ in range(2):
        session.rewind(3)
        assert run.optimizer.resume(scheduler=run.scheduler) == {"step": 3, "extra": {"seen": 3}}
        assert_equal(run.everything(), expected)
        assert session.run.steps() == [2, 3, 4]
        assert run.train(range(3, 5)) == losses[3:]
    with pytest.raises(moetier.ConfigError, match="has no step 7"):
        session.rewind(7)
    run.close()


def test_a_way_back_that_the_disk_bars_loses_no_update(
    checkpoint: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, found = [], []
    for bars in (False, True):
        seed()
        run = Run(checkpoint("qwen3_moe", torch.float32), tmp_path / f"{bars}", slots=24)
        losses.append(run.train(range(3), commit_at=(1,)))
        if bars:
            failing = Failing(monkeypatch, errno.ENOSPC, 0)
            with pytest.raises(moetier.StoreError, match="No space left"):
                run.model.moetier.training.rewind(1)
            failing.end()
        losses[-1] += run.train(range(3, 4))
        found.append(run.everything())
        run.close()
    assert losses[0] == losses[1]
    assert_equal(*found)
