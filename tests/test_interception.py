"""Routers that choose again: over the families, with the weights that each family's own rule gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conftest import family_class
from families import FAMILIES, build
from moetier import ConfigError, UnsupportedModelError
from moetier.interception import Intercepted, Scale
from moetier.predictors.routers import Routers

ROUTERS = {
    "mixtral": Scale.PROBABILITIES,
    "qwen3_moe": Scale.PROBABILITIES,
    "gpt_oss": Scale.LOGITS,  # softmax of the chosen
    "granitemoe": Scale.LOGITS,
    "minimax_m2": Scale.SCORES,
    "deepseek_v2": Scale.PROBABILITIES,
    "deepseek_v3": Scale.SCORES,  # masked groups
    "mistral4": Scale.PROBABILITIES,  # groups masked with zeros
    "glm4_moe": Scale.SCORES,
    "hunyuan_v1_moe": Scale.PROBABILITIES,
    "cohere2_moe": Scale.LOGITS,
    "ernie4_5_moe": Scale.SCORES,
    "gemma4_text": Scale.PROBABILITIES,  # weights times a scale per expert
    "inkling_text": Scale.SCORES,  # weights shared with experts that are always used
    "nemotron_h": Scale.SCORES,
    "qwen3_vl_moe": Scale.PROBABILITIES,
}
IDS = torch.arange(3, 14)[None]


def routed(model: Any) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """Logits, and per layer the experts and weights that its experts module was given."""
    from moetier.hf import find_experts

    index, weights = [], []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        given = [*args, *kwargs.values()]
        index.append(given[1].reshape(IDS.shape[1], -1))
        weights.append(given[2].reshape(IDS.shape[1], -1))

    handles = [m.register_forward_pre_hook(note, with_kwargs=True) for _, m in find_experts(model)]
    try:
        return model(input_ids=IDS, use_cache=False).logits, index, weights
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", ROUTERS)
def test_a_family_chooses_what_it_is_told_to(name: str, plain: Any) -> None:
    model = plain(name)
    before, own_index, own_weights = routed(model)
    asked: list[tuple[int, Scale]] = []

    def abstain(layer: int, ranked: torch.Tensor, own: torch.Tensor, scale: Scale) -> None:
        asked.append((layer, scale))

    intercepted = Intercepted(model, abstain)
    assert torch.equal(routed(model)[0], before)
    assert asked == [(layer, ROUTERS[name]) for layer in range(len(own_index))]
    intercepted.close()

    def confirm(layer: int, ranked: torch.Tensor, own: torch.Tensor, scale: Scale) -> torch.Tensor:
        return own.clone()

    intercepted = Intercepted(model, confirm)
    same, index, weights = routed(model)
    assert torch.equal(same, before)
    assert all(map(torch.equal, index, own_index)) and all(map(torch.equal, weights, own_weights))
    intercepted.close()

    def rotate(layer: int, ranked: torch.Tensor, own: torch.Tensor, scale: Scale) -> torch.Tensor:
        return own.roll(1, dims=1)  # the same experts in another order: the same weights in another order

    intercepted = Intercepted(model, rotate)
    _, index, weights = routed(model)
    assert torch.equal(index[0], own_index[0].roll(1, dims=1))
    assert torch.allclose(weights[0], own_weights[0].roll(1, dims=1), rtol=1e-2)
    intercepted.close()
    assert torch.equal(routed(model)[0], before)
    assert not any("forward" in module.__dict__ for module in model.modules())


def expected_weights(name: str, logits: torch.Tensor, chosen: torch.Tensor, config: Any) -> torch.Tensor:
    """What the family's rule gives for a choice, [T, K], from the router's logits, [T, E]."""
    if name in ("mixtral", "gpt_oss", "granitemoe"):  # of the chosen only, one way or the other
        return logits.gather(1, chosen).softmax(dim=1)
    if name == "qwen3_moe":
        gates = logits.softmax(dim=1).gather(1, chosen)
        return gates / gates.sum(dim=1, keepdim=True) if config.norm_topk_prob else gates
    gates = logits.sigmoid().gather(1, chosen)  # deepseek_v3: without the bias that it ranks by
    if config.norm_topk_prob:
        gates = gates / gates.sum(dim=1, keepdim=True)
    return gates * config.routed_scaling_factor


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "granitemoe", "qwen3_moe", "deepseek_v3"])
def test_weights_of_another_choice_follow_the_familys_rule(name: str, plain: Any) -> None:
    model = plain(name, torch.float32)
    _, own_index, own_weights = routed(model)
    worst = {}

    def worst_allowed(layer: int, ranked: torch.Tensor, own: torch.Tensor, scale: Scale) -> torch.Tensor:
        lowest = ranked.masked_fill(torch.isneginf(ranked), float("inf")).argmin(dim=1, keepdim=True)
        worst[layer] = torch.where(lowest == own[:, :1], own[:, -1:], lowest)
        return torch.cat((own[:, :-1], worst[layer]), dim=1)

    intercepted = Intercepted(model, worst_allowed)
    logits: list[torch.Tensor] = []
    router = next(m for n, m in model.named_modules() if type(m).__name__.lower().endswith("topkrouter"))
    handle = router.register_forward_hook(lambda module, args, output: logits.append(output[0]))
    _, index, weights = routed(model)
    handle.remove()
    intercepted.close()
    assert torch.equal(index[0][:, -1:], worst[0]) and not torch.equal(index[0], own_index[0])
    expected = expected_weights(name, logits[0].float(), index[0], model.config)
    assert torch.allclose(weights[0].float(), expected, rtol=1e-4, atol=1e-6)
    if name != "qwen3_moe" or model.config.norm_topk_prob:  # where the family normalises, the sum is kept
        assert torch.allclose(weights[0].sum(dim=1), own_weights[0].sum(dim=1), rtol=1e-5)
    else:
        assert torch.equal(weights[0][:, :-1], own_weights[0][:, :-1])


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("phimoe", "ranks experts in a way that cannot be seen"),
        ("zaya", "needs more than the hidden state"),
        ("deepseek_v4", "needs more than the hidden state"),
    ],
)
def test_families_that_are_refused(name: str, why: str) -> None:
    family_class(name)
    model = build(FAMILIES[name])
    with pytest.raises(UnsupportedModelError, match=why) as error:
        Intercepted(model, lambda *_: None)
    assert f"({model.config.model_type}): cache_prior, max_rank and max_mass cannot be used" in str(error.value)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_weights_that_ignore_the_choice_are_refused() -> None:
    model = build(FAMILIES["mixtral"])

    def forward(self: Any, hidden: torch.Tensor) -> Any:
        logits = torch.nn.functional.linear(hidden.reshape(-1, 64), self.weight).float()
        weights = logits.softmax(dim=1).sort(dim=1, descending=True).values[:, :2]  # by rank, not by expert
        return logits, weights, logits.topk(2, dim=1).indices

    for module in model.modules():
        if type(module).__name__ == "MixtralTopKRouter":
            module.forward = forward.__get__(module)
    with pytest.raises(UnsupportedModelError, match="do not follow what it chooses"):
        Intercepted(model, lambda *_: None)


def test_others_ask_the_routers_as_they_are(plain: Any) -> None:
    """Predictors that ask a router what it would do must not be answered by the levers."""
    model = plain("qwen3_moe")
    residual = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    routers = Routers(model)
    before = routers.route(1, residual).index
    routers.close()

    def flip(layer: int, ranked: torch.Tensor, own: torch.Tensor, scale: Scale) -> torch.Tensor:
        return ranked.topk(own.shape[1], dim=1, largest=False).indices

    intercepted = Intercepted(model, flip)
    routers = Routers(model)  # its probe and its control see the plain routers
    assert torch.equal(routers.route(1, residual).index, before)
    routers.close()
    intercepted.close()


def test_loading_refuses_what_does_not_fit(tiered: Any) -> None:
    with pytest.raises(ConfigError, match="max_rank: this model chooses 3 of 8 experts"):
        tiered("qwen3_moe", max_rank=9)
    with pytest.raises(ConfigError, match="keep_top: this model chooses 3 experts per token, got 4"):
        tiered("qwen3_moe", cache_prior=0.2, keep_top=4)
    with pytest.raises(UnsupportedModelError, match="phimoe"):
        tiered("phimoe", cache_prior=0.2)
    assert tiered("phimoe", drop_misses=0.5).moetier.lever is not None  # needs no router
