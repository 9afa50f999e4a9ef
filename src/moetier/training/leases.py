"""Leases for updates: one record at a time, or the same expert's records of several caches together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from moetier.access import Access, ExpertKey, Part, Phase
from moetier.cache import ExpertCache, Lease, WritableLease


def access_of(layer: int, keys: Sequence[ExpertKey], writes: bool = True) -> Access:
    """An update's access to these records of a layer; the cache gives it its time."""
    return Access(0, layer, tuple(keys), phase=Phase.PREFILL, writes=writes, part=Part.UPDATE)


@contextmanager
def leased(cache: ExpertCache, key: ExpertKey) -> Iterator[Lease]:
    """A lease on one record for the length of a block. Set its `dirty` as soon as the record is changed."""
    stream = cache.stream(access_of(key.layer, (key,)))
    try:
        yield _alone(cache, next(stream))
        for _ in stream:  # gives the lease back
            raise AssertionError("one key, one lease")
    finally:
        stream.close()  # type: ignore[attr-defined]


def together(
    layer: int, keys: Sequence[ExpertKey], first: ExpertCache, *others: ExpertCache
) -> Iterator[tuple[Lease, ...]]:
    """Leases on the records of every key in all of these caches, one key at a time, as they become ready in the first.

    While one expert is computed, the others' records are loaded in the first cache, which should be the one with the
    most bytes to move.
    """
    stream = first.stream(access_of(layer, keys))
    try:
        for lease in stream:
            _alone(first, lease)
            with ExitStack() as stack:
                rest = [stack.enter_context(leased(cache, lease.key)) for cache in others]
                yield (lease, *rest)
    finally:
        stream.close()  # type: ignore[attr-defined]


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
