"""A tiered model is used like any other: both doors, every kind of generation, threads, statistics, its end."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, StaticCache

from families import VOCAB
from moetier import ConfigError, MoetierError, TieredExpertsConfig, eventlog
from moetier.access import ExpertKey, Phase
from prepared import ONLINE

NAME = "qwen3_moe"  # 3 layers of 8 experts, 3 of them per token
Get = Callable[..., Any]


def prompt(rows: int = 2, length: int = 9, seed: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def generate(model: Any, seed: int = 0, rows: int = 2, **arguments: Any) -> torch.Tensor:
    torch.manual_seed(0)
    arguments = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None} | arguments
    made: torch.Tensor = model.generate(**prompt(rows, seed=seed), **arguments)
    return made


def test_both_doors_give_the_same(checkpoint: Get, plain: Get, tiered: Get) -> None:
    mine = tiered(NAME, slots=5)
    config = TieredExpertsConfig(slots=5, context=64)
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint(NAME), quantization_config=config, dtype="auto")
    assert type(mine) is type(theirs) is type(plain(NAME))
    assert mine.moetier.plan.tiers == theirs.moetier.plan.tiers
    expected = plain(NAME)(**prompt()).logits
    assert torch.equal(mine(**prompt()).logits, expected)
    assert torch.equal(theirs(**prompt()).logits, expected)
    theirs.moetier.close()


def test_no_marks_of_quantisation_are_left(plain: Get, tiered: Get) -> None:
    model = tiered(NAME)
    assert not hasattr(model.config, "quantization_config")
    assert not getattr(model, "is_quantized", False) and getattr(model, "hf_quantizer", None) is None
    assert not getattr(model, "quantization_method", None)
    for module in model.modules():
        assert not hasattr(getattr(module, "config", None), "_is_quantized")
    assert model.config.to_dict() == plain(NAME).config.to_dict()
    assert not any("experts.gate_up_proj" in name for name in model.state_dict())


@pytest.mark.parametrize(
    "arguments",
    [
        {"do_sample": True, "temperature": 1.5, "top_k": 20},
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 3},
        {"num_beams": 2, "do_sample": True},
        {"cache_implementation": "static"},
        {"cache_implementation": "dynamic"},
        {"use_cache": False},
        {"prompt_lookup_num_tokens": 2, "rows": 1},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    ],
    ids=lambda arguments: ",".join(arguments),
)
def test_ways_of_generating(arguments: dict[str, Any], plain: Get, tiered: Get) -> None:
    assert torch.equal(generate(plain(NAME), **arguments), generate(tiered(NAME), **arguments))


def test_assisted_generation(plain: Get, tiered: Get) -> None:
    """A tiered draft for a tiered model: two caches, used in turns."""
    expected = generate(plain(NAME), rows=1, assistant_model=plain(NAME))
    assert torch.equal(expected, generate(tiered(NAME), rows=1, assistant_model=tiered(NAME, slots=3)))


def test_static_cache_of_the_caller(plain: Get, tiered: Get) -> None:
    results = []
    for model in (plain(NAME), tiered(NAME)):
        cache = StaticCache(config=model.config, max_cache_len=32)
        first = model(**prompt(), past_key_values=cache).logits
        more = model(input_ids=first[:, -1:].argmax(-1), past_key_values=cache).logits
        results.append((first, more))
    for expected, given in zip(*results, strict=True):
        assert torch.equal(expected, given)


def test_left_and_right_padding(plain: Get, tiered: Get) -> None:
    model = tiered(NAME)
    for columns in (slice(0, 4), slice(5, 9)):
        batch = prompt()
        batch["input_ids"][0, columns] = 0
        batch["attention_mask"][0, columns] = 0
        assert torch.equal(model(**batch).logits, plain(NAME)(**batch).logits)


def test_batch_sizes_and_embeddings_as_input(plain: Get, tiered: Get) -> None:
    model, reference = tiered(NAME), plain(NAME)
    for rows, length in ((1, 1), (1, 40), (5, 3), (2, 64)):
        batch = prompt(rows, length)
        assert torch.equal(model(**batch).logits, reference(**batch).logits)
    embeddings = reference.get_input_embeddings()(prompt()["input_ids"])
    assert torch.equal(model(inputs_embeds=embeddings).logits, reference(inputs_embeds=embeddings).logits)


def test_text_generation_pipeline(plain: Get, tiered: Get) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(VOCAB)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", padding_side="left")
    texts = ["w5 w9 w17", "w30 w4 w5 w6 w7"]
    results = []
    for model in (plain(NAME), tiered(NAME)):
        pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
        results.append(pipe(texts, max_new_tokens=5, do_sample=False, batch_size=2, return_full_text=False))
    assert results[0] == results[1]


@pytest.mark.parametrize("slots", [1, 2, 3, 7, "50%", "100%"])
def test_prefill_in_waves(slots: int | str, plain: Get, tiered: Get) -> None:
    """A prefill needs all 8 experts of a layer, whatever the number of slots."""
    model = tiered(NAME, slots=slots)
    for _ in range(2):
        assert torch.equal(model(**prompt(2, 30)).logits, plain(NAME)(**prompt(2, 30)).logits)
    (tier,) = model.moetier.stats()["tiers"]
    if slots == 1:
        # at most the last expert that one layer used is still there when the same layer comes round again: never
        assert tier["hits"] == [0, 0, 0] and tier["misses"] == [16, 16, 16]
    if slots == "100%":
        assert tier["hits"] == tier["misses"] == [8, 8, 8]


def test_statistics_add_up(tiered: Get) -> None:
    model = tiered(NAME, slots="25%", admission="always")
    generate(model)
    stats = model.moetier.stats()
    (tier,), (disk,), seconds = stats["tiers"], stats["links"].values(), stats["seconds"]
    wanted = [0, 0, 0]

    def count(layer: int, index: torch.Tensor) -> None:
        wanted[layer] += len(index.unique())

    hooks = [
        module.register_forward_pre_hook(lambda m, args: count(m._moetier[1], args[1]))
        for _, module in model.named_modules()
        if hasattr(module, "_moetier")
    ]
    model(**prompt(2, 20))
    model(**prompt(1, 1))
    for hook in hooks:
        hook.remove()
    (after,) = model.moetier.stats()["tiers"]
    for layer in range(3):
        before = tier["hits"][layer] + tier["lates"][layer] + tier["misses"][layer]
        now = after["hits"][layer] + after["lates"][layer] + after["misses"][layer]
        assert now - before == wanted[layer] > 0
    record = model.moetier.plan.workload.record_nbytes
    assert record == 3 * 40 * 64 * 2
    assert disk["copies"] == sum(tier["misses"]) and disk["bytes"] == disk["copies"] * record
    assert sum(tier["hits"]) > 0 and sum(tier["misses"]) > 0 and tier["evictions"] > 0
    assert disk["busy_seconds"] > 0 and all(seconds[name] > 0 for name in ("wait", "compute", "decide"))


def test_threads_share_a_model(plain: Get, tiered: Get) -> None:
    model, reference = tiered(NAME, slots=4), plain(NAME)
    expected = [[reference(**prompt(seed=10 * t + n)).logits for n in range(6)] for t in range(3)]
    given: list[list[torch.Tensor]] = [[], [], []]
    errors: list[BaseException] = []

    def work(thread: int) -> None:
        try:
            with torch.no_grad():
                for number in range(6):
                    given[thread].append(model(**prompt(seed=10 * thread + number)).logits)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "the threads wait for each other"
    assert not errors
    for mine, theirs in zip(expected, given, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    model.moetier.cache.core.check()


def test_threads_generate_at_the_same_time(plain: Get, tiered: Get) -> None:
    model = tiered(NAME, slots=3)
    expected = [generate(plain(NAME), seed=seed) for seed in (1, 2)]
    given: dict[int, torch.Tensor] = {}
    threads = [
        threading.Thread(target=lambda seed=seed: given.update({seed: generate(model, seed=seed)}), daemon=True)
        for seed in (1, 2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(torch.equal(expected[seed - 1], given[seed]) for seed in (1, 2))


def test_forward_of_two_models_in_turns(plain: Get, tiered: Get) -> None:
    one, two = tiered("mixtral", slots=3), tiered("granitemoe", slots=2)
    for seed in range(3):
        assert torch.equal(one(**prompt(seed=seed)).logits, plain("mixtral")(**prompt(seed=seed)).logits)
        assert torch.equal(two(**prompt(seed=seed)).logits, plain("granitemoe")(**prompt(seed=seed)).logits)


def test_another_device_is_an_error(tiered: Get) -> None:
    """The math on another device than the tiers: here the module is called with what such a model would give it."""
    model = tiered(NAME)
    tiers, layer = next(module._moetier for _, module in model.named_modules() if hasattr(module, "_moetier"))
    with pytest.raises(
        ConfigError, match=r"computes on meta but its experts are tiered on cpu; choose the device when"
    ):
        tiers.forward(layer, None, torch.empty(2, 64, device="meta"), torch.zeros(2, 3, dtype=torch.long), None)


def test_a_closed_model_says_so(tiered: Get) -> None:
    model = tiered(NAME)
    model(**prompt())
    for _ in range(2):
        model.moetier.close()
        with pytest.raises(MoetierError, match="closed"):
            model(**prompt())


def test_closing_before_the_first_use(tiered: Get) -> None:
    model = tiered(NAME)
    model.moetier.close()
    with pytest.raises(MoetierError, match="closed"):
        model(**prompt())


@pytest.mark.parametrize("policy", ONLINE)
def test_a_recorded_run_replays(policy: str, tiered: Get, tmp_path: Path) -> None:
    model = tiered(NAME, record_events=True, policy=policy)
    generate(model)
    model.moetier.events().save(tmp_path / "events")
    again = eventlog.replay(eventlog.EventLog.load(tmp_path / "events"))
    assert again.digest() == model.moetier.cache.core.digest()
    assert again.counters() == model.moetier.cache.core.counters()
    assert again.residents() == model.moetier.cache.core.residents()


def test_events_need_the_option(tiered: Get) -> None:
    with pytest.raises(ConfigError, match="record_events=True"):
        tiered(NAME).moetier.events()


def test_gradients_may_be_enabled(plain: Get, tiered: Get) -> None:
    model = tiered(NAME)
    with torch.enable_grad():
        logits = model(**prompt()).logits
        assert logits.requires_grad
        assert torch.equal(logits.detach(), plain(NAME)(**prompt()).logits)
    with torch.inference_mode():
        assert torch.equal(model(**prompt()).logits, plain(NAME)(**prompt()).logits)


def test_an_exception_in_the_math_leaves_the_model_usable(
    plain: Get, tiered: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiered(NAME, slots=3)
    module = next(module for _, module in model.named_modules() if hasattr(module, "_moetier"))

    def broken(gate_up: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_apply_gate", broken, raising=True)
        for _ in range(5):
            with pytest.raises(KeyboardInterrupt):
                model(**prompt())
    assert torch.equal(model(**prompt()).logits, plain(NAME)(**prompt()).logits)
    assert not model.moetier.cache.core.tickets


def test_residents_are_the_bytes_of_the_checkpoint(plain: Get, tiered: Get) -> None:
    model = tiered(NAME, slots="50%")
    model(**prompt())
    cache = model.moetier.cache
    residents = sorted(cache.core.residents())
    assert len(residents) > 6
    for layer, expert in residents:
        key = ExpertKey(layer, expert)
        experts = plain(NAME).model.layers[layer].mlp.experts
        views = cache.host.views(cache.core.place(key).slot, cache.store.layout(layer), cache.store.phase(key))
        for name, view in views.items():
            assert torch.equal(view, getattr(experts, name)[expert])


def test_the_phase_follows_the_step_however_it_is_passed(tiered: Get) -> None:
    model = tiered(NAME)
    embed = model.get_input_embeddings()
    for length, phase in ((5, Phase.PREFILL), (1, Phase.DECODE), (4, Phase.PREFILL)):
        ids = prompt(1, length)["input_ids"]
        model(input_ids=None, inputs_embeds=embed(ids))
        assert model.moetier._phase is phase
