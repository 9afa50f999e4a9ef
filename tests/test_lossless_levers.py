"""Whatever is switched on or off, in any combination, whenever reads end: the bits of the model in memory.

Any three of the switches meet in all their ways; `MOETIER_COMBINATIONS=all` runs every combination. There is one tiny
model; each combination gets a cache of its own, and a store whose reads take random times, so that the order of
completions is another one every time.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import moetier
from combinations import ALL, covering
from families import VOCAB
from moetier.access import ExpertKey
from moetier.arenas import HostArena, HostTierArena
from moetier.attach import build_cache
from moetier.cache import ExpertCache
from moetier.crew import Crew
from moetier.misses import AlwaysInPlace
from moetier.options import Options
from moetier.packing import pack
from moetier.prefetch_binding import attach_prefetching
from moetier.residency import Residency
from moetier.stream_ahead import StreamAhead
from moetier.tiers import TierConfig
from packs import mapped
from test_prefetch_engine import always

NAME = "qwen3_moe"  # 3 layers of 8 experts, 3 of them per token
pytestmark = pytest.mark.timeout(1800 if ALL else 120)  # a test is 192 combinations, where all of them run
EXPERTS = (8, 8, 8)
PREFETCH = ("off", "next-gate", "mix")


class Shuffled:
    """A store whose reads end when they like."""

    def __init__(self, store: Any, seed: int):
        self._store, self._random = store, random.Random(seed)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def read(self, key: ExpertKey, segment: int, into: memoryview) -> int:
        time.sleep(self._random.random() ** 3 * 1e-3)
        return int(self._store.read(key, segment, into))


def logits(model: Any) -> list[torch.Tensor]:
    """A prefill that wants most experts, one that wants few, and decoding with one and two sequences."""
    draw = torch.Generator().manual_seed(0)
    found, past = [], None
    for rows, length in ((2, 12), (2, 1), (2, 1), (1, 4), (1, 1), (1, 1), (1, 1)):
        past = past if length == 1 else None
        ids = torch.randint(3, VOCAB, (rows, length), generator=draw)
        output = model(input_ids=ids, past_key_values=past, use_cache=True)
        past = output.past_key_values
        found.append(output.logits)
    return found


@pytest.fixture(scope="module")
def stores(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What `store` can be: the checkpoint, and a packed store of it."""
    folder = tmp_path_factory.mktemp("packs") / "model"
    pack(mapped(checkpoint(NAME), NAME), folder)
    return {"checkpoint": "none", "packed": str(folder)}


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def serve(model: Any, cache: ExpertCache, prefetch: str) -> Any:
    """Let a cache serve the model; returns its prefetching, which is not given the choice to rest."""
    model.moetier.cache = cache
    attach_prefetching(model, cache, prefetch, 3)
    if cache.prefetching is not None:
        always(cache.prefetching, 0.2)
        cache.ahead = StreamAhead(cache.core, EXPERTS)
    return cache.prefetching


@pytest.mark.parametrize(("store", "io"), [("checkpoint", "buffered"), ("packed", "auto")])
def test_one_tier(
    store: str,
    io: str,
    stores: dict[str, str],
    plain: Callable[..., Any],
    tiered: Callable[..., Any],
    two_threads: None,
) -> None:
    expected = logits(plain(NAME))
    model = tiered(NAME, store=stores[store], io=io, split="experts")
    first, crew, plan = model.moetier.cache, model.moetier.crew, model.moetier.plan
    source, crews = first.store, 0
    levers: list[Any] = [(9, 18), ("horizon", "lru"), ("decode-only", "always"), (1, 3), ("experts", "products")]
    combinations = covering(*levers, PREFETCH, (None, 2), seed=len(store))  # not those of the other store
    for number, (slots, policy, admission, readers, split, prefetch, pin_after) in enumerate(combinations):
        slots = 4 if prefetch == "mix" and slots == 9 else slots  # waves too
        options = Options(policy=policy, admission=admission, readers=readers, pin_after=pin_after)
        tiers = tuple(replace(tier, slots=slots) for tier in plan.tiers)
        late = Shuffled(source, number)
        cache, _ = build_cache(late, replace(plan, tiers=tiers), options, torch.device("cpu"))  # type: ignore[arg-type]
        if pin_after is not None:
            cache.pinning = moetier.pinning.WarmPinning(cache.core, 3, 8, slots, 3, pin_after, None)
        serve(model, cache, prefetch)
        model.moetier.crew = crew if split == "experts" else None
        torch.set_num_threads(2 if split == "experts" else 1)  # two by product crawl beside another process
        for actual, wanted in zip(logits(model), expected, strict=True):
            assert torch.equal(actual, wanted), (slots, policy, admission, readers, split, prefetch, pin_after)
        crews += model.moetier.crew is not None
        cache.settle()
        cache.core.check()
        cache.mover.close()
    assert isinstance(crew, Crew) and crews == sum("experts" in each for each in combinations) > 0
    model.moetier.cache = first
    model.moetier.crew = crew


@pytest.mark.parametrize("store", ["checkpoint", "packed"])
def test_two_tiers(store: str, stores: dict[str, str], plain: Callable[..., Any], tiered: Callable[..., Any]) -> None:
    expected = logits(plain(NAME))
    model = tiered(NAME, store=stores[store])
    first = model.moetier.cache
    levers: list[Any] = [((3, 5), (4, 12), (12, 13)), ("horizon", "lru"), (False, True), (None, AlwaysInPlace())]
    combinations = covering(*levers, PREFETCH, seed=len(store))
    moved = {"in_place": 0, "demotions": 0}
    for number, ((slots, host_slots), policy, exclusive, misses, prefetch) in enumerate(combinations):
        late: Any = Shuffled(first.store, number)
        lower = TierConfig(host_slots, policy, exclusive=exclusive, spare=int(exclusive))
        core = Residency([TierConfig(slots, policy), lower], 3, 8, misses)
        host, device = HostArena(host_slots, late.slot_nbytes), HostTierArena(slots, late.slot_nbytes)
        cache = ExpertCache(late, core, host, device, 2)
        serve(model, cache, prefetch)
        for actual, wanted in zip(logits(model), expected, strict=True):
            assert torch.equal(actual, wanted), (slots, host_slots, policy, exclusive, misses, prefetch)
        cache.settle()
        core.check()
        counted: Any = cache.stats()
        moved["in_place"] += counted["tiers"][1]["in_place"]
        moved["demotions"] += counted["tiers"][1]["demotions"]
        cache.mover.close()
    assert all(moved.values()), moved
    model.moetier.cache = first
