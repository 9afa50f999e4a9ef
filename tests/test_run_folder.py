"""The run folder: what was committed is there, whole, whatever happened afterwards; what was not is gone."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from moetier.access import ExpertKey
from moetier.errors import ConfigError, MoetierError, StoreError
from moetier.record import PAGE, RecordLayout
from moetier.stores import ExpertStore, WritableStore
from moetier.stores.diskio import aligned_buffer
from moetier.stores.manifest import BLOCK
from moetier.stores.runfamily import RunFamily
from moetier.stores.runfolder import RunFolder
from moetier.stores.synthetic import SyntheticStore

LAYOUT = RecordLayout.of([("a", torch.float32, (3, 5)), ("b", torch.bfloat16, (701,))])
BIG = RecordLayout.of([("a", torch.uint8, (2 * BLOCK + 12345,))])
LAYERS, EXPERTS = 2, 3
KEYS = [ExpertKey(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]


def made(folder: Path, **options: Any) -> RunFolder:
    return RunFolder.create(folder, model="tiny", fingerprint="f" * 64, **options)


def family(run: RunFolder, name: str = "weights", layout: RecordLayout = LAYOUT, **options: Any) -> RunFamily:
    return run.family(name, [layout] * LAYERS, experts=[EXPERTS] * LAYERS, **options)


def fill(nbytes: int, seed: int) -> bytes:
    """Bytes that differ from seed to seed and from place to place."""
    return (
        torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
        .numpy()
        .tobytes()
    )


def put(store: RunFamily, key: ExpertKey, seed: int, phase: int = 0) -> None:
    """Write a record that lies `phase` bytes behind a page of memory, as a cache's writer does."""
    nbytes = store.layout(key.layer).nbytes
    data = aligned_buffer(nbytes + PAGE)[phase : phase + nbytes]
    data[:] = fill(nbytes, seed)
    for segment in reversed(range(store.segments(key))):
        store.write(key, segment, data)


def get(store: ExpertStore, key: ExpertKey, phase: int = 0) -> bytes:
    nbytes = store.layout(key.layer).nbytes
    into = aligned_buffer(nbytes + PAGE)[phase : phase + nbytes]
    into[:] = b"?" * nbytes
    for segment in reversed(range(store.segments(key))):
        store.read(key, segment, into)
    return bytes(into)


def holds(store: ExpertStore, content: Mapping[ExpertKey, int | None]) -> bool:
    """Whether the records are those of the seeds; None: zeros."""
    sizes = {key: store.layout(key.layer).nbytes for key in content}
    return all(get(store, k) == (bytes(sizes[k]) if s is None else fill(sizes[k], s)) for k, s in content.items())


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunFolder]:
    with made(tmp_path / "run", keep=None) as opened:
        yield opened


def reopened(run: RunFolder, **options: Any) -> RunFolder:
    run.close()
    return RunFolder.open(run.folder, **options)


def test_a_family_is_a_store_that_can_be_written(run: RunFolder) -> None:
    store = family(run)
    assert isinstance(store, WritableStore)
    assert (store.layers, store.experts, store.records) == (LAYERS, EXPERTS, LAYERS * EXPERTS)
    assert store.slot_nbytes == PAGE and store.layout(0) is store.layout(1)
    assert holds(store, dict.fromkeys(KEYS))
    put(store, KEYS[1], 7)
    assert holds(store, {**dict.fromkeys(KEYS), KEYS[1]: 7})
    assert store.written(KEYS[1]) and not store.written(KEYS[0])


def test_steps(run: RunFolder) -> None:
    store = family(run)
    put(store, KEYS[0], 1)
    run.commit(10, {"loss": 0.1})
    put(store, KEYS[0], 2)
    put(store, KEYS[1], 3)
    run.commit(20)
    put(store, KEYS[1], 4)
    assert run.steps() == [10, 20] and run.step == 20
    for step, content in ((None, {0: 2, 1: 3}), (20, {0: 2, 1: 3}), (10, {0: 1, 1: None})):
        run = reopened(run, step=step, keep=None)
        assert run.steps() == [10, 20] and run.step == (step or 20)
        assert holds(family(run), {KEYS[number]: seed for number, seed in content.items()})
        assert run.extra(10) == {"loss": 0.1} and run.extra(20) is None
    run.close()


