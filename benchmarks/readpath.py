"""The disk: plain direct reads against moetier's read path over the same files. Runs in a child process.

Knows nothing about models' math: the accesses find nothing and compute nothing.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import common
from common import MIB

READERS = 4  # moetier's default
THREAD_COUNTS = (1, 2, 4, 8, 16)


def measure_disk(spec: dict[str, Any]) -> dict[str, Any]:
    """Rounds of plain direct reads and of moetier's read path, interleaved."""
    files = shards_of(Path(spec["folder"]))
    nbytes = spec["nbytes"]
    raw: dict[str, list[float]] = {str(threads): [] for threads in THREAD_COUNTS}
    engine: dict[str, list[float]] = {"layer": [], "token": []}
    with ReadPath(spec) as path:
        for number in range(spec["rounds"]):
            for position, threads in enumerate(THREAD_COUNTS):
                start = (number * len(THREAD_COUNTS) + position) * (nbytes // MIB)
                raw[str(threads)].append(common.raw_bandwidth(files, threads, nbytes, start))
                if position % 2 == 0:
                    for kind, width in (("layer", path.experts), ("token", spec["top_k"])):
                        engine[kind].append(path.bandwidth(width, nbytes))
    return {"raw": raw, "moetier": engine, "direct": path.direct, "nbytes": nbytes}


def shards_of(folder: Path) -> list[Path]:
    """The shards that hold experts: all but the smallest."""
    return sorted(folder.glob("*.safetensors"), key=lambda file: file.stat().st_size)[1:]


class ReadPath:
    """moetier's cache with slots for one layer, driven by accesses that find nothing and compute nothing."""

    def __init__(self, spec: dict[str, Any]):
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        from moetier.arenas import HostArena
        from moetier.cache import ExpertCache
        from moetier.hf import find_experts, map_experts
        from moetier.residency import Residency
        from moetier.stores.checkpoint import CheckpointStore
        from moetier.stores.shards import Shards
        from moetier.tiers import TierConfig

        config = AutoConfig.from_pretrained(spec["folder"])
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
        shards = Shards.open(Path(spec["folder"]))
        maps, _ = map_experts(model, find_experts(model), shards, config.dtype)
        store = CheckpointStore(shards, [m.layout for m in maps], [m.recipes for m in maps])
        self.layers, self.experts, self.direct = store.layers, store.experts, store.direct
        core = Residency([TierConfig(self.experts, "lru")], store.layers, store.experts)
        self.cache = ExpertCache(store, core, HostArena(self.experts, store.slot_nbytes), None, READERS)
        self.clock = self.next = 0
        self.bandwidth(self.experts, 1)  # touches every slot and starts the threads

    def bandwidth(self, width: int, nbytes: int) -> float:
        """Bytes/s over at least `nbytes`, in accesses of `width` experts."""
        from moetier.access import Access, ExpertKey

        link = self.cache.mover.links[0]
        before, begin = link.nbytes, time.perf_counter()
        self.next += -self.next % width
        while link.nbytes - before < nbytes:
            if self.next % self.experts + width > self.experts:  # not over the end of a layer
                self.next += -self.next % self.experts
            layer, first = divmod(self.next, self.experts)
            keys = tuple(ExpertKey(layer % self.layers, expert) for expert in range(first, first + width))
            self.next += width
            self.clock += 1
            for _ in self.cache.stream(Access(self.clock, layer % self.layers, keys)):
                pass
        return (link.nbytes - before) / (time.perf_counter() - begin)

    def __enter__(self) -> ReadPath:
        return self

    def __exit__(self, *_: object) -> None:
        self.cache.close()
