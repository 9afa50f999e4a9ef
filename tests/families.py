"""Tiny checkpoints of the mixture-of-experts families that transformers knows.

`FAMILIES` lists the families whose experts module is decorated by ``use_experts_implementation`` and that run
as a text-only causal LM. `WITHOUT_HOOK` lists families that are mixtures of experts but have no such hook.
Neither table imports a model class: an older transformers may lack some of them, see `available`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

VOCAB = 128

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_HEAD: dict[str, Any] = {"head_dim": 16}
# The widths of the experts are chosen so that no two sides of a matrix are equal: a wrong layout shows.
_MIXTRAL: dict[str, Any] = {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 48}
_QWEN: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
_DEEPSEEK: dict[str, Any] = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
}
_UNGROUPED: dict[str, Any] = _DEEPSEEK | {"n_group": 1, "topk_group": 1}
_MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}
_DSA: dict[str, Any] = {"index_topk": 8, "index_head_dim": 32, "index_n_heads": 2}
_DENSE_FIRST: dict[str, Any] = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
_SLIDING: dict[str, Any] = {
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
}
_SHARED: dict[str, Any] = {"shared_expert_intermediate_size": 32}
_DELTA: dict[str, Any] = {
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
_INKLING: dict[str, Any] = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 16,
    "sliding_window_size": 8,
    "d_rel": 8,
    "rel_extent": 32,
    "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"],
}
_VISION: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 64,
}
_VISION_HF: dict[str, Any] = {
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "patch_size": 4,
}


@dataclass(frozen=True)
class Family:
    """One family and the settings of its tiny model."""

    name: str
    config: str
    model: str
    settings: Mapping[str, Any]
    note: str = ""


def _family(name: str, stem: str, *parts: Mapping[str, Any], note: str = "", **more: Any) -> Family:
    """Make a family from the stem of its class names; ``more`` wins over ``parts``."""
    settings = dict(_BASE)
    for part in parts:
        settings |= part
    settings |= more
    return Family(name, f"{stem}Config", f"{stem.removesuffix('Text')}ForCausalLM", settings, note)


def _composite(
    name: str, stem: str, text: Mapping[str, Any], vision: Mapping[str, Any], note: str = "", **more: Any
) -> Family:
    """Make a family whose config holds one for text and one for images."""
    settings = {"text_config": dict(text), "vision_config": dict(vision), **more}
    return Family(name, f"{stem}Config", f"{stem}ForConditionalGeneration", settings, note)


# fmt: off
_ALL: list[Family] = [
    # One expert width for the whole model, as in Mixtral.
    _family("mixtral", "Mixtral", _MIXTRAL),
    _family("phimoe", "Phimoe", _MIXTRAL),
    _family("minimax", "MiniMax", _MIXTRAL, block_size=8),
    _family("minimax_m2", "MiniMaxM2", _MIXTRAL, _HEAD),
    _family("gpt_oss", "GptOss", _MIXTRAL, _HEAD, _SLIDING, note="transposed, interleaved, bias, own gate"),
    _family("granitemoe", "GraniteMoe", _MIXTRAL),
    _family("granitemoeshared", "GraniteMoeShared", _MIXTRAL, shared_intermediate_size=32),
    _family("granitemoe_swa", "GraniteMoeSWA", _MIXTRAL, _SLIDING, shared_intermediate_size=32),
    _family("granitemoehybrid", "GraniteMoeHybrid", _MIXTRAL, shared_intermediate_size=32, mamba_n_heads=4,
            mamba_d_state=16, mamba_chunk_size=8, layer_types=["mamba", "attention", "mamba"]),
    _family("olmoe", "Olmoe", _QWEN, intermediate_size=40),
    _family("flex_olmo", "FlexOlmo", _QWEN, intermediate_size=40),
    _family("hunyuan_v1_moe", "HunYuanMoEV1", _HEAD, num_experts=8, moe_topk=2, intermediate_size=40),
    _family("jamba", "Jamba", num_experts=8, num_hidden_layers=4, attn_layer_period=2, attn_layer_offset=1,
            expert_layer_period=2, expert_layer_offset=0, mamba_d_state=8, use_mamba_kernels=False,
            intermediate_size=48),
    Family("aria_text", "AriaTextConfig", "AriaTextForCausalLM",
           _BASE | {"moe_num_experts": 8, "moe_topk": 2, "intermediate_size": 40}, note="transposed"),
    # A width for the dense layers and one for the experts, as in Qwen.
    _family("qwen2_moe", "Qwen2Moe", _QWEN, _SHARED),
    _family("qwen3_moe", "Qwen3Moe", _QWEN, _HEAD),
    _family("qwen3_next", "Qwen3Next", _QWEN, _HEAD, _DELTA, _SHARED),
    _family("qwen3_5_moe_text", "Qwen3_5MoeText", _QWEN, _HEAD, _DELTA, _SHARED),
    _family("qwen4_exp_text", "Qwen4ExpText", _QWEN, _HEAD, _DELTA, _SHARED, hc_count=2, hc_lowrank=8,
            indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=16, indexer_budget=8,
            indexer_compress_ratio=4),
    _family("mellum", "Mellum", _QWEN, _HEAD, _SLIDING),
    _family("flint", "Flint", _QWEN, _HEAD, _SLIDING, _SHARED, mlp_only_layers=[0]),
    _family("kolibri1", "Kolibri1", _QWEN, _HEAD, _SLIDING, _SHARED),
    _family("laguna", "Laguna", _QWEN, _HEAD, _SLIDING, _SHARED),
    _family("beam", "Beam", _QWEN, _HEAD, _SLIDING, _DENSE_FIRST, n_group=2, topk_group=1, note="own gate"),
    _family("afmoe", "Afmoe", _QWEN, _HEAD, _SLIDING, num_dense_layers=1, num_shared_experts=1),
    _family("exaone_moe", "ExaoneMoe", _QWEN, _SLIDING, _DENSE_FIRST, num_shared_experts=1),
    _family("cohere2_moe", "Cohere2Moe", _QWEN, _HEAD, _SLIDING, intermediate_size=40, num_shared_experts=1,
            prefix_dense_intermediate_size=96, logit_scale=1.0),
    _family("hy_v3", "HYV3", _QWEN, _HEAD, num_shared_experts=1),
    _family("zaya", "Zaya", _QWEN, _HEAD, num_hidden_layers=4, router_hidden_size=32, num_experts_per_tok=1,
            note="one expert per token"),
    _family("lfm2_moe", "Lfm2Moe", _QWEN, num_dense_layers=1, layer_types=["conv", "full_attention", "conv"]),
    _family("gemma4_text", "Gemma4Text", _HEAD, _SLIDING, num_experts=8, top_k_experts=2,
            moe_intermediate_size=40, enable_moe_block=True, hidden_size_per_layer_input=0,
            global_head_dim=16, num_global_key_value_heads=2, note="experts beside the dense MLP"),
    _family("ernie4_5_moe", "Ernie4_5_Moe", moe_num_experts=8, moe_k=3, moe_intermediate_size=40,
            moe_num_shared_experts=1),
    # Shared experts, groups of experts and low-rank attention, as in DeepSeek.
    _family("deepseek_v2", "DeepseekV2", _UNGROUPED, _MLA, first_k_dense_replace=1),
    _family("deepseek_v3", "DeepseekV3", _DEEPSEEK, _MLA, first_k_dense_replace=1),
    _family("deepseek_v32", "DeepseekV32", _DEEPSEEK, _MLA, _DSA, _DENSE_FIRST),
    _family("deepseek_v4", "DeepseekV4", _UNGROUPED, intermediate_size=40, head_dim=32, num_key_value_heads=1,
            q_lora_rank=32, hc_mult=2, o_groups=2, o_lora_rank=16, index_n_heads=2, index_head_dim=32,
            index_topk=4, sliding_window=8, mlp_layer_types=["hash_moe", "moe", "moe"],
            layer_types=["heavily_compressed_attention", "compressed_sparse_attention", "sliding_attention"],
            compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
            note="own gate; the first router is a table of token ids"),
    _family("glm4_moe", "Glm4Moe", _DEEPSEEK, _HEAD, first_k_dense_replace=1),
    _family("glm4_moe_lite", "Glm4MoeLite", _DEEPSEEK, _MLA, _DENSE_FIRST),
    _family("glm_moe_dsa", "GlmMoeDsa", _DEEPSEEK, _MLA, _DSA, _DENSE_FIRST),
    _family("dots1", "Dots1", _DEEPSEEK, first_k_dense_replace=1),
    _family("dots3_note_text", "Dots3NoteText", _UNGROUPED, _MLA, _DSA, _DENSE_FIRST, sliding_window=8,
            shared_experts_intermediate_size=32, head_dim=16, swa_num_attention_heads=4,
            swa_num_key_value_heads=4, swa_q_lora_rank=32, swa_kv_lora_rank=32, swa_head_dim=32,
            swa_qk_nope_head_dim=16, swa_v_head_dim=16,
            layer_types=["sliding_attention", "indexed_attention", "sliding_attention"]),
    _family("solar_open", "SolarOpen", _DEEPSEEK, _HEAD),
    _family("mistral4", "Mistral4", _DEEPSEEK, _MLA, note="AutoModelForCausalLM does not know it"),
    _family("axk1", "AXK1", _DEEPSEEK, _MLA, _DENSE_FIRST),
    _family("axk2", "AXK2", _DEEPSEEK, _MLA, _DSA, _DENSE_FIRST, gated_norm_rank=4),
    _family("hy_v4", "HYV4", _UNGROUPED, _MLA, _DSA, _DENSE_FIRST, hc_mult=2, note="own gate"),
    _family("mimo_v2_flash", "MiMoV2Flash", _UNGROUPED, _HEAD, _SLIDING, _DENSE_FIRST, v_head_dim=16),
    _family("bailing_hybrid", "BailingHybrid", _DEEPSEEK, _MLA, _HEAD, _DENSE_FIRST, num_local_experts=8,
            layer_types=_DELTA["layer_types"]),
    _family("kimi_linear", "KimiLinear", _UNGROUPED, _MLA, _DENSE_FIRST, num_local_experts=8, q_lora_rank=None,
            linear_head_dim=16, linear_num_heads=4, layer_types=_DELTA["layer_types"]),
    _family("nemotron_h", "NemotronH", _DEEPSEEK, _HEAD, num_hidden_layers=5, n_groups=2, chunk_size=8,
            layers_block_type=["mamba", "moe", "attention", "moe", "mlp"], ssm_state_size=16,
            mamba_num_heads=4, mamba_head_dim=16, moe_shared_expert_intermediate_size=32,
            moe_latent_size=48, use_mamba_kernels=False, note="no gate; experts in a latent space"),
    _family("minimax_m3_vl_text", "MiniMaxM3VLText", _MIXTRAL, _HEAD, _DENSE_FIRST, dense_intermediate_size=96,
            shared_intermediate_size=32, rotary_dim=8, index_n_heads=2, index_head_dim=16, index_block_size=8,
            index_topk_blocks=2, layer_types=["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
            note="own gate"),
    _family("inkling_text", "InklingText", _UNGROUPED, _HEAD, _INKLING, _DENSE_FIRST,
            logits_mup_width_multiplier=1.0),
    _family("inkling2_text", "Inkling2Text", _UNGROUPED, _HEAD, _INKLING, unpadded_vocab_size=VOCAB,
            n_layers_per_attn_res_block=2, note="own gate; stored fused, gate and up interleaved"),
    # Image models, run on text alone.
    _composite("qwen3_vl_moe", "Qwen3VLMoe", _BASE | _QWEN | _HEAD,
               _VISION | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
               note="fused; the hub stores it transposed, save_pretrained does not"),
    _composite("glm4v_moe", "Glm4vMoe", _BASE | _DEEPSEEK | {
        "first_k_dense_replace": 1, "rope_parameters": {"rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    }, _VISION),
    _composite("glm5_next", "Glm5Next", _BASE | _UNGROUPED | _MLA | _DSA | _DENSE_FIRST | {
        "qk_rope_head_dim": 0, "hc_mult": 2, "linear_head_dim": 16, "linear_num_heads": 4, "index_kpool": 4,
        "layer_types": _DELTA["layer_types"],
    }, _VISION | {"projection_intermediate_size": 32}, note="own gate"),
    _composite("muse_spark", "MuseSpark", _BASE | _MIXTRAL | _HEAD | {
        "moe_intermediate_size": 40, "moe_hidden_size": 48, "output_multiplier": 1.0, **_DENSE_FIRST,
    }, _VISION_HF, out_hidden_size=32, projector_hidden_size=32,
               audio_config={"hidden_sizes": [16, 16, 16, 16], "depths": [1, 1, 1, 1], "out_hidden_size": 64},
               note="norm after each expert; experts in a latent space"),
    _composite("ernie4_5_vl_moe", "Ernie4_5_VLMoe", _BASE | {
        "moe_num_experts": 8, "moe_k": 3, "moe_intermediate_size": [40, 16], "moe_num_shared_experts": 1,
        "rope_parameters": {"rope_theta": 1e4, "mrope_section": [3, 3, 2]},
    } | _DENSE_FIRST, _VISION, tie_word_embeddings=False, note="two experts modules in each layer"),
    _composite("mistral_large4", "MistralLarge4", _BASE | _DEEPSEEK | _MLA | _DSA | {"first_k_dense_replace": 1},
               _VISION_HF | {"model_type": "pixtral", "head_dim": 16, "image_size": 16}),
]
_REFUSED: list[Family] = [
    Family("llama4_text", "Llama4TextConfig", "Llama4ForCausalLM",
           _BASE | _MIXTRAL | _HEAD | {"intermediate_size_mlp": 96}, note="gives its experts every token"),
    _family("longcat_flash", "LongcatFlash", _MLA, num_layers=2, ffn_hidden_size=96, expert_ffn_hidden_size=32,
            n_routed_experts=8, zero_expert_num=4, moe_topk=3, head_dim=16, note="has experts that do nothing"),
    _family("jetmoe", "JetMoe", _MIXTRAL, kv_channels=16, note="experts in the attention too"),
    _family("doge", "Doge", is_moe=True, num_experts=16, num_experts_per_tok=4, note="experts are embeddings"),
    Family("dbrx", "DbrxConfig", "DbrxForCausalLM", {
        "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 128, "vocab_size": VOCAB,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 32, "moe_num_experts": 8, "moe_top_k": 2},
    }),
    _composite("step3p7", "Step3p7", _BASE | _HEAD | _UNGROUPED | _DENSE_FIRST | {
        "num_local_experts": 8, "share_expert_dim": 32, "sliding_window": 8,
    }, _VISION_HF, note="experts shaped like the others, but not decorated"),
]
# fmt: on
FAMILIES: dict[str, Family] = {family.name: family for family in _ALL}

WITHOUT_HOOK: dict[str, Family] = {family.name: family for family in _REFUSED}


def available(family: Family) -> bool:
    """Whether the installed transformers has this family."""
    import transformers

    return all(getattr(transformers, name, None) is not None for name in (family.config, family.model))


def build(family: Family, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Any:
    """Make the tiny model with random weights, in the dtypes that loading it as ``dtype`` would give."""
    import transformers

    config = getattr(transformers, family.config)(**family.settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, family.model)._from_config(config, dtype=dtype)
        _randomize(model)
    kept = [re.compile(pattern) for pattern in model._get_dtype_plan(dtype)]
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if any(pattern.search(name) for pattern in kept):
            tensor.data = tensor.data.float()
    return model.eval()


@torch.no_grad()
def _randomize(model: torch.nn.Module) -> None:
    """Give every weight a value that matters: unit-variance maps, and nonzero biases and norms."""
    for name, weight in model.named_parameters():
        if weight.dim() < 2 or "A_log" in name:
            weight.add_(torch.randn_like(weight), alpha=0.1)
        elif "embed" in name:
            weight.normal_()
        else:
            weight.normal_(std=weight.shape[-1] ** -0.5)
    for name, buffer in model.named_buffers():
        if name.endswith("bias"):
            buffer.add_(torch.randn_like(buffer), alpha=0.1)
        elif name.endswith("tid2eid"):
            experts = int(model.config.num_local_experts)
            buffer.copy_(torch.rand(buffer.shape[0], experts).argsort(dim=-1)[:, : buffer.shape[1]])


def make_checkpoint(family: Family, path: Path, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> None:
    """Write a tiny checkpoint of the family to ``path``, with the tensor names of the hub."""
    build(family, dtype, seed).save_pretrained(path)
