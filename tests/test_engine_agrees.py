"""A simulated run is a real run without bytes: one recorded trace through both, decision by decision, every policy.

The trace is recorded from a tiny model. The real engine reads the model's checkpoint from disk. Without overlap the
simulator must find by itself what the engine did; with overlap (threads, delays, prefetches in flight) time decides, so
the run's event log is replayed.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import families
import moetier
from moetier.access import Access, ExpertKey, Phase
from moetier.arenas import HostArena
from moetier.cache import ExpertCache
from moetier.eventlog import EventLog, Recorder, replay
from moetier.policies import POLICIES
from moetier.record import RecordLayout
from moetier.residency import Residency
from moetier.simulate.clock import Clock
from moetier.simulate.config import SimulationConfig, Timing
from moetier.simulate.links import FREE
from moetier.simulate.run import InstantDriver, prepare, tier_configs
from moetier.simulate.witness import Noted, attach, tiers_of
from moetier.tiers import TierConfig
from test_two_tiers import PretendDevice

LINKS = {"disk→host": "disk_read", "host→device": "h2d"}  # of the real mover, and of the virtual one
POLICY = pytest.mark.parametrize("policy", sorted(POLICIES))


class Recorded(NamedTuple):
    """What the tests share: the accesses of a model's run, some more to fit on, and the store of its checkpoint."""

    accesses: list[Access]
    fit: list[Access]
    store: Any
    layers: int
    experts: int
    nbytes: int


class BorrowedStore:
    """A store that is closed by its owner; with `delay`, reads take their time."""

    def __init__(self, store: Any, delay: float = 0.0, seed: int = 0):
        self._store, self._delay, self._random = store, delay, random.Random(seed)
        self.layers, self.experts, self.slot_nbytes = store.layers, store.experts, store.slot_nbytes

    def layout(self, layer: int) -> RecordLayout:
        layout: RecordLayout = self._store.layout(layer)
        return layout

    def phase(self, key: ExpertKey) -> int:
        return int(self._store.phase(key))

    def segments(self, key: ExpertKey) -> int:
        return int(self._store.segments(key))

    def read(self, key: ExpertKey, segment: int, into: memoryview) -> int:
        if self._delay:
            time.sleep(self._delay * (0.5 + self._random.random()))
        return int(self._store.read(key, segment, into))

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    """Route a few texts through a tiny model: prefills of 6 tokens, then 12 tokens one by one."""
    folder = tmp_path_factory.mktemp("engine") / "model"
    families.make_checkpoint(families.FAMILIES["qwen3_moe"], folder)
    model: Any = moetier.from_pretrained(folder, slots="100%", policy="mrs", record_events=True)
    choose = random.Random(0)
    with torch.no_grad():
        for _ in range(6):
            words = [choose.randrange(64) for _ in range(5)]
            text = [choose.choice(words) for _ in range(18)]
            model(input_ids=torch.tensor([text[:6]]))
            for token in text[6:]:
                model(input_ids=torch.tensor([[token]]))
    accesses = accesses_of(model.moetier.events())
    store = model.moetier.cache.store
    half = len(accesses) // 2
    assert {access.phase for access in accesses[half:]} == set(Phase)
    yield Recorded(accesses[half:], accesses[:half], store, store.layers, store.experts, store.layout(0).nbytes)
    model.moetier.close()


def accesses_of(log: EventLog) -> list[Access]:
    accesses = []
    for name, *arguments in log.events:
        if name == "acquire":
            time, layer, experts, tokens, phase, sequence, mass, *_ = arguments[0]
            keys = tuple(ExpertKey(layer, expert) for expert in experts)
            accesses.append(Access(time, layer, keys, tuple(tokens), Phase(phase), sequence, tuple(mass)))
    return accesses


