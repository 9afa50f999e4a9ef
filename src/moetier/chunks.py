"""Experts that no slot can hold, computed in slices: one small ring of buffers through which every expert streams.

Nothing is cached, so nothing is decided: an access's experts come in ascending order, each as all slices of its first
matrix, then all slices of its second. The readers fill the buffers ahead of the math, always in the same order. The
result has the bits of the whole matrices' products (`stores.slices` says why, `products_can_be_cut` checks it here).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from moetier.access import Access, ExpertKey
from moetier.arenas import HostArena
from moetier.errors import CapacityError, MoetierError
from moetier.experts import Routing, up_name
from moetier.mover import ThreadMover
from moetier.overlap import Clocks
from moetier.plan import ChunkPlan
from moetier.products import products_can_be_cut
from moetier.stores import SlicedStore
from moetier.stores.slices import Cut, SliceStore, cut
from moetier.tiers import Copy, Kind, Place

if TYPE_CHECKING:
    from moetier.profile import Profile
    from moetier.timeline import Timeline


@dataclass(frozen=True, slots=True)
class Slice:
    """A slice in its buffer: outputs of a matrix of an expert, or a bias. A view, valid until the next is asked for."""

    expert: int
    field: str
    outputs: range
    width: int  # outputs of the whole matrix
    weight: torch.Tensor  # [outputs, inputs] or, in transposed families, [inputs, outputs]; [outputs] of a bias


class SliceCache:
    """Takes the place of `ExpertCache` where there are buffers instead of slots. Every use of an expert is a miss."""

    device = None

    def __init__(self, store: SlicedStore, cuts: Sequence[Sequence[Cut]], buffers: int, nbytes: int, readers: int = 4):
        """`cuts` per layer, in the order in which they are computed; `buffers` of `nbytes` bytes each."""
        self.store = store
        numbers = iter(range(sum(map(len, cuts))))
        self._cuts = [[next(numbers) for _ in layer] for layer in cuts]
        self._slices = SliceStore(store, [one for layer in cuts for one in layer], nbytes)
        self.host = HostArena(buffers, nbytes)
        self._condition = threading.Condition()
        self.readers = readers
        self.mover = ThreadMover(self._slices, self.host, None, self._condition, readers)
        self.profile: Profile | None = None  # counts every access
        self._turn = threading.Lock()  # the ring serves one access at a time
        self._closed = False
        self._ordered = 0
        self._misses = [0] * len(cuts)
        self.wait_seconds = self.exposed_seconds = self.compute_seconds = self.decide_seconds = (
            0.0  # as in `ExpertCache`
        )
        self.probe: Timeline | None = None

    def slices(self, access: Access) -> Generator[Slice]:
        """Yield every slice of every expert of the access, in the order in which they are computed.

        A slice's buffer is filled anew when the next one is asked for. Raises `StoreError` if one cannot be read; the
        next access is served as if nothing had been. Close the generator to end an access early.
        """
        clock = time.perf_counter
        with self._turn:
            begin = clock()
            probe = None if self.probe is None else self.probe.opened(access, (), begin)
            base = self._ordered
            keys = [ExpertKey(number, key.expert) for key in access.keys for number in self._cuts[access.layer]]
            flying: dict[int, BaseException | None] = {}
            try:
                ordered = 0
                for position, key in enumerate(keys):
                    ahead = min(len(keys), position + self.host.slots)
                    self._order(keys[ordered:ahead], ordered, flying)
                    ordered = ahead
                    self.decide_seconds += clock() - begin
                    begin = clock()
                    io = self.mover.io.seconds(begin)
                    self._wait(base + position, flying)
                    now = clock()
                    exposed = min(self.mover.io.seconds(now) - io, now - begin)
                    self.wait_seconds += now - begin
                    self.exposed_seconds += exposed
                    if probe is not None:
                        probe.waited(begin, now, exposed)
                    yield self._view(key, position)
                    begin = clock()
                    self.compute_seconds += begin - now
                    if probe is not None:
                        probe.computed(now, begin, (ExpertKey(access.layer, key.expert),))
            finally:
                self._drain(flying)  # whoever is next gets buffers that nobody writes to
                self._misses[access.layer] += len(access.keys)
                if self.profile is not None:
                    self.profile.add(access)
                if probe is not None:
                    probe.closed()

    def _order(self, keys: Sequence[ExpertKey], position: int, flying: dict[int, BaseException | None]) -> None:
        """Order slices into the buffers from `position` on."""
        number, home = self._ordered, Place(1, -1)
        orders = []
        for offset, key in enumerate(keys):
            slot = (position + offset) % self.host.slots
            orders.append(Copy(number + offset, key, home, Place(0, slot), Kind.LOAD))
        with self._condition:
            if self._closed:
                raise MoetierError("the expert cache is closed")
        self.mover.start(orders)
        flying.update((order.id, None) for order in orders)
        self._ordered += len(orders)

    def _wait(self, number: int, flying: dict[int, BaseException | None]) -> None:
        """Until the order is carried out. Raises what it met."""
        with self._condition:
            while True:
                self._collect(flying)
                if number not in flying:
                    return
                error = flying[number]
                if error is not None:
                    del flying[number]
                    raise error
                if self._closed:
                    raise MoetierError("the expert cache is closed")
                self._condition.wait()

    def _collect(self, flying: dict[int, BaseException | None]) -> None:
        """Note what has ended: gone if it succeeded, with its error if not. Holding the condition."""
        while self.mover.done:
            flight = self.mover.done.popleft()
            if flight.error is None:
                flying.pop(flight.copy.id, None)
            else:
                flying[flight.copy.id] = flight.error

    def _drain(self, flying: dict[int, BaseException | None]) -> None:
        with self._condition:
            self._collect(flying)
            while any(error is None for error in flying.values()) and not self._closed:
                self._condition.wait()
                self._collect(flying)

    def _view(self, key: ExpertKey, position: int) -> Slice:
        cut = self._slices.cuts[key.layer]
        record = self.host.record(position % self.host.slots, self._slices.phase(key), cut.layout.nbytes)
        return Slice(key.expert, cut.field.name, cut.outputs, cut.width, cut.layout.views(record)[cut.field.name])

    def stats(self) -> dict[str, Any]:
        """What `ExpertCache.stats` says, of a tier with no slots, and how experts are cut."""
        none, now = [0] * len(self._misses), time.perf_counter()
        tier = {"slots": 0, "policy": "none", "hits": none, "lates": none, "misses": list(self._misses)}
        tier |= {"evictions": 0, "write_backs": 0, "staged": 0}
        return {
            "tiers": [tier],
            "links": {
                link.name: {
                    "bytes": link.nbytes,
                    "busy_seconds": link.busy_seconds,
                    "union_seconds": link.union_seconds(now),
                    "copies": link.copies,
                }
                for link in self.mover.links
            },
            "seconds": {
                "wait": self.wait_seconds,
                "exposed": self.exposed_seconds,
                "io": self.mover.io.seconds(now),
                "compute": self.compute_seconds,
                "decide": self.decide_seconds,
            },
            "chunks": {
                "buffers": self.host.slots,
                "buffer_bytes": self.host.slot_nbytes,
                "slices_per_expert": max(map(len, self._cuts)),
            },
        }

    def clocks(self) -> Clocks:
        """Where the time went so far, in seconds, as in `ExpertCache`."""
        times = (self.wait_seconds, self.exposed_seconds, self.compute_seconds, self.decide_seconds)
        return Clocks(0.0, *times, *self.mover.clocks())

    def close(self) -> None:
        """Stop the threads and close the files."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()
        self.mover.close()
        self.store.close()
        self.host.close()


