"""Backward through tiered experts: right by gradcheck, and bit for bit what ordinary autograd gives in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from layers import KINDS, DictSink, Kind, Twins, routed
from moetier import ExpertKey, UnsupportedModelError
from moetier.access import Part
from moetier.errors import StaleGraphError
from moetier.experts import Routing, forward_from_leases, per_expert_parameters

Make = Callable[..., Twins]


@pytest.fixture(params=[0, 1 << 20], ids=["recomputed", "kept"])
def make(request: pytest.FixtureRequest) -> Iterator[Make]:
    """Layers whose forward keeps nothing of an expert for backward, or all up projections."""
    made: list[Twins] = []

    def get(*args: Any, **kwargs: Any) -> Twins:
        made.append(Twins(*args, activations=request.param, **kwargs))
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
    kind = replace(kind, hidden=3, inner=2, experts=3)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [KINDS[1], KINDS[4]], ids=lambda kind: kind.name)
def test_neighbours_change_no_bit(kind: Kind, dtype: torch.dtype, make: Make) -> None:
    """Also where rows are no whole vectors: the bits of an activation depend on how much is activated at once."""
    twins = make(replace(kind, inner=23), dtype, slots=6, delay=0.002)
    for seed in range(5):  # with each, other experts are there already
        inputs = routed(twins.kind, 20, dtype=dtype, seed=seed)
        twins.evict()
        twins.tiered[0](inputs[0][:1], inputs[1][:1], inputs[2][:1])
        expected = gradients_of(twins.plain[0], *inputs)
        for _ in range(2):  # the second time all of them are
            twins.sink.gradients.clear()
            compare(twins, gradients_of(twins.tiered[0], *inputs), expected)


@pytest.mark.parametrize(
    ("threads", "inner", "rows", "calls"), [(1, 24, 4, 3), (1, 64, 4, 1), (5, 1408, 54, 3), (5, 1408, 55, 1)]
)
def test_experts_are_activated_together_where_that_changes_no_bit(
    threads: int, inner: int, rows: int, calls: int
) -> None:
    """A run of experts is one activation if every row, and every thread's part, is whole vectors."""
    sizes: list[int] = []

    def activation(up: torch.Tensor) -> torch.Tensor:
        sizes.append(len(up))
        return torch.sigmoid(up)

    module = SimpleNamespace(has_gate=False, is_transposed=False, has_post_expert_norm=False, act_fn=activation)
    hidden, index = torch.randn(rows, 8), torch.arange(3).expand(rows, 3)
    fields = {"up_proj": torch.randn(inner, 8), "down_proj": torch.randn(8, inner)}
    leases: Any = [SimpleNamespace(key=ExpertKey(0, expert), fields=fields, in_place=False) for expert in range(3)]
    routing = Routing(index, torch.rand(rows, 3))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        expected = forward_from_leases(module, hidden, routing, [[lease] for lease in leases])
        sizes.clear()
        assert torch.equal(forward_from_leases(module, hidden, routing, [leases]), expected)
    finally:
        torch.set_num_threads(before)
    assert len(sizes) == calls and sum(sizes) == 3 * rows


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_close_to_the_stock_implementations(kind: Kind, implementation: str, make: Make) -> None:
    """Every gradient is within 1e-6 of its norm, the order of additions being another one."""
    twins = make(kind, slots=3)
    inputs = routed(kind, 40, 3)
    stock = kind.module(torch.float32, implementation)
    stock.load_state_dict(twins.plain[0].state_dict())
    found, expected = gradients_of(twins.tiered[0], *inputs), gradients_of(stock, *inputs)
    names = per_expert_parameters(stock)
    for name in names:
        gradients = [twins.sink.gradients[ExpertKey(0, expert)][name] for expert in range(kind.experts)]
        found[name] = torch.stack(gradients)
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-6 * gradient.norm(), name