def make_engine(recorded: Recorded, core: Any, readers: int, delay: float = 0.0) -> ExpertCache:
    """A cache for a core of one or two tiers over the checkpoint."""
    store = BorrowedStore(recorded.store, delay)
    slots = [tier.slots for tier in core.configs]
    device: Any = PretendDevice(slots[0], store.slot_nbytes) if len(slots) == 2 else None
    return ExpertCache(store, core, HostArena(slots[-1], store.slot_nbytes), device, readers)


# -- without overlap: the simulator finds it by itself ----------------------------------------------------------------


class Row(NamedTuple):
    """What an access did: per tier hits, late arrivals and misses so far; bytes per link so far."""

    counts: list[tuple[int, int, int]]
    nbytes: dict[str, int]


def counts_of(driver: Any) -> list[tuple[int, int, int]]:
    return [(sum(tier.hits), sum(tier.lates), sum(tier.misses)) for tier in tiers_of(driver)]


def run_engine(recorded: Recorded, tiers: Sequence[TierConfig]) -> tuple[list[Row], list[list[Noted]]]:
    core = Residency(tiers, recorded.layers, recorded.experts)
    prepare([core], recorded.accesses, recorded.fit)
    witnesses, rows = attach(core), []
    with make_engine(recorded, core, readers=1) as cache:
        for access in recorded.accesses:
            assert sorted(lease.key for lease in cache.stream(access)) == list(access.keys)
            nbytes = {LINKS[link.name]: link.nbytes for link in cache.mover.links if link.name in LINKS}
            rows.append(Row(counts_of(core), nbytes))
        core.check()
    return rows, [witness.noted for witness in witnesses]


def run_clock(
    recorded: Recorded, tiers: Sequence[TierConfig], config: SimulationConfig
) -> tuple[list[Row], list[list[Noted]]]:
    driver = Clock([tiers], recorded.layers, recorded.experts, config, top_k=3)
    prepare(driver.caches, recorded.accesses, recorded.fit)
    witnesses, rows = attach(driver.caches[0]), []
    used = ["disk_read", "h2d"][: len(tiers)]
    for access in recorded.accesses:
        driver.run([access])
        rows.append(Row(counts_of(driver.caches[0]), {name: driver.bytes_moved()[name] for name in used}))
    return rows, [witness.noted for witness in witnesses]


def run_instant(recorded: Recorded, tiers: Sequence[TierConfig]) -> tuple[list[Row], list[list[Noted]]]:
    driver = InstantDriver([tiers], recorded.layers, recorded.experts)
    prepare(driver.caches, recorded.accesses, recorded.fit)
    witnesses, rows = attach(driver.caches[0]), []
    for access in recorded.accesses:
        driver.run([access])
        counts = counts_of(driver.caches[0])
        rows.append(Row(counts, {"disk_read": counts[0][2] * recorded.nbytes}))
    return rows, [witness.noted for witness in witnesses]


@POLICY
@pytest.mark.parametrize(
    "options",
    [
        {"slots": 10},
        {"slots": 2},  # waves
        {"slots": 12, "staging": 3, "admission": "decode-only", "floor": 1},
        {"slots": 9, "host_slots": 16},  # in waves over two tiers, the speed of the links would decide
        {"slots": 8, "host_slots": 12, "host_policy": "lru"},
    ],
    ids=["one tier", "waves", "staging", "two tiers", "two policies"],
)
def test_a_simulated_run_is_the_real_one(policy: str, options: dict[str, Any], recorded: Recorded) -> None:
    config = SimulationConfig(policy, timing=Timing(recorded.nbytes, FREE, FREE, FREE, FREE), **options)
    largest = max(len(access.keys) for access in recorded.accesses)
    (tiers,) = tier_configs(config, 1, 0 if config.staging else largest)
    real = run_engine(recorded, tiers)
    assert run_clock(recorded, tiers, config) == real
    if len(tiers) == 1:
        assert run_instant(recorded, tiers) == real
    (hits, lates, misses), *_ = real[0][-1].counts
    assert hits + lates + misses == sum(len(access.keys) for access in recorded.accesses)
    assert misses > recorded.layers * recorded.experts and lates == 0
    if options["slots"] > 2:
        assert hits > 0
    assert real[0][-1].nbytes["disk_read"] > 0