def forward_in_slices(module: Any, hidden: torch.Tensor, routing: Routing, slices: Generator[Slice]) -> torch.Tensor:
    """What `experts.forward_from_leases` computes, [T, H] → [T, H], from slices: the same products, in parts."""
    if not routing.tokens:
        return torch.zeros_like(hidden)
    edges = list(accumulate(routing.tokens, initial=0))
    rows = routing.rows(hidden)
    up_field = up_name(module)
    up = down = rows.new_empty(0)
    with closing(slices):
        for part in slices:
            number = routing.number[part.expert]
            begin, end = edges[number], edges[number + 1]
            weight = part.weight if module.is_transposed else part.weight.t()
            first, last = part.outputs.start, part.outputs.stop
            if part.field == up_field:
                if first == 0:
                    up = rows.new_empty(end - begin, part.width, dtype=weight.dtype)
                torch.mm(rows[begin:end].to(weight.dtype), weight, out=up[:, first:last])
            elif part.field == "down_proj":
                if first == 0:
                    up = module._apply_gate(up) if module.has_gate else module.act_fn(up)
                    if not len(down):
                        down = rows.new_empty(rows.size(0), part.width, dtype=weight.dtype)
                torch.mm(up.to(weight.dtype), weight, out=down[begin:end, first:last])
            elif part.field == f"{up_field}_bias":  # a bias comes after its matrix
                up.add_(part.weight)
            else:
                down[begin:end].add_(part.weight)
    if module.has_post_expert_norm:
        down = module.post_expert_norm(down)
    return routing.combine(hidden, down * routing.weights.unsqueeze(-1))


def open_slices(store: SlicedStore, modules: Sequence[Any], plan: ChunkPlan, readers: int) -> SliceCache:
    """Buffers as planned for the experts of these modules (one per layer).

    Raises `CapacityError` where this machine's products change their bits when a matrix is cut.
    """
    cuts: list[list[Cut]] = []
    checked: set[tuple[torch.dtype, int, int, bool]] = set()
    for layer, module in enumerate(modules):
        layout, turned = store.layout(layer), bool(module.is_transposed)
        cuts.append(cut(layer, layout, fields_in_order(module), turned, plan.nbytes))
        for field in {one.field for one in cuts[-1] if len(one.outputs) < one.width}:
            inputs, outputs = field.shape if turned else reversed(field.shape)
            checked.add((field.dtype, inputs, outputs, turned))
    for dtype, inputs, outputs, turned in sorted(checked, key=str):
        if not products_can_be_cut(dtype, inputs, outputs, turned):
            raise CapacityError(
                "host_memory has no room for a whole expert, and on this machine experts cannot be computed in slices: "
                f"{dtype} products of {outputs} x {inputs} differ in the last bit when cut; give more memory"
            )
    return SliceCache(store, cuts, plan.buffers, plan.nbytes, readers)


def fields_in_order(module: Any) -> list[str]:
    """The fields of an experts module as `forward_in_slices` wants them."""
    up = up_name(module)
    return [up, f"{up}_bias", "down_proj", "down_proj_bias"] if module.has_bias else [up, "down_proj"]
