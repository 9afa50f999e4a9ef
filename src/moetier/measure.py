"""Measure what the planner's forecast needs: the disk with this checkpoint's records, and a short run of the model.

Everything is taken from the engine itself: its mover, its arenas, its forward. See `forecast` for what is made of it.
"""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
import torch

from moetier.access import Access, ExpertKey, Phase
from moetier.arenas import HostArena
from moetier.cache import ExpertCache
from moetier.errors import ConfigError
from moetier.forecast import Measured, Observation, calibrate, fit
from moetier.lease import Lease
from moetier.mover import ThreadMover
from moetier.simulate.config import Link
from moetier.stores import ExpertStore
from moetier.tiers import Copy, Kind, Place
from moetier.trace import Trace
from moetier.trace.streams import recorded_steps

ROUNDS = 24  # of reads, at each width


def measure(model: Any, tokens: Sequence[int], prompt: int = 4) -> Measured:
    """Decode `tokens` with a freshly loaded model, whose cache is empty, and fit a timing to what is seen.

    The first `prompt` tokens are one prefill, whose time is not looked at. The first tokens miss much and the last ones
    little, so that accesses of all kinds are seen. Raises `ConfigError` for too few tokens.
    """
    if len(tokens) < prompt + 8:
        raise ConfigError(f"at least {prompt + 8} tokens are needed to measure with, got {len(tokens)}")
    cache: ExpertCache = model.moetier.cache
    plan = model.moetier.plan
    disk = measure_disk(cache.store, plan.workload.top_k, cache.readers)
    cache.host.touch()  # the first use of a page costs more than every other
    h2d = measure_h2d(cache, plan.workload.top_k)
    ids = torch.tensor([list(tokens)], device=model.device)
    with torch.no_grad(), Watcher(cache) as watcher:
        output = model(input_ids=ids[:, :prompt], use_cache=True)
        begin = time.perf_counter()
        for position in range(prompt, len(tokens)):
            past = output.past_key_values
            output = model(input_ids=ids[:, position : position + 1], past_key_values=past, use_cache=True)
            int(output.logits[0, -1].argmax())  # what a greedy decoder does, and waits for
        seconds = time.perf_counter() - begin
    seen = watcher.observations()
    timing = fit(seen, plan.workload.record_nbytes, disk, h2d)
    store = cache.store
    timing = calibrate(timing, seen, store.layers, store.experts, cache.core.configs)
    return Measured(
        timing,
        disk,
        len(seen),
        sum(1 for one in seen if one.misses),
        (len(tokens) - prompt) / seconds,
        plan.slots,
        bool(getattr(store, "direct", False)),
    )


def measure_disk(store: ExpertStore, width: int, readers: int, seconds: float | None = None) -> Link:
    """The disk as the engine's readers see it: records alone and `width` at a time, drawn at random.

    With `seconds`, fewer rounds if these take longer; three at least.

    The time of a batch is taken as latency plus its bytes over the bandwidth; medians over interleaved rounds.
    """
    arena, condition, draw = HostArena(width, store.slot_nbytes), threading.Condition(), random.Random(0)
    arena.touch()
    mover = ThreadMover(store, arena, None, condition, readers)
    number = 0

    def read(count: int) -> tuple[float, int]:
        nonlocal number
        keys: set[ExpertKey] = set()
        while len(keys) < count:
            keys.add(ExpertKey(draw.randrange(store.layers), draw.randrange(store.experts)))
        orders = []
        for slot, key in enumerate(sorted(keys)):
            number += 1
            orders.append(Copy(number, key, Place(1, -1), Place(0, slot), Kind.LOAD))
        begin = time.perf_counter()
        mover.start(orders)
        with condition:
            while len(mover.done) < count:
                condition.wait()
            errors = [flight.error for flight in mover.done if flight.error is not None]
            mover.done.clear()
        if errors:
            raise errors[0]
        return time.perf_counter() - begin, sum(store.layout(key.layer).nbytes for key in keys)

    width = min(width, store.layers * store.experts)
    try:
        read(1)  # starts the threads
        end = None if seconds is None else time.perf_counter() + seconds
        rounds: list[tuple[tuple[float, int], tuple[float, int]]] = []
        while len(rounds) < ROUNDS and (end is None or len(rounds) < 3 or time.perf_counter() < end):
            rounds.append((read(1), read(width)))
    finally:
        mover.close()
        arena.close()
    one, many = (statistics.median(found[index][0] for found in rounds) for index in (0, 1))
    few_bytes, many_bytes = (statistics.fmean(found[index][1] for found in rounds) for index in (0, 1))
    per_byte = (many - one) / (many_bytes - few_bytes) if many_bytes > few_bytes else one / few_bytes
    if per_byte <= 0:  # noise: take the larger reads for what they are
        per_byte = many / many_bytes
    return Link(1e-9 / per_byte, max(0.0, one - few_bytes * per_byte), readers)


