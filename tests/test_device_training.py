"""Training from a device's slots, with stand-ins for the device: the bits of one tier, which are those in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import moetier
from device_training import kernels_at_once, late_device, two_tiers
from moetier.arenas import DeviceArena
from moetier.training.optimizers.clipping import norm_of
from training import NAME, OPTIMIZERS, assert_same, clip_reference, load_reference, load_trained, loop, trained_experts

Get = Callable[..., Any]
STEPS = range(2)


@pytest.fixture
def trained(checkpoint: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Get]:
    """`trained(slots=2)`: a model with so many slots on the device; the other kinds have few, too."""
    models: list[Any] = []

    def get(run: str = "", dtype: torch.dtype = torch.float32, stand_in: bool = True, **options: Any) -> Any:
        given: dict[str, Any] = {"slots": 2, "state_slots": 3, "gradient_slots": 2} | options
        with monkeypatch.context() as patch:
            if stand_in:
                two_tiers(patch)
            folder = tmp_path / (run or f"run{len(models)}")
            models.append(load_trained(checkpoint(NAME, dtype), folder, **given))
        return models[-1]

    yield get
    for model in models:
        model.moetier.close()


def few_host_slots(get: Get, more: int = 400_000) -> int:
    """A budget of host memory that has a few slots of each kind."""
    with pytest.raises(moetier.CapacityError, match=r"host_memory .* the minimum is .* \((\d+) bytes\)") as refused:
        get(host_memory="1MiB", state_slots=None, gradient_slots=None)
    return int(str(refused.value).partition("(")[2].partition(" ")[0]) + more


def check_traffic(model: Any) -> None:
    """Experts came up to the device, and nothing ever went down from its slots: they are changed in host memory."""
    stats = model.moetier.cache.stats()
    top, below = stats["tiers"]
    assert sum(top["misses"]) > 0 and below["in_place"] > 0 and top["write_backs"] == 0
    assert stats["links"]["host→device"]["copies"] > 0 and stats["links"]["device→host"]["copies"] == 0
    model.moetier.cache.core.check()


@pytest.mark.parametrize(
    ("kind", "slots", "update", "late"),
    [
        ("sgd", 2, "step", False),
        ("adamw", 1, "step", True),
        ("momentum", 6, "backward", True),
    ],
)
def test_a_plain_loop(
    kind: str, slots: int, update: str, late: bool, checkpoint: Get, trained: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step uses more experts than there are slots, on the device and in host memory."""
    if late:
        kernels_at_once(monkeypatch, late_device(monkeypatch, slots))
    model = trained(slots=slots, host_memory=few_host_slots(trained))
    assert isinstance(model.moetier.cache.device, DeviceArena) == model.moetier.cache.host.page_locked == late
    assert 1 < model.moetier.cache.host.slots < 8
    make, theirs, options = OPTIMIZERS[kind]
    plain = load_reference(checkpoint(NAME, torch.float32))
    optimizer, other = (
        make(model, fused=True, update=update, **options),
        theirs(plain.parameters(), fused=True, **options),
    )
    assert loop(model, optimizer, STEPS) == loop(plain, other, STEPS)
    assert_same(model, plain)
    check_traffic(model)


