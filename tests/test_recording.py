"""Recording real routing: what is recorded is what the routers chose, and nothing about the run changes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moetier
from families import VOCAB
from moetier.access import Access, Phase
from moetier.errors import ConfigError
from moetier.policies.lru import LRU
from moetier.recording import RecordOptions, Text, TraceRecorder, record_texts
from moetier.trace import Trace

NAME = "qwen3_moe"
Get = Callable[..., Any]


class Tokenizer:
    """A character is a token."""

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % VOCAB for letter in text]}

    def get_vocab(self) -> dict[str, int]:
        return {chr(number): number for number in range(VOCAB)}


TEXTS = [
    Text("a.txt", "The quick brown fox jumps over the lazy dog."),
    Text("b.txt", "All work and no play makes Jack"),
]


def routed(plain: Any, ids: list[int]) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """What the routers of the plain model give for a whole text: experts and weights per layer."""
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    hooks = [
        layer.mlp.experts.register_forward_pre_hook(
            lambda module, args, kwargs, number=number: seen.update({number: (args[1], args[2])}), with_kwargs=True
        )
        for number, layer in enumerate(plain.model.layers)
    ]
    plain(input_ids=torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return seen


def pairs(experts: Any, weights: Any) -> list[dict[int, float]]:
    return [dict(zip(e, w, strict=True)) for e, w in zip(experts.tolist(), weights.tolist(), strict=True)]


def test_what_is_recorded_is_what_the_routers_chose(plain: Get, tiered: Get) -> None:
    trace = record_texts(tiered(NAME), Tokenizer(), TEXTS[:1], RecordOptions(mode="prefill", tokens=20))
    assert trace.weights is not None and trace.token_ids is not None
    ids = Tokenizer()(TEXTS[0].content)["input_ids"][:20]
    assert trace.token_ids.tolist() == ids
    for layer, (experts, weights) in routed(plain(NAME), ids).items():
        assert pairs(trace.experts[:, layer], trace.weights[:, layer]) == pairs(experts, weights.float())
    assert (np.diff(trace.weights, axis=2) <= 0).all()
    assert trace.num_experts == 8 and trace.layers == 3 and trace.top_k == 3
    assert set(trace.phase) == {Phase.PREFILL} and set(trace.step) == {0}


def test_decoding_is_recorded_step_by_step(tiered: Get) -> None:
    told: list[int] = []
    options = RecordOptions(tokens=12, prompt=5)
    trace = record_texts(tiered(NAME), Tokenizer(), TEXTS, options, name="tiny", progress=told.append)
    assert trace.tokens == sum(told) == 24
    assert trace.phase.tolist() == ([Phase.PREFILL] * 5 + [Phase.DECODE] * 7) * 2
    assert trace.step.tolist() == [0] * 5 + list(range(1, 8)) + [8] * 5 + list(range(9, 16))
    assert trace.sequence.tolist() == [0] * 12 + [1] * 12
    described = trace.info.sequences[1]
    assert described["name"] == "b.txt" and described["tokens"] == 12 and described["prompt"] == 5
    assert described["sha256"] == hashlib.sha256(TEXTS[1].content.encode()).hexdigest()
    assert trace.info.model == "tiny" and "Tokenizer" in trace.info.tokenizer and trace.info.source == "recorded"
    assert len(trace.info.extra["config_sha256"]) == 64
    assert trace.info.extra["options"]["prompt"] == 5


def test_modes_and_batches_record_the_same_routing(tiered: Get) -> None:
    """Bit-identical logits need not follow from another shape of the step, but near-ties aside the routing does."""
    model = tiered(NAME, dtype_in_file=torch.float32)
    ways = [
        RecordOptions(tokens=16, prompt=4),
        RecordOptions(tokens=16, prompt=4, batch=2),
        RecordOptions(mode="prefill", tokens=16),
        RecordOptions(mode="prefill", tokens=16, chunk=5, batch=2, token_ids=False),
    ]
    traces = [record_texts(model, Tokenizer(), TEXTS, way) for way in ways]
    first = traces[0].of_sequences([0, 1])
    for trace in traces[1:]:
        same = np.sort(trace.of_sequences([0, 1]).experts, axis=2) == np.sort(first.experts, axis=2)
        assert same.mean() > 0.98
    together = traces[1]
    assert together.sequence.tolist()[:8] == [0] * 4 + [1] * 4 and set(together.step[:8]) == {0}
    assert [len(np.flatnonzero(together.step == step)) for step in (1, 12)] == [2, 2]
    assert traces[3].token_ids is None and sorted(set(traces[3].step.tolist())) == [0, 1, 2, 3]


def test_a_batch_is_cut_to_its_shortest_text(tiered: Get) -> None:
    short = Text("short", "only ten..")
    trace = record_texts(tiered(NAME), Tokenizer(), [*TEXTS, short], RecordOptions(tokens=20, prompt=4, batch=2))
    assert [sequence["tokens"] for sequence in trace.info.sequences] == [20, 20, 10]


def test_the_models_own_text(tiered: Get) -> None:
    model = tiered(NAME)

    def ids(**options: Any) -> list[int]:
        recorded = record_texts(
            model, Tokenizer(), TEXTS[:1], RecordOptions(tokens=12, prompt=4, generate=True, **options)
        )
        assert recorded.token_ids is not None
        return recorded.token_ids.tolist()

    prompt = torch.tensor([Tokenizer()(TEXTS[0].content)["input_ids"][:4]])
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    made = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    assert ids(temperature=0.0) == made[0].tolist()
    assert ids(seed=1) == ids(seed=1) != ids(seed=2)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3", "olmoe"])
def test_families(family: str, tiered: Get) -> None:
    trace = record_texts(tiered(family), Tokenizer(), TEXTS, RecordOptions(tokens=10, prompt=4))
    assert trace.tokens == 20 and trace.weights is not None
    used = trace.experts >= 0
    assert used.any(axis=2).all() and (trace.weights[~used] == 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 5, "prompt": 5}, "--tokens 5"),
        ({"mode": "train"}, "--mode train"),
        ({"batch": 0}, "--batch 0"),
        ({"mode": "prefill", "generate": True}, "--generate"),
        ({"temperature": float("nan")}, "--temperature"),
        ({"prompt": 40, "tokens": 60}, r"--text b\.txt: its 31 tokens"),
        ({"tokens": 10**6, "generate": True}, "positions"),
    ],
)
def test_options_that_cannot_be(tiered: Get, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        record_texts(tiered(NAME), Tokenizer(), TEXTS, RecordOptions(**options))
    with pytest.raises(ConfigError, match="no tokens"):
        record_texts(tiered(NAME), Tokenizer(), [Text("empty", "")])
    with pytest.raises(ConfigError, match="--text"):
        record_texts(tiered(NAME), Tokenizer(), [])


def test_watching_changes_nothing_and_ends(plain: Get, tiered: Get) -> None:
    model, ids = tiered(NAME, slots=5), torch.arange(3, 12)[None]
    expected = plain(NAME)(input_ids=ids).logits
    with TraceRecorder(model) as recorder:
        assert torch.equal(model(input_ids=ids).logits, expected)
        recorder.step([0], 9)
        with pytest.raises(ConfigError, match="watched already"), TraceRecorder(model):
            pass
    assert model.moetier.watch is None
    assert recorder.trace().tokens == 9


class NeedsMass(LRU):
    """LRU that writes down what it is shown."""

    needs_mass = True
    seen: list[Access] = []  # noqa: RUF012

    def on_access(self, access: Access) -> None:
        self.seen.append(access)


@pytest.fixture
def seen() -> Iterator[list[Access]]:
    NeedsMass.seen.clear()
    yield NeedsMass.seen
    NeedsMass.seen.clear()


def test_the_engine_shows_the_accesses_that_follow_from_the_trace(seen: list[Access], tiered: Get) -> None:
    """Keys, tokens, phase, sequence and gate mass, access by access: a replayed trace is what a real run was."""
    model = tiered(NAME, slots=6, policy=f"{__name__}:NeedsMass")
    trace: Trace = record_texts(model, Tokenizer(), TEXTS, RecordOptions(tokens=12, prompt=5))
    assert seen == trace.accesses()
    assert all(len(access.mass) == len(access.keys) for access in seen)
    seen.clear()
    trace = record_texts(model, Tokenizer(), TEXTS, RecordOptions(tokens=12, prompt=5, batch=2))
    assert [access.keys for access in seen] == [access.keys for access in trace.accesses()]
    assert {access.sequence for access in seen} == {0}, "several sequences at once"


def test_mass_is_not_computed_for_policies_that_do_not_ask(tiered: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Access] = []
    monkeypatch.setattr(LRU, "on_access", lambda self, access: shown.append(access))
    model = tiered(NAME, slots=6, policy="lru")
    model(input_ids=torch.arange(3, 12)[None])
    assert [access.mass for access in shown] == [(), (), ()]


def test_sequences_begin_where_nothing_came_before(seen: list[Access], tiered: Get) -> None:
    model = tiered(NAME, slots=6, policy=f"{__name__}:NeedsMass")
    ids = torch.arange(3, 12)[None]
    options = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 3}

    def sequences(call: Callable[[], Any]) -> list[int]:
        seen.clear()
        call()
        return [access.sequence for access in seen if access.layer == 0]

    assert sequences(lambda: model.generate(ids, **options)) == [0, 0, 0]
    assert sequences(lambda: model.generate(ids[:, :1], **options)) == [1, 1, 1], "a prompt of one token"
    assert sequences(lambda: model.generate(ids, cache_implementation="static", **options)) == [2, 2, 2]
    assert sequences(lambda: model.generate(ids, use_cache=False, **options)) == [3, 4, 5], "every pass begins anew"
    assert sequences(lambda: model.generate(ids.repeat(2, 1), **options)) == [0, 0, 0], "several at once"

    def chunks() -> None:
        past = None
        for part in ids.split(4, dim=1):
            past = model(input_ids=part, past_key_values=past, use_cache=True).past_key_values

    assert sequences(chunks) == [7, 7, 7]
    times = [access.time for access in seen]
    assert all(a < b for a, b in pairwise(times))


def test_the_demo_model_routes_with_locality() -> None:
    folder = Path(moetier.__file__).parent / "demo_model"
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = moetier.from_pretrained(folder, slots="50%", context=64)
    try:
        text = "In the beginning the king of Israel went up to the house, and he said unto the people, " * 3
        trace = record_texts(model, tokenizer, [Text("prose", text)], RecordOptions(tokens=40, prompt=8))
    finally:
        model.moetier.close()
    assert trace.layers == 6 and trace.num_experts == 32 and trace.top_k == 4
    both = (trace.experts[1:, :, :, None] == trace.experts[:-1, :, None, :]).any(axis=-1).mean()
    assert both > 4 / 32, "consecutive tokens share more experts than chance"
