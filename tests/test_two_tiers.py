"""Two tiers above home without a GPU: a stand-in for the device arena, everything else as in a real run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import moetier
from moetier.arenas import HostArena
from moetier.cache import ExpertCache
from moetier.record import RecordLayout
from moetier.residency import Residency
from moetier.tiers import TierConfig
from prepared import ONLINE


class PretendDevice:
    """The interface of `DeviceArena` over ordinary memory; poisons what is overwritten."""

    def __init__(self, slots: int, slot_nbytes: int):
        self.slots, self.slot_nbytes, self.device = slots, slot_nbytes, torch.device("cpu")
        self._bytes = torch.zeros(slots, slot_nbytes, dtype=torch.uint8)
        self.fills = 0

    def record(self, slot: int, nbytes: int) -> torch.Tensor:
        return self._bytes[slot, :nbytes]

    def fill(self, slot: int, source: torch.Tensor) -> None:
        self._bytes[slot].fill_(255)
        self.record(slot, source.numel()).copy_(source)
        self.fills += 1

    def used(self, slot: int) -> None:
        assert 0 <= slot < self.slots

    def views(self, slot: int, layout: RecordLayout) -> dict[str, torch.Tensor]:
        return layout.views(self.record(slot, layout.nbytes))


@pytest.fixture(scope="module")
def loaded(checkpoint: Callable[..., Path]) -> Iterator[tuple[Any, list[torch.Tensor]]]:
    """A model with all experts in one tier, and its logits."""
    model = moetier.from_pretrained(checkpoint("qwen3_moe"), slots="100%")
    with torch.no_grad():
        expected = logits(model)
    yield model, expected
    model.moetier.close()


def logits(model: Any) -> list[torch.Tensor]:
    ids = torch.arange(24).view(2, 12)
    return [model(input_ids=ids).logits, model(input_ids=ids[:, :1]).logits]


@pytest.mark.parametrize("policy", ONLINE)
@pytest.mark.parametrize(("device_slots", "host_slots"), [(1, 1), (2, 1), (1, 4), (6, 3), (6, 12), (24, 24)])
def test_two_tiers_equal_one(
    loaded: tuple[Any, list[torch.Tensor]], policy: str, device_slots: int, host_slots: int
) -> None:
    model, expected = loaded
    tiered = model.moetier
    one_tier = tiered.cache
    store = one_tier.store
    core = Residency([TierConfig(device_slots, policy), TierConfig(host_slots, policy)], store.layers, store.experts)
    device = PretendDevice(device_slots, store.slot_nbytes)
    cache = ExpertCache(store, core, HostArena(host_slots, store.slot_nbytes), device)  # type: ignore[arg-type]
    tiered.cache = cache
    try:
        for _ in range(2):
            assert all(torch.equal(a, b) for a, b in zip(logits(model), expected, strict=True))
            core.check()
        stats = tiered.stats()
    finally:
        tiered.cache = one_tier
        cache.mover.close()
        cache.host.close()
    top, below = stats["tiers"]
    assert sum(top["misses"]) == sum(below["hits"]) + sum(below["lates"]) + sum(below["misses"])
    assert stats["links"]["host→device"]["copies"] == device.fills == sum(top["misses"])
    assert stats["links"]["disk→host"]["copies"] == sum(below["misses"])