@pytest.mark.parametrize("reentrant", [False, True])
def test_accumulation_clipping_auxiliary_loss_and_checkpointing(
    reentrant: bool, checkpoint: Get, trained: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels_at_once(monkeypatch, late_device(monkeypatch, 1, 0.0))
    model, plain = trained(slots=3), load_reference(checkpoint(NAME, torch.float32))
    norms: list[float] = []
    for each in (model, plain):
        each.activation_checkpointing_enable({"use_reentrant": reentrant})
        each.enable_input_require_grads()
        each.config.router_aux_loss_coef = each.router_aux_loss_coef = 0.1
    make, theirs, options = OPTIMIZERS["adamw"]
    optimizer, other = (
        make(model, fused=True, max_grad_norm=0.5, **options),
        theirs(plain.parameters(), fused=True, **options),
    )
    mine = loop(model, optimizer, STEPS, accumulate=2, output_router_logits=True)
    clip = lambda plain: norms.append(clip_reference(plain, 0.5))  # noqa: E731
    assert mine == loop(plain, other, STEPS, accumulate=2, output_router_logits=True, before_step=clip)
    assert optimizer.grad_norm == norms[-1] and max(norms) > 0.5
    assert_same(model, plain)
    check_traffic(model)


@pytest.mark.parametrize(("slots", "update", "late"), [(2, "step", True), (3, "backward", False), (6, "step", False)])
def test_routing_that_favours_what_is_on_the_device(
    slots: int, update: str, late: bool, trained: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the device's slots are for what is favoured, however many the host has: as with one tier of them."""
    lever = {"max_rank": 6, "keep_top": 0, "slots": slots}
    one = trained(**lever, stand_in=False)
    if late:
        kernels_at_once(monkeypatch, late_device(monkeypatch, slots))
    found = []
    for model in (one, trained(**lever), trained(**lever, host_memory=few_host_slots(trained))):
        losses = loop(model, moetier.AdamW(model, lr=0.01, update=update), range(3))
        found.append((losses, model.moetier.stats()["routing"]))
        model.moetier.cache.settle()
        core = model.moetier.cache.core
        core.check()
        assert len(core._pinned) == slots // 2 == found[-1][1]["kept"]
    assert found[0] == found[1] == found[2] and found[0][1]["changed_tokens"] > 0


def test_half_precision_and_other_optimizers_as_with_one_tier(trained: Get) -> None:
    found = []
    for stand_in in (True, False):
        model = trained(dtype=torch.bfloat16, stand_in=stand_in, slots=2 if stand_in else 5)
        assert (model.moetier.cache.device is not None) == stand_in
        optimizer = moetier.AdamW(
            model, lr=0.01, weight_decay=0.1, idle="skip", experts="adafactor", clip="per-expert", max_grad_norm=1
        )
        losses = loop(model, optimizer, STEPS)
        weights = {f"{key} {name}": t for key, fs in trained_experts(model).items() for name, t in fs.items()}
        found.append((losses, weights | {name: p.data for name, p in model.named_parameters()}))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(tensor, found[1][1][name]) for name, tensor in found[0][1].items())


def test_stopped_resumed_and_gone_back(checkpoint: Get, trained: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other sizes after a stop, with a device and without, and back to a step in the same process: the same bits."""
    kernels_at_once(monkeypatch, late_device(monkeypatch, 7))
    plain = load_reference(checkpoint(NAME, torch.float32))
    whole = loop(plain, torch.optim.AdamW(plain.parameters(), lr=0.01, fused=True), range(3))
    losses = []
    for begin, end, options in ((0, 1, {}), (1, 2, {"slots": 5}), (2, 3, {"slots": 9, "stand_in": False})):
        model = trained("run", **options)
        optimizer = moetier.AdamW(model, lr=0.01, fused=True)
        found = optimizer.resume()
        assert (0 if found is None else found["step"]) == begin
        losses += loop(model, optimizer, range(begin, end))
        model.moetier.commit()
        if end == 2:
            loop(model, optimizer, range(20, 21))  # another one, which is undone
            session = model.moetier.training
            session.rewind(1)
            optimizer.resume()
            assert loop(model, optimizer, range(1, 2)) == losses[1:]
            model.moetier.commit()
        if end < 3:
            model.moetier.close()
    assert losses == whole
    assert_same(model, plain)


def test_gradients_that_a_failed_backward_left_are_forgotten(
    checkpoint: Get, trained: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels_at_once(monkeypatch, late_device(monkeypatch, 3))
    model, plain = trained(), load_reference(checkpoint(NAME, torch.float32))
    optimizer, other = (
        moetier.AdamW(model, lr=0.01, fused=True),
        torch.optim.AdamW(plain.parameters(), lr=0.01, fused=True),
    )
    engine = model.moetier.training.engine

    def fail(*_: Any) -> None:
        raise RuntimeError("in the first layer's norm")

    hook = model.model.layers[0].input_layernorm.weight.register_hook(fail)
    with pytest.raises(RuntimeError, match="first layer"):
        loop(model, optimizer, range(1))
    hook.remove()
    assert engine.outbound.under_way and engine.pending
    optimizer.zero_grad()
    assert not engine.pending and not engine.outbound.under_way
    assert loop(model, optimizer, STEPS) == loop(plain, other, STEPS)
    assert_same(model, plain)


def test_norms_are_there_when_backward_ends(trained: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels_at_once(monkeypatch, late_device(monkeypatch, 3))
    model = trained()
    moetier.SGD(model, lr=0.01)
    engine = model.moetier.training.engine
    with torch.enable_grad():
        model(input_ids=torch.arange(3, 19).view(2, 8), labels=torch.arange(3, 19).view(2, 8)).loss.backward()
    assert not engine.outbound.under_way
    for layer, proxy in enumerate(engine.proxies):
        assert proxy.weight.grad.item() == pytest.approx(norm_of(engine.squares(layer).values()), rel=1e-6) != 0


def test_device_memory_is_planned(trained: Get) -> None:
    with pytest.raises(moetier.CapacityError, match=r"device_memory .* the minimum is .* \((\d+) bytes\)") as refused:
        trained(slots=None, device_memory="1MiB")
    least = int(str(refused.value).partition("(")[2].partition(" ")[0])
    for more in (0, 100_000):
        model = trained(slots=None, device_memory=least + more, host_memory="40MiB", state_slots=None)
        plan, arena = model.moetier.plan, model.moetier.cache.device
        assert [tier.name for tier in plan.tiers] == ["device", "host"]
        assert arena.slots == plan.slots == 1 + more // arena.slot_nbytes
        assert plan.tiers[1].slots == model.moetier.cache.host.slots
        assert plan.device_total_nbytes <= least + more and plan.host_total_nbytes <= 40 << 20
        engine = model.moetier.training.engine
        moetier.AdamW(model)
        arenas = [cache.host for cache in (engine.weights, engine.gradients.cache, engine.applied.state)]
        assert sum(arena.slots * arena.slot_nbytes for arena in arenas) < plan.host_total_nbytes
        model.moetier.close()
