"""Orders and samplers: every sample once, locality as promised, resumed exactly."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from moetier.errors import ConfigError
from moetier.training.orders import ORDERS, Draws, Ordering, epoch_order, sorted_in_windows
from moetier.training.samplers import EnvironmentSampler


class Numbers(Dataset[int]):
    """Sample i is i."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return index


@st.composite
def orderings(draw: st.DrawFn) -> Ordering:
    per_batch = draw(st.integers(1, 5))
    counts = draw(st.lists(st.integers(1, 40), min_size=1, max_size=9))
    labels = np.repeat(np.arange(len(counts)) * 7 - 3, counts)
    labels = labels[Draws(draw(st.integers(0, 99)), 0).permutation(len(labels))]
    return Ordering(
        samples=len(labels),
        batch_size=per_batch * draw(st.integers(1, 4)),
        environments=labels,
        episode_length=draw(st.integers(1, 6)),
        envs_per_batch=per_batch,
        sort_keys=-labels,
        sort_window=draw(st.integers(0, 4)),
        seed=draw(st.integers(0, 5)),
    )


@settings(derandomize=True, deadline=None, max_examples=150)
@given(orderings(), st.sampled_from(sorted(ORDERS)), st.integers(0, 3))
def test_every_sample_once(ordering: Ordering, kind: str, epoch: int) -> None:
    order = epoch_order(kind, ordering, epoch)
    assert sorted(order.tolist()) == list(range(ordering.samples))
    assert np.array_equal(order, epoch_order(kind, ordering, epoch))


