"""The experts' forward, from leases: the same arithmetic as transformers' `grouped_mm` experts, one expert at a time.

Bit-identical by construction: rows are sorted by expert with the same sort, each expert's rows go through the same
matrix products, and the weighted rows are put back and summed over the top-k in the same order, whatever order the
experts became ready in. Families differ only by the flags that `use_experts_implementation` sets on their module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from moetier.access import ExpertKey
from moetier.crew import Crew, Task
from moetier.lease import Lease
from moetier.products import MAX_ROWS
from moetier.stores.slices import GRANULE, divide, least_outputs

AT_ONCE = 4 << 20  # bytes between the products of a layer up to which all its experts have them at the same time
STRIDE = 128  # bytes that torch's elementwise kernels take at once, at most: two vectors of AVX-512
GRAIN = 32768  # elements from which on torch gives every thread a part of an elementwise kernel

Fields = dict[str, torch.Tensor]
# neighbouring experts: which of the access's experts, in ascending order, and its fields
Run = list[tuple[int, Fields]]
Keep = Callable[[int, int, torch.dtype], torch.Tensor | None]  # rows, width, dtype → room, or None

if TYPE_CHECKING:
    from moetier.cpu_share import InPlace


def up_name(module: Any) -> str:
    """The field of the up projection, with that of a gate in it if there is one."""
    return "gate_up_proj" if module.has_gate else "up_proj"


def per_expert_parameters(module: torch.nn.Module) -> list[str]:
    """Names of the module's parameters whose first dimension is the expert."""
    up = up_name(module)
    names = [up, "down_proj"]
    return [*names, f"{up}_bias", "down_proj_bias"] if module.has_bias else names


def _linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, is_transposed: bool, out: torch.Tensor
) -> None:
    torch.mm(x, weight if is_transposed else weight.t(), out=out)
    if bias is not None:
        out.add_(bias)


