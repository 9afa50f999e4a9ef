"""Routers folded into one matrix: they choose what the modules choose, or are left to the modules."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from conftest import family_class
from moetier.access import Access, ExpertKey
from moetier.predictors import make_predictor
from moetier.predictors.linear_gate import folded
from moetier.predictors.next_gate import _guesses
from moetier.predictors.reliability import Frequencies, Reliability, bins_of
from moetier.predictors.routers import Routers
from test_next_gate import forward

ONE_MATRIX = ["mixtral", "qwen3_moe", "deepseek_v2", "flex_olmo", "qwen3_vl_moe"]


@pytest.mark.parametrize("name", ONE_MATRIX)
def test_folded_routers_choose_what_the_modules_choose(name: str, plain: Any) -> None:
    model = plain(name)
    routers = Routers(model)
    try:
        states = torch.randn(50, model.config.get_text_config().hidden_size, generator=torch.Generator().manual_seed(1))
        for layer in range(len(routers)):
            index = routers.route(layer, states.to(model.dtype)).index
            ranks = routers.ranks(layer, states.to(model.dtype))
            assert ranks is not None
            best = ranks.topk(index.shape[1]).indices
            same = (best[:, :, None] == index[:, None, :]).any(-1).float().mean()
            assert same > 0.9  # bfloat16 ties aside
    finally:
        routers.close()


def test_others_are_left_to_the_modules(checkpoint: Any) -> None:
    model = family_class("gpt_oss").from_pretrained(checkpoint("gpt_oss"), dtype="auto")  # its own: it is changed
    for module in model.modules():
        if type(module).__name__.endswith("Router"):
            module.bias.data.uniform_(1, 2)
    routers = Routers(model)
    try:
        assert routers.ranks(0, torch.zeros(1, model.config.hidden_size)) is None
    finally:
        routers.close()


def test_a_router_that_disagrees_is_not_folded() -> None:
    router, probe = torch.nn.Linear(16, 8, bias=False), torch.randn(7, 16)
    right = (probe @ router.weight.t()).topk(2).indices
    assert folded(router, None, probe, right) is not None
    assert folded(router, None, probe, (right + 1) % 8) is None
    assert folded(router, torch.nn.LayerNorm(16), probe, right) is None  # takes the mean away
    assert folded(torch.nn.Sequential(router, torch.nn.Linear(8, 8)), None, probe[:, :8], right) is None


def test_guesses_are_above_one_half_where_chosen() -> None:
    logits = np.random.default_rng(0).normal(size=(5, 9)).astype(np.float32)
    guesses = _guesses(logits, 3)
    chosen = np.argsort(-logits, axis=1)[:, :3]
    for row, best in zip(guesses, chosen, strict=True):
        assert set(np.flatnonzero(row > 0.5)) == set(best)
    assert np.allclose(guesses, _guesses(logits * 7, 3), atol=1e-5), "the scale of a state does not matter"
    assert (_guesses(logits, 9) > 0.5).all()


def test_the_short_way_names_what_the_long_way_names(checkpoint: Any) -> None:
    """`foresee` ranks as `predict` does, and is silent where it does not know."""
    model = family_class("qwen3_moe").from_pretrained(checkpoint("qwen3_moe"), dtype="auto")
    layers, top_k = 3, 3
    predictor: Any = make_predictor("next-gate", layers, 8, top_k)
    predictor.bind(model)
    seen = []

    def told(layer: int, index: torch.Tensor) -> None:
        keys = tuple(ExpertKey(layer, int(expert)) for expert in index.flatten().unique())
        access = Access(len(seen) + 1, layer, keys, (1,) * len(keys))
        short = predictor.foresee(access)
        predictor.observe(access)
        if layer == layers - 1:
            assert short == {}
        else:
            long = [prediction.key for prediction in predictor.predict(access, 1)]
            assert list(short) == long[: 2 * top_k]
            assert sum(chance > 0.5 for chance in short.values()) == top_k
        two = Access(len(seen) + 1, layer, keys, (2,) * len(keys))
        assert predictor.foresee(two) is None
        seen.append(layer)

    forward(model, torch.tensor([[5]]), told)
    predictor.close()
    assert seen == [0, 1, 2]


def test_frequencies_agree_with_reliability() -> None:
    draw = np.random.default_rng(0)
    many, few = Reliability(), Frequencies()
    for _ in range(200):
        raw = draw.uniform(size=6)
        came = draw.uniform(size=6) < raw**2
        many.learn(bins_of(raw), np.flatnonzero(came))
        few.learn([few.bin(value) for value in raw.tolist()], came.tolist())
    values = draw.uniform(size=50)
    assert many.probability(bins_of(values)).tolist() == [few.probability(few.bin(value)) for value in values.tolist()]