@pytest.mark.parametrize("phase", [0, 64, 4032])
def test_records_of_several_blocks(tmp_path: Path, phase: int) -> None:
    class Base(SyntheticStore):
        def phase(self, key: ExpertKey) -> int:
            return phase

    with made(tmp_path / "run") as run:
        base = Base(tmp_path / "base", 1, 2, 3 * BLOCK)
        store = run.family("weights", base=base)
        key, other = ExpertKey(0, 1), ExpertKey(0, 0)
        assert get(store, key, phase) == get(base, key, phase)
        put(store, key, 5, phase)
        put(store, other, 6, 24)  # memory that lies elsewhere in its page is copied
        run.commit(1)
    with RunFolder.open(tmp_path / "run") as run:
        base = Base(tmp_path / "base", 1, 2, 3 * BLOCK)
        store = run.family("weights", base=base)
        assert get(store, key, phase) == get(store, key, 24) == fill(3 * BLOCK, 5)
        assert get(store, other) == fill(3 * BLOCK, 6)


def test_what_is_read_where_nothing_was_written(tmp_path: Path, run: RunFolder) -> None:
    base = SyntheticStore(tmp_path / "base", 2, 2, 3 * PAGE)
    store = run.family("weights", base=base)
    for key in (ExpertKey(0, 0), ExpertKey(1, 1)):
        assert get(store, key) == get(base, key)
    put(store, ExpertKey(0, 0), 1)
    assert get(store, ExpertKey(0, 0)) == fill(3 * PAGE, 1) and get(store, ExpertKey(0, 1)) == get(
        base, ExpertKey(0, 1)
    )

    def initial(key: ExpertKey, into: memoryview) -> None:
        into[:] = bytes([key.expert + 1]) * len(into)

    state = family(run, "state", initial=initial)
    assert get(state, KEYS[1]) == b"\2" * LAYOUT.nbytes
    store.close()
    with pytest.raises(MoetierError, match="closed"):
        get(store, ExpertKey(0, 0))
    with pytest.raises(StoreError, match="the file is closed"):
        get(base, ExpertKey(0, 0))


def test_a_step_replaces_itself_and_later_ones(run: RunFolder) -> None:
    store = family(run)
    for step in (1, 2, 3, 4):
        put(store, KEYS[0], step)
        run.commit(step)
    run = reopened(run, step=2, keep=None)
    put(family(run), KEYS[0], 30)
    assert run.steps() == [1, 2, 3, 4]
    run.commit(3, "again")
    assert run.steps() == [1, 2, 3] and run.extra(3) == "again"
    run.commit(3, "and again")
    run = reopened(run, keep=None)
    assert run.steps() == [1, 2, 3] and run.extra(3) == "and again" and holds(family(run), {KEYS[0]: 30})
    run.close()


