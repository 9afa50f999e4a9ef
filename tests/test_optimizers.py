"""Record optimizers against torch.optim on ordinary parameters of the same tensors: equal to the last bit."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moetier.errors import ConfigError
from moetier.record import RecordLayout
from moetier.training.optimizers import OPTIMIZERS, Hyper, RecordOptimizer, make_optimizer
from moetier.training.optimizers import fields as fields_module
from moetier.training.optimizers.adam import AdamSettings
from moetier.training.optimizers.sgd import can_fuse

EXACT = settings(max_examples=40, derandomize=True, deadline=None)
SHAPES: list[tuple[tuple[int, ...], ...]] = [((6, 10), (5, 7), (13,)), ((64, 32), (32, 33)), ((1, 1),)]
Reference = Callable[[list[torch.nn.Parameter], dict[str, Any]], torch.optim.Optimizer]

TORCH: dict[str, Reference] = {
    "adafactor": lambda params, group: torch.optim.Adafactor(params, **group),
    "sgd": lambda params, group: torch.optim.SGD(params, fused=can_fuse(params), foreach=False, **group),
    "momentum": lambda params, group: torch.optim.SGD(params, fused=can_fuse(params), foreach=False, **group),
    "adam": lambda params, group: torch.optim.Adam(params, fused=True, **group),
    "adamw": lambda params, group: torch.optim.AdamW(params, fused=True, **group),
}


class Expert:
    """One expert's records, made as an engine makes them: weights given, state zeroed, then begun."""

    def __init__(self, optimizer: RecordOptimizer, tensors: list[torch.Tensor]):
        self.layout = RecordLayout.of([(f"field{i}", t.dtype, tuple(t.shape)) for i, t in enumerate(tensors)])
        self.weights = self.layout.views(torch.zeros(self.layout.nbytes, dtype=torch.uint8))
        for view, tensor in zip(self.weights.values(), tensors, strict=True):
            view.copy_(tensor)
        layout = optimizer.state_layout(self.layout)
        self.state = {} if layout is None else layout.views(torch.zeros(layout.nbytes, dtype=torch.uint8))
        optimizer.begin(self.weights, self.state)

    def gradients(self, tensors: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        return dict(zip(self.weights, tensors, strict=True))


class InMemory:
    """The same recipe with ordinary parameters: torch.optim on fp32 masters of half-precision weights, cast down."""

    def __init__(self, make: Reference, group: dict[str, Any], tensors: list[torch.Tensor], masters: bool):
        self.weights = [tensor.clone() for tensor in tensors]
        half = (torch.bfloat16, torch.float16)
        self.params = [
            torch.nn.Parameter(w.float() if masters and w.dtype in half else w.clone()) for w in self.weights
        ]
        self.optimizer = make(self.params, group)

    def step(self, gradients: list[torch.Tensor], **group: Any) -> None:
        self.optimizer.param_groups[0].update(group)
        for param, gradient in zip(self.params, gradients, strict=True):
            param.grad = gradient.to(param.dtype)
        self.optimizer.step()
        for weight, param in zip(self.weights, self.params, strict=True):
            weight.copy_(param.detach())


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def assert_same(expert: Expert, memory: InMemory) -> None:
    for i, (weight, param) in enumerate(zip(memory.weights, memory.params, strict=True)):
        assert same_bits(expert.weights[f"field{i}"], weight)
        if f"field{i}.master" in expert.state:
            assert same_bits(expert.state[f"field{i}.master"], param.detach())
        for name, moment in memory.optimizer.state[param].items():
            if name != "step" and moment is not None:
                assert same_bits(expert.state[f"field{i}.{name}"], moment), name


def draw(shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype, generator: torch.Generator) -> list[torch.Tensor]:
    """Tensors with some zeros of both signs and some tiny numbers among them."""
    tensors = []
    for shape in shapes:
        tensor = torch.randn(shape, generator=generator)
        kind = torch.randint(0, 12, shape, generator=generator)
        tensor[kind == 0] = 0.0
        tensor[kind == 1] = -0.0
        tensor[kind == 2] *= 1e-38
        tensors.append(tensor.to(dtype))
    return tensors


GROUPS: dict[str, list[dict[str, Any]]] = {
    "adafactor": [
        {"lr": 0.1},
        {"lr": 0.01, "beta2_decay": -0.5, "eps": (1e-6, 1e-2), "d": 1.5, "weight_decay": 0.1},
        {"lr": 0.01, "eps": (1e-30, 1e-3)},
    ],
    "sgd": [{"lr": 0.1}, {"lr": 0.1, "weight_decay": 0.01}],
    "momentum": [
        {"lr": 0.1, "momentum": 0.9},
        {"lr": 0.1, "momentum": 0.8, "dampening": 0.3, "weight_decay": 0.01},
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    ],
    "adam": [{"lr": 1e-2}, {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}],
    "adamw": [{"lr": 1e-2, "weight_decay": 0.0}, {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.1}],
}
CASES = [(name, group) for name, groups in GROUPS.items() for group in groups]


def make(name: str, group: dict[str, Any], masters: bool = True) -> RecordOptimizer:
    arguments = dict(group)
    if "betas" in arguments:
        arguments["beta1"], arguments["beta2"] = arguments.pop("betas")
    if isinstance(arguments.get("eps"), tuple):
        arguments["eps1"], arguments["eps2"] = arguments.pop("eps")
    return OPTIMIZERS[name](**arguments, masters=masters)


@EXACT
@given(
    case=st.sampled_from(CASES),
    shapes=st.sampled_from(SHAPES),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    gradients=st.sampled_from(["same", "float32"]),
    masters=st.booleans(),
    used=st.lists(st.booleans(), min_size=1, max_size=14),
    seed=st.integers(0, 2**32),
)
def test_any_pattern_of_use_equals_dense_torch(
    case: tuple[str, dict[str, Any]],
    shapes: tuple[tuple[int, ...], ...],
    dtype: torch.dtype,
    gradients: str,
    masters: bool,
    used: list[bool],
    seed: int,
) -> None:
    """Missed steps are caught up on before the next use and at the end; the learning rate changes at every step."""
    name, group = case
    generator = torch.Generator().manual_seed(seed)
    tensors = draw(shapes, dtype, generator)
    optimizer = make(name, group, masters)
    expert, memory = Expert(optimizer, tensors), InMemory(TORCH[name], group, tensors, masters)
    missed: list[Hyper] = []
    for step, use in enumerate([*used, True], start=1):
        memory.optimizer.param_groups[0]["lr"] = group["lr"] * (1 + (step * 7) % 5) / 3
        hyper = Hyper(step, optimizer.settings.updated(memory.optimizer.param_groups[0]))
        gradient = draw(shapes, dtype if gradients == "same" else torch.float32, generator)
        if not use:
            memory.step([torch.zeros_like(g) for g in gradient])
            missed.append(hyper)
            continue
        before = {key: tensor.clone() for key, tensor in (*expert.weights.items(), *expert.state.items())}
        changed = optimizer.idle(expert.weights, expert.state, missed)
        after = {**expert.weights, **expert.state}
        assert changed or all(same_bits(before[key], after[key]) for key in before)
        missed = []
        memory.step(gradient)
        optimizer.update(expert.weights, expert.gradients(gradient), expert.state, hyper)
        assert_same(expert, memory)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("chunk", [64, 4096])
def test_catching_up_in_chunks_changes_no_bit(
    case: tuple[str, dict[str, Any]], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fields_module, "CPU_CHUNK", chunk)
    name, group = case
    generator = torch.Generator().manual_seed(1)
    tensors = draw(((75, 131), (40, 8)), torch.float32, generator)
    optimizer = make(name, group)
    expert, memory = Expert(optimizer, tensors), InMemory(TORCH[name], group, tensors, True)
    gradient = draw(((75, 131), (40, 8)), torch.float32, generator)
    first, *later = [Hyper(step, optimizer.settings) for step in range(1, 12)]
    optimizer.update(expert.weights, expert.gradients(gradient), expert.state, first)
    memory.step(gradient)
    optimizer.idle(expert.weights, expert.state, later)
    for _ in later:
        memory.step([torch.zeros_like(g) for g in gradient])
    assert_same(expert, memory)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_does_not_idle_leaves_every_bit(case: tuple[str, dict[str, Any]]) -> None:
    """The shortcuts are taken where they may be, and only there: an untouched expert is changed by decay alone."""
    name, group = case
    optimizer = make(name, group)
    tensors = draw(((6, 10), (5, 7)), torch.float32, torch.Generator().manual_seed(2))
    expert = Expert(optimizer, tensors)
    changed = optimizer.idle(expert.weights, expert.state, [Hyper(s, optimizer.settings) for s in (1, 2, 3)])
    not_a_number = group.get("eps") == (1e-30, 1e-3)  # 0 / 0, as in torch
    assert changed == (group.get("weight_decay", 0.0) != 0 or not_a_number)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_eight_bit_moments_are_those_of_bitsandbytes(dtype: torch.dtype, weight_decay: float) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    shapes = ((64, 64), (20, 517), (13,))  # quantized; with a broken block; too small
    generator = torch.Generator().manual_seed(4)
    tensors = draw(shapes, dtype, generator)
    optimizer = make_optimizer(f"adamw8bit(weight_decay={weight_decay})")
    expert = Expert(optimizer, tensors)
    params = [torch.nn.Parameter(tensor.float()) for tensor in tensors]
    reference = bitsandbytes.optim.AdamW8bit(params, lr=1.0, weight_decay=weight_decay)
    missed: list[Hyper] = []
    for step, use in enumerate([False, False, True, True, False, False, True, True], start=1):
        reference.param_groups[0]["lr"] = 1e-2 / step
        hyper = Hyper(step, optimizer.settings.updated(reference.param_groups[0]))
        gradient = draw(shapes, torch.float32, generator)
        for param, tensor in zip(params, gradient, strict=True):
            param.grad = tensor if use else torch.zeros_like(tensor)
        reference.step()
        missed.append(hyper)
        if use:
            missed.pop()
        optimizer.idle(expert.weights, expert.state, missed if use or step == 2 else [])
        missed = [] if use or step == 2 else missed
        if use:
            optimizer.update(expert.weights, expert.gradients(gradient), expert.state, hyper)
        for i, param in enumerate(params if not missed else []):
            assert same_bits(expert.weights[f"field{i}"], param.detach().to(dtype))
            parts = ("state1", "state2", "absmax1", "absmax2") if i < 2 else ("state1", "state2")
            for part in parts:
                assert same_bits(expert.state[f"field{i}.{part}"], reference.state[param][part])


def test_without_bitsandbytes_the_way_out_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(ConfigError, match=r"needs bitsandbytes .* pip install \"moetier\[lowbit\]\""):
        make_optimizer("adamw8bit")


def test_the_state_names_fields_and_parts() -> None:
    layout = RecordLayout.of([("up", torch.bfloat16, (4, 8)), ("up_bias", torch.float32, (4,))])
    names = ["up.master", "up.exp_avg", "up.exp_avg_sq", "up_bias.exp_avg", "up_bias.exp_avg_sq"]
    state = make_optimizer("adamw").state_layout(layout)
    assert state is not None
    assert [field.name for field in state.fields] == names
    assert {field.dtype for field in state.fields} == {torch.float32}
    plain = make_optimizer("adamw(masters=false)").state_layout(layout)
    assert plain is not None
    assert [field.dtype for field in plain.fields] == [torch.bfloat16] * 2 + [torch.float32] * 2
    assert make_optimizer("sgd(masters=false)").state_layout(layout) is None


def test_what_cannot_be_trained_is_named() -> None:
    layout = RecordLayout.of([("up", torch.float8_e4m3fn, (4, 8))])
    with pytest.raises(ConfigError, match="field 'up' of the experts has dtype float8_e4m3fn, which cannot be trained"):
        make_optimizer("adamw").state_layout(layout)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("adamw(lr=-1)", "lr: -1 must be a number of at least 0"),
        ("adamw(lr=nan)", "lr: nan must be"),
        ("adamw(beta1=1)", "betas: 1 must be a number from 0 to below 1"),
        ("adamw(eps=x)", "eps: 'x' must be"),
        ("momentum(momentum=0)", 'choose the optimizer "sgd"'),
        ("momentum(nesterov=true,dampening=0.1)", "with nesterov it must be 0"),
        ("adamx", "unknown optimizer 'adamx'; choose one of: adafactor, adam, adamw, adamw8bit"),
        ("sgd(momentum=0.9)", "optimizer 'sgd' has no parameter 'momentum'"),
    ],
)
def test_what_cannot_be_used_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        make_optimizer(text)
    assert message in str(error.value)


