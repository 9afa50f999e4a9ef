"""The stress test of the cache: real bytes and virtual time agree, changes survive, and a lost byte is noticed."""

from __future__ import annotations

import json
import shlex
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from moetier.access import Access, ExpertKey
from moetier.arenas import HostArena, HostTierArena
from moetier.cache import ExpertCache
from moetier.cli import app
from moetier.errors import ConfigError, MoetierError, StoreError
from moetier.residency import Residency
from moetier.simulate.config import Link, Timing
from moetier.stores.synthetic import FIELD, SyntheticStore
from moetier.stress import Stress, run_real, run_virtual, summary
from moetier.threads import default_readers
from moetier.tiers import TierConfig

PAGE = 4096
TINY = Stress(
    experts=32,
    layers=2,
    device_slots=4,
    host_slots=9,
    steps=60,
    per_step=4,
    episode=8,
    envs=4,
    envs_per_batch=2,
    record_nbytes=PAGE,
    policy="lru",
    dirty_share=0.3,
)
FLAGS = shlex.split(
    "--experts 32 --layers 2 --device-slots 12 --host-slots 16 --steps 30 --experts-per-step 4 --episode-len 8 "
    "--envs 4 --record-size 4KiB"
)


def store_in(folder: Path, stress: Stress = TINY) -> SyntheticStore:
    return SyntheticStore(folder, stress.layers, stress.experts // stress.layers, stress.record_nbytes)


@pytest.mark.parametrize("policy", ["lru", "horizon", "slru"])
def test_real_bytes_and_virtual_time_count_alike(policy: str, tmp_path: Path) -> None:
    stress = Stress(**{name: getattr(TINY, name) for name in TINY.__dataclass_fields__} | {"policy": policy})
    real, virtual = run_real(stress, store_in(tmp_path)), run_virtual(stress, Timing(PAGE))
    assert real["counters"] == virtual["counters"]
    assert real["bytes"] == virtual["bytes"]
    counters, timers, check = real["counters"], real["timers"], real["check"]
    assert counters["device_misses"] == timers["h2d_load"]["count"] > 0
    assert counters["disk_read_ops"] == counters["host_misses"] == timers["disk_read"]["count"]
    assert counters["disk_write_ops"] == counters["write_backs"] == timers["d2h_writeback"]["count"] > 10
    assert check["ok"] and check["records"] == 32 and check["on_disk"] == 32
    assert real["needs"] == counters["device_hits"] + counters["device_lates"] + counters["device_misses"]
    assert json.loads(json.dumps(real)) == real


@pytest.mark.parametrize("writeback", ["periodic(every=9)", "periodic(share=0.25)", "writethrough"])
@pytest.mark.parametrize("limit", [None, 2])
def test_records_are_cleaned_and_all_is_right(writeback: str, limit: int | None, tmp_path: Path) -> None:
    stress = replace(TINY, writeback=writeback, dirty_limit=limit)
    real, virtual = run_real(stress, store_in(tmp_path)), run_virtual(stress, Timing(PAGE))
    for found in (real, virtual):
        counters = found["counters"]
        assert counters["cleaned"] > 10 and 0 < found["write_amplification"] <= 1
        assert counters["disk_write_ops"] == counters["cleaned"] + counters["write_backs"]
        if limit is not None:
            assert counters["dirty"] <= limit
    assert real["check"]["ok"]
    assert virtual == run_virtual(stress, Timing(PAGE))


def test_write_back_policies_differ_as_they_should() -> None:
    """On a virtual clock with a slow disk: more writes, but fewer that a demand waits for."""
    timing = Timing(PAGE, disk_write=Link(0.01, 1e-4, 2), disk_read=Link(0.02, 1e-4, 4), expert_seconds=1e-3)
    found = {name: run_virtual(replace(TINY, writeback=name), timing) for name in ("evict", "writethrough")}
    evict, through = (found[name]["counters"] for name in ("evict", "writethrough"))
    assert evict["cleaned"] == 0 < through["cleaned"] and through["write_backs"] < evict["write_backs"]
    assert through["disk_write_ops"] >= evict["disk_write_ops"]
    assert found["writethrough"]["write_amplification"] >= found["evict"]["write_amplification"]


def test_changes_survive_in_the_files(tmp_path: Path) -> None:
    first = run_real(TINY, store_in(tmp_path))
    assert first["check"]["changes"] > 50
    again = store_in(tmp_path)
    assert max(again.versions.values()) > 1  # what was written is there; records that never left their slot are not
    words = torch.empty(PAGE // 8, dtype=torch.int64)
    for key, version in again.versions.items():
        again.read(key, 0, memoryview(words.view(torch.uint8).numpy()))
        assert again.pattern.matches(words, key, version)
    assert run_real(TINY, again)["check"]["ok"]


def test_large_records_are_written_in_parts(tmp_path: Path) -> None:
    stress = Stress(
        experts=6,
        device_slots=2,
        host_slots=2,
        steps=12,
        per_step=2,
        envs=2,
        episode=2,
        record_nbytes=(1 << 20) + PAGE,
        dirty_share=1.0,
    )
    found = run_real(stress, store_in(tmp_path, stress))
    assert found["counters"]["disk_write_ops"] == 2 * found["counters"]["write_backs"] > 0
    assert found["check"]["ok"]


@pytest.mark.parametrize("damage", ["lost", "torn", "stale read"])
def test_a_byte_that_is_not_the_newest_is_noticed(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_in(tmp_path)
    plain_write, plain_read = store.write, store.read

    def write(key: ExpertKey, segment: int, data: memoryview) -> int:
        if damage == "lost":
            return len(data)
        torn = bytearray(data)
        if damage == "torn":
            torn[-1] ^= 1
        return plain_write(key, segment, memoryview(aligned(torn)))

    def read(key: ExpertKey, segment: int, into: memoryview) -> int:
        count = plain_read(key, segment, into)
        if damage == "stale read":
            into[:8] = bytes(8)
        return count

    monkeypatch.setattr(store, "write", write)
    monkeypatch.setattr(store, "read", read)
    with pytest.raises(MoetierError, match=r"expert \d+ of layer \d is (version \d+|damaged)"):
        run_real(TINY, store)


def aligned(data: bytes | bytearray) -> memoryview:
    from moetier.stores.diskio import aligned_buffer

    buffer = aligned_buffer(len(data))
    buffer[:] = data
    return buffer


def changing_cache(store: SyntheticStore, slots: int, two_tiers: bool) -> ExpertCache:
    configs = [TierConfig(slots, "lru")] * (2 if two_tiers else 1)
    core = Residency(configs, store.layers, store.experts)
    device = HostTierArena(slots, store.slot_nbytes) if two_tiers else None
    return ExpertCache(store, core, HostArena(slots, store.slot_nbytes), device)


@pytest.mark.parametrize("two_tiers", [False, True])
def test_a_write_that_fails_loses_nothing(two_tiers: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = SyntheticStore(tmp_path, 1, 6, PAGE)
    broken, plain = threading.Event(), store.write

    def write(key: ExpertKey, segment: int, data: memoryview) -> int:
        if broken.is_set():
            raise StoreError("the disk is full")
        return plain(key, segment, data)

    monkeypatch.setattr(store, "write", write)
    with changing_cache(store, 2, two_tiers) as cache:
        for lease in cache.stream(Access(1, 0, (ExpertKey(0, 0), ExpertKey(0, 1)), writes=True)):
            store.pattern.fill(lease.fields[FIELD], lease.key, 1)
            lease.dirty = True
        broken.set()
        with pytest.raises((StoreError, MoetierError), match="full"):
            for _ in cache.stream(Access(2, 0, (ExpertKey(0, 2), ExpertKey(0, 3)))):
                pass
        broken.clear()
        for expert in (2, 3, 4, 5):
            for lease in cache.stream(Access(2 + expert, 0, (ExpertKey(0, expert),))):
                assert store.pattern.matches(lease.fields[FIELD], lease.key, 0)
        for lease in cache.stream(Access(9, 0, (ExpertKey(0, 0), ExpertKey(0, 1)))):
            assert store.pattern.matches(lease.fields[FIELD], lease.key, 1)
        cache.core.check()


@pytest.mark.parametrize("two_tiers", [False, True])
def test_closing_finishes_what_was_ordered(two_tiers: bool, tmp_path: Path) -> None:
    store = SyntheticStore(tmp_path, 1, 8, PAGE)
    with changing_cache(store, 2, two_tiers) as cache:
        for expert in range(8):
            for lease in cache.stream(Access(1 + expert, 0, (ExpertKey(0, expert),), writes=True)):
                store.pattern.fill(lease.fields[FIELD], lease.key, 7)
                lease.dirty = True
    versions = SyntheticStore(tmp_path, 1, 8, PAGE).versions
    assert [versions[ExpertKey(0, expert)] for expert in range(6)] == [7] * 6


def test_a_change_counts_when_the_stream_is_left(tmp_path: Path) -> None:
    store = SyntheticStore(tmp_path, 1, 4, PAGE)
    with changing_cache(store, 1, False) as cache:
        for lease in cache.stream(Access(1, 0, (ExpertKey(0, 0),), writes=True)):
            store.pattern.fill(lease.fields[FIELD], lease.key, 1)
            lease.dirty = True
            break
        assert sum(1 for _ in cache.stream(Access(2, 0, (ExpertKey(0, 1),)))) == 1
        for lease in cache.stream(Access(3, 0, (ExpertKey(0, 0),))):
            assert store.pattern.matches(lease.fields[FIELD], lease.key, 1)


def test_a_folder_that_holds_something_else(tmp_path: Path) -> None:
    store_in(tmp_path / "store").close()
    with pytest.raises(ConfigError, match="holds something else than a synthetic store of 2 x 16 records of 8192"):
        SyntheticStore(tmp_path / "store", 2, 16, 2 * PAGE)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match="give a new or empty folder"):
        SyntheticStore(tmp_path / "mine", 2, 16, PAGE)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]
    (tmp_path / "store" / "layer-0001.bin").write_bytes(bytes(16 * PAGE))
    with pytest.raises(StoreError, match=r"layer-0001.bin: record 0 is damaged"):
        store_in(tmp_path / "store")


def test_summary() -> None:
    assert summary([]) == {"count": 0, "total": 0.0, "mean": 0.0, "p50": 0.0, "p99": 0.0}
    found = summary([float(n) for n in range(100, 0, -1)])
    assert (found["count"], found["total"], found["p50"], found["p99"]) == (100, 5050.0, 50.0, 99.0)
    assert summary([3.0])["p99"] == 3.0


def bench(*flags: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["bench", "cache", *flags])
    assert result.exit_code == code, result.stderr
    return result


def test_the_command(tmp_path: Path) -> None:
    text = bench(*FLAGS, "--store", str(tmp_path / "store"), "--dirty-share", "0.5").stdout
    assert "the device tier is a second host arena" in text or torch.cuda.is_available()
    assert "every byte is the newest version: 32 records through the cache" in text
    for name in ("h2d_load", "d2h_writeback", "disk_read", "disk_write", "hit rate", "p99 ms"):
        assert name in text
    found = json.loads(bench(*FLAGS, "--json", "--disk-read-gbps", "0.5", "--io-latency-ms", "1").stdout)
    assert found["mode"] == "virtual clock" and found["check"] is None
    assert found["timing"]["disk_read"] == {"gbps": 0.5, "latency": 0.001, "depth": default_readers()}
    slower = json.loads(bench(*FLAGS, "--json", "--disk-read-gbps", "0.005", "--io-latency-ms", "1").stdout)
    assert slower["counters"] == found["counters"]
    assert slower["seconds"]["total"] > 1.1 * found["seconds"]["total"]
    iid = json.loads(bench(*FLAGS, "--json", "--sampler", "iid").stdout)
    assert iid["hit_rates"]["device"] < found["hit_rates"]["device"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--sampler often", "--sampler often: choose episode or iid"),
        ("--record-size 5000 --store new", "record_size: must be a multiple of 4096 bytes, got 5000"),
        ("--record-size much", "--record-size: 'much' is not a size"),
        ("--experts 31", "31 experts cannot be spread over 2 layers evenly"),
        ("--envs-per-batch 3", "4 experts per step cannot be shared by 3 environments per batch"),
        ("--policy best", "unknown policy 'best'"),
        ("--store new --h2d-gbps 3", "--h2d-gbps: of the virtual clock"),
        ("--dirty-share 2", "dirty-share"),
    ],
)
def test_flags_that_cannot_be_used(flags: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["bench", "cache", *FLAGS, *flags.split()])
    assert result.exit_code == 2
    assert words in result.stderr or words in str(result.exception)
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())