def test_accumulation_uses_twice_and_other_layers(make: Make) -> None:
    """Three micro-batches, both layers in each and the first one twice; two forwards come before their backwards."""
    kind = KINDS[0]
    twins = make(kind, slots=2, delay=0.001)

    def loss(modules: Any, seed: int) -> torch.Tensor:
        hidden, index, weights = routed(kind, seed=seed)
        between = modules[0](hidden.requires_grad_(), index, weights)
        again = modules[0](modules[1](between, *routed(kind, seed=seed + 10)[1:]), index, weights)
        return again.square().sum()

    def backward(modules: Any) -> None:
        first, second = loss(modules, 0), loss(modules, 1)
        second.backward()
        first.backward()
        loss(modules, 2).backward()

    for plain in twins.plain:
        plain.zero_grad()
    backward(twins.plain)
    backward(twins.tiered)
    assert [access.layer for name, access in twins.sink.events if name == "backward"] == [0, 1, 0] * 3
    for layer, plain in enumerate(twins.plain):
        for name in per_expert_parameters(plain):
            stacked = getattr(plain, name).grad
            for expert in range(kind.experts):
                mine = twins.sink.gradients[ExpertKey(layer, expert)][name]
                # within a graph autograd adds up both uses first, then to what is there: another order of three terms
                torch.testing.assert_close(mine, stacked[expert], rtol=1e-5, atol=1e-5)
    assert list(twins.hub.tape.coming()) == []


def test_one_use_a_backward_adds_up_to_the_same_bits(make: Make) -> None:
    kind = KINDS[0]
    twins = make(kind, slots=1)
    for module in (twins.tiered[0], twins.plain[0]):
        results = [module(hidden, index, g) for hidden, index, g in (routed(kind, seed=seed) for seed in range(3))]
        for result in results:
            result.square().sum().backward()
    for expert in range(kind.experts):
        for name in per_expert_parameters(twins.plain[0]):
            expected = getattr(twins.plain[0], name).grad[expert]
            assert torch.equal(twins.sink.gradients[ExpertKey(0, expert)][name], expected)


@pytest.mark.parametrize("kind", [KINDS[1], KINDS[-1]], ids=lambda kind: kind.name)
@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)], ids=str)
def test_only_some_gradients_are_wanted(wanted: tuple[bool, bool], kind: Kind, make: Make) -> None:
    twins = make(kind)
    found = {}
    for name, module in (("tiered", twins.tiered[0]), ("plain", twins.plain[0])):
        hidden, index, weights = routed(kind)
        hidden.requires_grad_(wanted[0])
        weights.requires_grad_(wanted[1])
        module(hidden, index, weights).square().sum().backward()
        found[name] = {"hidden": hidden.grad, "weights": weights.grad}
        found[name] |= {name: p.grad for name, p in module.named_parameters()}
    assert [found["tiered"][name] is not None for name in ("hidden", "weights")] == list(wanted)
    for name, value in found["tiered"].items():
        expected = found["plain"][name]
        assert (value is None and expected is None) or torch.equal(value, expected)
    compare(twins, {}, {name: found["plain"][name] for name in per_expert_parameters(twins.plain[0])})


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[-1]], ids=lambda kind: kind.name)
def test_frozen_experts(kind: Kind, make: Make) -> None:
    """Without a sink, or where it does not train the layer: the gradients of everything else."""
    twins = make(kind)
    expected = gradients_of(twins.plain[0], *routed(kind))
    for frozen in ("layer", "all"):
        twins.sink.layers.clear()
        twins.hub.sink = None if frozen == "all" else twins.sink
        found = gradients_of(twins.tiered[0], *routed(kind))
        assert not twins.sink.gradients
        assert all(torch.equal(value, expected[name]) for name, value in found.items())
    hidden, index, weights = routed(kind)
    for parameter in twins.tiered[0].parameters():
        parameter.requires_grad_(False)
    assert not twins.tiered[0](hidden, index, weights).requires_grad
    assert list(twins.hub.tape.coming()) == []


def test_a_retained_graph_goes_back_twice(make: Make) -> None:
    twins = make(KINDS[0], slots=1)
    hidden, index, weights = routed(KINDS[0])
    hidden.requires_grad_()
    result = twins.tiered[0](hidden, index, weights).sum()
    result.backward(retain_graph=True)
    once = {key: {n: g.clone() for n, g in value.items()} for key, value in twins.sink.gradients.items()}
    twins.evict()
    result.backward()
    for key, value in once.items():
        assert all(torch.equal(twins.sink.gradients[key][name], 2 * gradient) for name, gradient in value.items())
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        result.backward()
    with pytest.raises(RuntimeError, match="once_differentiable"):
        x = hidden.detach().requires_grad_()
        (first,) = torch.autograd.grad(twins.tiered[0](x, index, weights).square().sum(), x, create_graph=True)
        first.sum().backward()


