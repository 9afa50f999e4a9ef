"""What a model will need besides its experts: attention cache, activations, buffers. Reads shapes, never weights."""

from __future__ import annotations

from typing import Any

import torch

from moetier.mapping import LayerMap
from moetier.stores.blocks import WINDOW_NBYTES
from moetier.stores.checkpoint import can_slice
from moetier.stores.slices import can_cut, least_buffer

BASE_WORKSPACE = 24 << 20  # bytes: activations of a decode step, the allocator's slack, thread stacks
READER_NBYTES = (1 << 20) + 3 * 4096  # each reader's aligned scratch

_TOP_K = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "top_k_experts",
    "num_selected_experts",
)


def workspace_nbytes(model: Any, readers: int, context: int, top_k: int, strided: bool = False) -> int:
    """Working memory of a run: the stated constant, read buffers, and the activations of a prefill of `context` tokens.

    A token's rows pass the experts `top_k` times and exist there about four times over (gathered, results, in token
    order, summed); sixteen more copies of the hidden state cover attention and the residual stream. With `strided`
    slices (of transposed matrices) every reader has a window of rows to pick columns from.
    """
    hidden = int(model.config.get_text_config().hidden_size)
    itemsize: int = next(model.parameters()).dtype.itemsize
    readers_nbytes = readers * (READER_NBYTES + (WINDOW_NBYTES if strided else 0))
    return BASE_WORKSPACE + readers_nbytes + context * hidden * itemsize * (4 * top_k + 16)


def record_nbytes(maps: list[LayerMap]) -> int:
    """Raw bytes of the largest expert."""
    return max(m.layout.nbytes for m in maps)


def slice_nbytes(maps: list[LayerMap], is_packed: bool = False) -> int:
    """The smallest buffer that every expert can be computed through in slices; 0 where they cannot be cut.

    In a packed store every expert lies as the math wants it, whatever the checkpoint's recipes.
    """
    if not all((is_packed or can_slice(m.recipes)) and can_cut(m.layout, m.is_transposed) for m in maps):
        return 0
    return max(least_buffer(m.layout, m.is_transposed) for m in maps)


def top_k_of(model: Any, modules: list[tuple[str, Any]]) -> int:
    """Experts a token uses in a layer: from the router beside the experts, else from the config."""
    name, experts = modules[0]
    parent = model.get_submodule(name.rpartition(".")[0])
    for module in (parent, *parent.children(), experts):
        value = getattr(module, "top_k", None)
        if isinstance(value, int) and value > 0:
            return value
    config = model.config.get_text_config()
    for attribute in _TOP_K:
        value = getattr(config, attribute, None)
        if isinstance(value, int) and value > 0:
            return value
    return 1


def kv_nbytes(model: Any, context: int) -> int:
    """Bytes of the decoding cache for `context` tokens of one sequence, whatever the family keeps in it.

    Runs the model on the meta device, where shapes are computed and nothing else; a family that cannot run there is
    estimated from its attention sizes.
    """
    config = model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None) or context
    tokens = min(context, longest)
    try:
        with torch.no_grad(), torch.device("meta"):
            output = model(input_ids=torch.zeros(1, tokens, dtype=torch.long, device="meta"), use_cache=True)
        cache = output.past_key_values
        if cache is not None:
            return sum({id(t): t.nbytes for t in _tensors(cache, set())}.values())
    except Exception:  # data-dependent code cannot run without data: estimate instead
        pass
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", 1)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    itemsize = next(model.parameters()).dtype.itemsize
    return int(2 * config.num_hidden_layers * heads * width * itemsize * tokens)


def _tensors(value: Any, seen: set[int]) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if id(value) in seen:
        return []
    seen.add(id(value))
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in _tensors(item, seen)]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in _tensors(item, seen)]
    if hasattr(value, "__dict__") and type(value).__module__.startswith("transformers."):
        return _tensors(vars(value), seen)
    return []
