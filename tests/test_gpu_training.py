"""Training on a real GPU. Skipped where there is none; `test_device_training` and `test_outbound` have stand-ins."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import moetier
from moetier.access import ExpertKey
from moetier.arenas import DeviceArena
from moetier.record import RecordLayout
from moetier.training.outbound import Outbound
from training import GENTLE, NAME, assert_close, batch, expert_modules, load_reference, load_trained, trained_experts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LATE = 20_000_000  # cycles: about 10 ms
STEPS = range(4)
Get = Callable[..., Any]


@pytest.fixture
def trained(checkpoint: Get, tmp_path: Path) -> Iterator[Get]:
    """`trained(slots=4)`: a model on the GPU, with so many of its 24 experts there."""
    models: list[Any] = []

    def get(run: str = "", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
        given = {"slots": 4, "state_slots": 5, "gradient_slots": 3, "host_memory": "64MiB", "device": "cuda"} | options
        models.append(load_trained(checkpoint(NAME, dtype), tmp_path / (run or f"run{len(models)}"), **given))
        return models[-1]

    yield get
    for model in models:
        model.moetier.close()


def loop(model: Any, optimizer: Any, steps: range, accumulate: int = 1, max_norm: float | None = None) -> list[float]:
    losses = []
    with torch.enable_grad():
        for step in steps:
            for part in range(accumulate):
                ids = {name: ids.to(model.device) for name, ids in batch(step * accumulate + part).items()}
                loss = model(**ids, use_cache=False).loss / accumulate
                loss.backward()
                losses.append(loss.item())
            if max_norm is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            optimizer.step()
            optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("kind", GENTLE)
@pytest.mark.parametrize("update", ["step", "backward"])
def test_losses_and_weights_of_training_in_memory(kind: str, update: str, checkpoint: Get, trained: Get) -> None:
    """The experts' optimizer runs on the CPU, that of the reference on the GPU: they round differently."""
    make, theirs, options = GENTLE[kind]
    model = trained()
    assert isinstance(model.moetier.cache.device, DeviceArena) and model.moetier.cache.host.page_locked
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    plain = load_reference(checkpoint(NAME, torch.float32)).to("cuda")
    optimizer, other = make(model, update=update, **options), theirs(plain.parameters(), **options)
    assert loop(model, optimizer, STEPS) == pytest.approx(loop(plain, other, STEPS), rel=1e-4)
    if kind != "adamw":  # there, the sign of a gradient of nearly nothing decides about a whole step
        assert_close(model, plain, 1e-4)
    stats = model.moetier.cache.stats()
    assert sum(stats["tiers"][0]["misses"]) > 0 and stats["tiers"][1]["in_place"] > 0
    assert stats["links"]["device→host"]["copies"] == 0
    model.moetier.cache.core.check()


def test_accumulation_clipping_and_checkpointing(checkpoint: Get, trained: Get) -> None:
    model, plain = trained(), load_reference(checkpoint(NAME, torch.float32)).to("cuda")
    for each in (model, plain):
        each.activation_checkpointing_enable({"use_reentrant": False})
    make, theirs, options = GENTLE["momentum"]
    optimizer, other = make(model, **options, max_grad_norm=0.5), theirs(plain.parameters(), **options)
    mine = loop(model, optimizer, STEPS, accumulate=2)
    assert mine == pytest.approx(loop(plain, other, STEPS, accumulate=2, max_norm=0.5), rel=1e-4)
    assert_close(model, plain, 1e-4)


