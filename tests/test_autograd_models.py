"""Backward through whole models: every gradient has the bits of the reference in memory, family by family."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from conftest import family_class
from families import VOCAB
from layers import DictSink
from moetier import ExpertKey
from moetier.experts import per_expert_parameters
from moetier.hf import find_experts
from moetier.training.reference import use_reference

Get = Callable[..., Any]
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")

# One of each way to store, to gate and to route, as in test_families.py, and those with gates of their own
FAMILIES = ["qwen3_moe", "mixtral", "gpt_oss", "aria_text", "nemotron_h", "muse_spark", "inkling2_text", "deepseek_v3"]
FAMILIES += ["deepseek_v4", "minimax_m3_vl_text", "zaya", "gemma4_text", "qwen3_vl_moe"]


@pytest.fixture(autouse=True)
def _grad() -> Iterator[None]:
    with torch.enable_grad():
        yield


def inputs(seed: int = 0, rows: int = 2) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCAB, (rows, 9), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def reference(checkpoint: Get, name: str, dtype: torch.dtype) -> Any:
    return use_reference(family_class(name).from_pretrained(checkpoint(name, dtype), dtype="auto")).train()


def check(model: Any, sink: DictSink, other: Any) -> int:
    """All gradients are equal; returns how many experts have one."""
    theirs = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        expected = theirs[name].grad
        assert (parameter.grad is None) == (expected is None), name
        assert expected is None or torch.equal(parameter.grad, expected), name
    for layer, (path, module) in enumerate(find_experts(model)):
        for name in per_expert_parameters(module):
            for expert, expected in enumerate(theirs[f"{path}.{name}"].grad):
                mine = sink.gradients.get(ExpertKey(layer, expert), {})
                assert torch.equal(mine.get(name, torch.zeros_like(expected)), expected), (layer, expert, name)
    return len(sink.gradients)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.bfloat16) for name in FAMILIES]
    + [(name, torch.float32) for name in ("qwen3_moe", "gpt_oss", "muse_spark")],
    ids=str,
)
def test_families(name: str, dtype: torch.dtype, checkpoint: Get, tiered: Get) -> None:
    model, other = tiered(name, dtype, slots=3).train(), reference(checkpoint, name, dtype)
    model.moetier.sink = sink = DictSink()
    losses = []
    for each in (model, other):
        losses.append(each(**inputs()).loss)
        losses[-1].backward()
    assert torch.equal(*losses)
    assert check(model, sink, other) > 3


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool, checkpoint: Get, tiered: Get) -> None:
    model, other = (
        tiered("qwen3_moe", torch.float32, slots=4).train(),
        reference(checkpoint, "qwen3_moe", torch.float32),
    )
    model.moetier.sink = sink = DictSink()
    other(**inputs()).loss.backward()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model(**inputs(), use_cache=False).loss.backward()
    check(model, sink, other)
    forwards = sum(name == "forward" for name, _ in sink.events)
    assert forwards == (6 if reentrant else 3)  # 3 layers; not again where the experts end their decoder layer


def train(model: Any, steps: int = 4) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(steps):
        loss = model.train()(**inputs(step), use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_fine_tuning_the_routers_of_a_frozen_model(checkpoint: Get, tiered: Get) -> None:
    """Nothing but `from_pretrained` is needed: experts are frozen, all else is as usual."""
    model, other = tiered("qwen3_moe", torch.float32, slots=3), reference(checkpoint, "qwen3_moe", torch.float32)
    losses = []
    for each in (model, other):
        for name, parameter in each.named_parameters():
            parameter.requires_grad_(name.endswith("mlp.gate.weight"))
        losses.append(train(each))
    assert losses[0] == losses[1]
    theirs = dict(other.named_parameters())
    assert all(torch.equal(parameter, theirs[name]) for name, parameter in model.named_parameters())


def test_trainer_takes_a_model_with_frozen_experts(checkpoint: Get, tiered: Get, tmp_path: Path) -> None:
    data = [{name: values[0] for name, values in inputs(seed, 1).items()} for seed in range(6)]
    losses = []
    for each in (tiered("qwen3_moe", torch.float32, slots=3), reference(checkpoint, "qwen3_moe", torch.float32)):
        for name, parameter in each.named_parameters():
            parameter.requires_grad_("experts" not in name)
        settings = transformers.TrainingArguments(
            str(tmp_path), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2, use_cpu=True,
            report_to=[], save_strategy="no", disable_tqdm=True, max_grad_norm=0.5,
        )  # fmt: skip
        each.gradient_checkpointing_enable()
        trainer = transformers.Trainer(model=each, args=settings, train_dataset=data)
        losses.append(trainer.train().training_loss)
    assert losses[0] == losses[1]


@pytest.mark.filterwarnings("ignore")
def test_lora_of_peft_on_the_attention(checkpoint: Get, tiered: Get, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    losses, adapters = [], []
    for each in (tiered("qwen3_moe", torch.float32, slots=3), reference(checkpoint, "qwen3_moe", torch.float32)):
        torch.manual_seed(0)
        lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        made = peft.get_peft_model(each, lora)
        losses.append(train(made))
        made.save_pretrained(tmp_path / str(len(losses)))
        adapters.append((tmp_path / str(len(losses)) / "adapter_model.safetensors").read_bytes())
    assert losses[0] == losses[1] and losses[0][0] != losses[0][-1]
    assert adapters[0] == adapters[1]
