"""The caches of a training run's records: weights in one tier or two, gradients and optimizer states in host memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from moetier.arenas import DeviceArena, HostArena, HostTierArena
from moetier.cache import ExpertCache
from moetier.residency import Residency
from moetier.stores import ExpertStore
from moetier.tiers import configure

CPU = torch.device("cpu")


def small_cache(
    store: ExpertStore, slots: int, counts: Sequence[int], readers: int, policy: str = "lru", writeback: str = "evict"
) -> ExpertCache:
    """A cache in host memory, for the records that only updates need. `writeback`: see `moetier.writeback`."""
    config = configure(slots, sum(counts), len(counts), 1, policy, "always")
    core = Residency([config], len(counts), max(counts), writeback=writeback)
    return ExpertCache(store, core, HostArena(slots, store.slot_nbytes), readers=readers)


def weights_cache(
    store: ExpertStore,
    slots: int,
    counts: Sequence[int],
    top_k: int,
    readers: int,
    policy: str,
    writeback: str,
    device_slots: int | None = None,
    device: torch.device = CPU,
) -> ExpertCache:
    """The cache of weights: `slots` in host memory, where they are updated, and above it `device_slots`, if any.

    Those are in the memory of a GPU; on the CPU in a second arena of host memory, for tests and comparisons.
    """
    sizes = [slots] if device_slots is None else [device_slots, slots]
    configs = [configure(n, sum(counts), len(counts), top_k, policy, "always") for n in sizes]
    if device_slots is not None:
        configs[1] = replace(configs[1], updates=True)
    core = Residency(configs, len(counts), max(counts), writeback=writeback)
    on_gpu = device.type != "cpu" and device_slots is not None
    host = HostArena(slots, store.slot_nbytes, page_locked=on_gpu)
    arena = None if device_slots is None else fast_arena(device_slots, store.slot_nbytes, device)
    return ExpertCache(store, core, host, arena, readers)


def fast_arena(slots: int, slot_nbytes: int, device: torch.device) -> DeviceArena | HostTierArena:
    """Slots where the model computes."""
    if device.type == "cpu":
        return HostTierArena(slots, slot_nbytes)
    return DeviceArena(slots, slot_nbytes, device)