def _read(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in host memory, without holding up any stream but its own."""
    if tensor.device.type == "cpu":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    there = torch.cuda.Event()  # type: ignore[no-untyped-call]
    there.record(torch.cuda.current_stream(tensor.device))
    there.synchronize()
    return host


class Routing:
    """The (token, expert) pairs of an access, sorted by expert: which rows each expert computes.

    `index` and `weights` are [T, K]. Reading the expert ids, and with `with_mass` the gate weights in the same copy, is
    the one device-to-host transfer of a layer. `mass` is the sum of the gate weights of each expert's tokens, ascending
    by expert; empty without `with_mass`.

    One token needs no sorting, as every expert has one row: there the rows keep the token's own order.
    """

    def __init__(self, index: torch.Tensor, weights: torch.Tensor, with_mass: bool = False):
        self.top_k = index.size(-1)
        self.number: dict[int, int] = {}  # expert, ascending -> its place among those of the rows
        self.tokens: tuple[int, ...] = ()  # rows of each of them; an expert's rows are neighbours
        self.mass: tuple[float, ...] = ()
        self.unsorted = index.numel() == self.top_k and index.device.type == "cpu" and self._take(index)
        if self.unsorted:
            self.order = torch.arange(self.top_k)
            self.weights = weights.reshape(-1)
            if with_mass:
                mass = self.weights.detach().tolist()
                self.mass = tuple(mass[number] for number in self.number.values())
            return
        sorted_experts, self.order = torch.sort(index.reshape(-1))
        self.weights = weights.reshape(-1)[self.order]
        gates = None
        if not with_mass:
            experts = _read(sorted_experts).numpy()
        elif index.device.type == "cpu":
            experts, gates = sorted_experts.numpy(), self.weights.detach().float().numpy()
        else:  # one copy: float64 holds both the ids and the weights exactly
            experts, gates = _read(torch.stack((sorted_experts.double(), self.weights.detach().double()))).numpy()
        if len(experts):
            edges = [0, *((experts[1:] != experts[:-1]).nonzero()[0] + 1).tolist(), len(experts)]
            self.number = {expert: number for number, expert in enumerate(experts[edges[:-1]].tolist())}
            self.tokens = tuple(end - begin for begin, end in pairwise(edges))
            if gates is not None:
                one_each = len(self.tokens) == len(experts)
                sums = gates if one_each else np.add.reduceat(gates.astype(np.float64, copy=False), edges[:-1])
                self.mass = tuple(sums.tolist())

    def _take(self, index: torch.Tensor) -> bool:
        """Number one token's experts as they stand; False if one of them stands there twice."""
        experts = index.reshape(-1).tolist()
        self.number = {expert: number for expert, number in sorted(zip(experts, range(len(experts)), strict=True))}
        self.tokens = (1,) * len(experts)
        return len(self.number) == len(experts)

    def rows(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, H] → [S, H], S = T * K pairs: what each row of an expert computes on."""
        return hidden.expand(self.top_k, -1) if self.unsorted else hidden[self.order // self.top_k]

    def by_token(self, results: torch.Tensor, room: torch.Tensor | None = None) -> torch.Tensor:
        """[S, ...] of the sorted rows, in the order of `index`; in `room`, if that is given and of their kind."""
        if self.unsorted:
            return results
        inverse = torch.empty_like(self.order)
        inverse[self.order] = torch.arange(self.order.size(0), device=self.order.device)
        if room is None or room.shape != results.shape or room.dtype != results.dtype:
            return results[inverse]
        return torch.index_select(results, 0, inverse, out=room)

    def combine(self, hidden: torch.Tensor, results: torch.Tensor, room: torch.Tensor | None = None) -> torch.Tensor:
        """Weighted rows back in token order, summed over the top-k: [T * K, H] → [T, H]; `room` as in `by_token`."""
        summed = self.by_token(results, room).view(hidden.size(0), self.top_k, hidden.size(-1)).sum(dim=1)
        return summed.to(hidden.dtype)


def forward_from_leases(
    module: Any,
    hidden: torch.Tensor,
    routing: Routing,
    batches: Iterable[Sequence[Lease]],
    crew: Crew | None = None,
    in_place: InPlace | None = None,
    aside: Callable[[], None] | None = None,
    keep: Keep | None = None,
) -> torch.Tensor:
    """The whole experts forward, [T, H] → [T, H], computing each expert when its lease comes.

    Every result lands in its sorted rows; what is elementwise runs over neighbouring experts of a batch at once. With a
    `crew`, the experts of a batch are shared among its threads. Leases in place are for `in_place`, which is needed
    where there may be any. `aside` may be called by this thread while the others compute. `keep` is asked for room that
    outlives this, for the up projections.
    """
    rows = routing.rows(hidden)
    math: _Math | None = None
    if crew is not None and max(routing.tokens, default=0) > MAX_ROWS:
        crew = None
    for batch in batches:
        if batch[0].in_place:
            assert in_place is not None
            in_place.compute(batch)
            continue
        if math is None:
            math = _Math(module, rows, batch[0].fields, routing.tokens, keep)
        runs = _runs(batch, routing)
        if crew is not None and len(batch) == 1 and math.can_share(runs[0][0][0], crew):
            math.compute_shared(*runs[0][0], crew, aside)
        elif crew is None or len(batch) == 1:
            for run in runs:
                math.compute(run)
        else:
            shares = _shares(runs, -(-len(batch) // (2 * crew.helpers + 2)))
            crew.run([partial(math.compute, share) for share in shares], aside)
    down = None if math is None else math.down
    if in_place is not None:
        down = in_place.deliver(down)
    if down is None:  # no tokens
        return torch.zeros_like(hidden)
    if module.has_post_expert_norm:
        down = module.post_expert_norm(down)
    gates = routing.weights.unsqueeze(-1)
    if torch.result_type(down, gates) != down.dtype:
        return routing.combine(hidden, down * gates)
    # in place: a large step's rows are fresh pages otherwise, which cost more than what is done to them
    return routing.combine(hidden, down.mul_(gates), rows)


def expert_math(module: Any, rows: torch.Tensor, fields: Fields) -> torch.Tensor:
    """One expert by itself, where its fields are: [n, H] → [n, H], without gate weights and norm."""
    math = _Math(module, rows, fields, (len(rows),))
    math.compute([(0, fields)])
    return math.down


class _Math:
    """The products of an access: rows in, and a result in the place of every row whatever the order.

    All views are made at once: for one row, making views one by one costs as much as a fifth of the products.
    """

    def __init__(
        self, module: Any, rows: torch.Tensor, fields: Fields, tokens: tuple[int, ...], keep: Keep | None = None
    ):
        self.module = module
        self.up_name = up_name(module)
        self.up_bias = f"{self.up_name}_bias"
        weight = fields[self.up_name]
        width = outputs_of(weight, module.is_transposed)
        self.down = _buffer(rows, fields["down_proj"], module.is_transposed)
        self._inner = width // (2 if module.has_gate else 1)
        self._tokens = tokens
        self._ends = list(accumulate(tokens))
        self._rows = rows.to(weight.dtype).split_with_sizes(tokens)
        self._downs = self.down.split_with_sizes(tokens)
        self._many = len(rows) * width * weight.itemsize > AT_ONCE
        self._ups: tuple[torch.Tensor, ...] = ()  # of all experts; without them each has its own in turn
        up = None if keep is None else keep(len(rows), width, weight.dtype)
        if up is None and not self._many:
            up = _buffer(rows, weight, module.is_transposed)
        if up is not None:
            self.up, self._ups = up, up.split_with_sizes(tokens)

    def compute(self, run: Run) -> None:
        """Experts whose rows touch."""
        if self._many:
            for number, fields in run:
                self._compute_many(number, fields)
            return
        transposed, ends = self.module.is_transposed, self._ends
        first, last = run[0][0], run[-1][0]
        for number, fields in run:
            bias = fields.get(self.up_bias)
            _linear(self._rows[number], fields[self.up_name], bias, transposed, self._ups[number])
        begin, end = ends[first] - self._tokens[first], ends[last]
        if first == last or self._joins((end - begin) * self._inner):
            parts = self._activated(self.up[begin:end]).split_with_sizes(self._tokens[first : last + 1])
        else:
            parts = tuple(map(self._activated, self._ups[first : last + 1]))
        for (number, fields), x in zip(run, parts, strict=True):
            bias = fields.get("down_proj_bias")
            _linear(x, fields["down_proj"], bias, transposed, self._downs[number])

    def _compute_many(self, number: int, fields: Fields) -> None:
        """One expert of a large step: what is between its products is there for this expert only."""
        transposed, rows = self.module.is_transposed, self._rows[number]
        up = self._ups[number] if self._ups else _buffer(rows, fields[self.up_name], transposed)
        _linear(rows, fields[self.up_name], fields.get(self.up_bias), transposed, up)
        bias = fields.get("down_proj_bias")
        _linear(self._activated(up), fields["down_proj"], bias, transposed, self._downs[number])

    def can_share(self, number: int, crew: Crew) -> bool:
        """Whether `compute_shared` can have this expert."""
        return crew.cuts and self._tokens[number] == 1 and not self._many

    def compute_shared(self, number: int, fields: Fields, crew: Crew, aside: Callable[[], None] | None) -> None:
        """One expert of one row, alone: the crew shares the outputs of its matrices."""
        out = self._ups[number]
        weight, bias = fields[self.up_name], fields.get(self.up_bias)
        crew.run(_parts(self._rows[number], weight, bias, out, crew.helpers + 1), aside)
        weight, bias = fields["down_proj"], fields.get("down_proj_bias")
        crew.run(_parts(self._activated(out), weight, bias, self._downs[number], crew.helpers + 1))

    def _activated(self, up: torch.Tensor) -> torch.Tensor:
        """[n, …] of the up projection → [n, I]."""
        module = self.module
        h: torch.Tensor = module._apply_gate(up) if module.has_gate else module.act_fn(up)
        return h.to(self.down.dtype)

    def _joins(self, elements: int) -> bool:
        """Whether an activation over so many elements gives each expert the bits that it gets by itself.

        The CPU's kernels compute what is left behind the last whole vector with scalar functions, which may round
        otherwise. So neighbours are activated together only where every row, and every thread's part, is whole vectors.
        """
        if self.up.device.type != "cpu":
            return True
        size = self.up.element_size()
        if self._inner * size % STRIDE:
            return False
        if elements < GRAIN:
            return True
        threads = min(torch.get_num_threads(), -(-elements // GRAIN))
        return -(-elements // threads) * size % STRIDE == 0


def _parts(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, parts: int
) -> list[Task]:
    """The product as so many products of some outputs each, for weights [outputs, inputs]."""
    outputs = len(weight)
    most = max(least_outputs(outputs), -(-outputs // parts // GRANULE) * GRANULE)
    return [
        partial(
            _linear,
            x,
            weight[part.start : part.stop],
            None if bias is None else bias[part.start : part.stop],
            False,
            out[:, part.start : part.stop],
        )
        for part in divide(outputs, most)
    ]


def _buffer(rows: torch.Tensor, weight: torch.Tensor, is_transposed: bool) -> torch.Tensor:
    """Room for all rows times this weight."""
    return torch.empty(rows.size(0), outputs_of(weight, is_transposed), dtype=weight.dtype, device=rows.device)


def outputs_of(weight: torch.Tensor, is_transposed: bool) -> int:
    """Of a product with it."""
    return weight.size(1 if is_transposed else 0)


def _runs(batch: Sequence[Lease], routing: Routing) -> list[Run]:
    """The batch as runs of experts whose sorted rows touch."""
    runs: list[Run] = []
    for number, fields in sorted(((routing.number[lease.key.expert], lease.fields) for lease in batch), key=_number):
        if runs and runs[-1][-1][0] == number - 1:
            runs[-1].append((number, fields))
        else:
            runs.append([(number, fields)])
    return runs


def _shares(runs: list[Run], size: int) -> list[Run]:
    """The runs cut into pieces of at most `size` experts."""
    return [run[begin : begin + size] for run in runs for begin in range(0, len(run), size)]


def _number(item: tuple[int, Fields]) -> int:
    return item[0]


def keys_of(layer: int, routing: Routing) -> tuple[tuple[ExpertKey, ...], tuple[int, ...]]:
    """The access's keys, ascending, and the tokens routed to each."""
    return tuple(ExpertKey(layer, expert) for expert in routing.number), routing.tokens