def test_a_past_that_was_left_stays_left_after_a_kill(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    store = family(run)
    for step in (10, 20):
        put(store, KEYS[0], step)
        run.commit(step)
    run = reopened(run, step=10, keep=None)
    put(family(run), KEYS[0], 11)
    monkeypatch.setattr("moetier.stores.runsteps.Steps.remove", lambda self, manifests: None)  # killed before that
    run.commit(15)
    monkeypatch.undo()
    for write in (False, True):
        run = reopened(run, keep=None, write=write)
        assert run.steps() == [10, 15] and holds(family(run), {KEYS[0]: 11})
    assert len(list((run.folder / "steps").iterdir())) == 2
    run.close()


def test_keep(tmp_path: Path) -> None:
    with made(tmp_path / "run", keep=2) as run:
        store = family(run)
        for step in range(5):
            put(store, KEYS[0], step)
            run.commit(step)
        assert run.steps() == [3, 4]
        assert run.stats()["weights"]["used"] == 2 * PAGE and run.stats()["weights"]["written"] == 5 * PAGE
        assert run.stats()["weights"]["file"] == 3 * PAGE  # two steps, and one to write the next


def test_space_is_used_again(run: RunFolder) -> None:
    store = family(run)
    for seed in range(20):
        put(store, KEYS[0], seed)
        assert run.stats()["weights"]["used"] == PAGE
    assert run.stats()["weights"]["file"] == 2 * PAGE
    run.commit(1)
    put(store, KEYS[1], 1)
    run.commit(2)
    put(store, KEYS[0], 21)
    run.commit(3)
    assert run.stats()["weights"]["used"] == 3 * PAGE  # unchanged records are not written again
    run.drop(1)
    assert run.stats()["weights"]["used"] == 3 * PAGE  # step 2 has what step 1 had
    run.drop(2)
    assert run.stats()["weights"]["used"] == 2 * PAGE and run.steps() == [3]
    assert holds(store, {KEYS[0]: 21, KEYS[1]: 1})
    run.close()
    assert (run.folder / "weights.bin").stat().st_size <= 3 * PAGE


def test_rollback(run: RunFolder) -> None:
    store = family(run)
    put(store, KEYS[0], 1)
    run.rollback()
    assert holds(store, {KEYS[0]: None}) and run.stats()["weights"]["used"] == 0
    put(store, KEYS[0], 2)
    run.commit(1)
    put(store, KEYS[0], 3)
    put(store, KEYS[1], 4)
    put(family(run, "state"), KEYS[1], 5)
    run.rollback()
    assert holds(store, {KEYS[0]: 2, KEYS[1]: None}) and holds(family(run, "state"), {KEYS[1]: None})
    assert run.stats()["weights"]["used"] == PAGE


def test_a_family_that_is_not_asked_for_goes_along(run: RunFolder) -> None:
    put(family(run), KEYS[0], 1)
    put(family(run, "state"), KEYS[0], 2)
    run.commit(1)
    run = reopened(run, keep=1)
    put(family(run), KEYS[0], 3)
    run.commit(2)
    run = reopened(run)
    assert holds(family(run), {KEYS[0]: 3}) and holds(family(run, "state"), {KEYS[0]: 2})
    run.close()


def test_attachments(run: RunFolder) -> None:
    run.commit(
        1, attachments={"rng.json": lambda path: path.write_text("[1]"), "b": lambda path: path.write_bytes(b"")}
    )
    assert run.attachments(1) == ["b", "rng.json"]
    assert run.attachment(1, "rng.json").read_text() == "[1]"
    with pytest.raises(ConfigError, match=r"has no 'c'; there are: b, rng\.json"):
        run.attachment(1, "c")
    run.attachment(1, "rng.json").write_text("[2]")
    with pytest.raises(StoreError, match=r"rng\.json: damaged"):
        run.attachment(1, "rng.json")
    for name in ("../x", "step.json", ".x", ""):
        with pytest.raises(ConfigError, match="not a name"):
            run.commit(2, attachments={name: lambda path: path.write_text("")})
    with pytest.raises(ConfigError, match="must be what JSON can hold"):
        run.commit(2, {"a": object()})
    assert run.steps() == [1]


@pytest.mark.parametrize("extra", [{"nan": float("nan"), "third": 1 / 3, "n": 2**70}, [None, "é"], {1: 2, 10: 3}])
def test_extra_comes_back(run: RunFolder, extra: Any) -> None:
    run.commit(1, extra)
    run = reopened(run)
    assert json.dumps(run.extra(1)) == json.dumps(json.loads(json.dumps(extra)))
    run.close()


def test_writes_from_many_threads(run: RunFolder) -> None:
    store = family(run, layout=RecordLayout.of([("a", torch.uint8, (9 * PAGE + 5,))]))
    rounds = 12

    def work(number: int) -> None:
        for seed in range(rounds):
            for key in KEYS[number::3]:
                put(store, key, 100 * number + seed)
                assert get(store, key) == fill(9 * PAGE + 5, 100 * number + seed)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for step in range(3):
        run.commit(step)
    for thread in threads:
        thread.join()
    run.commit(9)
    final = {key: 100 * (number % 3) + rounds - 1 for number, key in enumerate(KEYS)}
    run = reopened(run, keep=None)
    assert not list(run.verify()) and run.steps() == [0, 1, 2, 9]
    assert holds(family(run, layout=RecordLayout.of([("a", torch.uint8, (9 * PAGE + 5,))])), final)
    run.close()
