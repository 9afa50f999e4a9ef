"""The lossy levers in running models: bit-identical when off, and when on exactly what the rules say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from families import VOCAB
from moetier import ExpertKey, Phase
from moetier.hf import find_experts
from moetier.levers import Levers
from moetier.routing import Lever
from test_routing import prior_of_one, rank_of_one

STEPS = 24
PROMPT = torch.randint(3, VOCAB, (1, 7), generator=torch.Generator().manual_seed(1))
OFF: list[dict[str, Any]] = [
    {"cache_prior": 0.0, "drop_misses": 0.0},
    {"max_rank": 3},  # as many as the model chooses
    {"cache_prior": 1.0, "keep_top": 3},
    {"max_rank": 8, "keep_top": 3},
]
ON: list[dict[str, Any]] = [
    {"cache_prior": 0.4},
    {"max_rank": 6},
    {"max_mass": 0.7, "keep_top": 0},
    {"drop_misses": 0.9},
    {"cache_prior": 0.3, "drop_misses": 0.9},
]


def decode(model: Any, rows: int = 1, steps: int = STEPS) -> torch.Tensor:
    """Logits of a prompt and of as many steps of given tokens: [rows, 7 + steps, V]."""
    ids = torch.randint(3, VOCAB, (rows, steps), generator=torch.Generator().manual_seed(2))
    output = model(input_ids=PROMPT.expand(rows, -1), use_cache=True)
    logits = [output.logits]
    for step in range(steps):
        past = output.past_key_values
        output = model(input_ids=ids[:, step : step + 1], past_key_values=past, use_cache=True)
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("options", OFF, ids=str)
def test_off_is_the_models_own_output_bit_for_bit(options: dict[str, Any], plain: Any, tiered: Any) -> None:
    model = tiered("qwen3_moe", slots=8, **options)
    assert torch.equal(decode(model), decode(plain("qwen3_moe")))
    stats = model.moetier.stats()
    if options == OFF[0]:  # untouched: nothing is in the way at all
        assert model.moetier.lever is None and "levers" not in stats
        assert not any("forward" in module.__dict__ for module in model.modules())
    else:
        assert stats["levers"]["changed"] == stats["levers"]["dropped"] == 0
        assert stats["levers"]["choices"] == STEPS * 3 * 3


@pytest.mark.parametrize("options", ON, ids=str)
def test_on_reads_less_and_is_deterministic(options: dict[str, Any], plain: Any, tiered: Any) -> None:
    options = options | {"prefetch": "off"}  # what is resident decides, and must not depend on time
    exact = tiered("qwen3_moe", slots=8, prefetch="off")
    expected = decode(exact)
    runs = [(tiered("qwen3_moe", slots=8, **options), decode) for _ in range(2)]
    logits = [run(model) for model, run in runs]
    assert torch.equal(*logits) and torch.isfinite(logits[0]).all()
    assert runs[0][0].moetier.stats()["levers"] == runs[1][0].moetier.stats()["levers"]
    assert torch.equal(logits[0][:, :7], expected[:, :7])  # the prefill is the model's own
    assert not torch.equal(logits[0], expected)
    read = [m.moetier.stats()["links"]["disk→host"]["bytes"] for m in (exact, runs[0][0])]
    assert read[1] < read[0]
    report = runs[0][0].moetier.stats()["levers"]
    assert (report["changed"] > 0) == runs[0][0].moetier.lever.levers.rechooses
    assert (report["dropped"] > 0) == ("drop_misses" in options)


def test_closed_levers_leave_the_model_as_it_was(plain: Any, tiered: Any) -> None:
    model = tiered("qwen3_moe", slots=8, max_rank=8)
    model.moetier.lever.close()
    model.moetier.lever = None
    assert torch.equal(decode(model), decode(plain("qwen3_moe")))


class Watched:
    """Notes, per access of a decoding step, the router's logits, the residents, and what the experts were given."""

    def __init__(self, model: Any):
        self.tiered = model.moetier
        self.seen: list[tuple[int, np.ndarray, list[bool], torch.Tensor, torch.Tensor]] = []
        routers = [m for _, m in model.named_modules() if type(m).__name__.endswith("TopKRouter")]
        for layer, ((_, experts), router) in enumerate(zip(find_experts(model), routers, strict=True)):
            router.register_forward_pre_hook(lambda module, args, layer=layer: self.before(layer))
            router.register_forward_hook(lambda module, args, output: setattr(self, "logits", output[0]))
            experts.register_forward_pre_hook(
                lambda module, args, kwargs, layer=layer: self.experts(layer, [*args, *kwargs.values()]),
                with_kwargs=True,
            )

    def before(self, layer: int) -> None:
        self.held = self.tiered.cache.holding([ExpertKey(layer, e) for e in range(8)])

    def experts(self, layer: int, given: list[Any]) -> None:
        if self.tiered.phase is Phase.DECODE:
            logits = self.logits.float().reshape(-1, 8).numpy()
            self.seen.append((layer, logits, self.held, given[1].reshape(-1, given[1].shape[-1]), given[2]))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mixtral", {"cache_prior": 0.4}),
        ("gpt_oss", {"cache_prior": 0.2, "keep_top": 0}),
        ("granitemoe", {"max_rank": 5}),
        ("mixtral", {"max_rank": 8, "keep_top": 0}),
    ],
    ids=str,
)
def test_a_models_choices_and_weights(name: str, options: dict[str, Any], rows: int, tiered: Any) -> None:
    """Every choice in a run, and its weights, from the router's logits and the residents of that moment."""
    model = tiered(name, torch.float32, slots=8, **options)
    watched = Watched(model)
    decode(model, rows, 12)
    keep = options.get("keep_top", 1)
    ranges: dict[int, list[float]] = {}
    changed = 0
    for layer, logits, held, index, weights in watched.seen:
        ranges.setdefault(layer, []).extend((logits.max(axis=1) - logits.min(axis=1)).tolist())
        for row in range(rows):
            z = logits[row]
            own = set(np.argsort(-z, kind="stable")[:2].tolist())
            if "cache_prior" in options:
                bonus = options["cache_prior"] * np.mean(ranges[layer])
                margin = np.abs(np.subtract.outer(z + bonus * np.array(held), z))
                if margin[margin > 0].min() < 1e-5:
                    continue  # a tie but for rounding
                expected = prior_of_one(z, own, held, float(bonus), keep)
            else:
                expected = rank_of_one(z, own, held, keep, options["max_rank"])
            assert set(index[row].tolist()) == expected
            gates = np.exp(z[index[row].numpy()] - z.max())
            assert np.allclose(weights[row].float().numpy(), gates / gates.sum(), rtol=1e-4)
            changed += len(expected - own)
    assert len(watched.seen) == 12 * len(ranges) and changed > 3
    assert model.moetier.stats()["levers"]["changed"] == pytest.approx(changed, abs=2)


