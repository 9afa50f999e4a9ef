"""The experts' forward, from leases: the same arithmetic as transformers' `grouped_mm` experts, one expert at a time.

Bit-identical by construction: rows are sorted by expert with the same sort, each expert's rows go through the same
matrix products, and the weighted rows are put back and summed over the top-k in the same order, whatever order the
experts became ready in. Families differ only by the flags that `use_experts_implementation` sets on their module.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch

from moetier.access import ExpertKey
from moetier.cache import Lease


def per_expert_parameters(module: torch.nn.Module) -> list[str]:
    """Names of the module's parameters whose first dimension is the expert."""
    up = "gate_up_proj" if module.has_gate else "up_proj"
    names = [up, "down_proj"]
    return [*names, f"{up}_bias", "down_proj_bias"] if module.has_bias else names


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, is_transposed: bool) -> torch.Tensor:
    out = torch.mm(x.to(weight.dtype), weight if is_transposed else weight.t())
    return out if bias is None else out.add_(bias)


def expert_forward(module: Any, fields: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """One expert's rows, [n, H] → [n, H], before the routing weights."""
    up = "gate_up_proj" if module.has_gate else "up_proj"
    h = _linear(x, fields[up], fields.get(f"{up}_bias"), module.is_transposed)
    h = module._apply_gate(h) if module.has_gate else module.act_fn(h)
    y = _linear(h, fields["down_proj"], fields.get("down_proj_bias"), module.is_transposed)
    return module.post_expert_norm(y) if module.has_post_expert_norm else y


class Routing:
    """The (token, expert) pairs of an access, sorted by expert: which rows each expert computes.

    `index` and `weights` are [T, K]. Reading the expert ids is the one device-to-host transfer of a layer.
    """

    def __init__(self, index: torch.Tensor, weights: torch.Tensor):
        self.top_k = index.size(-1)
        sorted_experts, self.order = torch.sort(index.reshape(-1))
        self.weights = weights.reshape(-1)[self.order]
        self.rows: dict[int, tuple[int, int]] = {}  # expert -> its range of sorted rows
        experts = sorted_experts.cpu().numpy()
        if len(experts):
            edges = [0, *((experts[1:] != experts[:-1]).nonzero()[0] + 1).tolist(), len(experts)]
            self.rows = {int(experts[begin]): (begin, end) for begin, end in pairwise(edges)}

    def combine(self, hidden: torch.Tensor, results: torch.Tensor) -> torch.Tensor:
        """Weighted rows back in token order, summed over the top-k: [T * K, H] → [T, H]."""
        inverse = torch.empty_like(self.order)
        inverse[self.order] = torch.arange(self.order.size(0), device=self.order.device)
        summed = results[inverse].view(hidden.size(0), self.top_k, hidden.size(-1)).sum(dim=1)
        return summed.to(hidden.dtype)


def forward_from_leases(module: Any, hidden: torch.Tensor, routing: Routing, leases: Iterator[Lease]) -> torch.Tensor:
    """The whole experts forward, [T, H] → [T, H], computing each expert when its lease comes."""
    rows = hidden[routing.order // routing.top_k]
    results: torch.Tensor | None = None
    for lease in leases:
        begin, end = routing.rows[lease.key.expert]
        y = expert_forward(module, lease.fields, rows[begin:end])
        y = y * routing.weights[begin:end].unsqueeze(-1)
        if results is None:
            results = torch.empty(rows.size(0), y.size(-1), dtype=y.dtype, device=y.device)
        results[begin:end] = y
    if results is None:  # no tokens
        return torch.zeros_like(hidden)
    return routing.combine(hidden, results)


def keys_of(layer: int, routing: Routing) -> tuple[tuple[ExpertKey, ...], tuple[int, ...]]:
    """The access's keys, ascending, and the tokens routed to each."""
    return (
        tuple(ExpertKey(layer, expert) for expert in routing.rows),
        tuple(end - begin for begin, end in routing.rows.values()),
    )
