"""A data loader that knows its next batches, and says so to who can load their experts.

What a batch will need is a guess or a certainty of the caller's: a function from a batch to expert keys (`hint`). What
becomes of it is the target's business (`Prefetches`; `CachePrefetch` for an `ExpertCache`). Hints change time, never
batches: the loader's own come out, in order, all of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from moetier.access import ExpertKey
from moetier.errors import ConfigError
from moetier.training.samplers import EnvironmentSampler

if TYPE_CHECKING:
    from moetier.cache import ExpertCache

__all__ = ["CachePrefetch", "Hint", "Lookahead", "Prefetches"]

Hint = Callable[[Any], Iterable[ExpertKey]]


class Prefetches(Protocol):
    """Who is told which experts come next."""

    def prefetch(self, keys: Sequence[ExpertKey]) -> int:
        """Begin to load those of `keys` that are not there, the most pressing first; returns how many loads began."""


class CachePrefetch:
    """Prefetches into an `ExpertCache`, at most `most` experts before a batch (default: half of its slots of tier 0).

    With `displace` they take the slots of the policy's victims; else free slots only, which a cache that has run for a
    while no longer has. What is leased, waited for, pinned or just loaded is never displaced.
    """

    def __init__(self, cache: ExpertCache, most: int | None = None, displace: bool = True):
        slots = cache.core.configs[0].slots
        self.cache, self.displace = cache, displace
        self.most = max(1, slots // 2) if most is None else most
        if self.most < 1:
            raise ConfigError(f"most: at least 1 expert a batch, got {most}")

    def prefetch(self, keys: Sequence[ExpertKey]) -> int:
        """Begin to load those of `keys` that are not there."""
        return self.cache.prefetch(keys, self.displace, self.most)


class Lookahead:
    """The batches of `loader`, with `depth` more known before each is handed out, and their experts foretold.

    Before a batch is handed out, `target.prefetch` gets the keys that `hint` names for it and for the `depth` batches
    after it, nearest first, each once. The first batch's own are of use too: its first layer is not there yet. With
    `depth` 0 only these are. At the end of an epoch the window runs empty: what comes after is not known to the loader.

    It resumes if the loader has an `EnvironmentSampler`: `state_dict` says what was handed out, whatever workers and
    the window have drawn beyond; the batch handed out last counts as done.
    """

    def __init__(self, loader: Any, depth: int = 1, hint: Hint | None = None, target: Prefetches | None = None):
        if depth < 0:
            raise ConfigError(f"depth: must not be negative, got {depth}")
        if (hint is None) != (target is None):
            raise ConfigError("hint and target go together: who names experts, and who is told of them")
        self.loader, self.depth, self.hint, self.target = loader, depth, hint, target
        self.named = self.began = 0  # experts that hints named for a batch handed out; loads that began for them
        self._epoch = self._handed = 0
        self._over: tuple[Any, Iterator[Any]] | None = None

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        sampler = self._sampler()
        if sampler is not None:
            self._epoch, self._handed = sampler.epoch, sampler.skipped
        for batch in self._ahead(iter(self.loader)):
            self._handed += 1
            yield batch

    def over(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The same for an iterator that somebody else owns, such as the Trainer's of transformers (docs/sampling.md).

        Asked again with the same iterator, it is the same answer, so that nothing in the window is lost.
        """
        if self._over is None or self._over[0] is not batches:
            self._over = (batches, self._ahead(batches))
        return self._over[1]

    def _ahead(self, batches: Iterator[Any]) -> Iterator[Any]:
        window: deque[tuple[Any, list[ExpertKey]]] = deque()
        ended = False
        while True:
            while not ended and len(window) <= self.depth:
                try:
                    batch = next(batches)
                except StopIteration:
                    ended = True
                else:
                    window.append((batch, [] if self.hint is None else [ExpertKey(*key) for key in self.hint(batch)]))
            if not window:
                return
            if self.target is not None:
                self.named += len(window[0][1])
                keys = list(dict.fromkeys(key for _, keys in window for key in keys))
                self.began += self.target.prefetch(keys)
            yield window.popleft()[0]

    def state_dict(self) -> dict[str, Any]:
        """Where training is: the sampler's state after the batches handed out. Raises `ConfigError` without one."""
        return self._needed().state_at(self._epoch, self._handed)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next `iter()` goes on behind the batch that was handed out last. Raises `ConfigError`."""
        sampler = self._needed()
        sampler.load_state_dict(state)
        self._epoch, self._handed = sampler.epoch, sampler.skipped

    def set_epoch(self, epoch: int) -> None:
        """The next `iter()` gives this epoch."""
        self._needed().set_epoch(epoch)

    def _sampler(self) -> EnvironmentSampler | None:
        """The sampler of samples below the loader, if it is one that can be resumed."""
        batches = getattr(self.loader, "batch_sampler", None)
        sampler = getattr(batches, "sampler", None)
        if not isinstance(sampler, EnvironmentSampler):
            return None
        size = getattr(batches, "batch_size", None)
        if size != sampler.ordering.batch_size:
            raise ConfigError(
                f"batch_size: the loader makes batches of {size}, but its sampler orders samples for batches of "
                f"{sampler.ordering.batch_size}; give both the same"
            )
        return sampler

    def _needed(self) -> EnvironmentSampler:
        sampler = self._sampler()
        if sampler is None:
            raise ConfigError(
                "this loader cannot be resumed: give it an EnvironmentSampler (moetier.training.samplers)"
            )
        return sampler
