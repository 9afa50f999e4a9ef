"""Write-back of changed records that stay: when it happens, what it waits for, and that no write sees a change."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from moetier.access import Access, ExpertKey, Phase
from moetier.arenas import HostArena, HostTierArena
from moetier.cache import ExpertCache
from moetier.errors import ConfigError, MoetierError, StoreError
from moetier.eventlog import Recorder
from moetier.lease import WritableLease
from moetier.record import PAGE
from moetier.residency import Residency
from moetier.stores.synthetic import FIELD, SyntheticStore
from moetier.tiers import Copy, Kind, Ticket, TierConfig
from moetier.writeback import DEPTH, WRITEBACKS

pytestmark = pytest.mark.timeout(60)
LAYERS, EXPERTS = 2, 8


def k(expert: int, layer: int = 0) -> ExpertKey:
    return ExpertKey(layer, expert)


class Bench:
    """A core of 2 layers x 8 experts, driven by hand; every load lands at once, writes only when told."""

    def __init__(self, *slots: int, writeback: str = "evict", limit: int | None = None, **options: Any):
        tiers = [TierConfig(count, "lru", **(options if index else {})) for index, count in enumerate(slots)]
        self.core = Residency(tiers, LAYERS, EXPERTS, None, writeback, limit)
        self.writes: list[Copy] = []  # taken, not ended
        self.time = 0

    def acquire(self, *experts: int, writes: bool = True) -> Ticket:
        self.time += 1
        ticket = self.core.acquire(Access(self.time, 0, tuple(k(expert) for expert in experts), writes=writes))
        self.move()
        return ticket

    def move(self) -> None:
        while orders := self.core.take():
            self.writes += [copy for copy in orders if copy.kind in (Kind.CLEAN, Kind.WRITE_BACK)]
            for copy in orders:
                if copy not in self.writes:
                    self.core.completed(copy.id)
        self.core.check()

    def release(self, ticket: Ticket, dirty: bool = True) -> None:
        while ticket.ready:
            self.core.release(ticket, ticket.ready.popleft(), dirty)
            self.move()

    def change(self, *experts: int) -> None:
        """One access that changes these, to its end; none of them may have to wait."""
        ticket = self.acquire(*experts)
        self.release(ticket)
        assert ticket.done

    def end(self, *keys: ExpertKey, ok: bool = True) -> None:
        """The running writes of these keys end; of all of them without keys."""
        ended = [copy for copy in self.writes if not keys or copy.key in keys]
        self.writes = [copy for copy in self.writes if copy not in ended]
        for copy in ended:
            self.core.completed(copy.id, ok)
            self.move()

    def writing(self) -> list[ExpertKey]:
        return [copy.key for copy in self.writes]

    def counts(self) -> dict[str, Any]:
        counters: Any = self.core.counters()["writebacks"]
        return counters


# -- when --------------------------------------------------------------------------------------------------------------


def test_evict_writes_only_for_a_slot() -> None:
    bench = Bench(2)
    bench.change(0, 1)
    assert bench.writing() == [] and list(bench.core.writing.dirty) == [k(0), k(1)]
    bench.acquire(2)
    assert [(copy.key, copy.kind) for copy in bench.writes] == [(k(0), Kind.WRITE_BACK)]
    bench.end()
    assert bench.counts() == bench.counts() | {"dirty": 1, "updates": 2, "written": 1, "cleaned": 0}
    assert bench.counts()["amplification"] == 0.5


def test_writethrough_writes_at_once_a_few_at_a_time_the_oldest_first() -> None:
    bench = Bench(8, writeback="writethrough")
    bench.change(*range(6))
    assert bench.writing() == [k(expert) for expert in range(DEPTH)]
    assert {copy.kind for copy in bench.writes} == {Kind.CLEAN}
    bench.end(k(2))
    assert bench.writing() == [k(0), k(1), k(3), k(4)]
    bench.end()
    bench.end()
    assert list(bench.core.writing.dirty) == [] and bench.core.residents() == {k(expert) for expert in range(6)}
    assert bench.counts() == bench.counts() | {"cleaned": 6, "written": 6, "amplification": 1.0}


def test_periodic_writes_what_was_dirty_at_its_beat() -> None:
    bench = Bench(8, writeback="periodic(every=4, share=1)")
    bench.change(0)
    bench.change(1)
    bench.release(bench.acquire(7), dirty=False)
    assert bench.writing() == []
    bench.change(2)  # the fourth access
    assert bench.writing() == [k(0), k(1), k(2)]
    bench.change(3)
    assert bench.writing() == [k(0), k(1), k(2)]


def test_periodic_writes_the_oldest_beyond_its_share() -> None:
    bench = Bench(8, writeback="periodic(every=1000, share=0.5)")
    bench.change(0, 1, 2)
    bench.change(0)  # as old as it was
    bench.change(3)
    assert bench.writing() == []
    bench.change(4)
    assert bench.writing() == [k(0)]


def test_a_limit_makes_writes_begin_whatever_the_policy() -> None:
    bench = Bench(8, limit=2)
    bench.change(0, 1)
    assert bench.writing() == [] and not bench.core.writing.throttled
    bench.change(2, 3)
    assert bench.writing() == [k(0), k(1)] and bench.core.writing.throttled
    bench.end(k(1))
    assert bench.core.writing.throttled
    bench.end(k(0))
    assert not bench.core.writing.throttled and bench.writing() == []


@pytest.mark.parametrize("name", sorted(WRITEBACKS))
def test_policies_know_their_parameters(name: str) -> None:
    Bench(4, writeback=name)
    with pytest.raises(ConfigError, match="write-back policy"):
        Bench(4, writeback=f"{name}(color=3)")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sometimes", "unknown write-back policy 'sometimes'; choose one of: evict, periodic, writethrough"),
        ("periodic(every=0)", "every must be a whole number of accesses, at least 1, got 0"),
        ("periodic(every=1.5)", "got 1.5"),
        ("periodic(share=2)", "share must be between 0 and 1, got 2"),
    ],
)
def test_what_cannot_be_is_told(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        Bench(4, writeback=text)


def test_a_limit_of_nothing_is_told() -> None:
    with pytest.raises(ConfigError, match="dirty_limit must be at least 1"):
        Bench(4, limit=0)


# -- who waits for whom ------------------------------------------------------------------------------------------------


def test_readers_have_a_record_while_it_is_written_and_writers_when_it_is_home() -> None:
    bench = Bench(4, writeback="writethrough")
    bench.change(0)
    reader = bench.acquire(0, writes=False)
    assert list(reader.ready) == [k(0)]
    writer = bench.acquire(0, 1)
    assert list(writer.ready) == [k(1)] and bench.core.promoted == [bench.writes[0].id]
    bench.end()
    assert list(writer.ready) == [k(1), k(0)] and not bench.core.writing.dirty
    bench.release(writer)
    bench.release(reader, dirty=False)
    assert bench.writing() == [k(1), k(0)]


def test_what_a_writer_holds_is_not_written() -> None:
    bench = Bench(4)
    bench.change(0)
    writer = bench.acquire(0)
    assert not bench.core.clean(k(0))
    bench.release(writer, dirty=False)
    assert bench.core.clean(k(0)) and not bench.core.clean(k(0))
    bench.move()
    bench.end()
    assert not bench.core.clean(k(0)) and bench.counts()["updates"] == 1


def test_a_writer_that_gives_up_waits_no_more() -> None:
    bench = Bench(4, writeback="writethrough")
    bench.change(0)
    writer = bench.acquire(0)
    bench.core.abort(writer)
    bench.core.check()
    bench.end()
    assert list(writer.ready) == [] and not bench.core.tickets


def test_a_record_that_is_written_is_no_victim_and_serves_the_next_when_it_is_home() -> None:
    bench = Bench(2, writeback="writethrough")
    bench.change(0, 1)
    ticket = bench.acquire(2, 3)
    assert ticket.waiting == [k(2), k(3)] and bench.writing() == [k(0), k(1)]
    bench.end(k(1))
    assert ticket.waiting == [k(3)] and list(ticket.ready) == [k(2)]
    bench.end(k(0))
    assert not ticket.waiting and bench.counts()["written"] == 2


def test_only_an_access_that_writes_may_change() -> None:
    bench = Bench(2)
    ticket = bench.acquire(0, writes=False)
    with pytest.raises(MoetierError, match=r"expert=0\) was changed by an access that only reads; give its Access"):
        bench.release(ticket)


def test_what_its_user_has_saved_is_not_written() -> None:
    bench = Bench(2, 4)
    bench.change(0)
    ticket = bench.acquire(0)
    bench.core.release(ticket, ticket.ready.popleft(), False, True)
    bench.core.check()
    bench.release(bench.acquire(1, 2), dirty=False)
    assert bench.writing() == [] and not bench.core.writing.dirty


# -- two tiers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exclusive", [False, True])
def test_a_record_of_the_device_is_cleaned_there(exclusive: bool) -> None:
    bench = Bench(2, 4, writeback="writethrough", exclusive=exclusive)
    bench.change(0)
    assert [(copy.source.tier, copy.target.tier) for copy in bench.writes] == [(0, 2)]
    assert k(0) not in bench.core.residents(1)
    bench.end()
    bench.release(bench.acquire(1), dirty=False)
    bench.release(bench.acquire(2), dirty=False)
    assert bench.writing() == [] and k(0) not in bench.core.residents()


# -- failures ----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_written_stays_dirty_and_is_tried_again_only_for_a_reason() -> None:
    bench = Bench(4, writeback="writethrough")
    bench.change(0)
    bench.end(ok=False)
    assert list(bench.core.writing.dirty) == [k(0)] and bench.writing() == [] and bench.counts()["failed"] == 1
    bench.change(1)
    assert bench.writing() == [k(1)]
    bench.change(0)
    assert bench.writing() == [k(1), k(0)]
    bench.end(k(0), ok=False)
    bench.core.flush()
    bench.move()
    assert bench.writing() == [k(1), k(0)]
    bench.end()
    assert not bench.core.writing.dirty and not bench.core.writing.flushing


def test_a_flush_is_over_when_everything_was_tried() -> None:
    bench = Bench(8)
    bench.change(*range(6))
    bench.core.flush()
    bench.move()
    assert len(bench.writes) == DEPTH and len(bench.core.writing.flushing) == 6
    bench.end(k(0), ok=False)
    bench.end()
    bench.end()
    assert not bench.core.writing.flushing and list(bench.core.writing.dirty) == [k(0)]


def test_a_flush_counts_what_is_on_its_way_out_and_what_changes_again_counts_for_the_next() -> None:
    bench = Bench(2)
    bench.change(0, 1)
    bench.acquire(2)
    bench.core.flush()
    bench.move()
    assert bench.writing() == [k(0), k(1)] and {copy.kind for copy in bench.writes} == {Kind.WRITE_BACK, Kind.CLEAN}
    bench.end()
    assert not bench.core.writing.flushing and not bench.core.writing.dirty


# -- real bytes --------------------------------------------------------------------------------------------------------


class TearingStore(SyntheticStore):
    """Writes a record in parts with time between them: a change under a write would tear it. Looks for torn ones."""

    def __init__(self, folder: Path, seconds: float = 0.001):
        super().__init__(folder, LAYERS, EXPERTS, 2 * PAGE)
        self.seconds, self.broken = seconds, False
        self.home = {k(expert, layer): 0 for expert in range(EXPERTS) for layer in range(LAYERS)}  # whole versions
        self.at_once: set[ExpertKey] = set()
        self.torn: list[str] = []

    def segments(self, key: ExpertKey) -> int:
        return 1

    def read(self, key: ExpertKey, segment: int, into: memoryview) -> int:
        for part in range(2):
            self._files[key.layer].read_into(key.expert * 2 * PAGE + part * PAGE, into[part * PAGE : (part + 1) * PAGE])
        return 2 * PAGE

    def write(self, key: ExpertKey, segment: int, data: memoryview) -> int:
        if key in self.at_once:
            self.torn.append(f"two writes of {key} at once")
        self.at_once.add(key)
        try:
            copied = bytearray(data[:PAGE])
            time.sleep(self.seconds * random.random())
            if self.broken:
                raise StoreError("the disk is full")
            copied += data[PAGE:]
            words = torch.frombuffer(copied, dtype=torch.int64)
            version = int(words[0])
            if not self.pattern.matches(words, key, version):
                self.torn.append(f"{key}: version {version} was changed while it was written")
            if version < self.home[key]:
                self.torn.append(f"{key}: version {version} over {self.home[key]}")
            self.home[key] = version
            super().write(key, segment, memoryview(data))
            return len(data)
        finally:
            self.at_once.remove(key)


def open_cache(
    store: SyntheticStore, slots: int, lower: int = 0, writeback: str = "evict", limit: int | None = None
) -> ExpertCache:
    tiers = [TierConfig(slots, "lru")] + [TierConfig(lower, "lru", exclusive=True, spare=1)] * (lower > 0)
    core = Recorder(Residency(tiers, store.layers, store.experts, None, writeback, limit))
    device = HostTierArena(slots, store.slot_nbytes) if lower else None
    return ExpertCache(store, core, HostArena(lower or slots, store.slot_nbytes), device)


def change(store: SyntheticStore, lease: Any, slowly: bool = True) -> None:
    """The next version, half by half."""
    words, key = lease.fields[FIELD], lease.key
    new = torch.empty_like(words)
    store.versions[key] += 1
    store.pattern.fill(new, key, store.versions[key])
    half = len(words) // 2
    words[:half] = new[:half]
    if slowly:
        time.sleep(0.0003)
    words[half:] = new[half:]
    lease.dirty = True


def serve(cache: ExpertCache, accesses: int, seed: int, writes: float, layer: int | None = None) -> None:
    store: Any = cache.store
    draw = random.Random(seed)
    for _ in range(accesses):
        at = draw.randrange(LAYERS) if layer is None else layer
        experts = sorted(draw.sample(range(EXPERTS), draw.randint(1, 4)))
        writing = draw.random() < writes
        access = Access(1, at, tuple(k(expert, at) for expert in experts), phase=Phase.PREFILL, writes=writing)
        for lease in cache.stream(access):
            assert store.pattern.matches(lease.fields[FIELD], lease.key, store.versions[lease.key])
            if writing and draw.random() < 0.7:
                change(store, lease)


@pytest.mark.parametrize("writeback", ["evict", "periodic(every=5)", "periodic(share=0.2)", "writethrough"])
@pytest.mark.parametrize("tiers", [(5, 0), (16, 0), (3, 7)])
def test_no_write_sees_a_change_and_no_change_is_lost(tmp_path: Path, tiers: tuple[int, int], writeback: str) -> None:
    store = TearingStore(tmp_path)
    with open_cache(store, *tiers, writeback=writeback, limit=3) as cache:
        serve(cache, 40, 1, 0.7)
        cache.core.check()
        before = cache.core.residents()
        cache.flush()
        assert not cache.core.writing.dirty and cache.dirty_nbytes == 0
        assert cache.core.residents() >= before
        assert store.home == store.versions
        serve(cache, 15, 2, 0.7)
        counts = cache.stats()["writebacks"]
        assert counts["dirty_bytes"] == 2 * PAGE * counts["dirty"]
        assert counts["updates"] >= counts["written"] >= counts["cleaned"]
        cache.flush()
    assert store.torn == [] and store.home == store.versions


def test_several_threads_each_with_a_layer_of_its_own_and_one_that_flushes(tmp_path: Path) -> None:
    store = TearingStore(tmp_path)
    with open_cache(store, 7, writeback="periodic(every=3)", limit=4) as cache, ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(serve, cache, 40, layer, 0.8, layer) for layer in range(LAYERS)]
        jobs.append(pool.submit(lambda: [cache.flush() for _ in range(6)]))
        for job in jobs:
            job.result(50)
        cache.flush()
        cache.core.check()
    assert store.torn == [] and store.home == store.versions


def test_the_limit_holds_but_for_what_is_in_use(tmp_path: Path) -> None:
    store = TearingStore(tmp_path, seconds=0.004)
    most = 0
    with open_cache(store, 16, limit=2) as cache:
        for round in range(12):
            keys = tuple(k(expert, round % 2) for expert in range(round % 3, round % 3 + 3))
            for lease in cache.stream(Access(1, round % 2, keys, writes=True)):
                most = max(most, len(cache.core.writing.dirty))
                change(store, lease, slowly=False)
        cache.flush()
    assert 2 < most <= 2 + 3 and store.home == store.versions


@pytest.mark.parametrize("tiers", [(6, 0), (3, 8)])
def test_a_full_disk_is_told_at_the_flush_and_forgotten_once_there_is_room(
    tmp_path: Path, tiers: tuple[int, int]
) -> None:
    store = TearingStore(tmp_path)
    with open_cache(store, *tiers, writeback="writethrough") as cache:
        store.broken = True
        for lease in cache.stream(Access(1, 0, (k(0), k(1), k(2)), writes=True)):
            change(store, lease)
        for _ in range(2):
            with pytest.raises(StoreError, match="the disk is full"):
                cache.flush()
            assert sorted(cache.core.writing.dirty) == [k(0), k(1), k(2)]
        for lease in cache.stream(Access(1, 0, (k(0), k(1), k(2)))):
            assert store.pattern.matches(lease.fields[FIELD], lease.key, 1)
        store.broken = False
        cache.flush()
        cache.flush()
        cache.settle()
        cache.core.check()
    assert store.home == store.versions and store.torn == []


def test_a_background_write_that_failed_is_told_when_settling_too(tmp_path: Path) -> None:
    store = TearingStore(tmp_path)
    with open_cache(store, 6, writeback="writethrough") as cache:
        store.broken = True
        for lease in cache.stream(Access(1, 0, (k(0),), writes=True)):
            change(store, lease)
        with pytest.raises(StoreError, match="the disk is full"):
            cache.settle()
        cache.settle()


def test_a_write_back_that_failed_an_access_is_told_when_settling_until_it_is_made_good(tmp_path: Path) -> None:
    """The record is still not home, whoever was told: unlike a failed read this must not be forgotten."""
    store = TearingStore(tmp_path)
    with open_cache(store, 2) as cache:
        for lease in cache.stream(Access(1, 0, (k(0), k(1)), writes=True)):
            change(store, lease)
        store.broken = True
        for again in (False, True):
            with pytest.raises((StoreError, MoetierError), match="the disk is full"):
                list(cache.stream(Access(2, 0, (k(2), k(3)))))
            store.broken = not again
            if not again:
                with pytest.raises(StoreError, match="the disk is full"):
                    cache.settle()
                cache.settle()
        assert len(list(cache.stream(Access(3, 0, (k(2), k(3)))))) == 2
        cache.settle()
    assert store.home[k(0)] == store.home[k(1)] == 1


def test_a_flush_inside_a_stream_that_writes_is_an_error_not_a_hang(tmp_path: Path) -> None:
    store = TearingStore(tmp_path)
    with open_cache(store, 4) as cache:
        for lease in cache.stream(Access(1, 0, (k(0),), writes=True)):
            change(store, lease)
        for _ in cache.stream(Access(2, 0, (k(0),))):
            cache.flush()  # readers do not mind
        for lease in cache.stream(Access(3, 0, (k(0),), writes=True)):
            change(store, lease)
        for _ in cache.stream(Access(4, 0, (k(0),), writes=True)):
            with pytest.raises(MoetierError, match="end that stream"):
                cache.flush()
        cache.flush()


def test_leases_to_read_cannot_be_made_dirty(tmp_path: Path) -> None:
    with open_cache(TearingStore(tmp_path), 4) as cache:
        for lease in cache.stream(Access(1, 0, (k(0),))):
            assert not lease.dirty and not isinstance(lease, WritableLease)
            with pytest.raises(MoetierError, match="writes=True"):
                lease.dirty = True


def test_closing_ends_the_writes_that_run(tmp_path: Path) -> None:
    store = TearingStore(tmp_path, seconds=0.01)
    with open_cache(store, 8, writeback="writethrough") as cache:
        for lease in cache.stream(Access(1, 0, tuple(k(expert) for expert in range(DEPTH)), writes=True)):
            change(store, lease, slowly=False)
    assert [store.home[k(expert)] for expert in range(DEPTH)] == [1] * DEPTH and threading.active_count() < 20
