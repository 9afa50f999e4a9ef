"""The arms of the decode benchmark: how each loads its model. Everything here runs in a child process.

An arm is a kind and, for all but `memory`, the share of the experts that fits: `moetier-50`. Knows nothing about what
is then run, measured or reported.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Spec = dict[str, Any]

ENGINES = ("moetier", "foundation")  # kinds that load this repository's library, today's or a former one
PEERS = ("accelerate", "mmap", "mmap-fused", "llamacpp")  # llamacpp.py loads and runs the last one
KINDS = ("memory", *ENGINES, *PEERS)


def split(arm: str) -> tuple[str, int | None]:
    """Kind and share (%) of an arm: `("moetier", 50)`; `("memory", None)`."""
    kind, _, share = arm.rpartition("-")
    return (kind, int(share)) if share.isdigit() else (arm, None)


def load(spec: Spec) -> Any:
    """The model of the arm's kind."""
    return LOADERS[spec["kind"]](spec)


# -- plain transformers, in memory -------------------------------------------------------------------------------------


def load_memory(spec: Spec) -> Any:
    """Plain transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(spec["folder"], dtype="auto")


# -- moetier -----------------------------------------------------------------------------------------------------------


def load_moetier(spec: Spec) -> Any:
    """moetier with its defaults: only slots, context and what the command line asked for are given."""
    import moetier

    engine = Path(moetier.__file__).resolve()
    if spec.get("source") and not engine.is_relative_to(Path(spec["source"]).resolve()):
        raise RuntimeError(f"the engine came from {engine.parent}, not from {spec['source']}")
    slots, options = f"{spec['share']}%", spec.get("options", {})
    model = moetier.from_pretrained(spec["folder"], slots=slots, context=spec["context"], device="cpu", **options)
    if spec["share"] == 100:
        touch_all(model.moetier.cache)
    if spec.get("time_core"):
        time_core(model.moetier)
    return model


def touch_all(cache: Any) -> None:
    """Bring every expert into memory: that is what 100 % resident means, and what the in-memory model starts with."""
    from moetier import Access, ExpertKey

    for layer in range(cache.store.layers):
        keys = tuple(ExpertKey(layer, expert) for expert in range(cache.store.experts))
        for _ in cache.stream(Access(0, layer, keys)):
            pass


def time_core(tiered: Any) -> None:
    """Let `stats()` also tell the seconds spent in the residency core: its calls, without queues, locks and views."""
    spent = [0.0]

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            result = call(*args, **kwargs)
            spent[0] += time.perf_counter() - begin
            return result

        return wrapper

    core, plain_stats = tiered.cache.core, tiered.stats
    for name in ("acquire", "release", "completed", "take", "place"):
        setattr(core, name, timed(getattr(core, name)))

    def stats() -> dict[str, Any]:
        found: dict[str, Any] = plain_stats()
        found["seconds"]["core"] = spent[0]
        return found

    tiered.stats = stats


# -- accelerate --------------------------------------------------------------------------------------------------------


def load_accelerate(spec: Spec) -> Any:
    """transformers' model with the experts of all but `resident` layers dispatched to disk by accelerate.

    The documented API (`dispatch_model` with an offload index of safetensors files), with the finest device map: all
    weights but experts stay in memory.
    """
    from accelerate import dispatch_model
    from accelerate.utils import set_module_tensor_to_device
    from safetensors import safe_open

    model = empty_model(spec)
    index = json.loads((Path(spec["offload"]) / "offload.json").read_text())
    device_map = accelerate_device_map(model.config.num_hidden_layers, spec["resident"])
    on_disk = {}
    for name, entry in index.items():
        if device_map.get(name.rpartition(".")[0]) == "disk":
            on_disk[name] = entry
            continue
        with safe_open(entry["safetensors_file"], framework="pt") as file:
            value = file.get_tensor(entry["weight_name"]).clone()
        set_module_tensor_to_device(model, name, "cpu", value=value)
    model.eval()
    if not on_disk:
        return model
    return dispatch_model(model, device_map, main_device="cpu", offload_dir=spec["offload"], offload_index=on_disk)


def empty_model(spec: Spec) -> Any:
    """The model without data in its parameters; its buffers are computed."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(spec["folder"])
    with init_empty_weights():
        return AutoModelForCausalLM.from_config(config, dtype=config.dtype)


