"""Two optimizers by use: each expert as if torch.optim had been changed under it whenever it changed sides."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moetier.access import ExpertKey
from moetier.errors import ConfigError
from moetier.record import RecordLayout
from moetier.training.optimizers import Hyper, make_optimizer
from moetier.training.optimizers.hot_cold import HotCold
from moetier.training.optimizers.usage import Usage

EXACT = settings(max_examples=25, derandomize=True, deadline=None)
KEY = ExpertKey(0, 0)
SHAPES = {"up": (6, 10), "bias": (13,)}


class Reference:
    """The expert in memory; a change of sides makes a new optimizer of torch on the same parameters."""

    def __init__(self, weights: dict[str, torch.Tensor]):
        self.weights = {name: tensor.clone() for name, tensor in weights.items()}
        self.params = [torch.nn.Parameter(tensor.float()) for tensor in weights.values()]
        self.is_hot: bool | None = None
        self.optimizer: torch.optim.Optimizer

    def step(self, is_hot: bool, side: str, lr: float, gradients: list[torch.Tensor]) -> None:
        if is_hot != self.is_hot:
            self.is_hot = is_hot
            self.optimizer = {
                "adamw": lambda: torch.optim.AdamW(self.params, weight_decay=0.1, fused=True),
                "adafactor": lambda: torch.optim.Adafactor(self.params, weight_decay=0.1),
                "momentum": lambda: torch.optim.SGD(self.params, momentum=0.9, weight_decay=0.1, fused=True),
                "sgd": lambda: torch.optim.SGD(self.params, weight_decay=0.1, fused=True),
            }[side]()
        self.optimizer.param_groups[0]["lr"] = lr
        for param, gradient in zip(self.params, gradients, strict=True):
            param.grad = gradient
        self.optimizer.step()
        for weight, param in zip(self.weights.values(), self.params, strict=True):
            weight.copy_(param.detach())


@EXACT
@given(
    hot=st.sampled_from(["adamw", "momentum"]),
    cold=st.sampled_from(["sgd", "adafactor", "momentum"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    uses=st.lists(st.sampled_from(["used", "used", "idle", "idle, caught up on"]), min_size=4, max_size=24),
    threshold=st.sampled_from([0.0, 0.4, 0.6, 1.0]),
    seed=st.integers(0, 1000),
)
def test_every_side_is_torchs_optimizer_begun_anew(
    hot: str, cold: str, dtype: torch.dtype, uses: list[str], threshold: float, seed: int
) -> None:
    optimizer = HotCold(hot, cold, threshold=threshold, half_life=2.0, cold_lr=3.0)
    usage = optimizer.usage(1, 1)
    layout = RecordLayout.of([(name, dtype, shape) for name, shape in SHAPES.items()])
    generator = torch.Generator().manual_seed(seed)
    weights = layout.views(torch.zeros(layout.nbytes, dtype=torch.uint8))
    for tensor in weights.values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    states = optimizer.state_layout(layout)
    state = {} if states is None else states.views(torch.zeros(states.nbytes, dtype=torch.uint8))
    optimizer.begin(weights, state)
    reference = Reference(weights)
    missed: list[Hyper] = []

    def touched(share: float) -> dict[str, torch.Tensor]:
        """The state, or nothing where this side says that it needs none."""
        return {} if optimizer.part(share).state_layout(layout) is None else state

    def catch_up() -> None:
        share = usage.share(KEY)
        optimizer.part(share).idle(weights, touched(share), missed)
        missed.clear()

    for step, use in enumerate([*uses, "used"], start=1):
        hyper = Hyper(step, optimizer.settings.updated({"lr": 0.1 / step, "weight_decay": 0.1}))
        gradients = [torch.randn(shape, generator=generator) for shape in SHAPES.values()]
        if use == "used":
            catch_up()
            share = usage.count(KEY, step)
            optimizer.part(share).update(weights, dict(zip(SHAPES, gradients, strict=True)), touched(share), hyper)
        else:
            missed.append(hyper)
            gradients = [torch.zeros_like(gradient) for gradient in gradients]
            if use != "idle":
                catch_up()
        is_hot = usage.share(KEY) >= threshold
        reference.step(is_hot, hot if is_hot else cold, 0.1 / step * (1.0 if is_hot else 3.0), gradients)
        if not missed:
            for name, weight in weights.items():
                assert torch.equal(weight, reference.weights[name])


def test_a_cold_side_without_state_leaves_the_state_alone() -> None:
    layout = RecordLayout.of([("up", torch.float32, (4, 4))])
    optimizer = HotCold("adamw", "sgd", threshold=0.5)
    assert optimizer.part(0.4).state_layout(layout) is None
    hot, whole = optimizer.part(0.5).state_layout(layout), optimizer.state_layout(layout)
    assert hot is not None and whole is not None
    assert [field.name for field in whole.fields] == ["hot.up.exp_avg", "hot.up.exp_avg_sq", "hot.clock"]
    assert {field.name for field in hot.fields} == {field.name for field in whole.fields}


def test_half_precision_has_one_master_for_both_sides() -> None:
    layout = RecordLayout.of([("up", torch.bfloat16, (4, 8))])
    whole = make_optimizer("hot-cold(hot=adamw, cold=adafactor)").state_layout(layout)
    assert whole is not None
    assert [field.name for field in whole.fields if "master" in field.name] == ["up.master"]
    assert {field.name for field in whole.fields} >= {"hot.up.exp_avg", "cold.up.row_var", "cold.clock"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hot-cold(threshold=2)", "threshold: 2 must be a share from 0 to 1"),
        ("hot-cold(half_life=0)", "half_life: 0 must be a number of steps above 0"),
        ("hot-cold(cold_lr=-1)", "cold_lr: -1 must be at least 0"),
        ("hot-cold(cold=hot-cold)", "'hot-cold' cannot be one side of it"),
        ("hot-cold(hot=adamw(masters=false))", "both must have them or neither"),
        ("hot-cold(hot=adamx)", "unknown optimizer 'adamx'"),
    ],
)
def test_what_cannot_be_used_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        make_optimizer(text)
    assert message in str(error.value)


@pytest.mark.parametrize("every", [1, 2, 5])
def test_the_share_is_that_of_the_steps_used(every: int) -> None:
    usage = Usage(1, 2, half_life=50)
    for step in range(every, 2000, every):
        usage.count(KEY, step)
    assert usage.share(KEY) == pytest.approx(1 / every, rel=0.05)
    assert usage.share(ExpertKey(0, 1)) == 0


def test_usage_comes_back_from_json_exactly() -> None:
    usage, again = Usage(2, 3, half_life=7), Usage(2, 3, half_life=7)
    for step in range(1, 40):
        usage.count(ExpertKey(step % 2, step % 3), step)
    again.load(json.loads(json.dumps(usage.to_json())))
    key = ExpertKey(1, 2)
    assert again.share(key) == usage.share(key) > 0
    assert again.count(key, 50) == usage.count(key, 50)
    for damaged in ({}, None, {"share": [[0.0]], "last": [[0]]}, {"share": "x", "last": []}):
        with pytest.raises(ConfigError, match="the saved usage of experts"):
            again.load(damaged)
