"""The stress test of the cache alone: many records, few slots, no model; real bytes or a virtual clock.

With real bytes everything is what a model runs on (`ExpertCache`, its threads, arenas and files), and every byte is
checked at the end, so that it proves more than speed. With a virtual clock the same residency core and policies move
nothing, and the links are as fast as they are said to be.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from moetier.access import Access, ExpertKey
from moetier.errors import ConfigError, MoetierError
from moetier.residency import Residency
from moetier.simulate.config import SimulationConfig, Timing
from moetier.tiers import Ticket, TierConfig
from moetier.trace.synthetic import Sampler, environments

if TYPE_CHECKING:
    from moetier.cache import ExpertCache
    from moetier.stores.synthetic import SyntheticStore

CHECK_WIDTH = 64  # records in one access of the final check
TIMERS = {  # what the original prototype called them -> the links of the real mover, of the virtual one
    "h2d_load": ("host→device", "h2d"),
    "d2h_writeback": ("device→host", "d2h"),
    "disk_read": ("disk→host", "disk_read"),
    "disk_write": ("host→disk", "disk_write"),
}


@dataclass(frozen=True, slots=True)
class Stress:
    """What is run. `experts` counts all records, over `layers` layers; a step is one access to every layer.

    `per_step` experts are needed of a layer at a step (fewer where environments share some): `envs_per_batch` tokens,
    each of its own environment. `dirty_share` is the share of uses that change the record; `writeback` and
    `dirty_limit` say when changed records are written (`moetier.writeback`).
    """

    experts: int = 2048
    layers: int = 1
    device_slots: int = 16
    host_slots: int = 64
    steps: int = 1000
    per_step: int = 8
    sampler: Sampler = "episode"
    episode: int = 64
    envs: int = 64
    envs_per_batch: int = 1
    record_nbytes: int = 256 << 10
    policy: str = "horizon"
    dirty_share: float = 0.1
    writeback: str = "evict"
    dirty_limit: int | None = None
    seed: int = 0

    def accesses(self) -> list[Access]:
        """The accesses of the run. Raises `ConfigError` for numbers that do not fit together."""
        if self.layers < 1 or self.experts < self.layers or self.experts % self.layers:
            raise ConfigError(f"{self.experts} experts cannot be spread over {self.layers} layers evenly")
        if self.envs_per_batch < 1 or self.per_step < 1 or self.per_step % self.envs_per_batch:
            raise ConfigError(
                f"{self.per_step} experts per step cannot be shared by {self.envs_per_batch} environments per batch "
                "evenly; give a multiple"
            )
        if not 0 <= self.dirty_share <= 1:
            raise ConfigError(f"the dirty share must be between 0 and 1, got {self.dirty_share}")
        trace = environments(
            self.steps,
            self.layers,
            self.experts // self.layers,
            self.per_step // self.envs_per_batch,
            sampler=self.sampler,
            episode=self.episode,
            envs=self.envs,
            batch=self.envs_per_batch,
            envs_per_batch=self.envs_per_batch,
            seed=self.seed,
        )
        return [replace(access, writes=True) for access in trace.accesses()]

    def tiers(self) -> list[TierConfig]:
        """Of the residency core."""
        return [TierConfig(self.device_slots, self.policy), TierConfig(self.host_slots, self.policy)]

    def core(self, kind: type[Residency] = Residency) -> Residency:
        """A residency core for it."""
        experts = self.experts // self.layers
        return kind(self.tiers(), self.layers, experts, None, self.writeback, self.dirty_limit)

    def changes(self, access: Access, key: ExpertKey) -> bool:
        """Whether this use changes the record: the same in both modes, whatever happens when."""
        mixed = (access.time * 0x9E3779B97F4A7C15 + (key.layer << 20) + key.expert + self.seed) & (1 << 64) - 1
        mixed = ((mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9) & (1 << 64) - 1
        mixed = ((mixed ^ mixed >> 27) * 0x94D049BB133111EB) & (1 << 64) - 1
        return (mixed >> 11) / (1 << 53) < self.dirty_share


# -- real bytes --------------------------------------------------------------------------------------------------------


def run_real(stress: Stress, store: SyntheticStore, readers: int = 4) -> dict[str, Any]:
    """Serve the accesses from `store` and check every byte of every record; see `_report` for what is returned.

    Raises `MoetierError` naming the record whose bytes are not its newest version: a bug of moetier's, or of the disk.
    """
    import torch

    from moetier.arenas import DeviceArena, HostArena, HostTierArena
    from moetier.cache import ExpertCache

    accesses = stress.accesses()
    core = stress.core()
    gpu = torch.cuda.is_available()
    device: DeviceArena | HostTierArena
    if gpu:
        device = DeviceArena(stress.device_slots, store.slot_nbytes, torch.device("cuda"))
    else:
        device = HostTierArena(stress.device_slots, store.slot_nbytes)
    host = HostArena(stress.host_slots, store.slot_nbytes, page_locked=gpu)
    with ExpertCache(store, core, host, device, readers) as cache:
        for link in cache.mover.links:
            link.latencies = []
        begin = time.perf_counter()
        changed = _serve(stress, accesses, cache, store)
        cache.settle()
        seconds = time.perf_counter() - begin
        links = {link.name: (link.operations, link.nbytes, list(link.latencies or ())) for link in cache.mover.links}
        counters: Any = core.counters()
        parts = {"wait": cache.wait_seconds, "compute": cache.compute_seconds, "decide": cache.decide_seconds}
        check = _check(cache, store) | {"changes": changed}
    named = {name: links.get(real, (0, 0, [])) for name, (real, _) in TIMERS.items()}
    about = {
        "mode": "real bytes",
        "device": torch.cuda.get_device_name() if gpu else "no GPU: the device tier is a second host arena",
        "direct_io": store.direct,
        "store": str(store.folder),
    }
    return _report(stress, about, accesses, counters, named, {"total": seconds, **parts}, check)


def _serve(stress: Stress, accesses: Sequence[Access], cache: ExpertCache, store: SyntheticStore) -> int:
    """Run all accesses; every use looks at its record's version, some make a new one. The number of changes."""
    from moetier.stores.synthetic import FIELD

    versions, changed = store.versions, 0
    for access in accesses:
        for batch in cache.batches(access):
            for lease in batch:
                words, key = lease.fields[FIELD], lease.key
                if int(words[0]) != versions[key]:
                    raise _stale(key, int(words[0]), versions[key], f"at access {access.time}")
                if stress.changes(access, key):
                    lease.dirty = True
                    versions[key] += 1
                    store.pattern.fill(words, key, versions[key])
                    changed += 1
    return changed


