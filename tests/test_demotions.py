"""Exclusive residency, staged prefetches and withdrawals with real bytes and threads, under random delays."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from moetier.access import Access, ExpertKey, Phase
from moetier.arenas import HostArena, HostTierArena
from moetier.cache import ExpertCache
from moetier.eventlog import Recorder, replay
from moetier.mover import ThreadMover
from moetier.record import PAGE
from moetier.residency import Residency
from moetier.stores.synthetic import FIELD, SyntheticStore
from moetier.tiers import Copy, Kind, Place, TierConfig

pytestmark = pytest.mark.timeout(60)

LAYERS, EXPERTS = 3, 4
RECORDS = LAYERS * EXPERTS


def delayed(call: Callable[..., Any], random: Random, seconds: float) -> Callable[..., Any]:
    def slow(*arguments: Any) -> Any:
        time.sleep(random.random() * seconds)
        return call(*arguments)

    return slow


def make_cache(folder: Path, tiers: list[TierConfig], seed: int, seconds: float = 0.001) -> ExpertCache:
    """Two tiers of ordinary memory over a synthetic store; every read and copy takes a random time."""
    store = SyntheticStore(folder, LAYERS, EXPERTS, PAGE)
    random = Random(seed)
    store.read = delayed(store.read, random, seconds)  # type: ignore[method-assign]
    device = HostTierArena(tiers[0].slots, store.slot_nbytes)
    device.fill = delayed(device.fill, random, seconds)  # type: ignore[method-assign]
    device.save = delayed(device.save, random, seconds)  # type: ignore[method-assign]
    core = Recorder(Residency(tiers, LAYERS, EXPERTS))
    return ExpertCache(store, core, HostArena(tiers[1].slots, store.slot_nbytes), device)


def serve(cache: ExpertCache, random: Random, accesses: int, dirty: bool = False) -> None:
    """Every byte of every lease is looked at; some are changed."""
    store: Any = cache.store
    for number in range(accesses):
        layer = number % LAYERS
        experts = sorted(random.sample(range(EXPERTS), random.randint(1, 3)))
        phase = random.choice(list(Phase))
        keys = tuple(ExpertKey(layer, expert) for expert in experts)
        for lease in cache.stream(Access(number + 1, layer, keys, phase=phase, writes=dirty)):
            words = lease.fields[FIELD]
            assert store.pattern.matches(words, lease.key, store.versions[lease.key])
            if dirty and random.random() < 0.2:
                store.versions[lease.key] += 1
                store.pattern.fill(words, lease.key, store.versions[lease.key])
                lease.dirty = True
        if random.random() < 0.4:
            key = ExpertKey(random.randrange(LAYERS), random.randrange(EXPERTS))
            with cache._condition:
                cache.core.prefetch(key, random.random() < 0.5, random.random() < 0.5)
                cache._start_orders()
        if random.random() < 0.3:
            key = ExpertKey(random.randrange(LAYERS), random.randrange(EXPERTS))
            with cache._condition:
                cache.core.cancel(key)
                cache._start_orders()
        cache.core.check()


@pytest.mark.parametrize("dirty", [False, True])
@pytest.mark.parametrize(
    ("upper", "lower", "spare"), [(1, 12, 0), (6, 7, 0), (6, 7, 2), (4, 4, 2), (10, 3, 3), (2, 1, 1)]
)
def test_every_byte_is_right(tmp_path: Path, upper: int, lower: int, spare: int, dirty: bool) -> None:
    tiers = [
        TierConfig(upper + 2, "lru", "decode-only", staging=2),
        TierConfig(lower, "lru", exclusive=True, spare=spare),
    ]
    with make_cache(tmp_path / "store", tiers, upper + spare) as cache:
        serve(cache, Random(lower), 120, dirty)
        cache.settle()
        links = {link.name: link.copies for link in cache.mover.links}
        below: Any = cache.core.counters()["tiers"][1]  # type: ignore[index]
        if upper + lower > RECORDS and not dirty:
            assert links["disk→host"] <= RECORDS, "nothing is read twice"
            assert not spare or below["demotions"] > 0 or upper == 1
        if not dirty:
            assert links["device→host"] == below["demotions"]
        assert isinstance(cache.core, Recorder)
        again = replay(cache.core.log)
        assert again.digest() == cache.core.digest() and again.counters() == cache.core.counters()


def test_what_left_is_read_again_in_the_background(tmp_path: Path) -> None:
    tiers = [TierConfig(4, "lru"), TierConfig(6, "lru", exclusive=True, refill=True)]
    with make_cache(tmp_path / "store", tiers, 1) as cache:
        serve(cache, Random(2), 120)
        cache.settle()
        below: Any = cache.core.counters()["tiers"][1]  # type: ignore[index]
        links = {link.name: link.copies for link in cache.mover.links}
        assert below["refills"] > 0 and links["device→host"] == 0


def test_demand_overtakes_demotions_and_what_is_awaited_is_promoted(tmp_path: Path) -> None:
    """A busy copier: a demotion waits behind loads unless somebody waits for it."""
    store = SyntheticStore(tmp_path / "store", 1, 8, PAGE)
    device, host = HostTierArena(8, store.slot_nbytes), HostArena(8, store.slot_nbytes)
    begun: list[int] = []
    gate, entered = threading.Event(), threading.Event()
    save = device.save

    def saving(slot: int, target: Any) -> None:
        begun.append(slot)
        entered.set()
        gate.wait(10)
        save(slot, target)

    device.save = saving  # type: ignore[method-assign]
    done = threading.Condition()
    mover = ThreadMover(store, host, device, done, readers=1)
    copies = [Copy(n, ExpertKey(0, n), Place(0, n), Place(1, n), Kind.DEMOTE) for n in range(5)]
    mover.start(copies[:1])
    assert entered.wait(10)
    mover.start(copies[1:])
    mover.start([Copy(9, ExpertKey(0, 6), Place(0, 6), Place(2, -1), Kind.WRITE_BACK)])
    mover.promote([3])
    assert mover.withdraw([0, 2, 7]) == [2], "0 has begun; there is no 7"
    gate.set()
    with done:
        assert done.wait_for(lambda: len(mover.done) == 5, 10)
    assert begun == [0, 6, 3, 1, 4]
    assert sorted(flight.copy.id for flight in mover.done) == [0, 1, 3, 4, 9]
    mover.close()
    store.close()


def test_a_prefetch_that_has_not_begun_is_withdrawn(tmp_path: Path) -> None:
    tiers = [TierConfig(4, "lru"), TierConfig(8, "lru")]
    with make_cache(tmp_path / "store", tiers, 0) as cache:
        gate, entered = threading.Event(), threading.Event()
        read = cache.store.read

        def reading(*arguments: Any) -> int:
            entered.set()
            gate.wait(10)
            return read(*arguments)

        cache.store.read = reading  # type: ignore[method-assign]
        with cache._condition:
            for expert in range(4):
                for layer in range(LAYERS):
                    cache.core.prefetch(ExpertKey(layer, expert))
            cache._start_orders()
        assert entered.wait(10)
        wanted = ExpertKey(0, 1)
        with cache._condition:
            for key in [ExpertKey(layer, expert) for expert in range(4) for layer in range(LAYERS)]:
                if key != wanted:
                    cache.core.cancel(key)
            cache._start_orders()
        cache.core.check()
        gate.set()
        for lease in cache.stream(Access(1, 0, (wanted,))):
            assert lease.key == wanted
        cache.settle()
        disk = cache.mover.links[0]
        assert disk.copies <= 1 + cache.readers, "only what had begun was read"
        cache.core.check()
