"""The look-ahead loader: the same batches, hints in time, and a state that workers and windows do not disturb."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from moetier.access import Access, ExpertKey
from moetier.arenas import HostArena
from moetier.cache import ExpertCache
from moetier.errors import ConfigError
from moetier.residency import Residency
from moetier.stores.synthetic import SyntheticStore
from moetier.tiers import TierConfig
from moetier.training.lookahead import CachePrefetch, Lookahead
from moetier.training.samplers import EnvironmentSampler


class Numbers(Dataset[int]):
    def __len__(self) -> int:
        return 30

    def __getitem__(self, index: int) -> int:
        return index


class Told:
    """Keeps what it was told."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []

    def prefetch(self, keys: Sequence[ExpertKey]) -> int:
        self.calls.append([key.expert for key in keys])
        return len(keys)


def loader(workers: int = 0) -> DataLoader[int]:
    return DataLoader(Numbers(), batch_size=4, sampler=EnvironmentSampler(30, 4, "iid", seed=2), num_workers=workers)


def hint(batch: torch.Tensor) -> list[ExpertKey]:
    return [ExpertKey(0, number // 10) for number in batch.tolist()]


@pytest.mark.parametrize("depth", [0, 1, 3, 100])
def test_batches_and_hints(depth: int) -> None:
    plain = [batch.tolist() for batch in loader()]
    told = Told()
    ahead = Lookahead(loader(), depth, hint, told)
    assert [batch.tolist() for batch in ahead] == plain
    assert len(ahead) == len(plain) == 8
    for number, keys in enumerate(told.calls):
        expected = [n // 10 for batch in plain[number : number + depth + 1] for n in batch]
        assert keys == list(dict.fromkeys(expected))  # nearest first, each once
    assert len(told.calls) == 8
    assert ahead.named == 30 and ahead.began == sum(map(len, told.calls))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 7, 8, 11])
def test_resume(workers: int, stop: int) -> None:
    def run(ahead: Lookahead, count: int) -> list[list[int]]:
        seen: list[list[int]] = []
        while True:
            for batch in ahead:
                seen.append(batch.tolist())
                if len(seen) == count:
                    return seen

    whole = run(Lookahead(loader(), 2), 16)
    first = Lookahead(loader(workers), 2)
    begun = run(first, stop)
    state = json.loads(json.dumps(first.state_dict()))
    second = Lookahead(loader(workers), 3)
    second.load_state_dict(state)
    assert second.state_dict()["samples"] == state["samples"] % 30
    assert begun + run(second, 16 - stop) == whole


def test_over_an_iterator_of_somebody_else() -> None:
    told = Told()
    ahead = Lookahead(loader(), 1, hint, told)
    theirs = iter(loader())
    seen = [next(ahead.over(theirs)).tolist() for _ in range(8)]
    assert seen == [batch.tolist() for batch in loader()]
    assert next(ahead.over(theirs), None) is None
    assert len(told.calls) == 8


def test_wrong_use() -> None:
    with pytest.raises(ConfigError, match="depth"):
        Lookahead(loader(), -1)
    with pytest.raises(ConfigError, match="together"):
        Lookahead(loader(), 1, hint)
    other = Lookahead(DataLoader(Numbers(), batch_size=5, sampler=EnvironmentSampler(30, 4, "iid")))
    with pytest.raises(ConfigError, match="batches of 5"):
        next(iter(other))
    shuffled = Lookahead(DataLoader(Numbers(), batch_size=4, shuffle=True))
    assert len([*shuffled]) == 8
    for ask in (shuffled.state_dict, lambda: shuffled.load_state_dict({}), lambda: shuffled.set_epoch(1)):
        with pytest.raises(ConfigError, match="EnvironmentSampler"):
            ask()
    iterable: Any = Lookahead([1, 2, 3])
    assert list(iterable) == [1, 2, 3]


def test_prefetching_into_a_cache(tmp_path: Any) -> None:
    store = SyntheticStore(tmp_path / "store", 1, 12, 4096)
    core = Residency([TierConfig(6, "lru")], 1, 12)
    with ExpertCache(store, core, HostArena(6, 4096)) as cache:
        with pytest.raises(ConfigError, match="most"):
            CachePrefetch(cache, 0)
        target = CachePrefetch(cache)
        assert target.prefetch([ExpertKey(0, e) for e in range(5)]) == 3  # half of the slots at most
        cache.settle()
        access = Access(1, 0, tuple(ExpertKey(0, e) for e in range(3)))
        assert [lease.key.expert for lease in cache.stream(access)] == [0, 1, 2]
        tier = core.counters()["tiers"][0]  # type: ignore[index]
        assert (sum(tier["hits"]), sum(tier["misses"])) == (3, 0)
        assert target.prefetch([ExpertKey(0, 1), ExpertKey(0, 2)]) == 0  # they are there
        for expert in range(3, 12):  # the cache is full
            list(cache.stream(Access(expert, 0, (ExpertKey(0, expert),))))
        assert CachePrefetch(cache, displace=False).prefetch([ExpertKey(0, 0)]) == 0
        assert target.prefetch([ExpertKey(0, 0)]) == 1
        cache.settle()
        assert core.holds(ExpertKey(0, 0))
