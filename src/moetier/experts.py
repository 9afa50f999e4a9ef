"""The experts' forward, from leases: the same arithmetic as transformers' `grouped_mm` experts, one expert at a time.

Bit-identical by construction: rows are sorted by expert with the same sort, each expert's rows go through the same
matrix products, and the weighted rows are put back and summed over the top-k in the same order, whatever order the
experts became ready in. Families differ only by the flags that `use_experts_implementation` sets on their module.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from moetier.access import ExpertKey
from moetier.cache import Lease

if TYPE_CHECKING:
    from moetier.inplace import InPlace


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
    in_place: InPlace | None = None,
) -> torch.Tensor:
    """The whole experts forward, [T, H] → [T, H], computing each expert when its lease comes.

    Every result lands in its sorted rows; what is elementwise runs over neighbouring experts of a batch at once.
    Leases in place are for `in_place`, which is needed where there may be any.
    """
    rows = hidden[routing.order // routing.top_k]  # [S, H], S = T * K pairs
    up_name = "gate_up_proj" if module.has_gate else "up_proj"
    up = down = None
    for batch in batches:
        if batch[0].in_place:
            assert in_place is not None
            in_place.compute(batch)
            continue
        if up is None or down is None:
            up = _buffer(rows, batch[0].fields[up_name], module.is_transposed)
            down = _buffer(rows, batch[0].fields["down_proj"], module.is_transposed)
        for run in _runs(batch, routing):
            first, last = run[0][0], run[-1][1]
            for begin, end, fields in run:
                bias = fields.get(f"{up_name}_bias")
                _linear(rows[begin:end], fields[up_name], bias, module.is_transposed, up[begin:end])
            h = up[first:last]
            h = module._apply_gate(h) if module.has_gate else module.act_fn(h)
            for begin, end, fields in run:
                bias, x = fields.get("down_proj_bias"), h[begin - first : end - first]
                _linear(x, fields["down_proj"], bias, module.is_transposed, down[begin:end])
    if in_place is not None:
        down = in_place.deliver(down)
    if down is None:  # no tokens
        return torch.zeros_like(hidden)
    if module.has_post_expert_norm:
        down = module.post_expert_norm(down)
    return routing.combine(hidden, down * routing.weights.unsqueeze(-1))


def expert_math(module: Any, rows: torch.Tensor, fields: dict[str, torch.Tensor]) -> torch.Tensor:
    """One expert by itself, where its fields are: [n, H] → [n, H], without gate weights and norm."""
    up_name = "gate_up_proj" if module.has_gate else "up_proj"
    up = _buffer(rows, fields[up_name], module.is_transposed)
    _linear(rows, fields[up_name], fields.get(f"{up_name}_bias"), module.is_transposed, up)
    h = module._apply_gate(up) if module.has_gate else module.act_fn(up)
    down = _buffer(rows, fields["down_proj"], module.is_transposed)
    _linear(h, fields["down_proj"], fields.get("down_proj_bias"), module.is_transposed, down)
    return down


def _buffer(rows: torch.Tensor, weight: torch.Tensor, is_transposed: bool) -> torch.Tensor:
    """Room for all rows times this weight."""
    return torch.empty(rows.size(0), weight.size(1 if is_transposed else 0), dtype=weight.dtype, device=rows.device)


def _runs(batch: Sequence[Lease], routing: Routing) -> list[list[tuple[int, int, dict[str, torch.Tensor]]]]:
    """The batch as runs of experts whose sorted rows touch: (begin, end, fields) each."""
    runs: list[list[tuple[int, int, dict[str, torch.Tensor]]]] = []
    for begin, end, fields in sorted(((*routing.rows[lease.key.expert], lease.fields) for lease in batch), key=_begin):
        if runs and runs[-1][-1][1] == begin:
            runs[-1].append((begin, end, fields))
        else:
            runs.append([(begin, end, fields)])
    return runs


def _begin(item: tuple[int, int, dict[str, torch.Tensor]]) -> int:
    return item[0]


def keys_of(layer: int, routing: Routing) -> tuple[tuple[ExpertKey, ...], tuple[int, ...]]:
    """The access's keys, ascending, and the tokens routed to each."""
    return (
        tuple(ExpertKey(layer, expert) for expert in routing.rows),
        tuple(end - begin for begin, end in routing.rows.values()),
    )
