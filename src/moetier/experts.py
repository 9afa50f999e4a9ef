"""The experts' forward, from leases: the same arithmetic as transformers' `grouped_mm` experts, one expert at a time.

Bit-identical by construction: rows are sorted by expert with the same sort, each expert's rows go through the same
matrix products, and the weighted rows are put back and summed over the top-k in the same order, whatever order the
experts became ready in. Families differ only by the flags that `use_experts_implementation` sets on their module.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from moetier.access import ExpertKey
from moetier.cache import Lease
from moetier.crew import MAX_ROWS, Crew

Fields = dict[str, torch.Tensor]
Run = list[tuple[int, int, Fields]]  # neighbouring experts: first row, end of rows, fields


def per_expert_parameters(module: torch.nn.Module) -> list[str]:
    """Names of the module's parameters whose first dimension is the expert."""
    up = "gate_up_proj" if module.has_gate else "up_proj"
    names = [up, "down_proj"]
    return [*names, f"{up}_bias", "down_proj_bias"] if module.has_bias else names


def _linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, is_transposed: bool, out: torch.Tensor
) -> None:
    torch.mm(x.to(weight.dtype), weight if is_transposed else weight.t(), out=out)
    if bias is not None:
        out.add_(bias)


class Routing:
    """The (token, expert) pairs of an access, sorted by expert: which rows each expert computes.

    `index` and `weights` are [T, K]. Reading the expert ids, and with `with_mass` the gate weights in the same copy, is
    the one device-to-host transfer of a layer. `mass` is the sum of the gate weights of each expert's tokens, ascending
    by expert; empty without `with_mass`.
    """

    def __init__(self, index: torch.Tensor, weights: torch.Tensor, with_mass: bool = False):
        self.top_k = index.size(-1)
        sorted_experts, self.order = torch.sort(index.reshape(-1))
        self.weights = weights.reshape(-1)[self.order]
        self.rows: dict[int, tuple[int, int]] = {}  # expert -> its range of sorted rows
        self.tokens: tuple[int, ...] = ()  # rows of each expert, ascending by expert
        self.mass: tuple[float, ...] = ()
        gates = None
        if not with_mass:
            experts = sorted_experts.cpu().numpy()
        elif index.device.type == "cpu":
            experts, gates = sorted_experts.numpy(), self.weights.detach().float().numpy()
        else:  # one copy: float64 holds both the ids and the weights exactly
            experts, gates = torch.stack((sorted_experts.double(), self.weights.detach().double())).cpu().numpy()
        if len(experts):
            edges = [0, *((experts[1:] != experts[:-1]).nonzero()[0] + 1).tolist(), len(experts)]
            self.rows = {int(experts[begin]): (begin, end) for begin, end in pairwise(edges)}
            self.tokens = tuple(end - begin for begin, end in pairwise(edges))
            if gates is not None:
                one_each = len(self.rows) == len(experts)
                mass = gates if one_each else np.add.reduceat(gates.astype(np.float64, copy=False), edges[:-1])
                self.mass = tuple(mass.tolist())

    def combine(self, hidden: torch.Tensor, results: torch.Tensor) -> torch.Tensor:
        """Weighted rows back in token order, summed over the top-k: [T * K, H] → [T, H]."""
        inverse = torch.empty_like(self.order)
        inverse[self.order] = torch.arange(self.order.size(0), device=self.order.device)
        summed = results[inverse].view(hidden.size(0), self.top_k, hidden.size(-1)).sum(dim=1)
        return summed.to(hidden.dtype)


def forward_from_leases(
    module: Any,
    hidden: torch.Tensor,
    routing: Routing,
    batches: Iterable[Sequence[Lease]],
    crew: Crew | None = None,
) -> torch.Tensor:
    """The whole experts forward, [T, H] → [T, H], computing each expert when its lease comes.

    Every result lands in its sorted rows; what is elementwise runs over neighbouring experts of a batch at once. With a
    `crew`, the experts of a batch are shared among its threads.
    """
    rows = hidden[routing.order // routing.top_k]  # [S, H], S = T * K pairs
    math: _Math | None = None
    for batch in batches:
        if math is None:
            math = _Math(module, rows, batch[0].fields)
        runs = _runs(batch, routing)
        if crew is None or len(batch) == 1 or max(routing.tokens) > MAX_ROWS:
            for run in runs:
                math.compute(run)
        else:
            shares = _shares(runs, -(-len(batch) // (2 * crew.helpers + 2)))
            crew.run([partial(math.compute, share) for share in shares])
    if math is None:  # no tokens
        return torch.zeros_like(hidden)
    down = math.down
    if module.has_post_expert_norm:
        down = module.post_expert_norm(down)
    return routing.combine(hidden, down * routing.weights.unsqueeze(-1))


class _Math:
    """The products of an access: rows in, and a result in the place of every row whatever the order."""

    def __init__(self, module: Any, rows: torch.Tensor, fields: dict[str, torch.Tensor]):
        self.module, self.rows = module, rows
        self.up_name = "gate_up_proj" if module.has_gate else "up_proj"
        self.up_bias = f"{self.up_name}_bias"
        self.up = _buffer(rows, fields[self.up_name], module.is_transposed)
        self.down = _buffer(rows, fields["down_proj"], module.is_transposed)

    def compute(self, run: Run) -> None:
        """Experts whose rows touch."""
        module = self.module
        first, last = run[0][0], run[-1][1]
        for begin, end, fields in run:
            bias = fields.get(self.up_bias)
            _linear(self.rows[begin:end], fields[self.up_name], bias, module.is_transposed, self.up[begin:end])
        h = self.up[first:last]
        h = module._apply_gate(h) if module.has_gate else module.act_fn(h)
        for begin, end, fields in run:
            bias, x = fields.get("down_proj_bias"), h[begin - first : end - first]
            _linear(x, fields["down_proj"], bias, module.is_transposed, self.down[begin:end])


def _buffer(rows: torch.Tensor, weight: torch.Tensor, is_transposed: bool) -> torch.Tensor:
    """Room for all rows times this weight."""
    return torch.empty(rows.size(0), weight.size(1 if is_transposed else 0), dtype=weight.dtype, device=rows.device)


def _runs(batch: Sequence[Lease], routing: Routing) -> list[Run]:
    """The batch as runs of experts whose sorted rows touch."""
    runs: list[Run] = []
    for begin, end, fields in sorted(((*routing.rows[lease.key.expert], lease.fields) for lease in batch), key=_begin):
        if runs and runs[-1][-1][1] == begin:
            runs[-1].append((begin, end, fields))
        else:
            runs.append([(begin, end, fields)])
    return runs


def _shares(runs: list[Run], size: int) -> list[Run]:
    """The runs cut into pieces of at most `size` experts."""
    return [run[begin : begin + size] for run in runs for begin in range(0, len(run), size)]


def _begin(item: tuple[int, int, Fields]) -> int:
    return item[0]


def keys_of(layer: int, routing: Routing) -> tuple[tuple[ExpertKey, ...], tuple[int, ...]]:
    """The access's keys, ascending, and the tokens routed to each."""
    return tuple(ExpertKey(layer, expert) for expert in routing.rows), routing.tokens