def test_the_mean_range_is_over_all_tokens_so_far(tiered: Any) -> None:
    model = tiered("mixtral", slots=4, cache_prior=0.5)
    lever: Lever = model.moetier.lever
    rows = [[[0.0, 4.0], [1.0, 2.0]], [[0.0, 10.0]], [[5.0, 5.0]]]
    means = [lever._mean_range(0, np.array(row, dtype=np.float32)) for row in rows]
    assert means == pytest.approx([2.5, 5.0, 3.75])


def test_a_dropped_expert_adds_nothing(tiered: Any) -> None:
    """The experts' forward with dropped pairs, against the same with these weights zero and everything loaded."""
    model = tiered("mixtral", torch.float32, slots=6)
    module, generator = find_experts(model)[1][1], torch.Generator().manual_seed(3)
    dropped = 0
    for tokens in (1, 5, 1):
        hidden = torch.randn(tokens, 64, generator=generator)
        index = torch.rand(tokens, 8, generator=generator).topk(3, dim=1).indices
        weights = torch.rand(tokens, 3, generator=generator)
        dropping = Lever(model, Levers(drop_misses=1.0))
        model.moetier.lever, model.moetier._phase = dropping, Phase.DECODE
        held = model.moetier.cache.holding([ExpertKey(1, e) for e in range(8)])
        got = module(hidden, index, weights)
        shares = weights / weights.sum(dim=1, keepdim=True)
        needed = set(index.gather(1, shares.argmax(dim=1, keepdim=True)).reshape(-1).tolist())
        needed |= {e for e in range(8) if held[e]}
        needed |= {int(e) for e, share in zip(index.reshape(-1), shares.reshape(-1), strict=True) if share >= 1 / 3}
        kept = torch.tensor([[int(e) in needed for e in row] for row in index])
        model.moetier.lever = None
        expected = module(hidden, index, weights * kept)
        assert torch.allclose(got, expected, atol=1e-5)
        assert dropping.report()["dropped"] == int((~kept).sum())
        dropped += int((~kept).sum())
    assert dropped > 0


def test_generate_in_a_batch(tiered: Any) -> None:
    """Several rows, padding, sampling off: runs, and counts every pair."""
    model = tiered("mixtral", slots=6, cache_prior=0.3, drop_misses=0.8)
    made = model.generate(input_ids=PROMPT.expand(3, -1).clone(), max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert made.shape == (3, 12)
    assert model.moetier.stats()["levers"]["choices"] == 4 * 3 * 3 * 2  # steps, rows, layers, experts


def test_events_are_recorded_with_levers(tiered: Any) -> None:
    """The recorder of the core stands between; what was chosen replays like anything else."""
    from moetier.eventlog import replay

    model = tiered("qwen3_moe", slots=8, max_rank=8, record_events=True)
    decode(model)
    assert replay(model.moetier.events()).digest() == model.moetier.cache.core.digest()