def test_gradients_that_are_only_asked_for_are_not_accumulated(make: Make) -> None:
    """`torch.autograd.grad`, as of a penalty, leaves the gradients of the experts alone, like those of parameters."""
    twins = make(KINDS[0])
    hidden, index, weights = routed(KINDS[0])
    hidden.requires_grad_()
    result = twins.tiered[0](hidden, index, weights).sum()
    (asked,) = torch.autograd.grad(result, hidden, retain_graph=True)
    assert not twins.sink.gradients
    result.backward(inputs=[hidden], retain_graph=True)
    assert not twins.sink.gradients and torch.equal(hidden.grad, asked)
    result.backward()
    assert twins.sink.gradients


def test_an_expert_that_was_updated_since_is_refused(make: Make) -> None:
    twins = make(KINDS[0])
    hidden, index, weights = routed(KINDS[0])
    result = twins.tiered[0](hidden.requires_grad_(), index, weights).sum()
    key = ExpertKey(0, int(index[0, 0]))
    twins.sink.versions[key] = 3
    with pytest.raises(StaleGraphError, match=rf"expert {key.expert} of MoE layer 0 .*version 0.*version 3.*optimizer"):
        result.backward()
    twins.tiered[0](hidden, index, weights).sum().backward()


def test_hidden_states_that_were_changed_since_are_refused(make: Make) -> None:
    twins = make(KINDS[0])
    hidden, index, weights = routed(KINDS[0])
    between = hidden.requires_grad_() * 2
    result = twins.tiered[0](between, index, weights).sum()
    between.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.backward()


def test_a_read_that_fails_in_backward_can_be_repeated(make: Make) -> None:
    twins = make(KINDS[0], slots=2)
    hidden, index, weights = routed(KINDS[0])
    hidden.requires_grad_()
    result = twins.tiered[0](hidden, index, weights).square().sum()
    twins.evict()
    broken = ExpertKey(0, int(index[0, 0]))
    record = twins.store.records.pop(broken)
    with pytest.raises(KeyError):
        result.backward(retain_graph=True)
    twins.store.records[broken] = record
    twins.sink.gradients.clear()
    hidden.grad = None
    result.backward()
    expected = gradients_of(twins.plain[0], *routed(KINDS[0]))
    assert torch.equal(hidden.grad, expected["hidden"])
    compare(twins, {}, {name: expected[name] for name in per_expert_parameters(twins.plain[0])})


def test_no_tokens(make: Make) -> None:
    twins = make(KINDS[0])
    hidden, index, weights = (value[:0].requires_grad_(value.is_floating_point()) for value in routed(KINDS[0]))
    twins.tiered[0](hidden, index, weights).sum().backward()
    assert hidden.grad.shape == hidden.shape and weights.grad.shape == weights.shape
    assert not twins.sink.gradients


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[1], KINDS[-1]], ids=lambda kind: kind.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(dtype: torch.dtype, kind: Kind, make: Make) -> None:
    """Products keep the experts' dtype, as in `grouped_mm`; backward has forward's state, not its own."""
    twins = make(kind, dtype)
    hidden, index, weights = routed(kind)
    found = []
    for module, within in ((twins.plain[0], False), (twins.tiered[0], True), (twins.tiered[0], False)):
        x, g = hidden.clone().requires_grad_(), weights.clone().requires_grad_()
        twins.sink.gradients.clear()
        with torch.autocast("cpu", torch.bfloat16):
            loss = module(x, index, g).square().sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=within):
            loss.backward()
        found.append([loss.detach(), x.grad, g.grad])
        assert x.grad.dtype == g.grad.dtype == torch.float32
        if module is twins.tiered[0]:
            assert all(torch.equal(mine, theirs) for mine, theirs in zip(found[-1], found[0], strict=True))
            names = per_expert_parameters(module)
            compare(twins, {}, {name: getattr(twins.plain[0], name).grad for name in names})


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool, make: Make) -> None:
    """The same bits; and where nothing after the experts is saved, backward fetches them once, not twice."""
    twins = make(KINDS[0], slots=2)
    found = []
    for modules in (twins.tiered, twins.plain):
        hidden, index, weights = routed(KINDS[0])
        x, g = hidden.clone().requires_grad_(), weights.clone().requires_grad_()
        for module in twins.plain:
            module.zero_grad()

        def block(module: Any, x: torch.Tensor, g: torch.Tensor, index: torch.Tensor = index) -> torch.Tensor:
            return x + module(torch.tanh(x), index, g)

        y = x
        for module in modules:
            y = checkpoint(block, module, y, g, use_reentrant=reentrant)
        y.square().sum().backward()
        found.append([y.detach(), x.grad, g.grad])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*found, strict=True))
    expected = {name: getattr(twins.plain[0], name).grad for name in per_expert_parameters(twins.plain[0])}
    compare(twins, {}, expected)
    order = [(name, access.layer) for name, access in twins.sink.events]
    ahead = [("forward", 0), ("forward", 1)]
    back = [("forward", 1), ("backward", 1), ("forward", 0), ("backward", 0)]
    assert order == ahead + (back if reentrant else back[1::2])
    assert list(twins.hub.tape.coming()) == []


