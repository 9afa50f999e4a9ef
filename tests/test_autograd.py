"""Backward through tiered experts: right by gradcheck, and bit for bit what ordinary autograd gives in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from layers import KINDS, Kind, Twins, routed
from moetier import ExpertKey
from moetier.experts import per_expert_parameters

Make = Callable[..., Twins]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[Twins] = []

    def get(*args: Any, **kwargs: Any) -> Twins:
        made.append(Twins(*args, **kwargs))
        return made[-1]

    yield get
    for twins in made:
        twins.close()


@pytest.fixture(autouse=True)
def _grad() -> Iterator[None]:
    with torch.enable_grad():
        yield


class Layer(torch.autograd.Function):
    """A tiered layer as a function of everything, its experts' fields included; all experts leave before backward."""

    @staticmethod
    def forward(ctx: Any, twins: Twins, index: Any, hidden: Any, weights: Any, *fields: Any) -> Any:
        names = per_expert_parameters(twins.tiered[0])
        for expert in range(twins.kind.experts):
            for name, stacked in zip(names, fields, strict=True):
                twins.store.fields(ExpertKey(0, expert))[name].copy_(stacked[expert])
        twins.evict()
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in (hidden, weights)]
            result = twins.tiered[0](inputs[0], index, inputs[1])
        ctx.state = twins, inputs, result, names, fields
        return result.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        twins, inputs, result, names, fields = ctx.state
        twins.sink.gradients.clear()
        twins.evict()
        for tensor in inputs:
            tensor.grad = None
        torch.autograd.backward(result, gradient, retain_graph=True)
        stacked = []
        for name, like in zip(names, fields, strict=True):
            of_field = torch.zeros_like(like)
            for key, gradients in twins.sink.gradients.items():
                of_field[key.expert] = gradients[name]
            stacked.append(of_field)
        return (None, None, inputs[0].grad, inputs[1].grad, *stacked)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_gradcheck_with_every_expert_evicted_in_between(kind: Kind, make: Make) -> None:
    kind = replace(kind, hidden=4, inner=3, experts=4)
    twins = make(kind, torch.float64, slots=2)
    hidden, index, weights = routed(kind, 3, 2, torch.float64)
    fields = [getattr(twins.plain[0], name).detach().clone() for name in per_expert_parameters(twins.plain[0])]
    inputs = [x.requires_grad_() for x in (hidden, weights, *fields)]
    assert torch.autograd.gradcheck(lambda *x: Layer.apply(twins, index, *x), inputs, fast_mode=False)


def gradients_of(module: Any, hidden: Any, index: Any, weights: Any, sink: Any = None) -> dict[str, torch.Tensor]:
    """Outputs and gradients of everything, the experts' stacked."""
    x, g = (value.clone().requires_grad_() for value in (hidden, weights))
    for parameter in module.parameters():
        parameter.grad = None
    result = module(x, index, g)
    result.square().sum().backward()
    found = {"result": result.detach(), "hidden": x.grad, "weights": g.grad}
    return found | {name: parameter.grad for name, parameter in module.named_parameters()}


def compare(twins: Twins, found: dict[str, Any], expected: dict[str, Any]) -> None:
    names = per_expert_parameters(twins.plain[0])
    for name, gradient in expected.items():
        if name not in names:
            assert torch.equal(found[name], gradient), name
    for expert in range(twins.kind.experts):
        mine = twins.sink.gradients.get(ExpertKey(0, expert), {})
        for name in names:
            zero = torch.zeros_like(expected[name][expert])
            assert torch.equal(mine.get(name, zero), expected[name][expert]), (name, expert)


@pytest.mark.parametrize("slots", [1, 3, 12])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_bits_of_the_reference(kind: Kind, dtype: torch.dtype, slots: int, make: Make) -> None:
    twins = make(kind, dtype, slots=slots, delay=0.002)
    for seed in range(3):
        inputs = routed(kind, dtype=dtype, seed=seed)
        twins.sink.gradients.clear()
        found = gradients_of(twins.tiered[0], *inputs)
        compare(twins, found, gradients_of(twins.plain[0], *inputs))
        with torch.no_grad():
            assert torch.equal(twins.tiered[0](*inputs), found["result"])
