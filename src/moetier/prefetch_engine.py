"""Prefetching beside a running engine: predict, issue within a budget, keep the books, obey the controller.

Sans-I/O and torch-free: the caller passes clock readings and serialises all calls but `predict`, which may take long
and is called by each thread for itself. `ExpertCache` drives it, and the simulator's clock does. Nothing in here may
end a run: the first fault of its own ends prefetching, is logged once and reported.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from threading import get_ident
from typing import TYPE_CHECKING, Any

from moetier.access import Access, ExpertKey, Part, Phase
from moetier.predictors import Predictor
from moetier.predictors.reliability import Frequencies
from moetier.prefetch import ranked
from moetier.prefetch_control import Controller, Setting, Step
from moetier.residency import Residency
from moetier.tiers import Copy, Kind

if TYPE_CHECKING:
    from moetier.eventlog import Recorder

__all__ = ["Prefetching"]

_log = logging.getLogger("moetier")
_STREAMS = 64  # threads whose predictors are kept
_LEAST = 0.15  # a predictor's own probability below which a missing expert is not even looked at
_WARMUP = 192  # accesses, for a predictor that does not say how many passes it needs to be of use
_CANDIDATES = 16  # an access, at most
_WORTH = 4.0  # the loads to be hidden take at least so many times as long as asking what they are (docs/LOG.md)
_SLACK = 0.5  # records that may be under way when the next access comes: measured, the link shares itself (docs/LOG.md)


@dataclass(slots=True)
class _Ahead:
    """A prefetch that is not demanded yet."""

    victim: ExpertKey | None  # whose slot it took
    landed: bool = False


@dataclass(slots=True)
class _Stream:
    """What is known of one thread: its predictor, and the access it is in."""

    predictor: Predictor
    layer: int = -1
    begun: float = 0.0
    misses: int = 0  # of the access, as in `Step`
    spared: int = 0
    regretted: int = 0
    kind: int = 0
    stage: int = -1  # of the controller at its begin; -1: its period does not count
    expected: list[ExpertKey] = field(default_factory=list)  # missing experts that were predicted for the next layer
    bins: list[int] = field(default_factory=list)  # of their probabilities


class Prefetching:
    """Prefetches for `core`, with one predictor a thread, made by `make`; `name` is for the report.

    `nbytes` says how large a layer's records are. `withdraw` is set by the driver: it takes prefetches back that the
    mover has not begun, and says which.
    """

    def __init__(
        self,
        core: Residency | Recorder,
        make: Callable[[], Predictor],
        name: str,
        nbytes: Callable[[int], int],
        controller: Controller | None = None,
    ):
        self.core, self.name = core, name
        self._make, self._nbytes = make, nbytes
        self._streams: dict[int, _Stream] = {get_ident(): _Stream(make())}
        passes = getattr(self._streams[get_ident()].predictor, "warmup", None)
        warmup = _WARMUP if passes is None else passes * core.layers
        self.controller = controller or Controller(window=-(-64 // core.layers) * core.layers, warmup=warmup)
        self.withdraw: Callable[[Iterable[int]], list[int]] = lambda copy_ids: []
        self.error: Exception | None = None  # the fault that ended prefetching
        self.issued = self.useful = self.late = self.wasted = self.failed = self.cancelled = 0
        self.wasted_nbytes = 0
        self.predict_seconds = 0.0
        self._asking = 0.0  # seconds, of one access, usually
        self._needs = 0.0  # records that an access misses, or would without prefetches, usually
        self._ahead: dict[ExpertKey, _Ahead] = {}
        self._at: list[set[ExpertKey]] = [set() for _ in range(core.layers)]  # keys of `_ahead`, by layer
        self._displaced: dict[ExpertKey, ExpertKey] = {}  # victim -> the prefetched expert that took its slot
        self._unreadable: set[ExpertKey] = set()  # only on demand from now on
        self._worth = Frequencies()  # how often a prediction of a missing expert comes true
        self._occupants: dict[int, ExpertKey] | None = None  # of tier 0, by slot, while prefetching
        self._loading = self._batch = 0  # demand loads under way; loads since the link was idle
        self._since = 0.0  # when it was
        self._load_seconds = 0.0  # of one record, several under way

    # -- the driver's calls, serialised, in the order of an access ----------------------------------------------------

    def begin(self, access: Access, now: float) -> bool:
        """Before `core.acquire`; whether `predict` is wanted for this access."""
        controller = self.controller
        if self.error is not None:
            return False
        if not (controller.measures or self._ahead):
            controller.passed()
            if not controller.measures:
                return False
        try:
            return self._begin(access, now)
        except Exception as error:
            self._fault(error)
            return False

    def orders(self, copies: Iterable[Copy], now: float) -> None:
        """Copies that go to the mover."""
        home = len(self.core.configs)
        for copy in copies:
            if copy.kind is Kind.WRITE_BACK:
                continue
            if self._occupants is not None and copy.target.tier == 0:
                self._occupants[copy.target.slot] = copy.key
            if copy.kind is Kind.LOAD and copy.source.tier == home:
                if not self._loading:
                    self._since, self._batch = now, 0
                self._loading += 1
                self._batch += 1

    def ended(self, copy: Copy, ok: bool, when: float) -> bool:
        """A copy has ended, and the core knows. True: it failed, and nobody needs to hear of it."""
        if copy.kind is Kind.LOAD and copy.source.tier == len(self.core.configs):
            self._loading = max(0, self._loading - 1)
            if not self._loading and self._batch and when > self._since:
                seconds = (when - self._since) / self._batch
                self._load_seconds += (seconds - self._load_seconds) * (0.1 if self._load_seconds else 1.0)
        ahead = self._ahead.get(copy.key) if copy.kind is Kind.PREFETCH else None
        if ahead is None:
            return False
        if ok:
            ahead.landed = copy.target.tier == 0
            return False
        self.failed += 1
        self.wasted += 1
        self._unreadable.add(copy.key)
        self._forget(copy.key)
        return True

    def predict(self, access: Access) -> dict[ExpertKey, float]:
        """What is likely to be wanted next, likeliest first, with the predictor's own probabilities. Called by the
        access's own thread, without the lock.
        """
        stream = self._streams.get(get_ident())
        if stream is None or self.error is not None or access.part > Part.FORWARD:  # predictors go forward
            return {}
        try:
            foresee = getattr(stream.predictor, "foresee", None)  # a shorter way that some have
            found: dict[ExpertKey, float] | None = None if foresee is None else foresee(access)
            if found is not None:
                return found
            stream.predictor.observe(access)
            if access.phase is Phase.PREFILL:
                return {}
            wanted = ranked(stream.predictor, access, self.core.layers, self.core.experts, _LEAST, (1,))
            return {key: prediction.probability for key, prediction in wanted.items()}
        except Exception as error:  # whatever a third party's predictor raises
            self._fault(error)
            return {}

    def asked(self, seconds: float) -> None:
        """What `predict` and `issue` of an access took together."""
        self.predict_seconds += seconds
        self._asking += (seconds - self._asking) * (0.05 if self._asking else 1.0)

    def issue(self, wanted: dict[ExpertKey, float], now: float) -> int:
        """Order what is worth it and fits the time until the next access; returns how many."""
        stream, setting = self._streams.get(get_ident()), self.controller.setting
        if stream is None or self.error is not None:
            return 0
        try:
            holds, unreadable, worth = self.core.holds, self._unreadable, self._worth
            keys = [key for key in wanted if not holds(key) and key not in unreadable][:_CANDIDATES]
            if not keys:
                return 0
            stream.expected = keys
            stream.bins = [worth.bin(wanted[key]) for key in keys]
            if setting is None:
                return 0
            chances = [worth.probability(number) for number in stream.bins]
            return self._issue(keys, chances, setting, self._room(stream, now))
        except Exception as error:
            self._fault(error)
            return 0

    def report(self) -> dict[str, Any]:
        """What became of the prefetches, and what the controller makes of it.

        `issued` = `useful` (demanded before they were evicted; `late` of these were still on their way) + `wasted`
        (evicted undemanded, or failed) + `cancelled` (taken back before they began) + `pending`. `saved_seconds` is the
        net gain over the accesses that the controller judged, below 0 for a loss.
        """
        if self.error is None:
            for key in [key for key in self._ahead if not self.core.holds(key)]:
                self._waste(key)
        controller = self.controller
        return {
            "predictor": self.name,
            "issued": self.issued,
            "useful": self.useful,
            "late": self.late,
            "wasted": self.wasted,
            "failed": self.failed,
            "cancelled": self.cancelled,
            "pending": len(self._ahead),
            "wasted_bytes": self.wasted_nbytes,
            "saved_seconds": controller.gained - controller.paid,
            "controller": controller.report(),
            "error": None if self.error is None else f"{type(self.error).__name__}: {self.error}",
        }

    # -- an access begins ---------------------------------------------------------------------------------------------

    def _begin(self, access: Access, now: float) -> bool:
        controller, stream = self.controller, self._stream()
        follows = access.layer == stream.layer + 1 or self.core.layers == 1
        if stream.stage == controller.stage and follows:  # across the passes there is sampling, and the user
            step = Step(now - stream.begun, stream.misses, stream.spared, stream.regretted, stream.kind)
            controller.record(step, controller.setting is not None)
        before = controller.stage
        controller.passed()
        if controller.stage != before:
            self._turned()
        stream.layer, stream.begun = access.layer, now
        stream.stage = controller.stage if controller.measures and access.phase is Phase.DECODE else -1
        stream.kind = sum(access.tokens).bit_length()
        if stream.bins:
            if stream.expected[0].layer == access.layer:
                self._worth.learn(stream.bins, [key in access.keys for key in stream.expected])
            stream.bins = []
        self._settle(access, stream)
        if stream.stage >= 0:
            self._needs += (stream.misses + stream.spared - self._needs) * 0.02
        return controller.predicts

    def _settle(self, access: Access, stream: _Stream) -> None:
        """What became of the prefetches for this layer; what the access misses, and because of whom."""
        stream.spared = stream.regretted = 0
        for key in self._at[access.layer] and list(self._at[access.layer]):
            if not self.core.holds(key):
                self._waste(key)
            elif key in access.keys:
                stream.spared += 1
                self.useful += 1
                self.late += not self._ahead[key].landed
                self._forget(key)
            elif not self._ahead[key].landed:
                self._cancel(key)
        missing = [key for key in access.keys if not self.core.holds(key)]
        stream.misses = len(missing)
        for key in missing if self._displaced else ():
            thief = self._displaced.pop(key, None)
            stream.regretted += thief is not None and self.core.holds(thief)

    def _stream(self) -> _Stream:
        thread = get_ident()
        stream = self._streams.get(thread)
        if stream is None:
            if len(self._streams) >= _STREAMS:  # numbers of threads that ended are used again: these are really many
                self._streams.pop(next(iter(self._streams)))
            stream = self._streams[thread] = _Stream(self._make())
        return stream

    def _turned(self) -> None:
        """The controller has changed its mind, and should not have if there is nothing to gain."""
        if self.controller.predicts and self._needs * self._load_seconds < _WORTH * self._asking:
            self.controller.give_up(
                f"an access loads for {1e3 * self._needs * self._load_seconds:.2g} ms, too little for the "
                f"{1e3 * self._asking:.2g} ms of asking what"
            )
        predicts = self.controller.predicts
        if not predicts:
            self._occupants = None
            for stream in self._streams.values():
                pause = getattr(stream.predictor, "pause", None)
                if pause is not None:
                    pause()
        elif self._occupants is None:
            self._occupants = {self.core.place(key).slot: key for key in self.core.residents()}

    # -- a prefetch's life --------------------------------------------------------------------------------------------

    def _room(self, stream: _Stream, now: float) -> float:
        """How many records the link can read before the next access, beside what it has to read already."""
        period, each = self.controller.baseline.seconds(stream.kind, stream.misses), self._load_seconds
        under_way = sum(not ahead.landed for ahead in self._ahead.values())
        if period is None or not each:
            return 1.0 - under_way
        idle = period - max(stream.misses * each, now - stream.begun)
        return idle / each + _SLACK - under_way

    def _issue(self, keys: list[ExpertKey], chances: list[float], setting: Setting, room: float) -> int:
        """Likeliest first, while there is room. One that will be half-way when its access comes saves the other half
        of a read, or else costs the access the rest of it: it must be the likelier the less of it fits."""
        issued = 0
        for key, chance in zip(keys, chances, strict=True):
            if issued >= setting.limit or chance < setting.confidence or chance <= 1 - (room - issued):
                break
            issued += self._prefetch(key)
        self.issued += issued
        return issued

    def _prefetch(self, key: ExpertKey) -> bool:
        if key in self._ahead:  # evicted meanwhile
            self._waste(key)
        if not self.core.prefetch(key, True):
            return False
        slot = self.core.place(key).slot
        victim = None if self._occupants is None else self._occupants.get(slot)
        if victim is not None and self.core.holds(victim):
            victim = None
        self._ahead[key] = _Ahead(victim)
        self._at[key.layer].add(key)
        if victim is not None:
            self._displaced[victim] = key
        return True

    def _cancel(self, key: ExpertKey) -> None:
        """Its access has come and does not want it: take it back unless it has begun."""
        if not self.core.cancel(key) and self.core.obsolete:  # the mover has it
            for copy_id in self.withdraw(list(self.core.obsolete)):
                self.core.cancelled(copy_id)
            self.core.obsolete.clear()
        if not self.core.holds(key):
            self.cancelled += 1
            self._forget(key)

    def _waste(self, key: ExpertKey) -> None:
        self.wasted += 1
        self.wasted_nbytes += self._nbytes(key.layer)
        self._forget(key)

    def _forget(self, key: ExpertKey) -> None:
        ahead = self._ahead.pop(key)
        self._at[key.layer].discard(key)
        if ahead.victim is not None and self._displaced.get(ahead.victim) == key:
            del self._displaced[ahead.victim]

    def _fault(self, error: Exception) -> None:
        self.error = error
        _log.warning("prefetching ends: %s: %s: %s", self.name, type(error).__name__, error)
