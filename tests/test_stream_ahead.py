"""Streaming ahead: the next layer of a prefill begins early, nothing is displaced, nothing stays behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from families import VOCAB
from moetier.access import Access, ExpertKey, Phase
from moetier.residency import Residency
from moetier.stream_ahead import StreamAhead
from moetier.tiers import Kind, TierConfig

LAYERS, EXPERTS = 3, 8


def keys(layer: int, count: int = EXPERTS) -> tuple[ExpertKey, ...]:
    return tuple(ExpertKey(layer, expert) for expert in range(count))


def serve(core: Residency, access: Access, ahead: StreamAhead | None = None) -> list[ExpertKey]:
    """Run an access; every copy ends at once. Returns what was loaded for it on demand."""
    ticket, demanded = core.acquire(access), []
    if ahead is not None:
        ahead.demanded(access)
    while not ticket.done:
        for copy in core.take():
            if copy.kind is Kind.LOAD:
                demanded.append(copy.key)
            core.completed(copy.id)
        while ticket.ready:
            core.release(ticket, ticket.ready.popleft())
            if ahead is not None and not ticket.waiting:
                ahead.released(access)
    for copy in core.take():
        core.completed(copy.id)
    core.check()
    return demanded


def full_core(staging: int = 3) -> Residency:
    """A core whose ranked slots hold experts of the last layer, all that a decode would want."""
    core = Residency([TierConfig(EXPERTS + staging, "lru", "decode-only", staging)], LAYERS, EXPERTS)
    serve(core, Access(1, LAYERS - 1, keys(LAYERS - 1)))
    return core


def test_the_next_layer_is_there_and_the_working_set_stays() -> None:
    core = full_core()
    before = core.residents()
    ahead = StreamAhead(core, (EXPERTS,) * LAYERS)
    serve(core, Access(2, 0, keys(0), phase=Phase.PREFILL), ahead)
    assert ahead.issued == 3
    assert {key for key in keys(1) if core.holds(key)} == set(keys(1)[:3])
    demanded = serve(core, Access(3, 1, keys(1), phase=Phase.PREFILL), ahead)
    assert demanded == list(keys(1)[3:]), "each of the others once"
    assert before <= core.residents()
    assert core.counters()["prefetches"]["wasted"] == 0


def test_what_is_not_wanted_gives_its_slot_back() -> None:
    core = full_core()
    ahead = StreamAhead(core, (EXPERTS,) * LAYERS)
    serve(core, Access(2, 0, keys(0), phase=Phase.PREFILL), ahead)
    serve(core, Access(3, 1, keys(1)[4:], phase=Phase.PREFILL), ahead)
    assert not any(core.holds(key) for key in keys(1)), "staged, and gone"


@pytest.mark.parametrize(
    "access",
    [Access(2, 0, keys(0)), Access(2, 0, keys(0, 5), phase=Phase.PREFILL), Access(2, 2, keys(2), phase=Phase.PREFILL)],
    ids=["decode", "not saturated", "last layer"],
)
def test_when_nothing_is_streamed(access: Access) -> None:
    core = full_core()
    ahead = StreamAhead(core, (EXPERTS,) * LAYERS)
    serve(core, access, ahead)
    assert ahead.issued == 0


def test_in_a_running_model(plain: Callable[..., Any], tiered: Callable[..., Any]) -> None:
    ids = torch.randint(3, VOCAB, (2, 40), generator=torch.Generator().manual_seed(0))
    expected = plain("qwen3_moe")(input_ids=ids).logits
    model = tiered("qwen3_moe", slots=18)
    cache = model.moetier.cache
    for _ in range(3):
        assert torch.equal(model(input_ids=ids).logits, expected)
    assert cache.ahead.issued > 0
    cache.settle()
    cache.core.check()
    off = tiered("qwen3_moe", slots=18, prefetch="off")
    assert off.moetier.cache.ahead is None
    assert torch.equal(off(input_ids=ids).logits, expected)
