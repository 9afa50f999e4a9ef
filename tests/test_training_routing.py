"""Cache-aware routing in training: the bits of a plain model with plain rules, whatever moved; what it reports."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

import moetier
from moetier.access import ExpertKey
from moetier.errors import ConfigError, UnsupportedModelError
from moetier.training.balance import NUMBERS, Tally
from moetier.training.kept import MEMORY, KeptExperts, quota_of
from test_resume import Run, assert_equal, seed
from test_routing import prior_of_one, rank_of_one
from training import NAME, assert_same, batch, load_reference, load_trained, loop

Get = Callable[..., Any]
STEPS = range(3)
LAYERS, EXPERTS, TOP_K = 3, 8, 3  # of the model
LEVERS: dict[str, dict[str, Any]] = {"prior": {"cache_prior": 0.5}, "rank": {"max_rank": 6, "keep_top": 0}}
WAYS = {"plain": None, "recomputed": {"use_reentrant": False}, "reentrant": {"use_reentrant": True}}


@pytest.fixture
def trained(checkpoint: Get, tmp_path: Path) -> Iterator[Get]:
    models: list[Any] = []

    def get(folder: str | None = None, **options: Any) -> Any:
        where = tmp_path / (folder or str(len(models)))
        models.append(load_trained(checkpoint(NAME, torch.float32), where, **options))
        return models[-1]

    yield get
    for model in models:
        model.moetier.close()


class PlainRouting:
    """The same routing in the routers of a model in memory: sets and loops, and nothing of moetier's.

    The router's own arithmetic is kept to the letter; only the choice is another.
    """

    def __init__(self, model: Any, slots: int, lever: dict[str, Any]):
        self.lever = lever
        self.quota = [slots // 2 // LAYERS + (layer < slots // 2 % LAYERS) for layer in range(LAYERS)]
        self.kept: list[set[int]] = [set() for _ in range(LAYERS)]
        self.wanted, self.tokens = ([[0.0] * EXPERTS for _ in range(LAYERS)] for _ in range(2))
        self.ranges: list[list[float]] = [[] for _ in range(LAYERS)]
        self.mean = [0.0] * LAYERS
        self.changed = self.seen = 0
        self.load = np.zeros((LAYERS, EXPERTS))
        for layer, block in enumerate(model.model.layers):
            block.mlp.gate.forward = lambda hidden, layer=layer, gate=block.mlp.gate: self.route(layer, gate, hidden)

    def route(self, layer: int, gate: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        hidden = hidden.reshape(-1, gate.hidden_dim)
        logits = torch.nn.functional.linear(hidden, gate.weight)
        probabilities = torch.nn.functional.softmax(logits, dtype=torch.float, dim=-1)
        index = torch.topk(probabilities, TOP_K, dim=-1).indices
        chosen = index.clone()
        for row, p in enumerate(probabilities.detach().numpy()):
            z, own = np.log(p), set(index[row].tolist())
            held = [expert in self.kept[layer] for expert in range(EXPERTS)]
            if "cache_prior" in self.lever:
                new = prior_of_one(z, own, held, float(np.float32(self.lever["cache_prior"] * self.mean[layer])), 1)
            else:
                new = rank_of_one(z, own, held, self.lever["keep_top"], self.lever["max_rank"])
            if new != own:
                chosen[row] = torch.tensor(sorted(new, key=lambda expert: -z[expert]))
                self.changed += 1
            self.seen += 1
            self.ranges[layer].append(float(z.max() - z.min()))
            self.load[layer] += np.bincount(chosen[row].numpy(), minlength=EXPERTS)
            for expert in own:
                self.tokens[layer][expert] += 1
        weights = probabilities.gather(-1, chosen)
        if gate.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return logits, weights, chosen

    def step(self) -> None:
        for layer in range(LAYERS):
            self.mean[layer] = float(np.sum(self.ranges[layer])) / len(self.ranges[layer])
            old, new = self.wanted[layer], self.tokens[layer]
            self.wanted[layer] = [MEMORY * a + b for a, b in zip(old, new, strict=True)]
            may = [e for e in range(EXPERTS) if e in self.kept[layer] or new[e]]
            self.kept[layer] = set(sorted(may, key=lambda e: (-self.wanted[layer][e], e))[: self.quota[layer]])
            self.tokens[layer] = [0.0] * EXPERTS


@pytest.mark.parametrize(("lever", "way"), [("prior", "plain"), ("rank", "recomputed"), ("prior", "reentrant")])
def test_the_bits_of_plain_routing_in_memory(lever: str, way: str, checkpoint: Get, trained: Get) -> None:
    """Forward, gradients and recomputation: one other choice in any of them, or another weight, and no bits agree.

    One way has an auxiliary loss, which is of the routers' own choice.
    """
    plain = load_reference(checkpoint(NAME, torch.float32))
    routing = PlainRouting(plain, 12, LEVERS[lever])
    other = torch.optim.AdamW(plain.parameters(), lr=0.01, fused=True)
    model = trained(slots=12, **LEVERS[lever])
    inputs = {"output_router_logits": True} if way == "recomputed" else {}
    plain.router_aux_loss_coef = model.router_aux_loss_coef = 0.5
    found: list[list[set[int]]] = []

    def step(plain: Any) -> None:
        routing.step()
        found.append([set(kept) for kept in routing.kept])

    expected = loop(plain, other, STEPS, accumulate=2, before_step=step, **inputs)
    if WAYS[way] is not None:
        model.activation_checkpointing_enable(WAYS[way])
        if way == "reentrant":
            model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
    optimizer = moetier.AdamW(model, lr=0.01, fused=True)
    held: list[bool] = []

    def after(step: int) -> None:
        keys = model.moetier.training.routing.kept.keys()
        assert [{k.expert for k in keys if k.layer == layer} for layer in range(LAYERS)] == found[step]
        model.moetier.cache.settle()
        held.append(set(keys) <= model.moetier.cache.core.residents())

    assert loop(model, optimizer, STEPS, accumulate=2, after_step=after, **inputs) == expected
    assert_same(model, plain)
    assert len(held) == len(STEPS) and all(held) and found[0] != found[-1]  # what is favoured is there, and changes
    report = model.moetier.stats()["routing"]
    assert report["tokens"] * LAYERS == routing.seen == 2 * 2 * 8 * len(STEPS) * LAYERS
    assert report["changed_tokens"] == routing.changed / routing.seen > 0.1
    assert report["layers"]["cv"] == pytest.approx((routing.load.std(axis=1) / routing.load.mean(axis=1)).tolist())
    assert report["kept"] == 6 and 0 < report["mass_given_up"] < 0.5 and report["cv"] > report["cv_own"]


def test_off_nothing_is_in_the_way_and_with_all_in_memory_nothing_changes(trained: Get) -> None:
    off = trained(slots="100%")
    assert off.moetier.training.routing is None and "routing" not in off.moetier.stats()
    assert not any("forward" in module.__dict__ for module in off.modules())
    on = trained(slots="100%", cache_prior=1.0, keep_top=0)
    losses = [loop(model, moetier.AdamW(model, lr=0.01), STEPS) for model in (off, on)]
    assert losses[0] == losses[1]
    report = on.moetier.stats()["routing"]
    assert report["kept"] == 24 and report["changed_tokens"] == report["mass_given_up"] == 0.0


def test_no_choice_depends_on_time_or_on_what_the_cache_does(trained: Get) -> None:
    found = []
    for options in ({"readers": 1, "prefetch": "off"}, {"readers": 4, "policy": "lru", "writeback": "writethrough"}):
        model = trained(slots=8, cache_prior=0.6, keep_top=0, **options)
        losses = loop(model, moetier.AdamW(model, lr=0.01), STEPS)
        found.append((losses, model.moetier.stats()["routing"]))
    assert found[0] == found[1]


def test_fewer_experts_are_used_and_bytes_read(trained: Get) -> None:
    used, read = [], []
    for options in ({}, {"max_rank": 8, "keep_top": 0}):
        model = trained(slots=18, prefetch="off", **options)  # 3 are favoured in every layer, and a token uses 3
        loop(model, moetier.AdamW(model, lr=0.001), STEPS)
        stats = model.moetier.stats()
        used.append(sum(sum(stats["tiers"][0][kind]) for kind in ("hits", "lates", "misses")))
        read.append(stats["links"]["disk→host"]["bytes"])
    assert used[0] > 1.3 * used[1] and read[0] > 1.2 * read[1]


@pytest.mark.parametrize("options", [{"slots": 4}, {"update": "backward", "slots": 20}], ids=str)
def test_resumed_to_the_bit_whatever_memory_there_is(options: dict[str, Any], checkpoint: Get, tmp_path: Path) -> None:
    source, lever = checkpoint(NAME, torch.float32), {"cache_prior": 0.7, "slots": 8}
    own = {name: value for name, value in options.items() if name == "update"}
    seed()
    whole = Run(source, tmp_path / "whole", **lever, **own)
    losses = whole.train(range(5), commit_at=(3,))
    everything = whole.everything()
    whole.close()
    run = Run(source, tmp_path / "whole", **(lever | options), train_step=3)
    assert run.step == 3
    assert run.train(range(3, 5)) == losses[3:]
    assert_equal(run.everything(), everything)
    run.close()


def test_an_evaluation_is_the_models_own_and_changes_nothing(plain: Get, trained: Get) -> None:
    model, other = (trained(slots=8, cache_prior=0.7) for _ in range(2))
    optimizers = [moetier.AdamW(one, lr=0.01) for one in (model, other)]
    model.eval()
    with torch.no_grad():
        expected = plain(NAME, torch.float32)(**batch(9)).logits
        assert torch.equal(model(**batch(9)).logits, expected)
    model.train()
    losses = loop(model, optimizers[0], range(2))
    model.eval()
    with torch.no_grad():
        model(**batch(9))
    model.train()
    losses += loop(model, optimizers[0], range(2, 4))
    assert losses == loop(other, optimizers[1], range(4))
    reports = [one.moetier.stats()["routing"] for one in (model, other)]
    assert reports[0] == reports[1] and reports[0]["changed_tokens"] > 0


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "answer"),
    [
        ({"drop_misses": 0.5}, "drop_misses: not while a model is trained"),
        ({"cache_prior": 0.5, "slots": 1}, "cache_prior=0.5: experts can be kept in at most half of the slots"),
        ({"max_rank": 2}, "max_rank: this model chooses 3 of 8 experts"),
    ],
)
def test_refused(options: dict[str, Any], answer: str, checkpoint: Get, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=answer):
        load_trained(checkpoint(NAME, torch.float32), tmp_path, **options)
    load_trained(checkpoint(NAME, torch.float32), tmp_path).moetier.close()  # nothing was left open


def test_a_family_that_cannot_choose_again_is_refused_by_name(checkpoint: Get, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="Phimoe"):
        load_trained(checkpoint("phimoe", torch.float32), tmp_path, "phimoe", cache_prior=0.3)


def test_a_run_goes_on_with_its_own_levers_only(checkpoint: Get, tmp_path: Path) -> None:
    source = checkpoint(NAME, torch.float32)
    run = Run(source, tmp_path / "on", cache_prior=0.5)
    run.train(range(1), commit_at=(1,))
    run.close()
    off = Run(source, tmp_path / "off")
    off.train(range(1), commit_at=(1,))
    off.close()
    wrong = ("on", {}, "cache_prior=0.5, not exact"), ("off", {"max_rank": 4}, "exact, not max_rank=4")
    for folder, options, answer in wrong:
        with pytest.raises(ConfigError, match=f"trained with routing {answer}"):
            Run(source, tmp_path / folder, **options)
        shutil.rmtree(tmp_path / folder / "lock", ignore_errors=True)


def test_a_model_that_was_not_set_to_train(trained: Get) -> None:
    model = trained(cache_prior=0.5).eval()
    optimizer = moetier.AdamW(model, lr=0.01)
    with pytest.raises(ConfigError, match=r"no forward in training mode since the last step.*model\.train\(\)"):
        loop(model, optimizer, range(1))


# -- the books ---------------------------------------------------------------------------------------------------------


def test_the_balance_loss_is_that_of_transformers(trained: Get) -> None:
    model = trained(slots=12, cache_prior=0.5)
    logits: list[torch.Tensor] = []
    for block in model.model.layers:
        block.mlp.gate.register_forward_hook(lambda module, args, output: logits.append(output[0].detach()))
    loop(model, moetier.AdamW(model, lr=0.01), range(1))
    report = model.moetier.stats()["routing"]
    for layer in range(LAYERS):
        theirs = float(load_balancing_loss_func((logits[layer],), EXPERTS, TOP_K))  # of all K choices together
        assert report["layers"]["balance_loss_own"][layer] == pytest.approx(theirs / TOP_K)


def test_a_tally_by_hand() -> None:
    tally = Tally.empty([4, 2])
    own, given_ = np.array([[0, 1], [0, 2]]), np.array([[0, 1], [3, 2]])
    shares = np.array([[0.5, 0.5, 0.0, 0.0], [0.4, 0.1, 0.3, 0.2]])
    tally.add(0, own, given_, np.array([0, 1]), shares)
    before = tally.copy()
    found = tally.summary()["layers"]
    assert found["changed_tokens"] == [0.5, 0.0] and found["changed_experts"] == [0.25, 0.0]
    assert found["mass_given_up"] == pytest.approx([0.1, 0.0])
    assert found["cv"] == [0.0, 0.0] and found["cv_own"][0] == pytest.approx(np.std([2, 1, 1, 0]))
    assert found["balance_loss"][0] == pytest.approx(1.0)
    assert found["balance_loss_own"][0] == pytest.approx(4 * (0.5 * 0.45 + 0.25 * 0.3 + 0.25 * 0.15))
    assert tally.since(before).summary()["tokens"] == 0
    assert all(tally.since(before).summary()[name] == 0.0 for name in NUMBERS)
    tally.add(1, np.array([[1]]), np.array([[0]]), np.array([1]), np.array([[0.25, 0.75]]))
    later = tally.since(before).summary()
    assert later["changed_tokens"] == 1.0 and later["layers"]["cv"] == [0.0, 1.0] and later["mass_given_up"] == 0.5
    assert later["balance_loss"] == pytest.approx(0.25) and later["balance_loss_own"] == pytest.approx(0.75)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    st.integers(2, 12),
    st.lists(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=6), min_size=2, max_size=2), max_size=5),
)
def test_what_is_kept(slots: int, steps: list[list[list[int]]]) -> None:
    """Two layers of 5 experts: never more than half of the slots, known experts only, and the same after a resume."""
    quota = quota_of(slots, [5, 5])
    kept = KeptExperts([5, 5], quota)
    everything = slots >= 10
    assert sum(quota) == 10 if everything else sum(quota) == slots // 2 and max(quota) - min(quota) <= 1
    for step in steps:
        for layer, used in enumerate(step):
            kept.wanted(layer, np.array([used]))
        again = KeptExperts([5, 5], [0, 0])
        again.load(kept.to_json())
        before = set(kept.keys())
        kept.turn()
        again.turn()
        now = set(kept.keys())
        assert now == set(again.keys()) and kept.to_json() == again.to_json()
        assert now <= before | {ExpertKey(layer, expert) for layer, used in enumerate(step) for expert in used}
        for layer, room in enumerate(quota):
            own = {key for key in now if key.layer == layer}
            assert len(own) <= room and len(own) >= min(room, len(set(step[layer])))
            assert set(np.flatnonzero(kept.mask(layer)).tolist()) == {key.expert for key in own}
