"""The teacher regression with its experts in tiers: the bits of the reference in memory, whatever is resident."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from moetier.errors import CapacityError, ConfigError
from moetier.stores.runfolder import RunFolder
from moetier.training import reference
from moetier.training.synthetic_home import Home, Tiered
from moetier.training.synthetic_run import InMemory, Settings, Step, Trained, train

SMALL = Settings(
    n_experts=12,
    n_envs=6,
    layers=2,
    width=8,
    expert_width=12,
    samples_per_env=24,
    batch_size=6,
    envs_per_batch=2,
    episode_len=4,
    steps=14,
    lr=0.01,
)


def tiered(settings: Settings, **home: Any) -> dict[str, Any]:
    return train(settings, partial(Tiered, home=Home(**{"host_slots": 6} | home)))


def in_memory(settings: Settings) -> dict[str, Any]:
    """With the arithmetic of tiered experts."""
    return train(settings, partial(InMemory, implementation=reference.NAME))


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Bit for bit: every step's loss, and the held-out one, which has all experts in it."""
    return bool(one["steps"]["loss"] == other["steps"]["loss"] and one["loss"]["held_out"] == other["loss"]["held_out"])


@pytest.mark.parametrize(
    "changes",
    [
        {"optim": "sgd", "lr": 0.1, "weight_decay": 0.01},
        {"optim": "momentum", "lr": 0.05},
        {"optim": "adamw", "weight_decay": 0.1},
        {"sampler": "iid"},
        {"sort_by_expert": True},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_the_bits_of_the_reference(changes: dict[str, Any]) -> None:
    settings = replace(SMALL, **changes)
    found = tiered(settings)
    assert same(found, in_memory(settings))
    assert found["caches"]["weights"]["tiers"][0]["evictions"] > 0  # they did not fit
    assert found["per_step"]["read_bytes"] > 0 and found["per_step"]["written_bytes"] > 0


def test_transformers_experts_are_close() -> None:
    mine, theirs = tiered(SMALL), train(SMALL, InMemory)
    assert mine["steps"]["loss"] == pytest.approx(theirs["steps"]["loss"], rel=1e-5)


@pytest.mark.parametrize(
    "home",
    [
        {"host_slots": 1},
        {"host_slots": 24, "prefetch": False},
        {"device_slots": 3},
        {"policy": "lru", "readers": 1},
        {"writeback": "periodic(every=5)"},
        {"writeback": "writethrough", "device_slots": 2},
    ],
    ids=lambda home: "-".join(map(str, home.values())),
)
def test_memory_changes_nothing(home: dict[str, Any]) -> None:
    assert same(tiered(SMALL, **home), tiered(SMALL))


def test_it_learns_and_episodes_move_fewer_bytes() -> None:
    settings = replace(SMALL, steps=36, n_envs=12, layers=1, envs_per_batch=1, episode_len=4, lr=0.03)
    episodes, shuffled = tiered(settings), tiered(replace(settings, sampler="iid"))
    assert shuffled["loss"]["last"] < 0.8 * shuffled["loss"]["first"]
    assert episodes["per_step"]["experts"] < 0.7 * shuffled["per_step"]["experts"]
    assert episodes["per_step"]["read_bytes"] < 0.5 * shuffled["per_step"]["read_bytes"]


def test_bfloat16_with_masters_learns() -> None:
    found = tiered(replace(SMALL, dtype="bfloat16", layers=1, steps=40, sampler="iid", lr=0.03))
    assert found["loss"]["last"] < 0.9 * found["loss"]["first"]


@pytest.mark.parametrize(("optim", "idle"), [("adamw", "skip"), ("sgd", "dense")])
def test_stopped_and_resumed(optim: str, idle: str, tmp_path: Path) -> None:
    settings = replace(SMALL, optim=optim, idle=idle, samples_per_env=12, steps=18)  # 12 steps an epoch
    whole = tiered(settings)
    parts = []
    for steps, slots in ((5, 6), (13, 2), (18, 24)):
        folder = tmp_path / "run"
        given = replace(settings, steps=steps)
        parts.append(tiered(given, folder=folder, resume=bool(parts), host_slots=slots, commit_every=3))
    assert [loss for part in parts for loss in part["steps"]["loss"]] == whole["steps"]["loss"]
    assert parts[-1]["loss"]["held_out"] == whole["loss"]["held_out"]
    with RunFolder.open(tmp_path / "run", write=False) as run:
        assert run.steps() == [18]


def test_a_run_that_failed_goes_on_from_its_last_checkpoint(tmp_path: Path) -> None:
    def stop(step: Step, trained: Trained) -> None:
        if step.number == 8:
            raise KeyboardInterrupt

    home = Home(folder=tmp_path / "run", host_slots=6, commit_every=3)
    with pytest.raises(KeyboardInterrupt):
        train(SMALL, partial(Tiered, home=home), stop)
    rest = train(SMALL, partial(Tiered, home=replace(home, resume=True)))
    assert rest["steps"]["number"][0] == 7  # what came after step 6 was not committed
    assert rest["steps"]["loss"] == tiered(SMALL)["steps"]["loss"][6:]


def test_only_what_was_trained_is_on_the_disk(tmp_path: Path) -> None:
    settings = replace(SMALL, n_experts=400, steps=4)
    tiered(settings, folder=tmp_path / "run")
    used = sum(file.stat().st_blocks * 512 for file in (tmp_path / "run").rglob("*.bin"))
    assert 0 < used < 100 * 3 * 4096  # of 800 experts; weights and two moments, a page each


def test_a_budget() -> None:
    layout_pages = 1 + 1 + 1  # weights 1152 bytes, gradients as many, two moments: a page each
    assert tiered(SMALL, host_memory=5 * layout_pages * 4096)["caches"]["state"]["tiers"][0]["slots"] == 5
    with pytest.raises(CapacityError, match=r"12\.0 KiB"):
        tiered(SMALL, host_memory=4096)


def test_mistakes(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(ConfigError, match="holds no run"):
        tiered(SMALL, folder=folder, resume=True)
    tiered(replace(SMALL, steps=2), folder=folder)
    with pytest.raises(ConfigError, match="holds a run already"):
        tiered(SMALL, folder=folder)
    with pytest.raises(ConfigError, match="2 steps already"):
        tiered(replace(SMALL, steps=2), folder=folder, resume=True)
    with pytest.raises(ConfigError, match="begun with n_experts 12, not 13, seed 0, not 1"):
        tiered(replace(SMALL, n_experts=13, seed=1), folder=folder, resume=True)
    with pytest.raises(ConfigError, match="episode_length 4"):
        tiered(replace(SMALL, episode_len=5), folder=folder, resume=True)
    with pytest.raises(ConfigError, match="optimizer adamw, not sgd"):
        tiered(replace(SMALL, optim="sgd"), folder=folder, resume=True)
    RunFolder.create(tmp_path / "other", model="something", fingerprint="x").close()
    with pytest.raises(ConfigError, match="trains something"):
        tiered(SMALL, folder=tmp_path / "other", resume=True)


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    tiered(SMALL)
    assert list(tmp_path.iterdir()) == []


def test_experts_are_never_allocated() -> None:
    settings = replace(SMALL, n_experts=100_000, steps=1, samples_per_env=6)
    made = Tiered(settings, Home(host_slots=4))
    try:
        names = dict(made.model.named_parameters())
        assert not any("gate_up_proj" in name or "down_proj" in name for name in names)
        assert not any(tensor.is_meta for tensor in names.values())
        plain = InMemory(SMALL).model.head.weight
        assert torch.equal(made.model.head.weight, plain)  # the rest has the weights of the seed
    finally:
        made.close(None)
