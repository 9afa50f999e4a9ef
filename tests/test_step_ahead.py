"""Loading ahead in a training step: backward finds what it needs, nothing needed is displaced, bits stay."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from layers import Kind, Twins, routed
from moetier.access import Access, ExpertKey, Part, Phase
from moetier.eventlog import Recorder, replay
from moetier.residency import Residency
from moetier.tiers import Kind as CopyKind
from moetier.tiers import TierConfig
from moetier.training.ahead import StepAhead
from moetier.training.tape import Tape, Use

LAYERS, EXPERTS = 4, 8
F, B = Part.FORWARD, Part.BACKWARD


def keys(layer: int, *experts: int) -> tuple[ExpertKey, ...]:
    return tuple(ExpertKey(layer, expert) for expert in experts or range(EXPERTS))


class Steps:
    """A core, a tape, and what loads ahead; copies of prefetches land while an access computes."""

    def __init__(self, slots: int, policy: str = "zigzag", staging: int = 0, lower: int = 0):
        tiers = [TierConfig(slots, policy, staging=staging)] + [TierConfig(lower, policy)] * (lower > 0)
        self.core = Recorder(Residency(tiers, LAYERS, EXPERTS))
        self.tape = Tape()
        self.ahead = StepAhead(self.core, (EXPERTS,) * LAYERS, self.tape.coming)
        self.time = 0
        self.uses: list[Use] = []

    def serve(self, part: Part, wanted: tuple[ExpertKey, ...]) -> list[ExpertKey]:
        """Run an access; returns what it had to wait for."""
        self.time += 1
        access = Access(self.time, wanted[0].layer, wanted, phase=Phase.PREFILL, part=part)
        ticket = self.core.acquire(access)
        waited = [key for key in wanted if key not in ticket.ready]
        self.ahead.demanded(access)
        while not ticket.done:
            for copy in sorted(self.core.take(), key=lambda copy: copy.kind):
                self.core.completed(copy.id)
            while ticket.ready:
                self.core.release(ticket, ticket.ready.popleft())
                if not ticket.waiting:
                    self.ahead.released(access)
        while orders := self.core.take():
            assert {copy.kind for copy in orders} <= {CopyKind.PREFETCH, CopyKind.LOAD}
            for copy in orders:
                self.core.completed(copy.id)
        self.core.check()
        return waited

    def forward(self, *experts: int) -> list[list[ExpertKey]]:
        waited = []
        for layer in range(LAYERS):
            wanted = keys(layer, *experts)
            waited.append(self.serve(F, wanted))
            self.uses.append(self.tape.record(Access(0, layer, wanted)))
        return waited

    def backward(self) -> list[list[ExpertKey]]:
        waited = []
        while self.uses:
            use = self.uses.pop()
            self.tape.play(use)
            waited.append(self.serve(B, use.access.keys))
        return waited


@pytest.mark.parametrize("policy", ["zigzag", "lru"])
@pytest.mark.parametrize("experts", [(0, 2, 5), (0, 1, 2, 3)])
def test_backward_finds_everything(policy: str, experts: tuple[int, ...]) -> None:
    steps = Steps(2 * len(experts), policy)
    assert sum(map(len, steps.forward(*experts))) == LAYERS * len(experts), "few experts: no layer tells the next"
    assert steps.backward() == [[]] * LAYERS
    counts = steps.core.counters()["prefetches"]
    assert counts["wasted"] == 0 and counts["useful"] == counts["issued"] > 0


@pytest.mark.parametrize("policy", ["zigzag", "lru"])
def test_a_forward_of_many_tokens_tells_the_next_layer(policy: str) -> None:
    steps = Steps(2 * EXPERTS, policy)
    assert steps.forward() == [list(keys(0)), [], [], []]
    assert steps.backward() == [[]] * LAYERS
    again = steps.forward()
    assert sum(map(len, again)) <= EXPERTS


def test_with_room_for_one_layer_only_what_is_needed_stays() -> None:
    steps = Steps(EXPERTS)
    steps.forward()
    waited = steps.backward()
    assert waited[0] == [] and all(len(missing) < EXPERTS for missing in waited[1:])


def test_what_the_next_layer_has_is_not_displaced_for_it() -> None:
    steps = Steps(4, "lru")
    steps.serve(B, keys(1, 0, 1))  # oldest, and what LRU would evict
    use, other = steps.tape.record(Access(0, 1, keys(1, 0, 1, 2, 3))), steps.tape.record(Access(0, 2, keys(2, 0, 1)))
    steps.tape.play(other)
    steps.serve(B, keys(2, 0, 1))
    assert set(keys(1)[:4]) == steps.core.residents() and use.access.layer == 1


def test_what_forward_does_not_want_after_all_is_given_up() -> None:
    steps = Steps(2 * EXPERTS)
    steps.serve(F, keys(0))
    assert steps.serve(F, keys(1, 0, 1)) == []
    assert steps.serve(F, keys(2, 3)) == list(keys(2, 3)), "two of eight say nothing about the next layer"


def test_experts_that_catch_up_in_passing_disturb_nothing() -> None:
    steps = Steps(2 * EXPERTS)
    steps.serve(F, keys(0))
    steps.serve(Part.UPDATE, keys(1, 3))
    assert steps.serve(F, keys(1)) == []


def test_a_prefill_is_staged_as_ever() -> None:
    steps = Steps(EXPERTS + 3, "lru", staging=3)
    steps.serve(Part.SERVE, keys(3))
    steps.serve(Part.SERVE, keys(0))
    assert steps.ahead.issued == 3
    staged = {key for key, entry in steps.core.core._top.entries.items() if entry.transient}
    assert staged == set(keys(1)[:3])


@pytest.mark.parametrize("lower", [0, 12])
def test_decisions_replay(lower: int) -> None:
    steps = Steps(6, lower=lower)
    for experts in ((0, 1), (2, 5, 6), ()):
        steps.forward(*experts)
        steps.backward()
    again = replay(steps.core.log)
    assert again.digest() == steps.core.digest()


# -- through autograd --------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _grad() -> Iterator[None]:
    with torch.enable_grad():
        yield


def gradients(ahead: bool, slots: int, checkpointed: bool = False) -> tuple[list[torch.Tensor], Twins]:
    twins = Twins(Kind("default"), slots=slots, delay=0.001)
    if ahead:
        experts = (twins.kind.experts,) * 2
        twins.cache.ahead = StepAhead(twins.cache.core, experts, twins.hub.tape.coming)
    hidden, index, weights = routed(twins.kind, tokens=17, top_k=3)
    hidden.requires_grad_()

    def run(hidden: torch.Tensor) -> torch.Tensor:
        for module in twins.tiered:
            if checkpointed:
                from torch.utils.checkpoint import checkpoint

                hidden = hidden + checkpoint(
                    lambda h, m=module: m(h, index, weights) * 1.5, hidden, use_reentrant=False
                )
            else:
                hidden = hidden + module(hidden, index, weights)
        return hidden

    for _ in range(2):
        run(hidden).square().sum().backward()
    found = [hidden.grad]
    found += [g for key in sorted(twins.sink.gradients) for g in twins.sink.gradients[key].values()]
    parts = {access.part for _, access in twins.sink.events}
    assert parts == {F, B}
    return found, twins


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("slots", [1, 3, 7])
def test_gradients_are_the_same_bits(slots: int, checkpointed: bool) -> None:
    plain, without = gradients(False, slots, checkpointed)
    found, twins = gradients(True, slots, checkpointed)
    try:
        assert len(plain) == len(found) > 10
        assert all(torch.equal(one, other) for one, other in zip(plain, found, strict=True))
        if slots == 7:
            assert twins.cache.stats()["prefetches"]["useful"] > 0
    finally:
        for one in (without, twins):
            one.close()
