"""Norms and clipping: against torch's own, and the same whatever the order and the threads."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moetier.errors import ConfigError
from moetier.training.optimizers.clipping import (
    check_clipping,
    coefficient,
    group_max_norm,
    norm_of,
    scale_,
    squared_norm,
)

FEW = settings(max_examples=40, derandomize=True, deadline=None)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def gradients(seed: int, sizes: list[int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator) * 10 ** ((seed + i) % 7 - 3) for i, size in enumerate(sizes)]


@FEW
@given(st.integers(0, 10**6), st.lists(st.sampled_from([1, 7, 4096, 5000, 40000]), min_size=1, max_size=5))
def test_the_norm_is_torchs_to_a_millionth_and_the_exact_one_closer(seed: int, sizes: list[int]) -> None:
    tensors = gradients(seed, sizes)
    ours = norm_of(squared_norm([tensor]) for tensor in tensors)
    exact = math.sqrt(math.fsum(x * x for tensor in tensors for x in tensor.double().tolist()))
    assert ours == pytest.approx(exact, rel=2e-7)
    assert ours == pytest.approx(torch.nn.utils.get_total_norm(tensors).item(), rel=1e-6)


@FEW
@given(st.integers(0, 10**6), st.randoms(use_true_random=False))
def test_order_grouping_and_idle_groups_change_no_bit(seed: int, order: random.Random) -> None:
    squares = [squared_norm([tensor]) for tensor in gradients(seed, [5, 4100, 900, 12, 8192])]
    shuffled = [*squares, *[squared_norm([torch.zeros(50)])] * 3]
    order.shuffle(shuffled)
    assert norm_of(shuffled) == norm_of(squares)


def test_the_number_of_threads_changes_no_bit(threads: None) -> None:
    tensors = gradients(3, [1_000_003, 300_000])
    norms = set()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        norms.add(squared_norm(tensors))
    assert len(norms) == 1


def test_fp64_is_summed_in_fp64_and_half_in_fp32() -> None:
    assert squared_norm([torch.full((3,), 1e-30, dtype=torch.float64)]) == pytest.approx(3e-60, rel=1e-15)
    half = torch.full((10000,), 1.0, dtype=torch.bfloat16)
    assert squared_norm([half]) == pytest.approx(10000.0, rel=1e-7)  # bf16 itself has no such number
    assert squared_norm([torch.zeros(0)]) == 0.0


@FEW
@given(st.integers(0, 10**6), st.floats(0.01, 1e4))
def test_clipping_does_what_torchs_does(seed: int, max_norm: float) -> None:
    ours = gradients(seed, [30, 4100])
    params = [torch.nn.Parameter(torch.zeros_like(tensor)) for tensor in ours]
    for param, tensor in zip(params, ours, strict=True):
        param.grad = tensor.clone()
    torch.nn.utils.clip_grad_norm_(params, max_norm)
    scale_(ours, coefficient(norm_of([squared_norm(ours)]), max_norm))
    for param, tensor in zip(params, ours, strict=True):
        assert param.grad is not None
        assert torch.all((tensor - param.grad).abs() <= 1e-6 * param.grad.abs())


def test_what_needs_no_clipping_keeps_its_bits() -> None:
    tensors = gradients(1, [10])
    before = tensors[0].clone()
    scale_(tensors, coefficient(norm_of([squared_norm(tensors)]), 1e9))
    assert torch.equal(before, tensors[0])


@pytest.mark.parametrize(("bad", "factor"), [(math.inf, 0.0), (math.nan, math.nan), (1e30, 0.0)])
def test_a_norm_that_is_not_finite_is_torchs(bad: float, factor: float) -> None:
    tensors = [torch.ones(5000), torch.full((3,), bad)]
    norm = norm_of([squared_norm(tensors)])
    expected = torch.nn.utils.get_total_norm(tensors).item()
    assert (math.isnan(norm), math.isinf(norm)) == (math.isnan(expected), math.isinf(expected))
    assert coefficient(norm, 1.0) == factor or math.isnan(factor)
    assert math.isnan(coefficient(norm, 1.0)) == math.isnan(factor)


def test_an_fp64_sum_that_does_not_fit_is_infinite() -> None:
    assert norm_of([1.7e308, 1.7e308]) == math.inf


def test_groups_that_keep_to_their_share_keep_to_the_whole() -> None:
    elements = [1000, 1000, 30, 70000]
    shares = [group_max_norm(2.0, count, sum(elements)) for count in elements]
    assert norm_of(share * share for share in shares) == pytest.approx(2.0)


def test_what_cannot_be_used_is_refused() -> None:
    check_clipping("global", None)
    check_clipping("per-expert", 1.0)
    with pytest.raises(ConfigError, match="clip: 'norm' is unknown; choose one of: global, per-expert"):
        check_clipping("norm", 1.0)
    for bad in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ConfigError, match=r"max_grad_norm: .* must be a number above 0"):
            check_clipping("global", bad)