def test_a_group_of_torch_gives_the_settings() -> None:
    param = torch.nn.Parameter(torch.zeros(1))
    optimizer = make_optimizer("adamw(weight_decay=0.1)")
    torch_optimizer = torch.optim.AdamW([{"params": [param], "lr": torch.tensor(1e-3)}], betas=(0.5, 0.6))
    read = optimizer.settings.updated(torch_optimizer.param_groups[0])
    assert read == AdamSettings(lr=torch.tensor(1e-3).item(), betas=(0.5, 0.6), weight_decay=0.01)
    assert optimizer.settings.updated({"lr": 0.5}) == AdamSettings(lr=0.5, weight_decay=0.1)
    adafactor = make_optimizer("adafactor(eps1=1e-4)").settings
    assert adafactor.updated(torch_optimizer.param_groups[0]).group()["eps"] == (1e-4, 1e-3)
    torch_optimizer.param_groups[0]["amsgrad"] = True
    with pytest.raises(ConfigError, match="amsgrad: experts are not trained with amsgrad=True"):
        optimizer.settings.updated(torch_optimizer.param_groups[0])


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "adamw8bit"])
def test_settings_come_back_from_json(name: str) -> None:
    settings = make_optimizer(name).settings.updated({"lr": 0.1 + 0.2, "weight_decay": 1 / 3})
    saved = json.loads(json.dumps(settings.to_json()))
    assert make_optimizer(name).settings.from_json(saved) == settings
    with pytest.raises(ConfigError, match=r"saved settings .* are not those of this optimizer"):
        settings.from_json({**saved, "speed": 1})


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_without_masters_is_right_to_its_precision(dtype: torch.dtype, momentum: float) -> None:
    """torch's fused kernel is not: it fills the last elements with whatever lies in memory."""
    optimizer = make(
        "momentum" if momentum else "sgd", {"lr": 0.1} | ({"momentum": momentum} if momentum else {}), False
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        weight = torch.randn(64, 32, generator=generator).to(dtype)
        expert = Expert(optimizer, [weight])
        gradient = torch.randn(64, 32, generator=generator).to(dtype)
        hyper = Hyper(2, optimizer.settings.updated({"lr": 0.1}))
        optimizer.update(expert.weights, expert.gradients([gradient]), expert.state, hyper)
        expected = weight.double() - 0.1 * gradient.double()
        assert (expert.weights["field0"].double() - expected).abs().max() < 0.02