def accelerate_device_map(layers: int, resident: int) -> dict[str, str]:
    """Everything in memory but the experts of the layers from `resident` on."""
    device_map = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    for layer in range(layers):
        at = f"model.layers.{layer}"
        device_map |= dict.fromkeys(
            (f"{at}.self_attn", f"{at}.input_layernorm", f"{at}.post_attention_layernorm", f"{at}.mlp.gate"), "cpu"
        )
        device_map[f"{at}.mlp.experts"] = "cpu" if layer < resident else "disk"
    return device_map


def write_offload(spec: Spec) -> None:
    """accelerate's folder: the experts as transformers holds them (stacked per layer), as safetensors, and an index."""
    from transformers import AutoConfig, AutoModelForCausalLM

    offload = Path(spec["offload"])
    config = AutoConfig.from_pretrained(spec["folder"])
    model = AutoModelForCausalLM.from_pretrained(
        spec["folder"],
        dtype="auto",
        device_map=accelerate_device_map(config.num_hidden_layers, 0),
        offload_folder=str(offload),
    )
    weight_map = weight_map_of(spec)
    index = {}
    for name, _ in model.named_parameters():
        own = offload / f"{name}.safetensors"
        file = own if own.is_file() else Path(spec["folder"]) / weight_map[name]
        index[name] = {"safetensors_file": str(file), "weight_name": name, "dtype": "bfloat16"}
    (offload / "offload.json").write_text(json.dumps(index, indent=1))


def weight_map_of(spec: Spec) -> dict[str, str]:
    """Tensor name -> shard, of the checkpoint."""
    index = json.loads((Path(spec["folder"]) / "model.safetensors.index.json").read_text())
    weight_map: dict[str, str] = index["weight_map"]
    return weight_map


# -- the plain model over mapped files ---------------------------------------------------------------------------------


def load_mmap(spec: Spec) -> Any:
    """The plain model whose weights are the checkpoint's own shards, mapped: no weight is ever copied.

    `from_pretrained` would copy, since the hub layout has a tensor per expert and transformers stacks them. So the
    experts' matrices stay single, and an experts function like transformers' own eager loop multiplies by them.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register("mapped", mapped_experts_forward)
    model = empty_model(spec)
    tensors = mapped_tensors(Path(spec["folder"]) / shard for shard in sorted(set(weight_map_of(spec).values())))
    for layer, block in enumerate(model.model.layers):
        experts, at = block.mlp.experts, f"model.layers.{layer}.mlp.experts"
        del experts.gate_up_proj, experts.down_proj
        names = ("gate_proj", "up_proj", "down_proj")
        experts.mapped = [
            tuple(tensors.pop(f"{at}.{expert}.{name}.weight") for name in names)
            for expert in range(experts.num_experts)
        ]
    model.load_state_dict(tensors, strict=True, assign=True)
    model.set_experts_implementation("mapped")
    return model.eval()


def load_mmap_fused(spec: Spec) -> Any:
    """Unmodified transformers over a mapped copy of the checkpoint in its own layout (accelerate's files, stacked)."""
    index = json.loads((Path(spec["offload"]) / "offload.json").read_text())
    model = empty_model(spec)
    files = sorted({entry["safetensors_file"] for entry in index.values()})
    tensors = mapped_tensors(Path(file) for file in files)
    model.load_state_dict({name: tensors[name] for name in index}, strict=True, assign=True)
    return model.eval()


def mapped_tensors(files: Any) -> dict[str, Any]:
    """All tensors of safetensors files as views of private mappings: pages are read when they are first touched."""
    from safetensors import safe_open

    tensors = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def mapped_experts_forward(self: Any, hidden: Any, index: Any, weights: Any) -> Any:
    """[T, H] hidden states through the experts that `index` [T, K] names; only their matrices are touched."""
    import torch
    from torch.nn.functional import linear

    results = hidden.new_empty(index.numel(), hidden.size(-1))
    flat, rows = index.flatten(), torch.arange(index.numel()) // index.size(-1)
    for expert in flat.unique().tolist():
        pairs = (flat == expert).nonzero()[:, 0]
        gate, up, down = self.mapped[expert]
        x = hidden[rows[pairs]]
        results[pairs] = linear(self.act_fn(linear(x, gate)) * linear(x, up), down)
    return (results * weights.flatten().unsqueeze(-1)).view(*index.shape, -1).sum(dim=1).to(hidden.dtype)


LOADERS: dict[str, Callable[[Spec], Any]] = {
    "memory": load_memory,
    "moetier": load_moetier,
    "foundation": load_moetier,
    "accelerate": load_accelerate,
    "mmap": load_mmap,
    "mmap-fused": load_mmap_fused,
}
