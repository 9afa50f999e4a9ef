"""What this machine's matrix products do to bits: with other numbers of threads, and when a matrix is cut.

No library promises anything here, so it is tried on made-up weights before anything rests on it.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import torch

from moetier.stores.slices import GRANULE

MAX_ROWS = 8  # a product of more rows is long enough for torch's own threads, and is not tried
_OUTPUTS = 512
_CHECKED_NBYTES = 2 << 20  # weights that the check of cuts makes up; within the workspace of a run


@cache
def is_exact(dtype: torch.dtype, shapes: tuple[tuple[int, ...], ...], is_transposed: bool, threads: int) -> bool:
    """Whether products of up to `MAX_ROWS` rows with weights of these shapes have the same bits with one thread.

    `shapes` are those of the stored weights, [K, N] if `is_transposed`, else [N, K]. True for bfloat16 and float16
    wherever it was tried; in float32 MKL takes another way for some row counts.
    """
    before = torch.get_num_threads()
    generator = torch.Generator().manual_seed(0)
    try:
        for shape in shapes:
            # which way a library takes depends on rows and on the inner dimension: some outputs are enough
            inner, outer = shape if is_transposed else shape[::-1]
            weight = torch.randn(inner, min(outer, _OUTPUTS), generator=generator).to(dtype)
            if not is_transposed:
                weight = weight.t().contiguous().t()
            for rows in range(1, MAX_ROWS + 1):
                x = torch.randn(rows, inner, generator=generator).to(dtype)
                torch.set_num_threads(threads)
                many = torch.mm(x, weight)
                torch.set_num_threads(1)
                if not torch.equal(many, torch.mm(x, weight)):
                    return False
    finally:
        torch.set_num_threads(before)
    return True


@cache
def one_thread_can_cut(dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    """`products_can_be_cut` of weights [outputs, inputs], for products of one thread."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        return products_can_be_cut(dtype, shape[1], shape[0], False)
    finally:
        torch.set_num_threads(before)


def products_can_be_cut(dtype: torch.dtype, inputs: int, outputs: int, is_transposed: bool) -> bool:
    """Whether this machine's matrix products keep their bits when a matrix is cut between granules of outputs.

    Tried on made-up weights of this many inputs, for one, two and many rows. Products are not specified to do so: a
    library may sum in another order for a narrower matrix.
    """
    most = _CHECKED_NBYTES // (inputs * dtype.itemsize) // GRANULE * GRANULE  # whole granules: aligned if transposed
    wide = min(outputs, max(2 * GRANULE, most))
    generator = torch.Generator().manual_seed(inputs)
    weight = torch.rand(wide, inputs, dtype=dtype, generator=generator).sub_(0.5)
    weight = weight.t().contiguous() if is_transposed else weight.t()
    edges = [0, GRANULE, wide] if wide < 4 * GRANULE else [0, GRANULE, wide // 2 // GRANULE * GRANULE, wide]
    for rows in (1, 2, 33):
        x = (torch.rand(rows, inputs, generator=generator) - 0.5).to(dtype)
        whole, parts = torch.mm(x, weight), torch.empty(rows, wide, dtype=dtype)
        for begin, end in pairwise(edges):
            narrow = weight[:, begin:end].contiguous() if is_transposed else weight[:, begin:end]
            torch.mm(x, narrow, out=parts[:, begin:end])
        if not torch.equal(whole, parts):
            return False
    return True
