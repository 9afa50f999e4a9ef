"""Prefetch: turn a predictor's estimates into orders of the residency core, within limits.

Knows nothing about bytes, clocks or threads; the caller serialises calls, as for the core itself. Prefetches change
time, never outputs: whatever a predictor does wrong ends prefetching, not the run.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moetier.access import Access, ExpertKey
from moetier.errors import ConfigError
from moetier.predictors import Prediction, Predictor
from moetier.residency import Residency

if TYPE_CHECKING:
    from moetier.eventlog import Recorder

__all__ = ["Prefetcher", "ranked"]

_log = logging.getLogger("moetier")


class Prefetcher:
    """After every access: observe, predict, and prefetch what is likely enough and not there.

    `confidence` is the least probability worth a copy, `limit` the most copies per access. `displace` lets a prefetch
    evict the policy's victim; else it takes free slots only. `distances` are the layers ahead that are predicted, each
    at most one round of the model.
    """

    def __init__(
        self,
        core: Residency | Recorder,
        predictor: Predictor,
        confidence: float = 0.5,
        limit: int = 4,
        displace: bool = False,
        distances: Sequence[int] = (1,),
    ):
        if not 0 <= confidence <= 1:
            raise ConfigError(f"prefetch confidence must be between 0 and 1, got {confidence}")
        if limit < 0:
            raise ConfigError(f"prefetch limit must not be negative, got {limit}")
        if not distances or not all(1 <= distance <= core.layers for distance in distances):
            raise ConfigError(f"prefetch distances must be from 1 to {core.layers} layers, got {list(distances)}")
        self.core, self.predictor = core, predictor
        self.confidence, self.limit, self.displace = confidence, limit, displace
        self.distances = tuple(sorted(set(distances)))
        self.error: Exception | None = None  # the fault that ended prefetching
        self.issued = self.cancelled = 0
        self._queued: dict[ExpertKey, int] = {}  # prefetched -> the number of the access that was to need it
        self._accesses = 0

    @property
    def enabled(self) -> bool:
        """Whether the predictor is still asked: False after its first fault."""
        return self.error is None

    def after(self, access: Access, hidden: Any = None) -> int:
        """Tell the predictor of an access that was just acquired, and order prefetches; returns how many.

        `hidden` is passed to the predictor as it is. Never raises because of the predictor.
        """
        self._accesses += 1
        if not self.enabled:
            self._cancel_obsolete({})
            return 0
        try:
            self.predictor.observe(access, hidden)
            wanted = ranked(
                self.predictor, access, self.core.layers, self.core.experts, self.confidence, self.distances
            )
        except Exception as error:  # whatever a third party's predictor raises
            self.error, wanted = error, {}
            _log.warning("prefetching ends: the predictor failed: %s: %s", type(error).__name__, error)
        self._cancel_obsolete(wanted)
        issued = 0
        for key in [key for key in wanted if not self.core.holds(key)][: self.limit]:
            if self.core.prefetch(key, self.displace):
                self._queued[key] = self._accesses + wanted[key].due
                issued += 1
        self.issued += issued
        return issued

    def counters(self) -> dict[str, Any]:
        """What became of the prefetches.

        `issued` = `cancelled` + `useful` (demanded before they were evicted; `late` of these were still on their way) +
        `wasted` (evicted undemanded, or failed) + those not decided yet. `error` is the fault that ended prefetching.
        """
        outcomes: Any = self.core.counters()["prefetches"]
        return {
            "issued": self.issued,
            "useful": outcomes["useful"],
            "late": outcomes["late"],
            "wasted": outcomes["wasted"],
            "cancelled": self.cancelled,
            "error": None if self.error is None else f"{type(self.error).__name__}: {self.error}",
        }

    def _cancel_obsolete(self, wanted: dict[ExpertKey, Prediction]) -> None:
        """Take back orders that nobody has taken, where the access they were for has passed or expects them no more."""
        now, ahead = self._accesses, {self._accesses + distance for distance in self.distances}
        for key, due in list(self._queued.items()):
            passed = due <= now
            if passed or (due in ahead and key not in wanted):
                self.cancelled += self.core.cancel(key)
                del self._queued[key]


def ranked(
    predictor: Predictor, access: Access, layers: int, experts: int, confidence: float, distances: Sequence[int]
) -> dict[ExpertKey, Prediction]:
    """What is likely enough, most pressing first: probability, discounted by distance as in MoE-Infinity.

    Raises `ConfigError` for a key that does not exist, and whatever the predictor raises.
    """
    likely: dict[ExpertKey, Prediction] = {}
    for distance in distances:
        for prediction in predictor.predict(access, distance):
            if not prediction.probability >= confidence:  # likeliest first; NaN ends it too
                break
            key = ExpertKey(*prediction.key)
            if not (0 <= key.layer < layers and 0 <= key.expert < experts):
                raise ConfigError(f"the predictor named expert {key.expert} of layer {key.layer}: there is none")
            likely.setdefault(key, prediction)
    rounds = layers + 1
    order = sorted(likely.items(), key=lambda item: -item[1].probability * (1 - (item[1].due - 1) / rounds))
    return dict(order)
