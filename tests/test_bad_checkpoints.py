"""What can be wrong with a folder or an argument: each is one of moetier's errors, naming it and the way out."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import moetier
from families import VOCAB
from moetier import (
    CapacityError,
    CheckpointError,
    ConfigError,
    MoetierError,
    StoreError,
    TieredExpertsConfig,
    UnsupportedModelError,
)

Get = Callable[..., Any]
NAME = "qwen3_moe"


def prompt(seed: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def load(folder: str | Path, **options: Any) -> Any:
    return moetier.from_pretrained(folder, **{"slots": "25%", "context": 64} | options)


def second_door(folder: str | Path, **options: Any) -> Any:
    config = TieredExpertsConfig(**{"slots": "25%", "context": 64} | options)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype="auto")


@pytest.fixture
def copy(checkpoint: Get, tmp_path: Path) -> Callable[..., Path]:
    def get(name: str = NAME) -> Path:
        return Path(shutil.copytree(checkpoint(name), tmp_path / name))

    return get


def configure(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | changes))
    return folder


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
    return folder


def shard(folder: Path, checkpoint: Get) -> Path:
    model = AutoModelForCausalLM.from_pretrained(checkpoint(NAME), dtype="auto")
    model.save_pretrained(folder, max_shard_size="50KB")
    return folder


# -- the model ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("door", [load, second_door])
def test_not_a_mixture_of_experts(door: Get, tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM \(llama\) is not a Mixture-of-Experts model"):
        door(tmp_path)


def test_a_model_type_that_transformers_does_not_know(copy: Get) -> None:
    with pytest.raises(UnsupportedModelError, match=r"config.json: model type 'qwen99' is unknown .*upgrade it"):
        load(configure(copy(), model_type="qwen99"))


@pytest.mark.parametrize("method", ["fp8", "mxfp4", "gptq", "bitsandbytes"])
def test_quantised_checkpoints(method: str, copy: Get) -> None:
    folder = configure(copy(), quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(UnsupportedModelError, match=rf"config.json: the checkpoint is quantised \({method}\)"):
        load(folder)


@pytest.mark.parametrize("method", ["fp8", "mxfp4"])
def test_quantised_checkpoints_through_the_other_door(method: str, copy: Get) -> None:
    """transformers itself compares the two configs there, before moetier is asked."""
    folder = configure(copy(), quantization_config={"quant_method": method})
    with pytest.raises((ValueError, UnsupportedModelError), match=r"quanti[sz]ed"):
        second_door(folder)


def test_dense_where_experts_were_expected(copy: Get) -> None:
    """The config says that no layer has experts."""
    with pytest.raises(UnsupportedModelError):
        load(configure(copy(), mlp_only_layers=[0, 1, 2]))


# -- the folder --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["/nowhere/at/all", "./nowhere", "~/nowhere-at-all", "nowhere"])
def test_no_such_folder(model: str) -> None:
    with pytest.raises(CheckpointError, match=r"no such model folder; give a folder with config.json"):
        load(model)


def test_a_hub_id_without_a_connection() -> None:
    with pytest.raises(CheckpointError, match="not a folder, and the hub could not give it"):
        load("nobody/no-such-model", local_files_only=True)


def test_config_missing(copy: Get) -> None:
    folder = copy()
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config.json: missing"):
        load(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '"text"', "nul", "\x00\xff"])
def test_config_broken(text: str, copy: Get) -> None:
    folder = copy()
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config.json: (cannot be read as JSON|is not a JSON object)"):
        load(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "many"},
        {"num_attention_heads": 0},
        {"num_hidden_layers": -1},
        {"moe_intermediate_size": None},
        {"quantization_config": "fp8"},
        {"num_local_experts": 0},
        {"num_local_experts": "eight"},
        {"dtype": "float7"},
        {"model_type": 3},
        {"model_type": None},
        {"hidden_act": "no such function"},
        {"vocab_size": -5},
    ],
    ids=str,
)
def test_config_values_that_make_no_sense(change: dict[str, Any], copy: Get) -> None:
    with pytest.raises(MoetierError):
        load(configure(copy(), **change))


def test_only_pickles(copy: Get) -> None:
    folder = copy()
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"found only pytorch_model.bin: pickles can run code and are never"):
        load(folder)
    with pytest.raises((MoetierError, OSError)):
        second_door(folder)


def test_no_weights(copy: Get) -> None:
    folder = copy()
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        load(folder)


def test_shard_missing(checkpoint: Get, tmp_path: Path) -> None:
    folder = shard(tmp_path, checkpoint)
    lost = sorted(folder.glob("*.safetensors"))[2]
    lost.unlink()
    with pytest.raises(CheckpointError, match=rf"{lost.name}: cannot be opened: .*download it"):
        load(folder)


@pytest.mark.parametrize("nbytes", [0, 5, 100, 100_000, -1])
def test_truncated_before_loading(nbytes: int, copy: Get) -> None:
    folder = copy()
    path = folder / "model.safetensors"
    os.truncate(path, nbytes if nbytes >= 0 else path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=r"model.safetensors: truncated"):
        load(folder)


# -- checkpoint and config disagree ------------------------------------------------------------------------------------


@pytest.mark.parametrize("door", [load, second_door])
@pytest.mark.parametrize("field", ["gate_proj", "up_proj", "down_proj"])
def test_expert_missing(door: Get, field: str, copy: Get) -> None:
    name = f"model.layers.1.mlp.experts.5.{field}.weight"
    folder = rewrite(copy(), lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=r"model.safetensors: 7 tensors .*8 experts \(expert 5 is missing\)"):
        door(folder)


def test_last_expert_missing(copy: Get) -> None:
    name = "model.layers.2.mlp.experts.7.up_proj.weight"
    with pytest.raises(CheckpointError, match=r"layers.2.mlp.experts.*8 experts \(expert 7 is missing\)"):
        load(rewrite(copy(), lambda tensors: tensors.pop(name)))


def test_all_experts_of_a_layer_missing(copy: Get) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if key.startswith("model.layers.1.mlp.experts.")]:
            del tensors[key]

    with pytest.raises(CheckpointError, match=r"no tensor for 'model.layers.1.mlp.experts.gate_up_proj'"):
        load(rewrite(copy(), change))


def test_all_of_one_matrix_missing(copy: Get) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if key.startswith("model.layers.1.mlp.experts.") and "up_proj" in key]:
            del tensors[key]

    with pytest.raises(CheckpointError, match=r"no tensor '.*up_proj.*' for 'model.layers.1.mlp.experts.gate_up_proj'"):
        load(rewrite(copy(), change))


def test_an_expert_that_is_twice_as_wide(copy: Get) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        key = "model.layers.1.mlp.experts.5.gate_proj.weight"
        tensors[key] = torch.cat([tensors[key], tensors[key]])

    with pytest.raises(CheckpointError, match=r"config asks for \[80, 64\]"):
        load(rewrite(copy(), change))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "qwen3_moe",
            {"num_local_experts": 9},
            r"8 tensors match .* but the config says 9 experts \(expert 8 is missing\)",
        ),
        ("qwen3_moe", {"num_local_experts": 7}, r"8 tensors match .* but the config says 7 experts"),
        (
            "qwen3_moe",
            {"moe_intermediate_size": 48},
            r"shape \[80, 64\] per expert, but .* asks for \[96, 64\]",
        ),
        ("qwen3_moe", {"num_hidden_layers": 4}, r"no tensor for 'model.layers.3.mlp.experts"),
        ("granitemoe", {"num_local_experts": 9}, r"has shape \[8, .*\], but the config says 9 experts"),
        ("granitemoe", {"intermediate_size": 64}, r"config asks for"),
        ("gpt_oss", {"num_local_experts": 4}, r"has shape \[8, .*\], but the config says 4 experts"),
    ],
)
def test_config_of_another_model(name: str, changes: dict[str, Any], message: str, copy: Get) -> None:
    folder = configure(copy(name), **changes)
    for door in (load, second_door):
        with pytest.raises(CheckpointError, match=message):
            door(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float64])
def test_experts_of_a_strange_dtype(dtype: torch.dtype, copy: Get) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key in tensors:
            if ".experts." in key:
                tensors[key] = tensors[key].to(dtype)

    with pytest.raises(CheckpointError, match=r"experts.0.* has dtype .*; experts may be F32, F16, BF16"):
        load(rewrite(copy(), change))


def test_one_expert_of_another_dtype_is_cast(copy: Get, checkpoint: Get) -> None:
    """As transformers does it."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        key = "model.layers.1.mlp.experts.5.gate_proj.weight"
        tensors[key] = tensors[key].float()

    model = load(rewrite(copy(), change))
    plain = AutoModelForCausalLM.from_pretrained(checkpoint(NAME), dtype="auto")
    assert torch.equal(model(**prompt()).logits, plain(**prompt()).logits)
    model.moetier.close()


