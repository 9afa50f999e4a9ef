"""The caches of records that only training has: gradients and optimizer states, in host memory."""

from __future__ import annotations

from collections.abc import Sequence

from moetier.arenas import HostArena
from moetier.cache import ExpertCache
from moetier.residency import Residency
from moetier.stores import ExpertStore
from moetier.tiers import configure


def small_cache(
    store: ExpertStore, slots: int, counts: Sequence[int], readers: int, policy: str = "lru", writeback: str = "evict"
) -> ExpertCache:
    """A cache in host memory, for the records that only updates need. `writeback`: see `moetier.writeback`."""
    config = configure(slots, sum(counts), len(counts), 1, policy, "always")
    core = Residency([config], len(counts), max(counts), writeback=writeback)
    return ExpertCache(store, core, HostArena(slots, store.slot_nbytes), readers=readers)
