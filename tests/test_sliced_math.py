"""Facts about matrix products that slices of experts rest on: a product cut by outputs has the bits of the whole one.

No library promises this. What these tests find on a machine is what `moetier.chunks` may do there; docs/LOG.md has the
findings ("Products of slices").
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch

from moetier import products
from moetier.record import RecordLayout
from moetier.stores.slices import GRANULE, can_cut, divide, least_outputs

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ROWS = (1, 2, 3, 8, 17, 65)
# outputs, inputs: gate_up and down of small experts, no multiples of anything, and larger ones
SHAPES = [(416, 192), (192, 208), (200, 333), (1024, 256), (256, 512), (130, 50)]


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def matrix(outputs: int, inputs: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(outputs * inputs)
    return (torch.randn(outputs, inputs, generator=generator) * 0.05).to(dtype)


def product(x: torch.Tensor, weight: torch.Tensor, parts: list[range], is_transposed: bool) -> torch.Tensor:
    """[T, outputs] from a copy of each part alone, side by side."""
    out = torch.full((x.size(0), parts[-1].stop), torch.nan, dtype=x.dtype)
    for part in parts:
        narrow = weight[part.start : part.stop].clone()
        operand = narrow.t().contiguous() if is_transposed else narrow.t()
        torch.mm(x, operand, out=out[:, part.start : part.stop])
    return out


@pytest.mark.parametrize("is_transposed", [False, True], ids=["linear", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cut_by_outputs(dtype: torch.dtype, is_transposed: bool, threads: None) -> None:
    """Slices as `divide` makes them, of every size, give the bits of the whole product, for one and for many rows."""
    for outputs, inputs in SHAPES:
        weight = matrix(outputs, inputs, dtype)
        shape = (inputs, outputs) if is_transposed else (outputs, inputs)
        if not can_cut(RecordLayout.of([("matrix", dtype, shape)]), is_transposed):
            continue
        for rows in ROWS if outputs < 500 else (1, 3, 17):
            x = matrix(rows, inputs, dtype)
            whole = product(x, weight, [range(outputs)], is_transposed)
            for most in {least_outputs(outputs), 2 * GRANULE, 3 * GRANULE + 8, 300}:
                if least_outputs(outputs) <= most < outputs:
                    cut = product(x, weight, divide(outputs, most), is_transposed)
                    assert torch.equal(cut, whole), (outputs, inputs, rows, most)


@pytest.mark.parametrize("is_transposed", [False, True], ids=["linear", "transposed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_does_not_mind_where_it_is_cut(dtype: torch.dtype, is_transposed: bool) -> None:
    """torch's own kernels for machines without AVX-512 sum every output alone: two at a time, or seven."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "DEFAULT"):
        pytest.skip("other kernels compute this here; the rule of GRANULE is tested above")
    for outputs, inputs in ((200, 333), (80, 64)):
        weight = matrix(outputs, inputs, dtype)
        for rows in ROWS:
            x = matrix(rows, inputs, dtype)
            whole = product(x, weight, [range(outputs)], is_transposed)
            for size in (2, 7):
                edges = [*range(0, outputs, size), outputs]
                parts = [range(begin, end) for begin, end in pairwise(edges)]
                assert torch.equal(product(x, weight, parts, is_transposed), whole)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_unaligned_transposed_matrix_is_not_cut(dtype: torch.dtype) -> None:
    """Rows of 130 outputs do not all start on 16 bytes: float32 products of few tokens differ there (AVX2)."""
    assert not can_cut(RecordLayout.of([("matrix", dtype, (50, 130))]), True)
    assert can_cut(RecordLayout.of([("matrix", dtype, (50, 136))]), True)
    assert can_cut(RecordLayout.of([("matrix", dtype, (130, 50))]), False)


@pytest.mark.parametrize("is_transposed", [False, True], ids=["linear", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_check_of_this_machine_passes(dtype: torch.dtype, is_transposed: bool) -> None:
    for outputs, inputs in [shape for shape in SHAPES if shape[0] % 8 == 0] + [(5760, 2880)]:
        assert products.products_can_be_cut(dtype, inputs, outputs, is_transposed)


@pytest.mark.parametrize("is_transposed", [False, True], ids=["linear", "transposed"])
def test_the_check_sees_a_library_that_sums_otherwise(is_transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A product whose order of summation depends on the width: blocks of the inputs in one case, not in the other."""
    plain = torch.mm

    def mm(x: torch.Tensor, weight: torch.Tensor, out: Any = None) -> torch.Tensor:
        if weight.size(1) > 2 * GRANULE:
            result = plain(x, weight)
        else:
            half = x.size(1) // 2
            result = plain(x[:, :half], weight[:half]) + plain(x[:, half:], weight[half:])
        return result if out is None else out.copy_(result)

    assert products.products_can_be_cut(torch.float32, 192, 416, is_transposed)
    monkeypatch.setattr(torch, "mm", mm)
    assert not products.products_can_be_cut(torch.float32, 192, 416, is_transposed)