def test_other_weights_missing_or_misshapen(copy: Get) -> None:
    """What is not an expert is transformers' business; its errors come out as moetier's."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"] = torch.zeros(5)

    with pytest.raises(CheckpointError, match=r"the checkpoint and its config.json do not fit together"):
        load(rewrite(copy(), change))


# -- arguments ---------------------------------------------------------------------------------------------------------


def test_a_budget_below_the_minimum(checkpoint: Get) -> None:
    """The message states the minimum, and the minimum works."""
    folder = checkpoint(NAME)
    with pytest.raises(
        CapacityError, match=r"host_memory 1.0 MiB leaves no slot .*the minimum is .*\(\d+ bytes\)"
    ) as e:
        load(folder, host_memory="1MiB", slots=None)
    assert e.value.minimum_slots == 1
    minimum = int(str(e.value).partition("(")[2].partition(" bytes")[0])
    with pytest.raises(CapacityError):
        load(folder, host_memory=minimum - 1, slots=None)
    model = load(folder, host_memory=minimum, slots=None)
    assert model.moetier.plan.slots == 1
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert torch.equal(model(**prompt()).logits, plain(**prompt()).logits)
    model.moetier.close()


def test_no_slots(checkpoint: Get) -> None:
    with pytest.raises(CapacityError, match="at least 1 slot is needed, got 0"):
        load(checkpoint(NAME), slots=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "optimal"}, r"unknown policy 'optimal'; choose one of: activation-matrix, belady, "),
        ({"policy": "belady"}, r"policy 'belady' is an oracle .* in simulations only"),
        ({"policy": "static"}, r"policy 'static' has to be fitted .* in simulations only"),
        ({"policy": "slru(protect=0.5)"}, r"policy 'slru' has no parameter 'protect'; its parameters are: protected"),
        ({"policy": "no.such:Thing"}, r"policy 'no.such:Thing' cannot be imported"),
        ({"admission": "never"}, r"unknown admission policy 'never'; choose one of: "),
        ({"slots": "lots"}, r"slots: 'lots' is neither"),
        ({"slots": "0%"}, r"must be above 0%"),
        ({"slots": "101%"}, r"at most 100%"),
        ({"host_memory": "some"}, r"host_memory: 'some' is not a size"),
        ({"device_memory": -1}, r"device_memory must not be negative"),
        ({"io": "fast"}, r"io: 'fast' is unknown"),
        ({"readers": 0}, r"readers: at least 1"),
        ({"context": 0}, r"context: at least 1"),
    ],
    ids=str,
)
def test_arguments_that_cannot_be_used(options: dict[str, Any], message: str, checkpoint: Get) -> None:
    for door in (load, second_door):
        with pytest.raises(ConfigError, match=message):
            door(checkpoint(NAME), **options)


def test_an_argument_that_nobody_knows(checkpoint: Get) -> None:
    with pytest.raises(ConfigError, match=r"unexpected keyword argument 'polcy'; see moetier.Options"):
        load(checkpoint(NAME), polcy="lru")


def test_an_option_that_does_not_exist() -> None:
    with pytest.raises(ConfigError, match=r"known options: device_memory, host_memory, slots, policy"):
        TieredExpertsConfig(polcy="lru")


# -- the disk, later ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("io", ["auto", "buffered"])
def test_an_io_error_in_the_middle_of_a_run(
    io: str, checkpoint: Get, plain: Get, tiered: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiered(NAME, slots=4, io=io)
    expected = [plain(NAME)(**prompt(seed)).logits for seed in range(3)]
    assert torch.equal(model(**prompt(0)).logits, expected[0])
    real, calls = os.preadv, [0]

    def failing(*args: Any) -> int:
        calls[0] += 1
        if calls[0] > 5:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", failing)
        for _ in range(3):
            with pytest.raises(StoreError, match=r"model.safetensors: reading \d+ bytes at offset \d+ .*Input/output"):
                model(**prompt(1))
        time.sleep(0.1)  # reads that were under way have failed too
    for seed in range(3):
        assert torch.equal(model(**prompt(seed)).logits, expected[seed])
    assert not model.moetier.cache.core.tickets
    model.moetier.cache.core.check()


def test_truncated_after_loading(checkpoint: Get, plain: Get, tmp_path: Path) -> None:
    """A shard that holds experts only; transformers maps the others into memory, and dies with them."""
    folder = shard(tmp_path, checkpoint)
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    mixed = {file for name, file in weight_map.items() if ".experts." not in name}
    path = folder / min(set(weight_map.values()) - mixed)
    model = load(folder, slots=1, io="buffered")
    whole = path.read_bytes()
    os.truncate(path, len(whole) // 4)
    with pytest.raises(StoreError, match=rf"{path.name}: ends at byte .* it is truncated or was changed"):
        model(**prompt())
    path.write_bytes(whole)  # the same file again: the model recovers
    time.sleep(0.1)  # reads that were under way have failed too
    assert torch.equal(model(**prompt()).logits, plain(NAME)(**prompt()).logits)
    model.moetier.close()


def test_nothing_is_left_open_by_a_failed_load(copy: Get) -> None:
    folder = configure(copy(), num_local_experts=9)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(CheckpointError):
            load(folder)
    assert len(os.listdir("/proc/self/fd")) <= before + 1