def test_gradients_of_experts_are_those_of_the_reference(checkpoint: Get, trained: Get) -> None:
    """Summed in host memory by the time backward ends, with their norms in the proxies."""
    model, plain = trained(), load_reference(checkpoint(NAME, torch.float32)).to("cuda")
    moetier.SGD(model, lr=0.1)
    engine = model.moetier.training.engine
    ids = {name: ids.to("cuda") for name, ids in batch(0).items()}
    with torch.enable_grad():
        for each in (model, plain):
            each(**ids, use_cache=False).loss.backward()
    assert not engine.outbound.under_way
    for layer, module in enumerate(expert_modules(plain)):
        wanted = torch.stack([p.grad.norm() for p in (module.gate_up_proj, module.down_proj)]).norm()
        assert engine.proxies[layer].weight.grad.item() == pytest.approx(wanted.item(), rel=1e-4)
    for mine, theirs in zip(model.model.layers, plain.model.layers, strict=True):
        gradients = [each.mlp.gate.weight.grad for each in (mine, theirs)]
        assert (gradients[0] - gradients[1]).norm() <= 1e-4 * gradients[1].norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_slots_or_all(dtype: torch.dtype, trained: Get) -> None:
    found = []
    for slots in (1, "100%"):
        model = trained(slots=slots, dtype=dtype)
        losses = loop(model, moetier.AdamW(model, lr=0.001), STEPS)
        found.append((losses, trained_experts(model)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-3)
    for key, fields in found[0][1].items():
        for name, field in fields.items():
            assert (field - found[1][1][key][name]).float().norm() <= 2e-2 * field.float().norm(), (key, name)


@pytest.mark.parametrize("fused", [None, True])
def test_stopped_and_resumed(fused: bool | None, trained: Get) -> None:
    whole = trained()
    losses = loop(whole, moetier.AdamW(whole, lr=0.001, fused=fused), range(4))
    parts: list[float] = []
    for begin, slots in ((0, 4), (2, 7)):
        model = trained("run", slots=slots)
        optimizer = moetier.AdamW(model, lr=0.001, fused=fused)
        found = optimizer.resume()
        assert (0 if found is None else found["step"]) == begin
        parts += loop(model, optimizer, range(begin, begin + 2))
        model.moetier.commit()
        if begin == 0:
            model.moetier.close()
    assert parts == pytest.approx(losses, rel=1e-4)


def test_loss_scaling(trained: Get) -> None:
    model = trained()
    optimizer, scaler = moetier.SGD(model, lr=0.05), torch.amp.GradScaler("cuda", init_scale=2.0**10)
    with torch.enable_grad():
        for step in range(2):
            ids = {name: ids.to("cuda") for name, ids in batch(step).items()}
            with torch.autocast("cuda", torch.float16):
                loss = model(**ids, use_cache=False).loss
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert model.moetier.training.step == 2 and bool(torch.isfinite(loss))


def test_the_trainer(trained: Get, tmp_path: Path) -> None:
    from transformers import TrainingArguments

    model = trained()
    data = [{name: ids[0] for name, ids in batch(step, rows=1).items()} for step in range(8)]
    arguments = TrainingArguments(
        str(tmp_path / "out"), max_steps=3, per_device_train_batch_size=2, save_strategy="no", report_to=[]
    )
    if arguments.n_gpu > 1:
        pytest.skip("Trainer takes all GPUs that it sees")
    with torch.enable_grad():
        moetier.Trainer(model=model, args=arguments, train_dataset=data).train()
    assert model.moetier.training.step == 3


def test_gradients_are_copied_before_their_memory_is_used_again() -> None:
    device, numbers = torch.device("cuda", torch.cuda.current_device()), 1_000_000
    layout = RecordLayout.of([("field", torch.float32, (numbers,))])
    outbound = Outbound([layout], device)
    for value in range(40):
        if outbound.full:
            with outbound.receive() as (key, fields):
                assert bool((fields["field"] == key.expert).all()), key
        torch.cuda._sleep(LATE // 10)
        gradient = torch.full((numbers,), float(value), device=device)
        outbound.send(ExpertKey(0, value), {"field": gradient})
        del gradient
        torch.full((numbers,), -1.0, device=device)
    while outbound.under_way:
        with outbound.receive() as (key, fields):
            assert bool((fields["field"] == key.expert).all()), key
    outbound.close()
