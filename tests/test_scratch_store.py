"""The store of gradients: what was never written or was cleared is zeros, without I/O; the rest comes back."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from moetier.access import ExpertKey
from moetier.errors import ConfigError, StoreError
from moetier.record import PAGE, RecordLayout
from moetier.stores import WritableStore
from moetier.stores.diskio import aligned_buffer
from moetier.stores.scratch import ScratchStore

LAYOUT = RecordLayout.of([("g", torch.float32, (2_200_001,))])  # several read requests
KEY, OTHER = ExpertKey(0, 1), ExpertKey(1, 0)


@pytest.fixture
def store(tmp_path: Path) -> ScratchStore:
    return ScratchStore(tmp_path, [LAYOUT, LAYOUT], [2, 2])


def put(store: ScratchStore, key: ExpertKey, value: int) -> int:
    data = aligned_buffer(LAYOUT.nbytes)
    data[:] = bytes([value]) * LAYOUT.nbytes
    return sum(store.write(key, segment, data) for segment in range(store.segments(key)))


def get(store: ScratchStore, key: ExpertKey) -> tuple[set[int], int]:
    """The values that the record's bytes have, and how many were read."""
    into = aligned_buffer(LAYOUT.nbytes)
    into[:] = b"?" * LAYOUT.nbytes
    nbytes = sum(store.read(key, segment, into) for segment in range(store.segments(key)))
    return set(bytes(into)), nbytes


def test_never_written_records_are_zeros_and_cost_nothing(store: ScratchStore) -> None:
    assert isinstance(store, WritableStore) and store.segments(KEY) > 1
    assert get(store, KEY) == ({0}, 0)
    assert put(store, KEY, 5) == LAYOUT.nbytes
    assert get(store, KEY) == ({5}, LAYOUT.nbytes) and get(store, OTHER) == ({0}, 0)
    assert store.slot_nbytes % PAGE == 0 and store.records == 4


def test_cleared_records_are_zeros_and_are_not_written(store: ScratchStore) -> None:
    put(store, KEY, 5)
    store.clear(KEY)
    assert store.nbytes == 0 and not store.written(KEY)
    assert put(store, KEY, 6) == 0 and not store.written(KEY)  # the cache gives up what it still holds
    assert get(store, KEY) == ({0}, 0)  # and from here on it is in use
    assert put(store, KEY, 7) == LAYOUT.nbytes and get(store, KEY)[0] == {7}
    store.clear(KEY)
    store.use(KEY)  # still in its slot, filled anew
    assert put(store, KEY, 8) == LAYOUT.nbytes and get(store, KEY)[0] == {8}


def test_space_is_bounded_by_what_is_in_use(store: ScratchStore) -> None:
    size = store.slot_nbytes
    for value in range(9):
        put(store, KEY, value)
        put(store, OTHER, value)
        assert store.nbytes == 2 * size
        store.clear(KEY)
        store.use(KEY)
        assert store.nbytes == size
    assert store._file.size <= 4 * size


def test_cleared_while_it_is_written(store: ScratchStore, monkeypatch: pytest.MonkeyPatch) -> None:
    write = store._file.write

    def cleared(offset: int, lead: int, data: memoryview) -> None:
        write(offset, lead, data)
        store.clear(KEY)

    monkeypatch.setattr(store._file, "write", cleared)
    put(store, KEY, 5)
    assert not store.written(KEY) and store.nbytes == 0 and get(store, KEY)[0] == {0}


def test_a_write_that_fails_changes_nothing(store: ScratchStore, monkeypatch: pytest.MonkeyPatch) -> None:
    put(store, KEY, 5)

    def broken(*args: object) -> int:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", broken)
        with pytest.raises(StoreError, match=r"writing .* failed: Input/output error"):
            put(store, KEY, 6)
    assert get(store, KEY)[0] == {5} and store.nbytes == store.slot_nbytes
    put(store, KEY, 7)
    assert get(store, KEY)[0] == {7}


def test_nothing_is_left(store: ScratchStore, tmp_path: Path) -> None:
    put(store, KEY, 5)
    assert not list(tmp_path.iterdir())
    store.close()
    with pytest.raises(StoreError, match="the file is closed"):
        get(store, KEY)
    with pytest.raises(StoreError, match=r"scratch.*cannot be opened"):
        ScratchStore(tmp_path / "nowhere", [LAYOUT], [1])
    with pytest.raises(ConfigError, match="a layout and a number of experts"):
        ScratchStore(tmp_path, [LAYOUT], [])