def test_the_graph_keeps_inputs_and_routing_only(make: Make) -> None:
    twins = make(KINDS[0], slots=12)
    hidden, index, weights = routed(KINDS[0], 50)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        result = twins.tiered[0](hidden.requires_grad_(), index, weights.requires_grad_())
    assert {x.data_ptr() for x in saved} == {x.data_ptr() for x in (hidden, index, weights)}
    result.sum().backward()
    for gradients in twins.sink.gradients.values():
        for gradient in gradients.values():  # the sink's to keep: nothing of a slot, nor of another expert's
            assert gradient.untyped_storage().nbytes() == gradient.nbytes


def test_what_backward_will_want_is_known_in_its_order(make: Make) -> None:
    twins = make(KINDS[0], slots=3)
    hidden, index, weights = routed(KINDS[0])
    coming = []

    class Watching(DictSink):
        def collect(self, access: Any) -> Any:
            assert access.part is Part.BACKWARD
            coming.append([(after.layer, after.keys) for after in twins.hub.tape.coming()])
            return super().collect(access)

    twins.hub.sink = Watching()
    between = twins.tiered[0](hidden.requires_grad_(), index, weights)
    other = routed(KINDS[0], seed=1)[1]
    result = twins.tiered[1](between, other, weights)
    thrown_away = twins.tiered[1](between, index, weights)
    keys = [tuple(ExpertKey(layer, int(e)) for e in i.unique()) for layer, i in enumerate((index, other))]
    assert len(list(twins.hub.tape.coming())) == 3
    del thrown_away
    assert [access.keys for access in twins.hub.tape.coming()] == [keys[1], keys[0]]
    result.sum().backward()
    assert coming == [[(0, keys[0])], []]


def test_a_parameter_that_cannot_be_trained_is_named(make: Make) -> None:
    twins = make(KINDS[0])
    twins.tiered[0].register_parameter("scale", torch.nn.Parameter(torch.ones(())))
    with pytest.raises(UnsupportedModelError, match=r"Experts\.scale wants a gradient"):
        twins.tiered[0](*routed(KINDS[0]))
    twins.tiered[0].scale.requires_grad_(False)
    twins.tiered[0](*routed(KINDS[0])).sum().backward()


@pytest.mark.filterwarnings("ignore")
def test_compiled_around_the_experts(make: Make) -> None:
    """torch.compile takes what is before and behind the experts, and leaves them to residency."""
    twins = make(KINDS[0], slots=2)
    hidden, index, weights = routed(KINDS[0])

    def block(module: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(module(torch.sin(x), index, weights)) * 2

    operations: list[str] = []

    def backend(graph: Any, examples: Any) -> Any:
        operations.extend(getattr(node.target, "__name__", "") for node in graph.graph.nodes)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(block, backend=backend)
    found = []
    for function, module in ((compiled, twins.tiered[0]), (block, twins.plain[0])):
        x = hidden.clone().requires_grad_()
        result = function(module, x)
        result.square().sum().backward()
        found.append([result.detach(), x.grad])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*found, strict=True))
    compare(twins, {}, {name: getattr(twins.plain[0], name).grad for name in per_expert_parameters(twins.plain[0])})
    torch.compiler.reset()
    assert {"sin", "tanh"} <= set(operations) and not {"mm", "sort", "apply"} & set(operations)
