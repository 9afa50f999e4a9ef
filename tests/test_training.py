"""A tiered model in a plain training loop: bit for bit what the same arithmetic gives in memory, at a few slots."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import moetier
from moetier.access import ExpertKey
from training import (
    NAME,
    OPTIMIZERS,
    assert_close,
    assert_same,
    batch,
    clip_reference,
    load_reference,
    load_trained,
    loop,
    model_class,
    trained_experts,
)

STEPS = range(int(os.environ.get("MOETIER_TRAINING_STEPS", "4")))
Get = Callable[..., Any]


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
    model = trained(slots=1 if kind == "momentum" else 6)
    optimizer, other, plain = pair(checkpoint, model, kind)
    assert loop(model, optimizer, STEPS) == loop(plain, other, STEPS)
    assert_same(model, plain)


def checkpointed(model: Any) -> None:
    model.activation_checkpointing_enable({"use_reentrant": False})


def test_accumulation_clipping_auxiliary_loss_and_checkpointing(checkpoint: Get, trained: Get) -> None:
    model = trained(slots=3, state_slots=2, gradient_slots=2)
    optimizer, other, plain = pair(checkpoint, model, "adamw", max_grad_norm=0.5)
    norms: list[float] = []
    for each in (model, plain):
        checkpointed(each)
        each.config.router_aux_loss_coef = each.router_aux_loss_coef = 0.1
    mine = loop(model, optimizer, STEPS, accumulate=2, output_router_logits=True)
    clip = lambda plain: norms.append(clip_reference(plain, 0.5))  # noqa: E731
    theirs = loop(plain, other, STEPS, accumulate=2, output_router_logits=True, before_step=clip)
    assert mine == theirs
    assert optimizer.grad_norm == norms[-1] and max(norms) > 0.5
    assert_same(model, plain)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_close_to_stock_transformers(kind: str, checkpoint: Get, trained: Get) -> None:
    model = trained(slots="25%")
    optimizer = OPTIMIZERS[kind][0](model, **OPTIMIZERS[kind][2], max_grad_norm=1.0)
    plain = load_reference(checkpoint(NAME, torch.float32), implementation="grouped_mm")
    other = OPTIMIZERS[kind][1](plain.parameters(), **OPTIMIZERS[kind][2])
    clip = lambda plain: torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)  # noqa: E731
    mine, theirs = loop(model, optimizer, STEPS), loop(plain, other, STEPS, before_step=clip)
    assert mine == pytest.approx(theirs, rel=1e-6)
    if kind != "adamw":  # there, the sign of a gradient of nearly nothing decides about a whole step
        assert_close(model, plain, 1e-6)


@pytest.mark.parametrize("mode", [torch.autocast("cpu", torch.bfloat16), torch.inference_mode()], ids=type)
def test_an_update_is_the_same_whatever_the_forward_runs_in_that_makes_it(mode: Any, trained: Get) -> None:
    """Autocast would round the products in an update; of inference mode nothing may stay that training meets again."""
    found = []
    for settled in (True, False):
        model = trained()
        optimizer = moetier.AdamW(model, lr=0.01, experts="adafactor(lr=0.001)")
        settle = model.moetier.training.engine.settle if settled else lambda: None
        losses: list[Any] = []
        for step in range(3):
            with mode:
                losses.append(model(**batch(9, 1, 3)).loss.item())
            losses += loop(model, optimizer, range(step, step + 1), after_step=lambda _, settle=settle: settle())
        found.append((losses, trained_experts(model)))
    assert found[0][0] == found[1][0]
    for key, fields in found[0][1].items():
        assert all(torch.equal(field, found[1][1][key][name]) for name, field in fields.items()), key


def test_updates_in_backward(checkpoint: Get, trained: Get) -> None:
    model = trained()
    optimizer, other, plain = pair(checkpoint, model, "adamw", update="backward")
    assert loop(model, optimizer, STEPS) == loop(plain, other, STEPS)
    assert_same(model, plain)
    assert model.moetier.training.engine.gradients.cache.stats()["tiers"][0]["misses"] == [0, 0, 0]


def test_clipping_by_expert_needs_no_waiting(trained: Get) -> None:
    found = []
    for update in ("step", "backward"):
        model = trained()
        optimizer = moetier.SGD(model, lr=0.05, max_grad_norm=0.5, clip="per-expert", update=update)
        losses = loop(model, optimizer, STEPS)
        experts = {f"{key} {name}": t for key, fs in trained_experts(model).items() for name, t in fs.items()}
        found.append((losses, experts | {name: p.data for name, p in model.named_parameters()}))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(tensor, found[1][1][name]) for name, tensor in found[0][1].items())


def test_updates_in_backward_refuse_what_needs_to_wait(trained: Get) -> None:
    model = trained()
    with pytest.raises(moetier.ConfigError, match="use update='step', or clip='per-expert'"):
        moetier.AdamW(model, update="backward", max_grad_norm=1.0)
    optimizer = moetier.AdamW(model, update="backward")
    with pytest.raises(moetier.ConfigError, match="one backward per step"):
        loop(model, optimizer, range(1), accumulate=2)


def test_scaling_after_updates_in_backward_is_refused(trained: Get) -> None:
    model = trained()
    optimizer = moetier.AdamW(model, update="backward")
    with pytest.raises(moetier.ConfigError, match="scaled or clipped after backward"):
        loop(model, optimizer, range(1), before_step=lambda m: torch.nn.utils.clip_grad_norm_(m.parameters(), 0.01))
    with pytest.raises(moetier.MoetierError, match="load the model again with the same run folder"):
        loop(model, optimizer, range(1))


def test_clipping_from_outside_reaches_the_experts(checkpoint: Get, trained: Get) -> None:
    model = trained()
    optimizer, other, plain = pair(checkpoint, model, "momentum")
    norms: list[list[float]] = [[], []]
    for number, (each, its) in enumerate(((model, optimizer), (plain, other))):
        clip = lambda m, n=number: norms[n].append(torch.nn.utils.clip_grad_norm_(m.parameters(), 0.5).item())  # noqa: E731
        loop(each, its, STEPS, before_step=clip)
    assert norms[0] == pytest.approx(norms[1], rel=1e-6) and min(norms[0]) > 0.5
    assert_close(model, plain, 1e-6)


def test_loss_scaling(checkpoint: Get, trained: Get) -> None:
    """A scale that overflows skips the step, and the next one is the step that would have been made without."""
    model = trained()
    optimizer, other, plain = pair(checkpoint, model, "momentum")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, backoff_factor=2.0**-100)
    skipped = 0
    with torch.enable_grad():
        for step in range(4):
            scaler.scale(model(**batch(step), use_cache=False).loss).backward()
            scaler.step(optimizer)
            before = scaler.get_scale()
            scaler.update()
            optimizer.zero_grad()
            if scaler.get_scale() < before:
                skipped += 1
                continue
            plain(**batch(step), use_cache=False).loss.backward()
            other.step()
            other.zero_grad()
    assert skipped == 1 and model.moetier.training.step == 3
    assert_close(model, plain, 1e-6)


def test_half_precision_with_masters(checkpoint: Get, trained: Get) -> None:
    """Weights of bf16, masters and moments of fp32, everywhere."""
    model = trained(dtype=torch.bfloat16)
    optimizer = moetier.AdamW(model, lr=0.001, weight_decay=0.1, fused=True)
    plain = load_reference(checkpoint(NAME, torch.bfloat16))
    own = [p for p in plain.parameters() if p.dtype == torch.bfloat16]
    assert len(own) == len(list(plain.parameters()))
    masters = [p.detach().float().requires_grad_() for p in own]
    other = torch.optim.AdamW(masters, lr=0.001, weight_decay=0.1, fused=True)
    mine, theirs = loop(model, optimizer, STEPS), []
    with torch.enable_grad():
        for step in STEPS:
            loss = plain(**batch(step), use_cache=False).loss
            loss.backward()
            theirs.append(loss.item())
            for p, master in zip(own, masters, strict=True):
                master.grad = p.grad.float()
            other.step()
            for p, master in zip(own, masters, strict=True):
                p.data.copy_(master)
                p.grad = None
    assert mine == theirs
    assert_same(model, plain)


def test_frozen_experts_and_frozen_rest(checkpoint: Get, trained: Get) -> None:
    """The experts of one layer, or everything but experts: whatever `requires_grad` says."""

    def freeze(model: Any, prefix: str, keep: bool) -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_((prefix in name) == keep)

    for prefix, keep in ((".layers.1.mlp.experts.", False), (".experts.", True)):
        model = trained()
        plain = load_reference(checkpoint(NAME, torch.float32))
        for each in (model, plain):
            freeze(each, prefix, keep)
        optimizer = moetier.AdamW(model, lr=0.01, weight_decay=0.1, fused=True)
        wanted = [p for p in plain.parameters() if p.requires_grad]
        other = torch.optim.AdamW(wanted, lr=0.01, weight_decay=0.1, fused=True)
        assert loop(model, optimizer, STEPS) == loop(plain, other, STEPS)
        assert_same(model, plain)
        model.moetier.close()


def test_groups_and_schedules_reach_the_experts(checkpoint: Get, trained: Get) -> None:
    model = trained()
    plain = load_reference(checkpoint(NAME, torch.float32))
    made = []
    for each, kind in ((model, moetier.AdamW), (plain, torch.optim.AdamW)):
        experts = [p for name, p in each.named_parameters() if ".experts." in name]
        rest = [p for name, p in each.named_parameters() if ".experts." not in name]
        groups = [{"params": rest}, {"params": experts, "lr": 0.003, "weight_decay": 0.0}]
        arguments = (model, groups) if kind is moetier.AdamW else (groups,)
        optimizer = kind(*arguments, lr=0.01, weight_decay=0.1, fused=True)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=5)
        made.append(loop(each, optimizer, STEPS, scheduler=scheduler))
    assert made[0] == made[1]
    assert_same(model, plain)


def test_the_trained_model_is_saved_and_loads_anywhere(trained: Get, tmp_path: Path) -> None:
    model = trained()
    loop(model, moetier.AdamW(model, lr=0.01), STEPS)
    model.save_pretrained(tmp_path / "saved")
    again = load_reference(tmp_path / "saved")
    assert_same(model, again)
    stock = model_class().from_pretrained(tmp_path / "saved", dtype="auto")
    model.eval()
    assert torch.equal(model(**batch(0), use_cache=False).loss, stock(**batch(0), use_cache=False).loss)
    assert not any("proxy" in name for name in model.state_dict())


def test_experts_without_an_optimizer_are_not_trained_in_silence(trained: Get) -> None:
    model = trained()
    with torch.enable_grad(), pytest.raises(moetier.ConfigError, match="have gradients but no optimizer"):
        model(**batch(0), use_cache=False).loss.backward()


def test_memory_is_divided_out_of_one_budget(checkpoint: Get, trained: Get) -> None:
    with pytest.raises(moetier.CapacityError, match=r"the minimum is .* \((\d+) bytes\)") as refused:
        trained(slots=None, host_memory="1MiB")
    least = int(str(refused.value).partition("(")[2].partition(" ")[0])
    for budget in (least, least + 500_000):
        model = trained(slots=None, host_memory=budget)
        optimizer, other, plain = pair(checkpoint, model, "adamw")
        engine = model.moetier.training.engine
        slots = [cache.host.slots for cache in (engine.weights, engine.gradients.cache, engine.applied.state)]
        assert len(set(slots)) == 1 and (slots[0] == 1) == (budget == least)
        assert model.moetier.plan.host_total_nbytes <= budget
        assert loop(model, optimizer, range(1)) == loop(plain, other, range(1))
        assert_same(model, plain)


def test_backward_loads_the_states_that_the_step_begins_with(trained: Get) -> None:
    """Those of the first layer that the last forward used; its updates then wait for none of them."""
    model = trained(slots=6, state_slots=6)
    optimizer = moetier.AdamW(model, lr=0.01)
    state = model.moetier.training.engine.applied.state
    for step in range(3):
        with torch.enable_grad():
            loss = model(**batch(step)).loss
            *_, first = model.moetier.tape.coming()
            loss.backward()
        state.settle()
        expected = first.keys[:3]  # half of the slots
        assert first.layer == 0 and all(state.holding(expected))
        assert not step or sum(state.holding([ExpertKey(2, expert) for expert in range(8)])) <= 3
        before = state.stats()["tiers"][0]["lates"][0] + state.stats()["tiers"][0]["misses"][0]
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model(**batch(step))
        after = state.stats()["tiers"][0]
        assert after["lates"][0] + after["misses"][0] - before <= 8 - 3