def _check(cache: ExpertCache, store: SyntheticStore) -> dict[str, Any]:
    """Compare every byte: first as the cache gives it, then, after a flush, as it is on disk."""
    import torch

    from moetier.stores.diskio import aligned_buffer
    from moetier.stores.synthetic import FIELD

    versions, pattern, clock = store.versions, store.pattern, 1 << 60
    width = min(CHECK_WIDTH, store.experts)
    for layer in range(store.layers):
        for first in range(0, store.experts, width):
            clock += 1
            keys = tuple(ExpertKey(layer, expert) for expert in range(first, min(first + width, store.experts)))
            for lease in cache.stream(Access(clock, layer, keys)):
                words = lease.fields[FIELD]
                if not pattern.matches(words, lease.key, versions[lease.key]):
                    raise _stale(lease.key, int(words[0]), versions[lease.key], "through the cache")
    cache.flush()
    buffer = aligned_buffer(store.record_nbytes)
    words = torch.frombuffer(buffer, dtype=torch.int64)
    for key in versions:
        for segment in range(store.segments(key)):
            store.read(key, segment, buffer)
        if not pattern.matches(words, key, versions[key]):
            raise _stale(key, int(words[0]), versions[key], "on disk")
    return {"ok": True, "records": len(versions), "through_the_cache": len(versions), "on_disk": len(versions)}


def _stale(key: ExpertKey, found: int, wanted: int, where: str) -> MoetierError:
    what = f"version {found}" if found != wanted else "damaged"
    return MoetierError(f"expert {key.expert} of layer {key.layer} is {what} {where}; its newest version is {wanted}")


# -- virtual time ------------------------------------------------------------------------------------------------------


