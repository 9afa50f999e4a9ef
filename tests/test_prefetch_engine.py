"""Prefetching in the running engine: whatever it does, right or wrong, the output is the same to the last bit."""

from __future__ import annotations

import errno
import random
import time
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

from families import VOCAB
from moetier import (
    Access,
    ConfigError,
    ExpertKey,
    Options,
    Residency,
    StoreError,
    TierConfig,
    UnsupportedModelError,
)
from moetier.eventlog import replay
from moetier.predictors import PREDICTORS, Prediction
from moetier.prefetch_binding import check_prefetch
from moetier.prefetch_control import Controller, State
from moetier.prefetch_engine import Prefetching
from test_cache import EXPERTS, LAYERS, LAYOUT, Run, together
from test_prefetch_books import Always

Get = Callable[..., Any]
NAME = "qwen3_moe"  # 3 layers of 8 experts, 3 of them per token
USABLE = sorted(set(PREDICTORS) - {"scoutgate"})


class Guess:
    """Any experts of the next layer, with certainty; now and then a fault, if `faults`."""

    def __init__(self, layers: int = LAYERS, experts: int = EXPERTS, top_k: int = 2, faults: bool = False):
        self.layers, self.experts, self.faults = layers, experts, faults
        self.random = random.Random(0)

    def observe(self, access: Access, hidden: Any = None) -> None:
        pass

    def predict(self, access: Access, distance: int = 1) -> Iterable[Prediction]:
        if self.faults and self.random.random() < 0.1:
            raise RuntimeError("a fault")
        target = (access.layer + distance) % self.layers
        return [
            Prediction(ExpertKey(target, expert), 0.99, distance)
            for expert in self.random.sample(range(self.experts), self.experts)
        ]


def always(prefetching: Prefetching, confidence: float = 0.0) -> Prefetching:
    """Make it prefetch whatever it can."""
    prefetching.controller = Always(confidence)
    prefetching._room = lambda stream, now: 4.0  # type: ignore[method-assign]
    prefetching._turned()
    return prefetching


def slow(model: Any, seed: int, fail: float = 0.0) -> set[ExpertKey]:
    """Reads take their time, at random; some prefetches fail. Returns the keys that did."""
    cache, choose, failed = model.moetier.cache, random.Random(seed), set[ExpertKey]()
    read = cache.store.read

    def delayed(key: ExpertKey, segment: int, into: memoryview) -> int:
        time.sleep(choose.random() * 1e-3)
        waited_for = {key for ticket in cache.core.tickets for key in [*ticket.leased, *ticket.waiting]}
        ahead = cache.prefetching is not None and key in cache.prefetching._ahead and key not in waited_for
        if ahead and fail and choose.random() < fail:
            failed.add(key)
            raise StoreError(errno.EIO, f"{key} cannot be read")
        return int(read(key, segment, into))

    cache.store.read = delayed
    return failed


def texts(model: Any, seed: int = 0, steps: int = 8) -> list[torch.Tensor]:
    """Logits of a prefill and some steps of decoding."""
    ids = torch.randint(3, VOCAB, (1, 5 + steps), generator=torch.Generator().manual_seed(seed))
    logits, past = [], None
    with torch.no_grad():
        for begin, end in [(0, 5), *((5 + step, 6 + step) for step in range(steps))]:
            out = model(input_ids=ids[:, begin:end], past_key_values=past, use_cache=True)
            past = out.past_key_values
            logits.append(out.logits)
    return logits


@pytest.mark.parametrize("slots", [1, 4, 9, 20])
@pytest.mark.parametrize("predictor", [*USABLE, "test_prefetch_engine:Guess"])
def test_the_output_does_not_depend_on_prefetching(predictor: str, slots: int, plain: Get, tiered: Get) -> None:
    expected = texts(plain(NAME))
    model = tiered(NAME, slots=slots, prefetch=predictor, record_events=True)
    prefetching = always(model.moetier.cache.prefetching)
    slow(model, seed=slots)
    for given, wanted in zip(texts(model), expected, strict=True):
        assert torch.equal(given, wanted)
    report = model.moetier.stats()["prefetches"]
    assert report["error"] is None and report["predictor"] == predictor
    if slots == 9 and predictor != "previous-token":
        assert report["issued"] > 0, "else nothing is tested"
    assert prefetching.report()["issued"] == sum(report[n] for n in ("useful", "wasted", "cancelled", "pending"))
    core = model.moetier.cache.core
    core.check()
    assert replay(model.moetier.events()).digest() == core.digest()


