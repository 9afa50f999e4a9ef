"""In which order an epoch visits its samples, so that neighbouring batches need the same experts.

Pure functions of a seed and an epoch: numpy only, no files, no torch, no state. An order is a permutation of the
samples; cut into pieces of the batch size it gives the epoch's batches. Two orders of equal arguments are equal on
every machine and with every version of numpy: what is drawn comes from the raw stream of Philox (Salmon et al. 2011),
which numpy guarantees, and not from its shuffles, which it does not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetier.errors import ConfigError

Indices = NDArray[np.int64]


class Draws:
    """The random choices of one epoch, in the order they are asked for."""

    def __init__(self, seed: int, epoch: int):
        if seed < 0 or epoch < 0:
            raise ConfigError(f"seed and epoch must not be negative, got {seed} and {epoch}")
        mask = (1 << 64) - 1
        self._raw = np.random.Philox(key=np.array([seed & mask, epoch & mask], dtype=np.uint64))

    def permutation(self, count: int) -> Indices:
        """0 … count - 1 in random order."""
        return np.argsort(self._raw.random_raw(count), kind="stable")


@dataclass(frozen=True, slots=True)
class Ordering:
    """What an order is made from.

    `environments` [N] says where each sample comes from (any integers); None where nobody knows. An episode is
    `episode_length` batches of `envs_per_batch` environments, each with the same number of samples in every batch.
    `sort_keys` [N] with `sort_window` > 0 sort the samples of that many consecutive batches by their keys.
    """

    samples: int
    batch_size: int
    environments: Indices | None = None
    episode_length: int = 1
    envs_per_batch: int = 1
    sort_keys: Indices | None = None
    sort_window: int = 0
    seed: int = 0

    def check(self) -> None:
        """Raise `ConfigError` for numbers that cannot be."""
        for name in ("samples", "batch_size", "episode_length", "envs_per_batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: must be at least 1, got {getattr(self, name)}")
        if self.sort_window < 0:
            raise ConfigError(f"sort_window: must not be negative, got {self.sort_window}")
        if self.sort_window and self.sort_keys is None:
            raise ConfigError("sort_window: needs sort_keys, one a sample")
        for name, labels in (("environments", self.environments), ("sort_keys", self.sort_keys)):
            if labels is not None and labels.shape != (self.samples,):
                raise ConfigError(f"{name}: one a sample is needed, [{self.samples}], got {list(labels.shape)}")


def iid_order(ordering: Ordering, draws: Draws) -> Indices:
    """Every sample once, in random order: what shuffled training data are, and the control for `episode_order`."""
    return draws.permutation(ordering.samples)


def episode_order(ordering: Ordering, draws: Draws) -> Indices:
    """Every sample once, in episodes: a batch has at most `envs_per_batch` environments, which stay for a while.

    Each environment's samples are shuffled and cut into *shares*, its part of a batch, and these into *runs* of
    `episode_length` shares. Runs are served side by side, `envs_per_batch` at a time; one that ends is followed by the
    next. The first run of every environment goes before any second one, so that all are learned from evenly; their
    order is random. Where runs are out, the remaining ones fill the batch. Samples that fill no share are mixed into
    the epoch's last batches; these may have more environments, all others never have.

    Raises `ConfigError` if there are no environments, or a batch cannot be shared evenly.
    """
    if ordering.environments is None:
        raise ConfigError("the episode sampler needs environments: an integer for every sample")
    if ordering.batch_size % ordering.envs_per_batch:
        raise ConfigError(
            f"a batch of {ordering.batch_size} samples cannot be shared by {ordering.envs_per_batch} environments "
            "evenly; give a multiple"
        )
    size = ordering.batch_size // ordering.envs_per_batch
    rounds, rest = _runs(ordering, draws, size)
    runs = deque(each[i] for each in rounds for i in draws.permutation(len(each)).tolist())
    served = _serve(runs, ordering.envs_per_batch)
    mixed = np.concatenate(rest) if rest else np.empty(0, dtype=np.int64)
    return np.concatenate([*served, mixed[draws.permutation(len(mixed))]])


def _runs(ordering: Ordering, draws: Draws, size: int) -> tuple[list[list[list[Indices]]], list[Indices]]:
    """Round r: the run r of every environment that has one, as shares. And what fills no share."""
    assert ordering.environments is not None
    shuffled = draws.permutation(ordering.samples)
    labels = ordering.environments[shuffled]
    by_environment = shuffled[np.argsort(labels, kind="stable")]
    edges = np.flatnonzero(np.diff(np.sort(labels))) + 1
    rounds: list[list[list[Indices]]] = []
    rest: list[Indices] = []
    for own in np.split(by_environment, edges):
        whole = len(own) // size
        shares = list(own[: whole * size].reshape(whole, size))
        if len(own) % size:
            rest.append(own[whole * size :])
        for number, begin in enumerate(range(0, whole, ordering.episode_length)):
            if number == len(rounds):
                rounds.append([])
            rounds[number].append(shares[begin : begin + ordering.episode_length])
    return rounds, rest


def _serve(runs: deque[list[Indices]], lanes: int) -> list[Indices]:
    """The shares in the order in which `lanes` runs side by side give them, a share of each to every batch."""
    served: list[Indices] = []
    open_runs: list[deque[Indices]] = []
    while runs or open_runs:
        while runs and len(open_runs) < lanes:
            open_runs.append(deque(runs.popleft()))
        taken = 0
        while taken < lanes and open_runs:  # one round, or several where runs are out
            for run in open_runs[: lanes - taken]:
                served.append(run.popleft())
                taken += 1
            open_runs = [run for run in open_runs if run]
    return served


def sorted_in_windows(order: Indices, keys: Indices, window: int) -> Indices:
    """The order with every `window` consecutive samples sorted by their keys; equal keys keep their order."""
    blocks = np.arange(len(order)) // window
    return order[np.lexsort((keys[order], blocks))]


Order = Callable[[Ordering, Draws], Indices]
ORDERS: dict[str, Order] = {"iid": iid_order, "episode": episode_order}


def epoch_order(kind: str, ordering: Ordering, epoch: int) -> Indices:
    """The order of an epoch by the name of its sampler, [N]. Raises `ConfigError`."""
    if kind not in ORDERS:
        raise ConfigError(f"sampler: {kind!r} is unknown; choose one of {', '.join(ORDERS)}")
    ordering.check()
    order = ORDERS[kind](ordering, Draws(ordering.seed, epoch))
    if ordering.sort_window:
        assert ordering.sort_keys is not None
        order = sorted_in_windows(order, ordering.sort_keys, ordering.sort_window * ordering.batch_size)
    return order


def as_indices(name: str, labels: Sequence[int] | Any) -> Indices:
    """Labels of any kind (list, numpy array, torch tensor on the CPU) as [N] int64. Raises `ConfigError`."""
    found = np.asarray(labels)
    if found.ndim != 1 or not np.issubdtype(found.dtype, np.integer):
        raise ConfigError(f"{name}: integers, one a sample, are needed; got {found.dtype} of shape {list(found.shape)}")
    return found.astype(np.int64)
