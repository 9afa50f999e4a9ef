"""LoRA on tiered experts: low-rank factors that stay in memory, added to an expert's weights whenever it is leased.

Experts stay frozen records. A layer's adapters are `Factors`, which the experts module carries while it runs; forward
and backward compute with W + scale · lhs · rhs, an expert at a time. Merged factors stay with the module for good, and
are in what `save_pretrained` writes. Knows nothing of PEFT; `peft.py` does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moetier.access import ExpertKey
from moetier.lease import Lease
from moetier.record import RecordLayout
from moetier.stores import ExpertStore
from moetier.training.arithmetic import Fields
from moetier.training.sink import Gradients

ACTIVE, MERGED = "_moetier_adapters", "_moetier_merged"  # of an experts module: {field: factors of it}


@dataclass(frozen=True, slots=True)
class Factors:
    """What an adapter adds to one field of a layer's E experts: scale · lhs · rhs, in the field's dtype."""

    field: str
    lhs: torch.Tensor  # [E, rows of the field, rank]
    rhs: torch.Tensor  # [E, rank, columns of the field]
    scale: float


def factors_of(module: Any) -> list[Factors]:
    """The adapters of an experts module, those that are merged first."""
    found: list[Factors] = []
    for place in (MERGED, ACTIVE):
        for factors in vars(module).get(place, {}).values():
            found += factors
    return found


def with_adapters(fields: Fields, expert: int, adapters: Sequence[Factors]) -> Fields:
    """An expert's fields, those that are adapted as new tensors."""
    fields = dict(fields)
    for of in adapters:
        weight, lhs, rhs = fields[of.field], of.lhs[expert], of.rhs[expert]
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            fields[of.field] = torch.addmm(weight, lhs, rhs, alpha=of.scale)
    return fields


def adapted(batches: Iterable[Sequence[Lease]], adapters: Sequence[Factors]) -> Iterator[list[Lease]]:
    """The leases with adapted fields. One by one, so that no more than one expert exists twice."""
    for batch in batches:
        for lease in batch:
            yield [Lease(lease.key, with_adapters(lease.fields, lease.key.expert, adapters), lease.slot)]


class FactorGradients:
    """Collects, from the gradients of adapted experts, those of the factors; experts without tokens have zeros."""

    def __init__(self, adapters: Sequence[Factors]):
        self._adapters = adapters
        self._found = [(torch.zeros_like(of.lhs), torch.zeros_like(of.rhs)) for of in adapters]

    def add(self, key: ExpertKey, gradients: Gradients) -> None:
        """The gradients of one expert's fields."""
        for of, (of_lhs, of_rhs) in zip(self._adapters, self._found, strict=True):
            gradient = gradients[of.field]
            torch.mm(gradient, of.rhs[key.expert].t(), out=of_lhs[key.expert]).mul_(of.scale)
            torch.mm(of.lhs[key.expert].t(), gradient, out=of_rhs[key.expert]).mul_(of.scale)

    def results(self) -> list[torch.Tensor]:
        """Gradients of lhs and rhs of all adapters, in turn."""
        return [gradient for pair in self._found for gradient in pair]


class MergedStore:
    """A store's records with the merged adapters of their layers added, for saving. Reads whole records."""

    def __init__(self, store: ExpertStore, merged: Sequence[list[Factors]]):
        self._store, self._merged = store, merged

    @property
    def layers(self) -> int:
        """MoE layers."""
        return self._store.layers

    @property
    def experts(self) -> int:
        """Experts of the layer that has most."""
        return self._store.experts

    @property
    def slot_nbytes(self) -> int:
        """Bytes that hold any record."""
        return self._store.slot_nbytes

    def layout(self, layer: int) -> RecordLayout:
        """How a layer's records lie."""
        return self._store.layout(layer)

    def phase(self, key: ExpertKey) -> int:
        """Where a record starts."""
        return self._store.phase(key)

    def segments(self, key: ExpertKey) -> int:
        """One."""
        return 1

    def read(self, key: ExpertKey, segment: int, into: memoryview) -> int:
        """Read a record into `into`, and add what is merged."""
        nbytes = sum(self._store.read(key, part, into) for part in range(self._store.segments(key)))
        views = self.layout(key.layer).views(torch.frombuffer(into, dtype=torch.uint8))
        for name, field in with_adapters(views, key.expert, self._merged[key.layer]).items():
            if field is not views[name]:
                views[name].copy_(field)
        return nbytes

    def close(self) -> None:
        """Nothing: the store is not its own."""


def merged_store(store: ExpertStore, modules: Sequence[Any]) -> ExpertStore | None:
    """The store as it is with the merged adapters of these modules, one a layer; None where nothing is merged."""
    merged = [
        [
            Factors(of.field, of.lhs.cpu(), of.rhs.cpu(), of.scale)
            for factors in vars(module).get(MERGED, {}).values()
            for of in factors
        ]
        for module in modules
    ]
    return MergedStore(store, merged) if any(merged) else None
