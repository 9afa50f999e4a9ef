"""`moetier train synthetic`: what it prints, writes and refuses; and that memory changes nothing but time."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from moetier.cli import app
from moetier.cli.train import said_of
from moetier.training.synthetic_run import Step

SMALL = ("--n-experts", 12, "--n-envs", 6, "--width", 8, "--expert-width", 12, "--samples-per-env", 24)
SMALL = (*SMALL, "--batch-size", 6, "--envs-per-batch", 2, "--episode-len", 3, "--layers", 2)


def call(*args: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["train", "synthetic", *map(str, (*SMALL, *args))])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def said(result: Any) -> str:
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.stderr).split())


def report(tmp_path: Path, *args: object) -> dict[str, Any]:
    path = tmp_path / "report.json"
    call("--json", path, "-q", *args)
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    shown = said(call("--in-memory", "--steps", 60, "--lr", 0.02, "--json", path))
    assert re.search(r"loss \d\.\d+ mean of the last 10 steps", shown) and "held-out loss" in shown
    found = json.loads(path.read_text())
    assert found["version"] == 1 and found["settings"]["n_experts"] == 12
    assert len(found["steps"]["loss"]) == 60 and found["steps"]["number"] == list(range(1, 61))
    assert found["loss"]["last"] < 0.7 * found["loss"]["first"]
    assert found["per_step"]["read_bytes"] == 0 and found["caches"] == {}


def test_tiered(tmp_path: Path) -> None:
    folder, args = tmp_path / "run", ("--host-slots", 6, "--optim", "sgd", "--lr", 0.1)
    shown = said(call(*args, "--steps", 8, "--run", folder, "--device-slots", 3, "--writeback", "writethrough"))
    assert re.search(r"weights, tier 0 \d+\.\d % 3 slots; \d+ hits", shown) and "weights, tier 1" in shown
    assert "gradients" in shown and re.search(r"written [\d.]+ [KM]iB a step", shown)
    assert "holds a run already" in said(call(*args, "--steps", 12, "--run", folder, code=2))
    rest = report(tmp_path, *args, "--steps", 12, "--run", folder, "--resume", "--no-prefetch")
    whole = report(tmp_path, *args[2:], "--steps", 12, "--host-memory", "1MiB")
    assert rest["steps"]["loss"] == whole["steps"]["loss"][8:]
    assert whole["caches"]["weights"]["tiers"][0]["evictions"] == 0
    shown = said(call(*args, "--steps", 20, "--run", folder, "--resume", "--seed", 4, code=2))
    assert "the run was begun with --seed 0, not 4" in shown
    shown = said(call(*args, "--lr", 1, "--steps", 20, "--run", folder, "--resume", code=2))
    assert f"{folder}: the run was begun with --lr 0.1, not 1.0; give the same" in shown
    shown = said(call("--host-slots", 6, "--lr", 0.1, "--steps", 20, "--run", folder, "--resume", code=2))
    assert f"{folder}: the run was trained with --optim sgd, not adamw; give the same, or begin a new run" in shown
    shown = said(call(*args, "--steps", 20, "--run", folder, "--resume", "--idle", "skip", code=2))
    assert f"{folder}: the run was trained with --idle dense, not skip; give the same, or begin a new run" in shown


@pytest.mark.parametrize("damaged", ["step.json", "resident.safetensors", "weights.bin"])
def test_a_damaged_run(tmp_path: Path, damaged: str) -> None:
    folder = tmp_path / "run"
    call("--steps", 2, "--run", folder, "-q")
    (path,) = folder.rglob(damaged)
    path.write_bytes(b"\xff" * (path.stat().st_size if damaged == "weights.bin" else 3))
    shown = said(call("--steps", 3, "--run", folder, "--resume", code=4))
    assert "or begin a new run in another folder with --run" in shown and "--resume-from" not in shown, shown


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (("--host-slots", 4, "--host-memory", "1GiB"), "give one"),
        (("--host-memory", "lots"), "--host-memory"),
        (("--writeback", "never"), "write-back policy"),
        (("--resume", "--run", "/nowhere/there"), "holds no run"),
        (("--sampler", "random"), "choose one of iid, episode"),
        (("--optim", "lion"), "--optim: unknown optimizer 'lion'"),
        (("--idle", "never"), "choose one of dense, skip"),
        (("--dtype", "int8"), "float32, bfloat16"),
        (("--envs-per-batch", 4), "shared by 4 environments"),
        (("--envs-per-batch", 60, "--batch-size", 60), "--envs-per-batch: 60 environments a batch, but there are 6 in"),
        (("--top-k", 13), "--top-k: 13 of 12 experts"),
        (("--in-memory", "--run", "x"), "no run is kept; leave --run out"),
        (("--in-memory", "--host-slots", 4), "leave --host-slots out"),
        (("--max-grad-norm", -1), "--max-grad-norm"),
        (("--resume",), "--resume needs --run"),
        (("--commit-every", 5), "--commit-every needs --run"),
        (("--in-memory", "--idle", "skip"), "skip is for tiered"),
        (("--policy", "none"), "policy"),
        (("--json", "/nowhere/there.json"), "--json"),
        (("--steps", 0), "--steps"),
    ],
)
def test_mistakes(args: tuple[object, ...], named: str) -> None:
    assert named in said(call(*args, code=2))


def test_a_budget_below_one_expert() -> None:
    assert "--host-memory 1.0 KiB" in said(call("--host-memory", "1KiB", code=3))


def test_the_line() -> None:
    steps = [Step(1, 2.0, 0.01, 4, 2**20, 0, 3, 4), Step(2, 1.0, 0.03, 4, 2**20, 2**21, 1, 4)]
    assert said_of(steps) == "loss 1.5000 · 20.0 ms · hits 50 % · read 1.0 MiB, written 1.0 MiB"
    assert said_of([Step(1, 2.0, 0.01, 4, 0, 0, 0, 0)]) == "loss 2.0000 · 10.0 ms"