# -- with overlap: the event log of the run ---------------------------------------------------------------------------


class Notes:
    """What every access of a core found, and how many copies into each tier had landed before it."""

    def __init__(self, core: Residency):
        self.accesses: list[tuple[list[tuple[int, int, int]], tuple[int, ...]]] = []
        self.landed = [0] * len(core.configs)
        self.witnesses = attach(core)
        self._core, self._acquire, self._completed = core, core.acquire, core.completed
        core.acquire, core.completed = self.acquire, self.completed  # type: ignore[method-assign]

    def acquire(self, access: Access) -> Any:
        ticket = self._acquire(access)
        self.accesses.append((counts_of(self._core), tuple(self.landed)))
        return ticket

    def completed(self, copy_id: int, ok: bool = True) -> None:
        self.landed[self._core._orders.copies[copy_id].target.tier] += ok
        self._completed(copy_id, ok)


def serve(recorded: Recorded, cache: ExpertCache, accesses: Sequence[Access]) -> None:
    """Stream accesses; prefetch two experts of the next one just before it comes."""
    for access, following in zip(accesses, [*accesses[1:], None], strict=True):
        assert sorted(lease.key for lease in cache.stream(access)) == list(access.keys)
        with cache._condition:
            for key in following.keys[-2:] if following is not None else ():
                cache.core.prefetch(key, displace=True)
            cache._start_orders()


def in_threads(*jobs: Callable[[], None]) -> None:
    errors: list[BaseException] = []

    def guarded(job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(job,), daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a stream hangs"
    if errors:
        raise errors[0]


@POLICY
@pytest.mark.parametrize("options", [{"slots": 12}, {"slots": 8, "host_slots": 16}], ids=["one tier", "two tiers"])
def test_an_overlapped_run_replays(policy: str, options: dict[str, int], recorded: Recorded, tmp_path: Path) -> None:
    accesses = recorded.accesses[:72]
    largest = max(len(access.keys) for access in accesses)
    (tiers,) = tier_configs(SimulationConfig(policy, **options), 1, largest)  # type: ignore[arg-type]

    notes: list[Notes] = []

    def watch(core: Residency) -> None:
        prepare([core], accesses, recorded.fit)
        notes.append(Notes(core))

    core = Residency(tiers, recorded.layers, recorded.experts)
    watch(core)
    recorder = Recorder(core)
    with make_engine(recorded, recorder, readers=3, delay=0.0002) as cache:
        if hasattr(POLICIES[policy], "foresee"):  # the future must be known, so one stream only
            serve(recorded, cache, accesses)
        else:
            in_threads(
                lambda: serve(recorded, cache, accesses[0::2]),
                lambda: serve(recorded, cache, accesses[1::2]),
            )
        with cache._condition:
            while recorder.busy:
                cache._drain()
                cache._condition.wait(0.001)
        core.check()
        moved = [link.nbytes for link in cache.mover.links if link.name in LINKS][::-1]  # into tier 0 first
    recorder.log.save(tmp_path / "events.jsonl")
    replayed = replay(EventLog.load(tmp_path / "events.jsonl"), watch)
    real, again = notes
    assert replayed.digest() == core.digest() and replayed.counters() == core.counters()
    assert len(real.accesses) == len(accesses) and again.accesses == real.accesses
    assert [witness.noted for witness in again.witnesses] == [witness.noted for witness in real.witnesses]
    assert [copies * recorded.nbytes for copies in again.landed] == moved
    (_, lates, misses), *_ = again.accesses[-1][0]
    assert lates > 0 and misses > 0, "nothing overlapped"