class _Changing(Residency):
    """A core whose uses change records by the stress test's rule: the virtual compute thread only says yes or no."""

    stress: Stress

    def release(self, ticket: Ticket, key: ExpertKey, dirty: bool = False, saved: bool = False) -> None:
        """See `Residency.release`."""
        super().release(ticket, key, self.stress.changes(ticket.access, key), saved)


def run_virtual(stress: Stress, timing: Timing) -> dict[str, Any]:
    """Serve the accesses on a virtual machine; see `_report` for what is returned."""
    from moetier.simulate.clock import Clock

    accesses = stress.accesses()
    experts = stress.experts // stress.layers
    config = SimulationConfig(stress.policy, stress.device_slots, stress.host_slots, timing=timing)
    clock = Clock([stress.tiers()], stress.layers, experts, config, stress.per_step)
    core = stress.core(_Changing)
    assert isinstance(core, _Changing)
    core.stress = stress
    clock.caches = [core]
    for link in clock.links:
        link.latencies = []
    clock.run(accesses)
    clock.settle()
    named = {}
    for name, (_, virtual) in TIMERS.items():
        link = next(link for link in clock.links if link.name == virtual)
        named[name] = (link.copies, link.copies * stress.record_nbytes, list(link.latencies or ()))
    about = {"mode": "virtual clock", "device": "virtual", "timing": asdict(timing)}
    counters: Any = core.counters()
    return _report(stress, about, accesses, counters, named, dict(clock.seconds), None)


# -- the report --------------------------------------------------------------------------------------------------------


def _report(
    stress: Stress,
    about: dict[str, Any],
    accesses: Sequence[Access],
    core: dict[str, Any],
    links: dict[str, tuple[int, int, list[float]]],
    seconds: dict[str, float],
    check: dict[str, Any] | None,
) -> dict[str, Any]:
    """Counters, timers and bytes, in plain JSON types.

    `counters`: hits, lates and misses of both tiers, `disk_read_ops` and `disk_write_ops` (requests), evictions and
    write-backs of the device tier, records cleaned (written while they stayed) and dirty at the end; `timers`: of each
    operation count, total, mean, p50 and p99 in seconds (services that overlap count each); `bytes` by the same names;
    `seconds`: total, and of the compute thread; `check`: what was compared, null without bytes.
    """
    tiers, writebacks = core["tiers"], core["writebacks"]
    counters: dict[str, int] = {}
    for name, tier in zip(("device", "host"), tiers, strict=True):
        counters |= {f"{name}_{kind}": sum(tier[kind]) for kind in ("hits", "lates", "misses")}
    counters |= {"disk_read_ops": links["disk_read"][0], "disk_write_ops": links["disk_write"][0]}
    counters |= {"evictions": tiers[0]["evictions"], "write_backs": tiers[0]["write_backs"]}
    counters |= {name: writebacks[name] for name in ("cleaned", "dirty")}
    needs = sum(len(access.keys) for access in accesses)
    total = seconds["total"]
    return {
        "version": 1,
        **about,
        "config": asdict(stress),
        "accesses": len(accesses),
        "needs": needs,
        "hit_rates": {
            name: counters[f"{name}_hits"]
            / max(1, sum(counters[f"{name}_{kind}"] for kind in ("hits", "lates", "misses")))
            for name in ("device", "host")
        },
        "counters": counters,
        "write_amplification": writebacks["amplification"],
        "timers": {name: summary(latencies) for name, (_, _, latencies) in links.items()},
        "bytes": {name: nbytes for name, (_, nbytes, _) in links.items()},
        "seconds": seconds,
        "uses_per_second": needs / total if total else None,
        "check": check,
    }


def summary(seconds: Sequence[float]) -> dict[str, float | int]:
    """Count, total, mean, median and 99th percentile (nearest rank); zeros for nothing."""
    if not seconds:
        return {"count": 0, "total": 0.0, "mean": 0.0, "p50": 0.0, "p99": 0.0}
    ranked = sorted(seconds)
    return {
        "count": len(ranked),
        "total": sum(ranked),
        "mean": statistics.fmean(ranked),
        "p50": ranked[(len(ranked) - 1) // 2],
        "p99": ranked[-(-99 * len(ranked) // 100) - 1],
    }
