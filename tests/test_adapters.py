"""LoRA on tiered experts: the bits of adapted weights in memory, and what PEFT makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.func import functional_call

import moetier
from layers import KINDS, Kind, Twins, routed
from moetier.training.adapters import ACTIVE, Factors
from training import NAME, batch, load_reference, load_trained, model_class

Get = Callable[..., Any]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.fixture(autouse=True)
def with_gradients() -> Iterator[None]:
    with torch.enable_grad():
        yield


def factors(module: Any, name: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    experts, rows, columns = getattr(module, name).shape
    made = torch.Generator().manual_seed(seed)
    dtype = getattr(module, name).dtype
    lhs = torch.randn(experts, rows, 2, generator=made).to(dtype)
    return lhs.requires_grad_(), torch.randn(experts, 2, columns, generator=made).to(dtype).requires_grad_()


@pytest.mark.parametrize("slots", [1, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [KINDS[0], KINDS[1], KINDS[-1]], ids=lambda kind: kind.name)
def test_the_bits_of_adapted_weights(kind: Kind, dtype: torch.dtype, slots: int) -> None:
    """Outputs and gradients, with more experts than slots; two adapters on one field, one on the other."""
    twins = Twins(kind, dtype, slots=slots)
    twins.hub.sink = None  # frozen
    plain, tiered = twins.plain[0].requires_grad_(False), twins.tiered[0].requires_grad_(False)
    names = ["gate_up_proj", "gate_up_proj", "down_proj"]
    found = []
    for module in (plain, tiered):
        hidden, index, weights = routed(kind, dtype=dtype)
        inputs = hidden.requires_grad_(), weights.requires_grad_()
        pairs = [factors(plain, name, seed) for seed, name in enumerate(names)]
        if module is plain:
            stacks = {name: getattr(plain, name) for name in names}
            for name, (lhs, rhs) in zip(names, pairs, strict=True):
                one_by_one = zip(stacks[name], lhs, rhs, strict=True)
                stacks[name] = torch.stack([torch.addmm(*of_expert, alpha=0.5) for of_expert in one_by_one])
            result = functional_call(plain, stacks, (hidden, index, weights))
        else:
            active: dict[str, list[Factors]] = {}
            for name, pair in zip(names, pairs, strict=True):
                active.setdefault(name, []).append(Factors(name, *pair, 0.5))
            object.__setattr__(tiered, ACTIVE, active)
            result = tiered(hidden, index, weights)
        result.square().sum().backward()
        found.append([result, *(x.grad for x in (*inputs, *(x for pair in pairs for x in pair)))])
    twins.close()
    assert all(torch.equal(*both) for both in zip(*found, strict=True))


@pytest.fixture
def adapted(checkpoint: Get, tmp_path: Path) -> Iterator[Get]:
    """`adapted("tiered")`: the model with LoRA on attention and experts; `adapted("tiered", folder)`: from a file."""
    peft = pytest.importorskip("peft")
    if not hasattr(peft.tuners.lora.layer.ParamWrapper, "get_delta_factors"):
        pytest.skip("needs peft 0.21")
    models: list[Any] = []

    def get(where: str, folder: Path | None = None) -> Any:
        source = checkpoint(NAME, torch.float32)
        if where == "memory":
            model = load_reference(source, implementation="grouped_mm")
        else:
            model = moetier.from_pretrained(source, slots=6, context=64, model_class=model_class(), device="cpu")
            models.append(model)
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], target_parameters=EXPERTS, task_type="CAUSAL_LM")

        def made() -> Any:
            if folder is None:
                return peft.get_peft_model(model, config)
            return peft.PeftModel.from_pretrained(model, folder)

        if where == "memory":
            return made()
        with moetier.adaptable_experts(model):
            return made()

    yield get
    for model in models:
        model.moetier.close()


def train(model: Any, steps: int = 4) -> list[float]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    losses = []
    for step in range(steps):
        loss = model(**batch(step), use_cache=False).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.filterwarnings("ignore")  # of peft, about transformers
def test_peft_on_experts_is_that_in_memory(adapted: Get, tmp_path: Path) -> None:
    tiered, memory = adapted("tiered").train(), adapted("memory").train()
    before = sum(p.numel() for p in tiered.parameters() if p.requires_grad)
    assert before == sum(p.numel() for p in memory.parameters() if p.requires_grad)
    assert not any(name.endswith("gate_up_proj") for name, _ in tiered.named_parameters())
    losses = train(tiered)
    assert losses == pytest.approx(train(memory), rel=1e-6) and losses[0] != losses[-1]
    mine, theirs = ({n: p for n, p in m.named_parameters() if "lora_" in n} for m in (tiered, memory))
    assert mine.keys() == theirs.keys() and sum("experts" in name for name in mine) == 3 * 2 * 2
    for name, parameter in mine.items():
        assert (parameter - theirs[name]).norm() <= 1e-5 * theirs[name].norm(), name

    tiered.save_pretrained(tmp_path / "adapter")
    inputs = batch(9)
    with torch.no_grad():
        logits = tiered.eval()(**inputs).logits
        again = adapted("tiered", tmp_path / "adapter").eval()
        assert torch.equal(again(**inputs).logits, logits)
        other = adapted("memory", tmp_path / "adapter").eval()
        assert torch.allclose(other(**inputs).logits, logits, rtol=1e-5, atol=1e-5)
        with tiered.disable_adapter():
            plain = tiered(**inputs).logits
        assert not torch.equal(plain, logits)
        assert torch.equal(again.unload().eval()(**inputs).logits, plain)

        tiered.merge_adapter()
        assert torch.allclose(tiered(**inputs).logits, logits, rtol=1e-5, atol=1e-5)
        tiered.unmerge_adapter()
        merged = tiered.merge_and_unload()
        logits = merged(**inputs).logits
        merged.save_pretrained(tmp_path / "merged")
        whole = model_class().from_pretrained(tmp_path / "merged", dtype="auto").eval()
        assert torch.equal(whole(**inputs).logits, logits)


@pytest.mark.filterwarnings("ignore")
def test_accumulation_and_checkpointing_with_adapters(adapted: Get) -> None:
    found = []
    for where in ("tiered", "memory"):
        model = adapted(where).train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for part in range(2):
            (model(**batch(part), use_cache=False).loss / 2).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad and "lora_B" in name})
    for name, gradient in found[0].items():
        assert (gradient - found[1][name]).norm() <= 1e-6 * found[1][name].norm(), name


def test_what_cannot_be_adapted(checkpoint: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    source = checkpoint(NAME, torch.float32)
    with (
        pytest.raises(moetier.ConfigError, match=r"loaded with moetier\.from_pretrained"),
        moetier.adaptable_experts(load_reference(source)),
    ):
        pass
    model = load_trained(source, tmp_path / "run")
    with (
        pytest.raises(moetier.UnsupportedModelError, match="load it without train="),
        moetier.adaptable_experts(model),
    ):
        pass
    model.moetier.close()
    model = moetier.from_pretrained(source, slots=6, context=64, model_class=model_class(), device="cpu")
    cache = model.moetier.cache
    with monkeypatch.context() as patch:
        patch.setattr(cache.core, "misses", object())  # as cpu_experts has it, which needs a GPU
        with pytest.raises(moetier.ConfigError, match="cpu_experts='off'"), moetier.adaptable_experts(model):
            pass
    with monkeypatch.context() as patch:
        patch.setattr(model.moetier, "cache", object())  # of slices
        with pytest.raises(moetier.CapacityError, match="more host_memory"), moetier.adaptable_experts(model):
            pass
    cache.close()