@settings(derandomize=True, deadline=None, max_examples=150)
@given(orderings())
def test_episodes_keep_their_promise(ordering: Ordering) -> None:
    """Batches of whole shares have at most the environments they may; the leftovers come last."""
    unsorted = replace(ordering, sort_window=0)
    order = epoch_order("episode", unsorted, 1)
    assert unsorted.environments is not None
    labels = unsorted.environments[order]
    share = unsorted.batch_size // unsorted.envs_per_batch
    counts = np.unique(unsorted.environments, return_counts=True)[1]
    whole = int((counts // share * share).sum())
    for begin in range(0, whole, unsorted.batch_size):
        batch = labels[begin : min(begin + unsorted.batch_size, whole)]
        assert len(set(batch.tolist())) <= unsorted.envs_per_batch
        for part in batch.reshape(-1, share):
            assert len(set(part.tolist())) == 1


def test_an_episode_stays_with_its_environments() -> None:
    labels = np.arange(12).repeat(64)
    order = epoch_order("episode", Ordering(len(labels), 16, labels, episode_length=8, envs_per_batch=2), 0)
    batches = [frozenset(labels[part].tolist()) for part in order.reshape(-1, 16)]
    assert all(len(batch) == 2 for batch in batches)
    assert [len(list(group)) for _, group in itertools.groupby(batches)] == [8] * 6
    assert len(frozenset.union(*batches)) == 12
    again = epoch_order("episode", Ordering(len(labels), 16, labels, episode_length=8, envs_per_batch=2), 1)
    assert [frozenset(labels[part].tolist()) for part in again.reshape(-1, 16)] != batches


def test_first_runs_go_before_second_ones() -> None:
    labels = np.arange(6).repeat(20)
    order = epoch_order("episode", Ordering(len(labels), 5, labels, episode_length=2), 0)
    environments = [int(labels[part[0]]) for part in order.reshape(-1, 5)]
    assert sorted(environments[:12:2]) == sorted(environments[12::2]) == list(range(6))


def test_iid_mixes() -> None:
    labels = np.arange(8).repeat(100)
    order = epoch_order("iid", Ordering(800, 40, labels), 0)
    assert all(len(set(labels[part].tolist())) > 4 for part in order.reshape(-1, 40))


def test_known_order() -> None:
    """The order of a seed is for ever: a run that was begun with an older version goes on."""
    ordering = Ordering(12, 4, np.arange(3).repeat(4), episode_length=1, envs_per_batch=2, seed=5)
    assert epoch_order("iid", ordering, 2).tolist() == [11, 3, 5, 9, 2, 7, 10, 1, 8, 0, 6, 4]
    assert epoch_order("episode", ordering, 2).tolist() == [5, 7, 3, 2, 11, 9, 6, 4, 10, 8, 1, 0]


def test_sorting_groups_a_window() -> None:
    keys = np.array([2, 0, 1, 0, 2, 1, 1, 0])
    assert sorted_in_windows(np.arange(8), keys, 4).tolist() == [1, 3, 2, 0, 7, 5, 6, 4]
    labels = np.arange(4).repeat(32)
    mixed = EnvironmentSampler(128, 8, environments=labels, episode_length=4, envs_per_batch=4)
    apart = EnvironmentSampler(
        128, 8, environments=labels, episode_length=4, envs_per_batch=4, sort_keys=labels, sort_window=4
    )
    assert {len(set(labels[mixed.batch(n)])) for n in range(16)} == {4}
    assert {len(set(labels[apart.batch(n)])) for n in range(16)} == {1}


def test_no_global_random_state() -> None:
    states = torch.random.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # type: ignore[index]
    list(EnvironmentSampler(50, 5, "iid", seed=3))
    assert torch.equal(states[0], torch.random.get_rng_state())
    assert (states[1] == np.random.get_state()[1]).all()  # type: ignore[index]
    assert states[2] == random.getstate()


def sampler(**changes: Any) -> EnvironmentSampler:
    given: dict[str, Any] = {"episode_length": 3, "envs_per_batch": 2, "seed": 1} | changes
    return EnvironmentSampler(54, 4, environments=torch.arange(3).repeat_interleave(18), **given)


@pytest.mark.parametrize("stop", [0, 1, 17, 53, 54, 55, 100, 108])
def test_resume_is_exact(stop: int) -> None:
    def run(one: EnvironmentSampler) -> Any:
        while True:
            yield from one

    whole = list(itertools.islice(run(sampler()), 200))
    first = sampler()
    begun = list(itertools.islice(run(first), stop))
    state = json.loads(json.dumps(first.state_dict()))
    second = sampler()
    second.load_state_dict(state)
    assert begun + list(itertools.islice(run(second), 200 - stop)) == whole


def test_epochs_differ_and_a_new_iterator_begins_again() -> None:
    one = sampler()
    assert next(iter(one)) == next(iter(one))
    first, second = list(one), list(one)
    assert first != second and one.epoch == 2
    one.set_epoch(0)
    assert list(one) == first
    one.seek(1, 10)
    one.set_epoch(1)  # as a Trainer does after resuming: the place is kept
    assert list(one) == second[10:]
    one.seek(1, 54)  # at an epoch's end is the next one's beginning
    assert one.epoch == 2 and one.skipped == 0


def test_batches_by_arithmetic() -> None:
    one = sampler()
    loader = DataLoader(Numbers(54), batch_size=4, sampler=one)
    seen = [batch.tolist() for _ in range(2) for batch in loader]
    assert seen == [one.batch(number).tolist() for number in range(28)]
    assert one.batches == len(loader) == 14


def test_workers_see_the_same_batches() -> None:
    with torch.enable_grad():
        alone = [batch.tolist() for batch in DataLoader(Numbers(54), batch_size=4, sampler=sampler())]
        shared = DataLoader(Numbers(54), batch_size=4, sampler=sampler(), num_workers=2)
        assert [batch.tolist() for batch in shared] == alone


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"envs_per_batch": 3}, "shared by 3"),
        ({"envs_per_batch": 0}, "envs_per_batch"),
        ({"episode_length": 0}, "episode_length"),
        ({"kind": "random"}, "choose one of iid, episode"),
        ({"environments": None}, "needs environments"),
        ({"environments": [0, 1]}, "one a sample"),
        ({"environments": [0.5] * 8}, "integers"),
        ({"sort_window": 2}, "sort_keys"),
        ({"sort_window": -1}, "sort_window"),
        ({"seed": -1}, "seed"),
        ({"samples": 0}, "samples"),
    ],
)
def test_wrong_settings(wrong: dict[str, Any], named: str) -> None:
    given: dict[str, Any] = {"samples": 8, "batch_size": 4, "environments": [0, 1] * 4} | wrong
    with pytest.raises(ConfigError, match=named):
        EnvironmentSampler(**given)


@pytest.mark.parametrize(
    "changes", [{"seed": 2}, {"episode_length": 2}, {"kind": "iid"}, {"envs_per_batch": 1}], ids=lambda c: next(iter(c))
)
def test_a_state_of_another_order_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))):
        sampler(**changes).load_state_dict(sampler().state_dict())


def test_a_state_of_other_data_is_refused() -> None:
    other = EnvironmentSampler(54, 4, environments=[0] * 54, episode_length=3, envs_per_batch=2, seed=1)
    with pytest.raises(ConfigError, match="environments"):
        other.load_state_dict(sampler().state_dict())
    with pytest.raises(ConfigError, match="version"):
        other.load_state_dict({"version": 2})
