"""`ExpertCache` with a store that is slow and fails on request: right bytes, no hang, usable after failures."""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from moetier import CapacityError, MoetierError, Residency, StoreError, TierConfig, eventlog
from moetier.access import Access, ExpertKey, Phase
from moetier.arenas import HostArena
from moetier.cache import ExpertCache
from moetier.lease import Lease
from moetier.record import PAGE, RecordLayout

LAYERS, EXPERTS = 3, 8
LAYOUT = RecordLayout.of([("up", torch.float32, (5, 7)), ("down", torch.bfloat16, (7, 3))])
WATCHDOG = 30  # seconds


class FakeStore:
    """Records in memory, in parts, with random delays; `fail` keys cannot be read."""

    layers, experts = LAYERS, EXPERTS
    slot_nbytes = 2 * PAGE
    parts = 3

    def __init__(self, seed: int = 0, delay: float = 0.0):
        self.delay = delay
        self.random = random.Random(seed)
        self.fail: set[ExpertKey] = set()
        self.reads = 0

    def content(self, key: ExpertKey) -> bytes:
        return random.Random(100 * key.layer + key.expert).randbytes(LAYOUT.nbytes)

    def layout(self, layer: int) -> RecordLayout:
        return LAYOUT

    def phase(self, key: ExpertKey) -> int:
        return 8 * key.expert

    def segments(self, key: ExpertKey) -> int:
        return self.parts

    def read(self, key: ExpertKey, segment: int, into: memoryview) -> int:
        if self.delay:
            time.sleep(self.random.random() * self.delay)
        if key in self.fail and segment == 1:
            raise StoreError(errno.EIO, f"{key} cannot be read")
        cut = -(-LAYOUT.nbytes // self.parts)
        part = self.content(key)[segment * cut : (segment + 1) * cut]
        into[segment * cut : segment * cut + len(part)] = part
        self.reads += 1
        return len(part)

    def close(self) -> None:
        pass


class Run:
    """A cache, its store, and streams that check every lease."""

    def __init__(self, slots: int, seed: int = 0, delay: float = 0.0, record: bool = False, **config: Any):
        self.store = FakeStore(seed, delay)
        core: Any = Residency([TierConfig(slots, **config)], LAYERS, EXPERTS)
        self.core = eventlog.Recorder(core) if record else core
        self.cache = ExpertCache(self.store, self.core, HostArena(slots, self.store.slot_nbytes), readers=3)
        self._clock = 0

    def access(self, layer: int, experts: Any, phase: Phase = Phase.DECODE) -> Access:
        self._clock += 1
        keys = tuple(ExpertKey(layer, expert) for expert in sorted(experts))
        return Access(self._clock, layer, keys, (1,) * len(keys), phase)

    def check(self, lease: Lease) -> None:
        expected = LAYOUT.views(torch.frombuffer(bytearray(self.store.content(lease.key)), dtype=torch.uint8))
        assert list(lease.fields) == ["up", "down"]
        for name, tensor in expected.items():
            given = lease.fields[name]
            assert given.shape == tensor.shape and given.dtype == tensor.dtype
            assert torch.equal(given.view(torch.uint8), tensor.view(torch.uint8))

    def serve(self, access: Access, work: float = 0.0) -> list[ExpertKey]:
        """Stream an access; every lease holds its record's bytes from its beginning to its end."""
        seen = []
        for lease in self.cache.stream(access):
            self.check(lease)
            if work:
                time.sleep(random.random() * work)
            self.check(lease)
            seen.append(lease.key)
        assert sorted(seen) == list(access.keys)
        return seen


@pytest.fixture
def make() -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def get(*args: Any, **kwargs: Any) -> Run:
        runs.append(Run(*args, **kwargs))
        return runs[-1]

    yield get
    for run in runs:
        run.core.check()
        run.cache.close()


def together(*jobs: Callable[[], Any]) -> list[Any]:
    """Run the jobs in threads; fail instead of hanging, and pass on what they raise."""
    pool = ThreadPoolExecutor(len(jobs))
    try:
        futures = [pool.submit(job) for job in jobs]
        deadline = time.monotonic() + WATCHDOG
        return [future.result(max(0.0, deadline - time.monotonic())) for future in futures]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@pytest.mark.parametrize("slots", [1, 2, 3, EXPERTS, LAYERS * EXPERTS])
def test_each_expert_once_with_its_bytes(slots: int, make: Callable[..., Run]) -> None:
    run, choose = make(slots, delay=0.0005), random.Random(slots)
    for step in range(12):
        for layer in range(LAYERS):
            run.serve(run.access(layer, choose.sample(range(EXPERTS), choose.randint(1, EXPERTS))))
        run.core.check()
        assert step < 3 or not run.core.tickets


def test_an_access_to_nothing(make: Callable[..., Run]) -> None:
    run = make(1)
    assert run.serve(run.access(0, [])) == []


def test_residents_come_first(make: Callable[..., Run]) -> None:
    run = make(4)
    run.serve(run.access(0, [5, 6]))
    run.store.delay = 0.005
    assert set(run.serve(run.access(0, [1, 5, 6]))[:2]) == {ExpertKey(0, 5), ExpertKey(0, 6)}
    run.store.delay = 0.0
    reads = run.store.reads
    run.serve(run.access(0, [1, 5, 6]))
    assert run.store.reads == reads


@pytest.mark.parametrize("slots", [1, 2, 3, 8])
def test_a_failed_read_is_raised_and_the_cache_stays_usable(slots: int, make: Callable[..., Run]) -> None:
    run = make(slots, delay=0.0005)
    run.serve(run.access(0, range(4)))
    run.store.fail = {ExpertKey(1, 2), ExpertKey(1, 5)}
    for _ in range(3):
        with pytest.raises(StoreError, match=r"expert=[25]\) cannot be read"):
            run.serve(run.access(1, range(EXPERTS)))
        run.serve(run.access(0, range(EXPERTS)))
        run.core.check()
        assert not run.core.tickets
    run.store.fail.clear()
    for layer in range(LAYERS):
        run.serve(run.access(layer, range(EXPERTS)))


def test_settling_does_not_raise_failed_reads_again(make: Callable[..., Run]) -> None:
    """Those who wanted the experts were told; of several that failed in one access the others are no news either."""
    run = make(4, delay=0.0005)
    run.store.fail = {ExpertKey(1, 2), ExpertKey(1, 5)}
    for _ in range(3):
        with pytest.raises(StoreError, match=r"expert=[25]\) cannot be read"):
            run.serve(run.access(1, range(EXPERTS)))
    run.cache.settle()
    run.serve(run.access(0, range(EXPERTS)))
    assert not run.cache._errors, "a service that runs for months must not collect them"


def test_failures_at_random_with_threads(make: Callable[..., Run]) -> None:
    run = make(5, delay=0.0003)
    run.store.fail = {ExpertKey(layer, 3) for layer in range(LAYERS)}
    clock = threading.Lock()

    def work(seed: int) -> int:
        choose, failures = random.Random(seed), 0
        for _ in range(25):
            experts = choose.sample(range(EXPERTS), 3)
            with clock:
                access = run.access(choose.randrange(LAYERS), experts)
            if 3 in experts:
                failures += 1
                with pytest.raises(StoreError, match="cannot be read"):
                    run.serve(access)
            else:
                run.serve(access)
        return failures

    assert all(count > 0 for count in together(*[lambda seed=seed: work(seed) for seed in range(3)]))
    assert not run.core.tickets
    run.store.fail.clear()
    run.serve(run.access(0, range(EXPERTS)))


@pytest.mark.parametrize("taken", [0, 1, 2])
@pytest.mark.parametrize("slots", [1, 3, 8])
def test_an_abandoned_stream_gives_everything_back(slots: int, taken: int, make: Callable[..., Run]) -> None:
    run = make(slots, delay=0.0005)
    for _ in range(4):
        stream = run.cache.stream(run.access(0, range(5)))
        for _ in range(taken):
            run.check(next(stream))
        stream.close()
        assert not run.core.tickets
        run.serve(run.access(1, range(EXPERTS)))
    run.serve(run.access(0, range(EXPERTS)))


def test_an_exception_in_the_caller_gives_everything_back(make: Callable[..., Run]) -> None:
    run = make(2)
    with pytest.raises(ZeroDivisionError):
        for lease in run.cache.stream(run.access(0, range(5))):
            run.check(lease)
            raise ZeroDivisionError
    run.serve(run.access(0, range(EXPERTS)))
    assert not run.core.tickets


@pytest.mark.parametrize("slots", [1, 2, 4, 9])
@pytest.mark.parametrize("policy", ["horizon", "lru"])
def test_streams_of_several_threads(slots: int, policy: str, make: Callable[..., Run]) -> None:
    run = make(slots, delay=0.0003, policy=policy)
    clock = threading.Lock()

    def work(seed: int) -> None:
        choose = random.Random(seed)
        for step in range(15):
            with clock:
                access = run.access(step % LAYERS, choose.sample(range(EXPERTS), choose.randint(1, 6)))
            if choose.random() < 0.2:
                stream = run.cache.stream(access)
                run.check(next(stream))
                stream.close()
            else:
                run.serve(access, work=0.0003)

    together(*[lambda seed=seed: work(seed) for seed in range(4)])
    assert not run.core.tickets


def test_threads_that_want_the_same_expert_share_one_load(make: Callable[..., Run]) -> None:
    run = make(4, delay=0.02)
    accesses = [run.access(0, [1, 2]) for _ in range(4)]
    together(*[lambda access=access: run.serve(access) for access in accesses])
    assert run.store.reads == 2 * run.store.parts
    (tier,) = run.cache.stats()["tiers"]
    assert tier["misses"][0] == 2 and tier["hits"][0] + tier["lates"][0] == 6


def test_nested_streams_that_cannot_go_on_are_an_error(make: Callable[..., Run]) -> None:
    run = make(2)

    def nested() -> None:
        outer = run.cache.stream(run.access(0, [0, 1]))
        run.check(next(outer))
        with pytest.raises(CapacityError, match="all slots are leased by streams that this thread left open"):
            run.serve(run.access(1, [0, 1]))
        for lease in outer:
            run.check(lease)

    together(nested)
    run.serve(run.access(1, range(EXPERTS)))


def test_nested_streams_with_room_work(make: Callable[..., Run]) -> None:
    run = make(4)

    def nested() -> None:
        for lease in run.cache.stream(run.access(0, [0, 1])):
            run.serve(run.access(1, [4, 5, 6]))
            run.check(lease)

    together(nested)


def test_a_forked_child_is_refused(make: Callable[..., Run]) -> None:
    run = make(4)
    run.serve(run.access(0, [0, 1]))
    access = run.access(0, [2])
    child = os.fork()
    if child == 0:  # no test framework in here: only an exit code
        code = 1
        try:
            list(run.cache.stream(access))
        except MoetierError as error:
            code = 42 if "forked" in str(error) else 2
        finally:
            os._exit(code)
    deadline = time.monotonic() + WATCHDOG
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        if time.monotonic() > deadline:
            os.kill(child, 9)
            os.waitpid(child, 0)
            pytest.fail("the child hangs")
        time.sleep(0.01)
    assert os.waitstatus_to_exitcode(status) == 42
    run.serve(run.access(0, [2, 3]))


def test_a_child_forked_before_the_first_use_works() -> None:
    run = Run(2)
    access = run.access(0, [1, 2, 3])
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 42 if len(list(run.cache.stream(access))) == 3 else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42
    run.cache.close()


def test_closing(make: Callable[..., Run]) -> None:
    run = make(2, delay=0.005)
    run.serve(run.access(0, [0, 1]))
    threads = list(run.cache.mover._threads)
    assert len(threads) == 3
    with run.cache:
        pass
    run.cache.close()
    assert not any(thread.is_alive() for thread in threads)
    with pytest.raises(MoetierError, match="closed"):
        run.serve(run.access(0, [0]))


def test_closing_while_a_stream_waits(make: Callable[..., Run]) -> None:
    """The waiter is told instead of waiting for ever."""
    run = make(2, delay=0.2)

    def waiter() -> None:
        with pytest.raises(MoetierError, match="closed"):
            run.serve(run.access(0, range(EXPERTS)))

    def closer() -> None:
        time.sleep(0.1)
        run.cache.close()

    together(waiter, closer)


def test_recorded_threaded_runs_replay() -> None:
    """Whatever the timing was, the log of the core's inputs gives the same decisions again."""
    policies = ["horizon", "lru", "lfu", "lfru", "slru"]
    failed = 0
    for number in range(200):
        choose = random.Random(number)
        staging = {"staging": 2, "admission": "decode-only"} if number % 3 == 0 else {}
        run = Run(choose.randint(3, 9), number, delay=0.0004, record=True, policy=policies[number % 5], **staging)
        if number % 4 == 0:
            run.store.fail = {ExpertKey(1, 1)}
        clock = threading.Lock()

        def work(seed: int, run: Run = run, clock: threading.Lock = clock) -> int:
            choose, failures = random.Random(seed), 0
            for step in range(4):
                with clock:
                    phase = choose.choice(list(Phase))
                    access = run.access(step % LAYERS, choose.sample(range(EXPERTS), 3), phase)
                try:
                    run.serve(access)
                except StoreError:
                    failures += 1
            return failures

        failed += sum(together(*[lambda seed=seed: work(seed) for seed in (number, number + 1000)]))
        run.cache.close()
        run.core.check()
        again = eventlog.replay(run.core.log)
        assert again.digest() == run.core.digest()
        assert again.counters() == run.core.counters()
        again.check()
    assert failed > 10
