"""The expert cache over a run: what leases change is there after a commit, and a full disk loses nothing."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moetier.access import Access, ExpertKey
from moetier.arenas import HostArena
from moetier.cache import ExpertCache
from moetier.errors import StoreError
from moetier.record import PAGE, RecordLayout
from moetier.residency import Residency
from moetier.stores import ExpertStore
from moetier.stores.runfolder import RunFolder
from moetier.stores.synthetic import SyntheticStore
from moetier.tiers import configure

LAYERS, EXPERTS, SLOTS = 2, 6, 3
STATE = RecordLayout.of([("sum", torch.float32, (2000,)), ("count", torch.int64, (3,))])


class Shifted(SyntheticStore):
    """Records begin where a checkpoint's might: not on a page."""

    def phase(self, key: ExpertKey) -> int:
        return 64 * (key.expert + 1)

    @property
    def slot_nbytes(self) -> int:
        return self.record_nbytes + PAGE


def cache_over(store: ExpertStore) -> ExpertCache:
    core = Residency([configure(SLOTS, LAYERS * EXPERTS, LAYERS, 1, "lru", "always")], LAYERS, EXPERTS)
    return ExpertCache(store, core, HostArena(SLOTS, store.slot_nbytes), readers=2)


def add(cache: ExpertCache, field: str, key: ExpertKey, time: int, amount: int) -> None:
    for lease in cache.stream(Access(time, key.layer, (key,), writes=True)):
        lease.fields[field].add_(amount)
        lease.dirty = True


def evict(cache: ExpertCache, time: int) -> None:
    """Have everything that was changed written."""
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            for _ in cache.stream(Access(time + layer * EXPERTS + expert, layer, (ExpertKey(layer, expert),))):
                pass
    cache.settle()


def first_words(store: ExpertStore, field: str) -> dict[ExpertKey, int]:
    found = {}
    for key in [ExpertKey(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]:
        into = memoryview(bytearray(store.layout(key.layer).nbytes))
        for segment in range(store.segments(key)):
            store.read(key, segment, into)
        values = store.layout(key.layer).views(torch.frombuffer(into, dtype=torch.uint8))[field].flatten()
        found[key] = int(values[-1])
    return found


@pytest.fixture
def base(tmp_path: Path) -> Iterator[Shifted]:
    yield Shifted(tmp_path / "base", LAYERS, EXPERTS, 5 * PAGE)


def test_changes_come_back(tmp_path: Path, base: Shifted) -> None:
    before = first_words(base, "words")
    chance, added = random.Random(0), dict.fromkeys(before, 0)
    run = RunFolder.create(tmp_path / "run", model="m", fingerprint="f")
    weights = cache_over(run.family("weights", base=base))
    state = cache_over(run.family("state", [STATE] * LAYERS, experts=[EXPERTS] * LAYERS))
    for time in range(1, 120):
        key, amount = chance.choice(list(before)), chance.randrange(1, 9)
        add(weights, "words", key, time, amount)
        add(state, "sum", key, time, amount)
        added[key] += amount
    evict(weights, 200)
    evict(state, 200)
    run.commit(119)
    add(weights, "words", ExpertKey(0, 0), 300, 1000)  # of the next step, which is never committed
    weights.close()
    state.close()
    run.close()
    with RunFolder.open(run.folder) as run:
        again = run.family("weights", base=Shifted(tmp_path / "base", LAYERS, EXPERTS, 5 * PAGE))
        assert first_words(again, "words") == {key: before[key] + added[key] for key in before}
        assert first_words(run.family("state", [STATE] * LAYERS, experts=[EXPERTS] * LAYERS), "sum") == added
        assert not list(run.verify())


def test_a_full_disk_loses_nothing(tmp_path: Path, base: Shifted, monkeypatch: pytest.MonkeyPatch) -> None:
    before = first_words(base, "words")
    run = RunFolder.create(tmp_path / "run", model="m", fingerprint="f")
    weights = cache_over(run.family("weights", base=base))
    add(weights, "words", ExpertKey(0, 1), 1, 5)
    evict(weights, 2)
    run.commit(1)

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        patch.setattr(os, "pwritev", full)
        with pytest.raises(StoreError, match=r"weights\.bin: .*No space left on device; make room"):
            for expert in range(EXPERTS):
                add(weights, "words", ExpertKey(1, expert), 30 + expert, 7)
            weights.settle()
        with pytest.raises(StoreError, match="step 2 cannot be committed"):
            run.commit(2)
    with pytest.raises(StoreError):
        weights.settle()  # tells of every write that failed, once
    # there is room again: what stayed in its slots is written now
    changed = {key for key in before if key.layer == 1 and weights.holding([key])[0]}
    evict(weights, 60)
    run.commit(2)
    found = first_words(weights.store, "words")
    assert changed and {key: found[key] - before[key] for key in changed} == dict.fromkeys(changed, 7)
    assert found[ExpertKey(0, 1)] == before[ExpertKey(0, 1)] + 5
    weights.close()
    run.close()
