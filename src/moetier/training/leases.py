"""Leases for updates: one record at a time, while the next ones load, and what has to leave for them is written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

from moetier.access import Access, ExpertKey, Part, Phase
from moetier.cache import ExpertCache
from moetier.lease import Lease, WritableLease

AHEAD = 16  # records at most that are loaded before their turn: enough to keep the disk at work
SHARE = 2  # and at most this part of the slots, so that little leaves earlier than it had to


def access_of(layer: int, keys: Sequence[ExpertKey], part: Part = Part.UPDATE) -> Access:
    """An update's access to these records of a layer; the cache gives it its time."""
    return Access(0, layer, tuple(keys), phase=Phase.PREFILL, writes=True, part=part)


@contextmanager
def leased(cache: ExpertCache, key: ExpertKey, part: Part = Part.UPDATE) -> Iterator[Lease]:
    """A lease on one record for the length of a block. Set its `dirty` as soon as the record is changed."""
    stream = cache.stream(access_of(key.layer, (key,), part))
    try:
        yield _alone(cache, next(stream))
        for _ in stream:  # gives the lease back
            raise AssertionError("one key, one lease")
    finally:
        stream.close()  # type: ignore[attr-defined]


def load_ahead(cache: ExpertCache, keys: Iterable[ExpertKey]) -> None:
    """Begin to load the first few of `keys`, whose turn comes next, in this order.

    Not where a device is above: the slots of that are for what it computes.
    """
    if cache.device is not None:
        return
    cache.prefetch(islice(keys, max(1, min(AHEAD, cache.host.slots // SHARE))), displace=True)


def _alone(cache: ExpertCache, lease: Lease) -> Lease:
    """A lease whose record may be changed: no copy to a device reads it any more."""
    if lease.in_place:
        cache.host.wait_unread(lease.slot)
    return lease


def read_again(cache: ExpertCache, counts: Sequence[int]) -> None:
    """Read every record that the cache holds from its store again, which has others now. None may be changed.

    `counts` are the records of each layer. Raises `StoreError`; the cache then holds records of both.
    """
    store = cache.store
    for layer, count in enumerate(counts):
        keys = [ExpertKey(layer, expert) for expert in range(count)]
        held = [key for key, holds in zip(keys, cache.holding(keys, all_tiers=True), strict=True) if holds]
        for lease in cache.stream(access_of(layer, held)) if held else ():
            _alone(cache, lease)
            into = cache.host.memory(lease.slot, store.phase(lease.key), store.layout(layer).nbytes)
            for segment in range(store.segments(lease.key)):
                store.read(lease.key, segment, into)
            if lease.in_place and isinstance(lease, WritableLease):
                lease.saved = True  # what the device has of it is of no use any more
