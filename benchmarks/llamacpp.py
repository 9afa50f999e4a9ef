"""llama.cpp as a peer: the checkpoint as a mapped GGUF file in bf16, run by its server's own functions, in process.

Needs two packages that nothing else here does: `pip install xllamacpp gguf`. Knows nothing about limits or reports.
"""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common

Spec = dict[str, Any]
NAME = "t"  # and its number: a token's text


def installed() -> bool:
    """Whether both packages are there."""
    return all(importlib.util.find_spec(name) for name in ("xllamacpp", "gguf"))


def write_gguf(folder: Path, out: Path) -> None:
    """Convert a Qwen3-MoE checkpoint of `common.make_checkpoint`, tensor by tensor; its tokens get made-up names."""
    import gguf

    config = json.loads((folder / "config.json").read_text())
    partial = out.with_name(out.name + ".partial")
    writer = gguf.GGUFWriter(partial, "qwen3moe")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"{NAME}{number}" for number in range(config["vocab_size"])])
    writer.add_token_merges([f"{NAME} 1"])
    writer.add_add_bos_token(False)
    writer.add_eos_token_id(0)
    kinds = gguf.GGMLQuantizationType
    for name, parts in tensors(folder, config["num_hidden_layers"], config["num_experts"]):
        first = parts[0]
        shape = (len(parts), *first.shape) if len(parts) > 1 else tuple(first.shape)
        kind = kinds.BF16 if first.dim() == 2 and "gate_inp" not in name else kinds.F32
        width = 2 if kind is kinds.BF16 else 4
        nbytes = len(parts) * first.numel() * width
        writer.add_tensor_info(name, (*shape[:-1], shape[-1] * width), _bytes_dtype(), nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, parts in tensors(folder, config["num_hidden_layers"], config["num_experts"]):
        writer.write_tensor_data(_bytes_of(name, parts))
    writer.close()
    partial.rename(out)


def tensors(folder: Path, layers: int, experts: int) -> Iterator[tuple[str, list[Any]]]:
    """GGUF's name of every tensor, and the mapped tensors that it is made of (several: stacked)."""
    from arms import mapped_tensors

    found = mapped_tensors(sorted(folder.glob("*.safetensors")))
    yield "token_embd.weight", [found["model.embed_tokens.weight"]]
    yield "output_norm.weight", [found["model.norm.weight"]]
    yield "output.weight", [found["lm_head.weight"]]
    plain = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "ffn_gate_inp": "mlp.gate",
    }
    for layer in range(layers):
        at = f"model.layers.{layer}"
        for name, own in plain.items():
            yield f"blk.{layer}.{name}.weight", [found[f"{at}.{own}.weight"]]
        for name in ("gate", "up", "down"):
            parts = [found[f"{at}.mlp.experts.{expert}.{name}_proj.weight"] for expert in range(experts)]
            yield f"blk.{layer}.ffn_{name}_exps.weight", parts


def _bytes_dtype() -> Any:
    import numpy as np

    return np.dtype(np.uint8)


def _bytes_of(name: str, parts: list[Any]) -> Any:
    """bf16 as it is; norms and routers in fp32, as llama.cpp wants them."""
    import torch

    whole = torch.stack(parts) if len(parts) > 1 else parts[0].clone()
    if parts[0].dim() != 2 or "gate_inp" in name:
        whole = whole.float()
    return whole.contiguous().view(torch.uint8).numpy()


def run(spec: Spec) -> dict[str, Any]:
    """The run of `tasks.run_tokens`: a request a token, each with the whole text so far, whose prefix is cached."""
    import xllamacpp

    begin = time.perf_counter()
    parameters = xllamacpp.CommonParams()
    parameters.model.path = spec["gguf"]
    parameters.n_ctx, parameters.n_parallel = -(-spec["context"] // 256) * 256, 1
    parameters.load_mode = xllamacpp.llama_load_mode.LLAMA_LOAD_MODE_MMAP
    parameters.warmup = False  # it would read every expert
    parameters.cache_ram_mib = 0
    if spec["threads"] != common.DEFAULT_THREADS:
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = spec["threads"]
    server = xllamacpp.Server(parameters)
    loaded = time.perf_counter() - begin
    tokens, prompt, warm_up = spec["tokens"], spec["prompt"], spec["warm_up"]
    chosen: list[int] = []
    seconds: list[float] = []
    reads = [common.disk_read_bytes()]
    for end in range(prompt, len(tokens) + 1):
        begin = time.perf_counter()
        chosen += complete(server, tokens[:end])
        seconds.append(time.perf_counter() - begin)
        reads.append(common.disk_read_bytes())
    return {
        "load_seconds": loaded,
        "prompt": prompt,
        "prefill_seconds": seconds[0],
        "prefill_read_bytes": reads[1] - reads[0],
        "steps": seconds[1 + warm_up :],
        "warm_up_steps": seconds[1 : 1 + warm_up],
        "read_bytes": reads[-1] - reads[1 + warm_up],
        "chosen": chosen,
        "memory": common.memory_of(),
        "read_bytes_total": common.disk_read_bytes(),
    }


def complete(server: Any, tokens: list[int]) -> list[int]:
    """The likeliest next token. Raises `RuntimeError` where more than the last one is computed again."""
    answer: dict[str, Any] = server.handle_completions(
        {"prompt": tokens, "n_predict": 1, "temperature": 0, "top_k": 1, "cache_prompt": True}
    )
    if "choices" not in answer:
        raise RuntimeError(f"llama.cpp: {answer}")
    cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    if cached and cached != len(tokens) - 1:
        raise RuntimeError(f"llama.cpp computed {len(tokens) - cached} tokens instead of one")
    return [int(answer["choices"][0]["text"].removeprefix(NAME))]
