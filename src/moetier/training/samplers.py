"""Samplers for torch's `DataLoader` that know where their data come from, and resume where they were.

An ordinary `Sampler` of sample numbers: hand it to `DataLoader(dataset, batch_size=B, sampler=sampler)` with the same
B, or return it from `_get_train_sampler` of a Hugging Face `Trainer`. The order is arithmetic on (seed, epoch), from
`orders.py`: no global random state is read or changed, workers see nothing of it, and any batch of any epoch can be
named without running the ones before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import Sampler

from moetier.errors import ConfigError
from moetier.training.orders import Indices, Ordering, as_indices, epoch_order

__all__ = ["EnvironmentSampler"]

_VERSION = 1


class EnvironmentSampler(Sampler[int]):
    """Every sample once an epoch, shuffled (`iid`) or in episodes that stay with a few environments (`episode`).

    `samples` is the number of samples, or a dataset that has a length. `environments` gives each sample's origin;
    `episode` needs it. An episode is `episode_length` batches of `envs_per_batch` environments (see
    `orders.episode_order`). With `sort_keys` (one a sample, such as the number of its first expert) the samples of
    every `sort_window` consecutive batches are sorted: each batch then has fewer experts, at the price of batches that
    are less alike. Sorting within one batch changes no transfer: a batch's experts are fetched as a set.

    Every `iter()` begins an epoch at its first sample, unless `load_state_dict` or `seek` said otherwise; an epoch that
    was run to its end is followed by the next one, or the one that `set_epoch` names. Raises `ConfigError` for numbers
    that do not fit together.
    """

    def __init__(
        self,
        samples: int | Any,
        batch_size: int,
        kind: str = "episode",
        *,
        environments: Sequence[int] | Any | None = None,
        episode_length: int = 64,
        envs_per_batch: int = 1,
        sort_keys: Sequence[int] | Any | None = None,
        sort_window: int = 0,
        seed: int = 0,
    ):
        self.kind = kind
        self.ordering = Ordering(
            samples if isinstance(samples, int) else len(samples),
            batch_size,
            None if environments is None else as_indices("environments", environments),
            episode_length,
            envs_per_batch,
            None if sort_keys is None else as_indices("sort_keys", sort_keys),
            sort_window,
            seed,
        )
        self._cached: tuple[int, Indices] | None = None
        self.order(0)  # what is wrong is told now
        self._epoch = 0
        self._begin = 0  # samples that the next `iter()` leaves out
        self._given = 0  # samples of the epoch that were given, those left out included

    def order(self, epoch: int) -> Indices:
        """The sample numbers of an epoch in order, [N] int64. The last one asked for is kept."""
        if self._cached is None or self._cached[0] != epoch:
            self._cached = (epoch, epoch_order(self.kind, self.ordering, epoch))
        return self._cached[1]

    def batch(self, number: int) -> Indices:
        """The sample numbers of a batch, counted from the beginning of training, by arithmetic alone."""
        epoch, within = divmod(number, self.batches)
        size = self.ordering.batch_size
        return self.order(epoch)[within * size : (within + 1) * size]

    @property
    def batches(self) -> int:
        """Batches of an epoch, a short last one included."""
        return -(-self.ordering.samples // self.ordering.batch_size)

    @property
    def epoch(self) -> int:
        """The epoch that runs, or that the next `iter()` gives."""
        return self._epoch

    @property
    def skipped(self) -> int:
        """Batches that the next `iter()` leaves out, because they were trained on before."""
        return self._begin // self.ordering.batch_size

    def set_epoch(self, epoch: int) -> None:
        """The next `iter()` gives this epoch. One that is set again keeps the place that `load_state_dict` gave it."""
        if epoch != self._epoch:
            self.seek(epoch)

    def seek(self, epoch: int, samples: int = 0) -> None:
        """The next `iter()` gives `epoch` without its first `samples` samples."""
        if epoch < 0 or not 0 <= samples <= self.ordering.samples:
            raise ConfigError(f"there is no sample {samples} in epoch {epoch} of {self.ordering.samples} samples")
        if samples == self.ordering.samples:
            epoch, samples = epoch + 1, 0
        self._epoch, self._begin, self._given = epoch, samples, samples

    def __len__(self) -> int:
        return self.ordering.samples

    def __iter__(self) -> Iterator[int]:
        begin, self._begin = self._begin, 0
        epoch, self._given = self._epoch, begin
        order = self.order(epoch)
        for index in order[begin:].tolist():
            self._given += 1
            yield index
        if self._epoch == epoch:  # nobody has gone elsewhere meanwhile
            self.seek(epoch + 1)

    def state_dict(self) -> dict[str, Any]:
        """Where the sampler is, as plain numbers for JSON: exact where nothing runs ahead of the training loop.

        A `DataLoader` with workers does run ahead. `lookahead.Lookahead` counts what was handed out; a loop that counts
        for itself asks for `state_at`.
        """
        return self._state(self._epoch, self._given)

    def state_at(self, epoch: int, batches: int) -> dict[str, Any]:
        """What `state_dict` is after `batches` batches of an epoch."""
        return self._state(epoch, min(batches * self.ordering.batch_size, self.ordering.samples))

    def _state(self, epoch: int, samples: int) -> dict[str, Any]:
        return {"version": _VERSION, "epoch": epoch, "samples": samples, "settings": self._settings()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. Raises `ConfigError` if it is of a sampler with another order."""
        if state.get("version") != _VERSION:
            raise ConfigError(f"the state of the sampler is of version {state.get('version')}, not {_VERSION}")
        mine, theirs = self._settings(), state["settings"]
        for name in mine:
            if mine[name] != theirs.get(name):
                raise ConfigError(
                    f"sampler: the run was begun with {name} {theirs.get(name)}, and cannot go on with {mine[name]}"
                )
        self.seek(state["epoch"], state["samples"])

    def _settings(self) -> dict[str, Any]:
        """All that the order depends on. Of labels and keys, their sum: enough to notice other data."""
        o = self.ordering
        return {
            "kind": self.kind,
            "samples": o.samples,
            "batch_size": o.batch_size,
            "episode_length": o.episode_length,
            "envs_per_batch": o.envs_per_batch,
            "sort_window": o.sort_window,
            "seed": o.seed,
            "environments": _digest(o.environments),
            "sort_keys": _digest(o.sort_keys),
        }


def _digest(labels: Indices | None) -> str | None:
    if labels is None:
        return None
    from hashlib import sha256

    return sha256(labels.astype("<i8").tobytes()).hexdigest()[:16]