def measure_h2d(cache: ExpertCache, width: int = 1, seconds: float = 0.2) -> Link | None:
    """The link to the device, with the slots of an empty cache; none without a device tier.

    Copies one at a time and `width` enqueued together; medians of what fits into the time, three at least.
    """
    arena = cache.device
    if arena is None:
        return None
    nbytes = cache.store.layout(0).nbytes
    width = max(1, min(width, 8, arena.slots, cache.host.slots))

    def copy(count: int) -> float:
        begin = time.perf_counter()
        fences = [arena.fill(slot, cache.host.record(slot, 0, nbytes)) for slot in range(count)]
        for fence in fences:
            if fence is not None:
                fence.synchronize()
        return time.perf_counter() - begin

    copy(width)
    rounds: list[tuple[float, float]] = []
    end = time.perf_counter() + seconds
    while len(rounds) < 3 or (time.perf_counter() < end and len(rounds) < 50):
        rounds.append((copy(1), copy(width)))
    one, many = (statistics.median(found[index] for found in rounds) for index in (0, 1))
    per_record = (many - one) / (width - 1) if width > 1 else one
    if per_record <= 0:  # noise: take the batch for what it is
        per_record = many / width
    return Link(nbytes / per_record / 1e9, max(0.0, one - per_record))


class Watcher:
    """Times every access of a cache while it is open (a context manager)."""

    def __init__(self, cache: ExpertCache):
        self._cache = cache
        self._batches = cache.batches
        self._rows: list[dict[str, Any]] = []

    def __enter__(self) -> Watcher:
        for link in self._cache.mover.links:
            link.ends = []
        self._cache.batches = self._watched  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        del self._cache.batches
        for link in self._cache.mover.links:
            link.ends = None

    def _watched(
        self, access: Access, limit: int | None = None, aside: bool = False
    ) -> Generator[list[Lease], None, None]:
        cache, clock = self._cache, time.perf_counter
        links = cache.mover.links
        copies = [len(link.ends or ()) for link in links]
        before = cache.compute_seconds, cache.decide_seconds, cache.wait_seconds
        waited = cache.wait_seconds
        begin = clock()
        given: list[tuple[float, int, bool]] = []  # when, how many, after a wait
        for batch in self._batches(access, limit, aside):
            given.append((clock(), len(batch), cache.wait_seconds > waited))
            waited = cache.wait_seconds
            yield batch
        end = clock()
        self._rows.append(
            {
                "access": access,
                "begin": begin,
                "end": end,
                "given": given,
                "compute": cache.compute_seconds - before[0],
                "decide": cache.decide_seconds - before[1],
                "wait": cache.wait_seconds - before[2],
                "arrived": [(link.ends or [])[count:] for link, count in zip(links, copies, strict=True)],
            }
        )

    def observations(self) -> list[Observation]:
        """All accesses seen, in order."""
        found, end, missed = [], None, False
        top = 0 if self._cache.device is None else 1  # the link into tier 0
        for row in self._rows:
            arrived = row["arrived"][top]
            last = max(arrived, default=row["begin"])
            wakes = [
                when - max((t for t in arrived if t <= when), default=when) for when, _, late in row["given"] if late
            ]
            found.append(
                Observation(
                    access=row["access"],
                    misses=len(arrived),
                    before=row["begin"] - (row["begin"] if end is None else end),
                    after_miss=missed,
                    beside=sum(count for when, count, _ in row["given"] if when < last),
                    compute=row["compute"],
                    decide=row["decide"],
                    waits=len(wakes),
                    wait=row["wait"],
                    wake=sum(wakes),
                )
            )
            end, missed = row["end"], bool(arrived)
        return found


def replay(model: Any, trace: Trace) -> list[tuple[Phase, int, float]]:
    """Feed a trace's own tokens to a model, step by step as they were recorded; phase, tokens, seconds of each step.

    Raises `ConfigError` for a trace without token ids, or with several sequences in a step.
    """
    ids = trace.token_ids
    if ids is None:
        raise ConfigError("the trace does not hold its tokens' numbers; record it again with them")
    found, past, sequence = [], None, None
    with torch.no_grad():
        for step in recorded_steps(trace):
            sequences = np.unique(trace.sequence[step.rows])
            if len(sequences) > 1:
                raise ConfigError("the trace has several sequences in a step; only one at a time can be run again")
            if int(sequences[0]) != sequence:
                past, sequence = None, int(sequences[0])
            tokens = torch.tensor([ids[step.rows].tolist()], device=model.device)
            begin = time.perf_counter()
            output = model(input_ids=tokens, past_key_values=past, use_cache=True)
            int(output.logits[0, -1].argmax())
            found.append((step.phase, tokens.shape[1], time.perf_counter() - begin))
            past = output.past_key_values
    return found
