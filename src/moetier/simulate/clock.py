"""The residency core behind a virtual clock, and a model of the engine's one compute thread.

The thread does what `ExpertCache.batches` does: it learns of arrivals only when it begins an access or waits, computes
all experts that are ready (residents first, while the others load), one by one while some wait for a slot, then gives
them back. Time passes only here and only in `_compute` and `_wait`; the same input gives the same output, always.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from moetier.access import Access, ExpertKey
from moetier.errors import ConfigError, MoetierError
from moetier.pinning import WarmPinning
from moetier.predictors import make_predictor
from moetier.prefetch import Prefetcher
from moetier.prefetch_engine import Prefetching
from moetier.residency import Residency
from moetier.simulate.config import Result, SimulationConfig
from moetier.simulate.links import INSTANT, VirtualLink, VirtualMover
from moetier.tiers import Copy, Ticket, TierConfig

if TYPE_CHECKING:
    from moetier.eventlog import Recorder


class Clock:
    """One machine with one cache, or with one for every layer; they share its links."""

    name = "clock"

    def __init__(
        self,
        configs: Sequence[Sequence[TierConfig]],
        layers: int,
        experts: int,
        config: SimulationConfig,
        top_k: int,
    ):
        self.caches = [Residency(tiers, layers, experts) for tiers in configs]
        self.seconds = {"total": 0.0, "compute": 0.0, "wait": 0.0}
        self._timing, self._dirty = config.timing or INSTANT, config.dirty
        self._timed = config.timing is not None
        self._mover = VirtualMover(self._timing, len(configs[0]))
        self._now = 0.0
        self._started: dict[int, Copy] = {}  # kept for prefetching only
        self._layer = layers  # of the access before: the first one begins a step
        self._prefetcher = self._pinning = self._prefetching = None
        if config.predictor is not None and config.prefetch_control:
            if len(self.caches) > 1 or config.timing is None:
                raise ConfigError("prefetch_control measures time in one cache: give a timing, and scope global")
            self._prefetching = Prefetching(
                self.caches[0],
                partial(make_predictor, config.predictor, layers, experts, top_k),
                config.predictor,
                lambda layer: self._timing.record_nbytes,
            )
            self._prefetching.withdraw = partial(self._mover.withdraw, 0)
        elif config.predictor is not None:
            whole = self.caches[0] if len(self.caches) == 1 else LayerCaches(self.caches, layers, experts)
            self._prefetcher = Prefetcher(
                cast("Residency | Recorder", whole),
                make_predictor(config.predictor, layers, experts, top_k),
                config.prefetch_confidence,
                config.prefetch_limit,
                config.prefetch_displace,
            )
        if config.warm_pinning is not None:
            if len(self.caches) > 1:
                raise ConfigError("warm pinning chooses among all layers: use scope global")
            slots = configs[0][0].slots
            self._pinning = WarmPinning(self.caches[0], layers, experts, slots, top_k, config.warm_pinning)

    def run(self, accesses: Sequence[Access]) -> None:
        """Serve the next accesses."""
        for access in accesses:
            self._serve(access)

    @property
    def links(self) -> tuple[VirtualLink, ...]:
        """Disk reads, disk writes, host to device, device to host."""
        return self._mover.links

    @property
    def now(self) -> float:
        """Seconds since the start."""
        return self._now

    def settle(self) -> None:
        """Let pass the time until every copy has ended."""
        while (event := self._mover.next_event()) is not None:
            self.seconds["wait"] += event - self._now
            self._now = event
            self._drain()
        self.seconds["total"] = self._now

    def bytes_moved(self) -> dict[str, int]:
        """Bytes of the copies that have ended by now, per link; records instead of bytes where there is no timing."""
        self._mover.run_until(self._now)
        return {link.name: link.copies * self._timing.record_nbytes for link in self._mover.links}

    def report(self, result: Result) -> None:
        """Fill in what only this driver knows: bytes, seconds, prefetches, pins."""
        result.bytes_moved = self.bytes_moved()
        if self._timed:
            busy = {link.name: link.busy_until(self._now) for link in self._mover.links}
            result.seconds = {**self.seconds, "total": self._now, **busy}
        if self._prefetcher is not None:
            if self._prefetcher.error is not None:
                error = self._prefetcher.error
                raise ConfigError(f"predictor {result.config.predictor!r} failed: {error!r}") from error
            counts = self._prefetcher.counters()
            result.prefetches = {name: counts[name] for name in ("issued", "useful", "late", "wasted", "cancelled")}
        if self._prefetching is not None:
            report = self._prefetching.report()
            if self._prefetching.error is not None:
                raise ConfigError(f"predictor {result.config.predictor!r} failed: {report['error']}")
            result.prefetches = {name: report[name] for name in ("issued", "useful", "late", "wasted", "cancelled")}
            result.prefetch_control = report["controller"]
        if self._pinning is not None:
            result.pinning = self._pinning.report()
            result.pinned = [(key.layer, key.expert) for key in self._pinning.pinned]

    # -- the compute thread --------------------------------------------------------------------------------------------

    def _serve(self, access: Access) -> None:
        timing, number = self._timing, access.layer if len(self.caches) > 1 else 0
        cache = self.caches[number]
        if access.layer <= self._layer:
            self._compute(timing.step_seconds)
        self._layer = access.layer
        self._compute(timing.layer_seconds)
        self._drain()
        if self._dirty and not access.writes:
            access = replace(access, writes=True)
        if access.writes:
            self._throttle(number)
        foresee = self._prefetching is not None and self._prefetching.begin(access, self._now)
        ticket = cache.acquire(access)
        hits = len(ticket.ready)
        if hits < len(access.keys):
            self._compute(timing.miss_seconds)
        self._start_orders(number)
        if self._prefetcher is not None:
            self._prefetcher.after(access)
            for other in range(len(self.caches)):
                self._start_orders(other)
        idle = hits == len(access.keys)
        while not ticket.done:
            if foresee and not ticket.waiting and (idle or not ticket.ready):
                foresee = self._foresee(access)
            if not ticket.ready:
                self._wait(ticket)
            held = [ticket.ready.popleft() for _ in range(1 if ticket.waiting else len(ticket.ready))]
            for key in held:
                self._compute(self._math_seconds(access, key))
            for key in held:
                cache.release(ticket, key, self._dirty)
                self._start_orders(number)
        if foresee:
            self._foresee(access)
        if self._pinning is not None:
            self._pinning.observe(access, hits)
            self._start_orders(number)

    def _foresee(self, access: Access) -> bool:
        """As the engine does: ask the predictor where the thread would wait or the link idles. False: it is done."""
        assert self._prefetching is not None
        self._compute(self._timing.predict_seconds)
        self._prefetching.asked(self._timing.predict_seconds)
        wanted = self._prefetching.predict(access)
        if self._prefetching.issue(wanted, self._now):
            self._start_orders(0)
        return False

    def _math_seconds(self, access: Access, key: ExpertKey) -> float:
        timing = self._timing
        if not timing.token_seconds or not access.tokens:
            return timing.expert_seconds
        more = access.tokens[access.keys.index(key)] - 1
        return timing.expert_seconds + more * timing.token_seconds

    def _compute(self, seconds: float) -> None:
        """Work that takes so long alone; copies that are under way meanwhile slow it down."""
        begin, contention = self._now, self._timing.contention
        if contention:
            while self._mover.busy and (event := self._mover.next_event()) is not None:
                beside = min(seconds, (event - self._now) / (1 + contention))
                self._now += beside * (1 + contention)
                seconds -= beside
                if seconds <= 0:
                    break
                self._now = event
                self._mover.run_until(event)
        self._now += seconds
        self.seconds["compute"] += self._now - begin

    def _wait(self, ticket: Ticket) -> None:
        """Until the ticket has a ready expert, and the thread is awake."""
        wake = self._timing.wake_seconds
        while True:
            self._drain()
            if ticket.ready:
                return
            event = self._mover.next_event()
            if event is None:
                raise MoetierError(f"access {ticket.access.time} waits for copies that nobody makes")
            self.seconds["wait"] += event + wake - self._now
            self._now = event + wake

    def _throttle(self, number: int) -> None:
        """Before more records change: wait for writes while more are dirty than there may be."""
        while self.caches[number].writing.throttled and (event := self._mover.next_event()) is not None:
            self.seconds["wait"] += event - self._now
            self._now = event
            self._drain()

    def _drain(self) -> None:
        """Tell the caches what has ended, and let go what waited for it."""
        mover = self._mover
        mover.run_until(self._now)
        told = set()
        while mover.done:
            (number, copy_id), when = mover.done.popleft(), mover.times.popleft()
            self.caches[number].completed(copy_id)
            if self._prefetching is not None:
                self._prefetching.ended(self._started.pop(copy_id), True, when)
            told.add(number)
        for number in sorted(told):
            self._start_orders(number)

    def _start_orders(self, number: int) -> None:
        cache = self.caches[number]
        orders = cache.take()
        if orders:
            if self._prefetching is not None:
                self._prefetching.orders(orders, self._now)
                self._started.update((copy.id, copy) for copy in orders)
            self._mover.start(number, orders, self._now)
        if cache.promoted:
            self._mover.promote(number, cache.promoted)
            cache.promoted.clear()
        if cache.obsolete:
            withdrawn = self._mover.withdraw(number, cache.obsolete)
            cache.obsolete.clear()
            for copy_id in withdrawn:
                cache.cancelled(copy_id)
            if withdrawn:
                self._start_orders(number)


class LayerCaches:
    """What a prefetcher asks of a core, answered by the cache of the key's layer."""

    def __init__(self, caches: Sequence[Residency], layers: int, experts: int):
        self.caches, self.layers, self.experts = caches, layers, experts

    def holds(self, key: ExpertKey) -> bool:
        """See `Residency.holds`."""
        return self.caches[key.layer].holds(key)

    def prefetch(self, key: ExpertKey, displace: bool = False, staged: bool = False) -> bool:
        """See `Residency.prefetch`."""
        return self.caches[key.layer].prefetch(key, displace, staged)

    def cancel(self, key: ExpertKey) -> bool:
        """See `Residency.cancel`."""
        return self.caches[key.layer].cancel(key)

    def counters(self) -> dict[str, Any]:
        """The prefetches of all caches."""
        counters: list[Any] = [cache.counters()["prefetches"] for cache in self.caches]
        return {"prefetches": {name: sum(count[name] for count in counters) for name in counters[0]}}
