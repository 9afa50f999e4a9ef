"""The CPU's share of an access: experts that stay in host memory while a device computes the others.

The rows that the router gave them come to the host once, their results go back once, into the same sorted rows that the
device's results land in, so that the order of the sum does not change. CPU and GPU do not round alike: which of them
computes an expert shows in the last bits, see docs/gpu.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch

from moetier.arenas import DeviceArena, HostTierArena
from moetier.experts import Routing, expert_math
from moetier.lease import Lease


class InPlace:
    """One access. `hidden` [T, H] and the routing are on the device; nothing is copied before the first lease."""

    def __init__(self, module: Any, hidden: torch.Tensor, routing: Routing, device: DeviceArena | HostTierArena | None):
        self._module, self._hidden, self._routing = module, hidden, routing
        self._device = device if isinstance(device, DeviceArena) else None  # else all memory is host memory
        self._mark = None if self._device is None else self._device.mark()  # before any expert's kernels
        self._rows: tuple[torch.Tensor, torch.Tensor] | None = None
        self._edges = list(accumulate(routing.tokens, initial=0))  # of every expert's sorted rows
        self._results: list[tuple[int, int, torch.Tensor]] = []  # sorted rows from, to; [n, H] on the host

    def compute(self, leases: Sequence[Lease]) -> None:
        """The experts of these leases, on the CPU, by the thread that calls."""
        hidden, tokens = self._on_host()
        for lease in leases:
            number = self._routing.number[lease.key.expert]
            begin, end = self._edges[number : number + 2]
            rows = hidden[tokens[begin:end]]
            self._results.append((begin, end, expert_math(self._module, rows, lease.fields)))

    def deliver(self, down: torch.Tensor | None) -> torch.Tensor | None:
        """Put the results into their rows of the device's [S, H] results; if it has none, into a new tensor."""
        if not self._results:
            return down
        results = [rows for _, _, rows in self._results]
        if down is None:
            size = (self._routing.order.numel(), results[0].size(1))
            down = torch.empty(size, dtype=results[0].dtype, device=self._hidden.device)
        if self._device is not None:
            packed = self._device.from_host(results)
            results = list(torch.split(packed, [len(rows) for rows in results]))
        for (begin, end, _), rows in zip(self._results, results, strict=True):
            down[begin:end] = rows
        return down

    def _on_host(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The hidden states, and of every sorted row which of them it is."""
        if self._rows is None:
            hidden, order = self._hidden, self._routing.order
            if self._device is not None:
                assert self._mark is not None
                hidden, order = self._device.to_host([hidden, order], self._mark)
            self._rows = hidden, order // self._routing.top_k
        return self._rows
