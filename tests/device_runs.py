"""Runs of the engine that change records on a device, for the fake CUDA and for a real one."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from moetier.access import Access, ExpertKey
from moetier.arenas import DeviceArena, HostArena
from moetier.cache import ExpertCache
from moetier.lease import Lease
from moetier.misses import Miss
from moetier.record import RecordLayout, round_up
from moetier.residency import Residency
from moetier.tiers import TierConfig

LAYERS, EXPERTS = 3, 8
Launch = Callable[[Callable[[], object]], object]


class AtRandom:
    """A `MissPolicy`: any choice is right, this one makes them all."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)

    def split(self, access: Access, misses: Sequence[Miss]) -> Collection[ExpertKey]:
        return [miss.key for miss in misses if self.random.random() < 0.5]


class MemoryStore:
    """Records of equal words in memory, that can be written; every word of a new one is its key's number."""

    layers, experts, parts = LAYERS, EXPERTS, 3

    def __init__(self, words: int):
        self._layout = RecordLayout.of([("words", torch.int64, (words,))])
        self.slot_nbytes = round_up(self._layout.nbytes, 4096)
        self.home = {
            ExpertKey(layer, expert): bytearray(torch.full((words,), 100 * layer + expert).numpy().tobytes())
            for layer in range(LAYERS)
            for expert in range(EXPERTS)
        }
        self.lock = threading.Lock()

    def layout(self, layer: int) -> RecordLayout:
        return self._layout

    def phase(self, key: ExpertKey) -> int:
        return 0

    def segments(self, key: ExpertKey) -> int:
        return self.parts

    def _part(self, segment: int) -> slice:
        cut = -(-self._layout.nbytes // self.parts)
        return slice(segment * cut, min((segment + 1) * cut, self._layout.nbytes))

    def read(self, key: ExpertKey, segment: int, into: memoryview) -> int:
        part = self._part(segment)
        with self.lock:
            into[part] = self.home[key][part]
        return part.stop - part.start

    def write(self, key: ExpertKey, segment: int, data: memoryview) -> int:
        part = self._part(segment)
        with self.lock:
            self.home[key][part] = data[part]
        return part.stop - part.start

    def close(self) -> None:
        pass


class ChangingRun:
    """Accesses that check every word of a record and change half of the records, on the device or in place."""

    def __init__(
        self,
        slots: int,
        host_slots: int,
        words: int,
        device: torch.device,
        launch: Launch,
        seed: int,
        exclusive: bool = False,
        writeback: str = "evict",
    ):
        self.store, self.launch, self.draw = MemoryStore(words), launch, random.Random(seed)
        configs = [TierConfig(slots), TierConfig(host_slots, exclusive=exclusive)]
        self.core = Residency(configs, LAYERS, EXPERTS, AtRandom(seed), writeback)
        host = HostArena(host_slots, self.store.slot_nbytes, page_locked=True)
        arena = DeviceArena(slots, self.store.slot_nbytes, device)
        self.cache = ExpertCache(self.store, self.core, host, arena, readers=2)
        self.changes: Counter[ExpertKey] = Counter()
        self.wrong = torch.zeros((), dtype=torch.int64, device=device)  # words that were not as expected
        self.in_place = 0

    def run(self, accesses: int, each: Callable[[], Any] = lambda: None) -> None:
        for time in range(1, accesses + 1):
            layer = time % LAYERS
            keys = tuple(
                ExpertKey(layer, expert) for expert in sorted(self.draw.sample(range(EXPERTS), self.draw.randint(1, 5)))
            )
            for batch in self.cache.batches(Access(time, layer, keys, (1,) * len(keys), writes=True)):
                each()
                for lease in batch:
                    self._use(lease)
            if time % 4 == 0:
                with self.cache._condition:
                    key = ExpertKey((layer + 1) % LAYERS, self.draw.randrange(EXPERTS))
                    self.core.prefetch(key, displace=True)
                    self.cache._start_orders()
            self.core.check()

    def _use(self, lease: Lease) -> None:
        words, expected = lease.fields["words"], 100 * lease.key.layer + lease.key.expert + self.changes[lease.key]
        changes = self.draw.random() < 0.5
        if lease.in_place:
            self.in_place += 1
            assert bool((words == expected).all()), f"{lease.key} in place: {set(words.tolist())} instead of {expected}"
        else:
            self.launch(lambda: self.wrong.add_((words != expected).sum()))
        if changes:
            self.changes[lease.key] += 1
            lease.dirty = True
            if lease.in_place:
                self.cache.host.wait_unread(lease.slot)
                words.add_(1)
            else:
                self.launch(lambda: words.add_(1))

    def finish(self) -> None:
        """Flush, close, and look at what was written home."""
        self.cache.flush()
        self.cache.settle()
        self.core.check()
        self.cache.close()
        for key, content in self.store.home.items():
            words = torch.frombuffer(content, dtype=torch.int64)
            assert bool((words == 100 * key.layer + key.expert + self.changes[key]).all()), f"{key} at home"
