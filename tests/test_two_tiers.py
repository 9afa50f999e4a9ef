"""Two tiers above home without a GPU: a stand-in for the device arena, everything else as in a real run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import families
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


@pytest.mark.parametrize("policy", ONLINE)
@pytest.mark.parametrize(("device_slots", "host_slots"), [(1, 1), (2, 1), (1, 4), (6, 3), (6, 12), (24, 24)])
def test_two_tiers_equal_one(tmp_path: Path, policy: str, device_slots: int, host_slots: int) -> None:
    folder = tmp_path / "model"
    families.make_checkpoint(families.FAMILIES["qwen3_moe"], folder)
    model = moetier.from_pretrained(folder, slots="100%")
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        expected = [model(input_ids=ids).logits, model(input_ids=ids[:, :1]).logits]
    tiered = model.moetier
    store = tiered.cache.store
    core = Residency([TierConfig(device_slots, policy), TierConfig(host_slots, policy)], store.layers, store.experts)
    device = PretendDevice(device_slots, store.slot_nbytes)
    one_tier = tiered.cache
    tiered.cache = ExpertCache(store, core, HostArena(host_slots, store.slot_nbytes), device)  # type: ignore[arg-type]
    for _ in range(2):
        with torch.no_grad():
            actual = [model(input_ids=ids).logits, model(input_ids=ids[:, :1]).logits]
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
        core.check()
    stats = tiered.stats()
    top, below = stats["tiers"]
    assert sum(top["misses"]) == sum(below["hits"]) + sum(below["lates"]) + sum(below["misses"])
    assert stats["links"]["host→device"]["copies"] == device.fills == sum(top["misses"])
    assert stats["links"]["disk→host"]["copies"] == sum(below["misses"])
    tiered.cache.close()
    one_tier.close()
