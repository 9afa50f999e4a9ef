"""The next routers, asked early: exact on themselves in every family, without a trace in the outputs."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch

from conftest import family_class
from families import VOCAB
from moetier import Access, ConfigError, ExpertKey, UnsupportedModelError
from moetier.predictors import make_predictor
from moetier.predictors.routers import Routers

ROUTERS = {
    "mixtral": "softmax of all",
    "qwen3_moe": "softmax, renormalised",
    "gpt_oss": "bias, softmax of the chosen",
    "minimax_m2": "sigmoid and bias",
    "deepseek_v2": "softmax, groups",
    "deepseek_v3": "sigmoid, bias, groups",
    "glm4_moe": "sigmoid, bias, groups",
    "hunyuan_v1_moe": "own gate",
    "phimoe": "sparse mixer: no top-k to see",
    "flex_olmo": "no norm before the router",
    "gemma4_text": "a norm inside the router, experts beside the MLP",
    "nemotron_h": "layers without a MoE between",
    "qwen3_vl_moe": "a text model within another",
}


def forward(model: Any, ids: torch.Tensor, told: Any) -> torch.Tensor:
    """One forward; `told(layer, index)` is called where each layer's experts run."""
    from moetier.hf import find_experts

    handles = [
        module.register_forward_pre_hook(
            lambda module, args, kwargs, layer=layer: told(layer, [*args, *kwargs.values()][1]), with_kwargs=True
        )
        for layer, (_, module) in enumerate(find_experts(model))
    ]
    try:
        return model(input_ids=ids, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", ROUTERS)
def test_next_gate_is_exact_on_itself(name: str, plain: Any) -> None:
    """The control: asked about its own layer, it names what the router chose; and it leaves no trace in the outputs."""
    model, ids = plain(name), torch.arange(3, 14)[None]
    chosen: dict[int, torch.Tensor] = {}
    before = forward(model, ids, chosen.__setitem__)
    layers, top_k = len(chosen), chosen[0].shape[-1]
    predictor: Any = make_predictor("next-gate", layers, 8, top_k)
    predictor.bind(model)
    checked = []

    def told(layer: int, index: torch.Tensor) -> None:
        if layer in checked:
            return
        counts = torch.bincount(index.flatten(), minlength=8)
        keys = tuple(ExpertKey(layer, int(e)) for e in counts.nonzero())
        access = Access(len(checked) + 1, layer, keys, tuple(int(c) for c in counts if c))
        predictor.observe(access)
        named = {p.key for p in islice(predictor.predict(access, 0), len(keys))}
        assert named == set(keys)
        routed = predictor._routers.route(layer, predictor._seen.residual)
        assert torch.equal(routed.index.sort().values, index.reshape(11, -1).sort().values)
        if routed.scores is not None:
            assert torch.equal(routed.scores.topk(top_k).indices.sort().values, routed.index.sort().values)
        assert len(list(predictor.predict(access, 1))) == 8
        checked.append(layer)

    after = forward(model, ids, told)
    predictor.close()
    assert checked == list(range(layers)) and torch.equal(before, after)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.base_model.modules())


def test_next_gate_asks_the_next_router_through_the_next_norm(plain: Any) -> None:
    model = plain("qwen3_moe")
    routers = Routers(model)
    hidden = torch.randn(5, 64, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    layer = model.model.layers[2]
    logits = torch.nn.functional.linear(layer.post_attention_layernorm(hidden), layer.mlp.gate.weight)
    routed = routers.route(2, hidden)
    assert torch.equal(routed.index, logits.float().softmax(-1).topk(3).indices)
    assert routed.scores is not None and torch.equal(routed.scores, logits.softmax(-1, dtype=torch.float))
    routers.close()


def test_asking_is_not_recorded_as_an_output(plain: Any) -> None:
    model, ids = plain("qwen3_moe"), torch.arange(3, 14)[None]
    expected = model(input_ids=ids, output_router_logits=True).router_logits
    routers = Routers(model)

    def told(layer: int, index: torch.Tensor) -> None:
        assert routers.residual is not None and routers.residual[0] == layer
        routers.route((layer + 1) % 3, routers.residual[1])

    from moetier.hf import find_experts

    module = find_experts(model)[1][1]
    handle = module.register_forward_pre_hook(lambda *_: told(1, ids))
    got = model(input_ids=ids, output_router_logits=True).router_logits
    handle.remove()
    routers.close()
    assert len(got) == len(expected) and all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize(
    ("name", "why"),
    [("zaya", "needs more than the hidden state"), ("deepseek_v4", "needs more"), ("ernie4_5_vl_moe", "ran 0 times")],
)
def test_routers_that_cannot_be_asked_are_refused_by_name(name: str, why: str) -> None:
    from families import FAMILIES, build

    family_class(name)
    model = build(FAMILIES[name])
    with pytest.raises(UnsupportedModelError) as error:
        make_predictor("next-gate", 3, 8, 1).bind(model)  # type: ignore[attr-defined]
    assert f"({model.config.model_type})" in str(error.value) and why in str(error.value)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.base_model.modules())


def test_next_gate_says_what_it_lacks(plain: Any) -> None:
    predictor: Any = make_predictor("next-gate", 3, 8, 3)
    access = Access(1, 0, (ExpertKey(0, 0),), (1,))
    with pytest.raises(ConfigError, match="bind"):
        predictor.observe(access)
    with pytest.raises(ConfigError, match="made for 2 MoE layers, the model has 3"):
        make_predictor("next-gate", 2, 8, 3).bind(plain("qwen3_moe"))  # type: ignore[attr-defined]
    predictor.bind(plain("qwen3_moe"))
    with pytest.raises(ConfigError, match="no forward of its model"):
        predictor.observe(access)
    predictor.close()


def test_beside_a_tiered_model(tiered: Any) -> None:
    from moetier.predictors.live import evaluate_model

    model = tiered("qwen3_moe", slots=6)
    rng = np.random.default_rng(0)
    texts = [(str(n), rng.integers(3, VOCAB, 12).tolist()) for n in range(2)]
    rows = evaluate_model(model, texts, ["next-gate", "previous-token"], (0, 1)).results()
    control, ahead, previous = rows
    assert (control["predictor"], control["distance"]) == ("next-gate", 0)
    assert control["recall_k"] == control["whole_2k"] == 1.0 and control["accesses"] == 36
    assert ahead["accesses"] == previous["accesses"] == 24 and previous["distance"] == 1
    assert model.moetier.watch is None