def test_faults_of_the_predictor_and_of_reads_ahead_never_show(plain: Get, tiered: Get) -> None:
    model = tiered(NAME, slots=9, prefetch="test_prefetch_engine:Guess")
    always(model.moetier.cache.prefetching)
    failed = slow(model, seed=1, fail=0.5)
    for seed in range(3):
        for given, wanted in zip(texts(model, seed), texts(plain(NAME), seed), strict=True):
            assert torch.equal(given, wanted)
    model.moetier.cache.settle()
    report = model.moetier.stats()["prefetches"]
    assert report["failed"] == len(failed) > 0 and report["error"] is None
    for stream in model.moetier.cache.prefetching._streams.values():
        stream.predictor.faults = True
    for given, wanted in zip(texts(model, 5, 20), texts(plain(NAME), 5, 20), strict=True):
        assert torch.equal(given, wanted)
    assert "RuntimeError: a fault" in model.moetier.stats()["prefetches"]["error"]


def test_threads_have_predictors_of_their_own(plain: Get, tiered: Get) -> None:
    expected = [texts(plain(NAME), seed) for seed in range(3)]
    model = tiered(NAME, slots=9, prefetch="next-gate")
    prefetching = always(model.moetier.cache.prefetching, 0.3)
    slow(model, seed=0)
    for given, wanted in zip(together(*(lambda s=s: texts(model, s) for s in range(3))), expected, strict=True):
        assert all(map(torch.equal, given, wanted))
    report = prefetching.report()
    assert report["error"] is None and report["issued"] > 0
    predictors = [stream.predictor for stream in prefetching._streams.values()]
    assert len({id(predictor) for predictor in predictors}) == len(predictors) >= 2
    assert len({id(predictor._routers) for predictor in predictors}) == 1  # type: ignore[attr-defined]


def test_auto_is_next_gate_or_else_mix_and_off_is_nothing(tiered: Get) -> None:
    assert tiered(NAME, slots=9).moetier.cache.prefetching.name == "next-gate"
    assert tiered(NAME, slots="100%").moetier.cache.prefetching is None, "nothing to prefetch"
    assert tiered(NAME, slots=9, prefetch="off").moetier.cache.prefetching is None


def test_where_routers_need_more_than_the_hidden_state(tiered: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, model: Any) -> None:
        raise UnsupportedModelError("its router needs more")

    monkeypatch.setattr("moetier.predictors.next_gate.NextGate.bind", refuse)
    assert tiered(NAME, slots=9).moetier.cache.prefetching.name == "mix"
    with pytest.raises(UnsupportedModelError):
        tiered(NAME, slots=9, prefetch="next-gate")


@pytest.mark.parametrize("name", ["", "nonsense", "mix(x=1)", "scoutgate", "moetier.nothing:Here"])
def test_a_wrong_name_is_told(name: str) -> None:
    with pytest.raises(ConfigError, match="prefetch"):
        check_prefetch(name)
    with pytest.raises(ConfigError):
        Options(prefetch=name).check()


def test_useless_prefetching_is_turned_off_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole loop, with threads and clocks: a predictor that is sure and always wrong, and slow besides."""
    run = Run(8, delay=2e-4)
    predictor = Guess()
    monkeypatch.setattr(predictor, "observe", lambda access, hidden=None: time.sleep(2e-3))
    prefetching = Prefetching(
        run.core, lambda: predictor, "guess", lambda layer: LAYOUT.nbytes, Controller(window=12, patience=4, rest=100)
    )
    run.cache.prefetching = prefetching
    choose = random.Random(0)
    try:
        for number in range(400):
            run.serve(run.access(number % LAYERS, choose.sample(range(EXPERTS), 2)))
            if prefetching.controller.state is State.OFF:
                break
        assert prefetching.controller.state is State.OFF and number >= 24, prefetching.report()
        before = prefetching.report()["issued"]
        monkeypatch.setattr(predictor, "observe", None)  # is not asked any more
        for number in range(60):
            run.serve(run.access(number % LAYERS, choose.sample(range(EXPERTS), 2)))
        assert prefetching.report()["issued"] == before and prefetching.error is None
    finally:
        run.cache.close()


@pytest.mark.parametrize(("asking", "given_up"), [(1e-3, True), (0.0, False)])
def test_where_asking_takes_longer_than_what_it_could_save_it_is_given_up(asking: float, given_up: bool) -> None:
    """Right every time; but the loads are quick, and the answer is not."""
    core = Residency([TierConfig(slots=9, policy="lru")], LAYERS, EXPERTS)
    prefetching = Prefetching(core, Guess, "guess", lambda layer: LAYOUT.nbytes, Controller(window=LAYERS))
    now = 0.0
    for number in range(20 * LAYERS):
        access = Access(number + 1, number % LAYERS, (ExpertKey(number % LAYERS, number // LAYERS % EXPERTS),))
        asks = prefetching.begin(access, now)
        ticket = core.acquire(access)
        copies = core.take()
        prefetching.orders(copies, now)
        for copy in copies:
            now += 1e-3
            core.completed(copy.id)
            prefetching.ended(copy, True, now)
        core.release(ticket, ticket.ready.popleft())
        if asks:
            now += asking
            prefetching.asked(asking)
    controller = prefetching.controller
    assert ("asking" in controller.words()) == given_up
    assert prefetching.predict_seconds <= 2 * LAYERS * 1e-3, "only until it was known what it takes"
