"""`simulate`: a trace and a configuration in, a `Result` out. It checks, chooses the driver, and merges what came out.

Two drivers make the same decisions: `Instant` where every copy of a single tier may as well end at once, and the real
residency core behind a virtual clock (`Clock`) where time, a second tier, prefetches, pins or dirty records matter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Protocol

from moetier.access import Access
from moetier.errors import CapacityError, ConfigError
from moetier.policies import find_policy, parse_policy
from moetier.residency import Residency
from moetier.simulate.clock import Clock
from moetier.simulate.config import Result, SimulationConfig
from moetier.simulate.instant import Instant
from moetier.simulate.witness import Witness, attach, tiers_of
from moetier.tiers import TierConfig
from moetier.trace import Trace

__all__ = ["Progress", "simulate", "simulate_accesses"]

Progress = Callable[[int, int], None]  # accesses done, accesses in all


class Driver(Protocol):
    """What serves accesses in order."""

    name: str

    @property
    def caches(self) -> Sequence[Instant | Residency]:
        """One, or one for every layer."""

    def run(self, accesses: Sequence[Access]) -> None:
        """Serve the next accesses."""


class InstantDriver:
    """One `Instant`, or one for every layer."""

    name = "instant"

    def __init__(self, configs: Sequence[Sequence[TierConfig]], layers: int, experts: int):
        self.caches = [Instant(tier, layers, experts) for (tier,) in configs]

    def run(self, accesses: Sequence[Access]) -> None:
        """Each access goes to the cache of its layer."""
        if len(self.caches) == 1:
            self.caches[0].run(accesses)
            return
        for layer, cache in enumerate(self.caches):
            cache.run([access for access in accesses if access.layer == layer])


def simulate(
    trace: Trace, config: SimulationConfig, fit: Trace | None = None, progress: Progress | None = None
) -> Result:
    """Serve a trace as `config` says.

    `fit` is for policies that learn from another trace first. Raises `ConfigError` for a configuration that cannot be,
    `CapacityError` for too few slots.
    """
    if config.seed is not None:
        trace = trace.shuffled(config.seed)
    if config.relabel:
        trace = trace.relabelled(config.seed or 0)
        fit = None if fit is None else fit.relabelled(config.seed or 0)
    fitted = None
    if fit is not None:
        if (fit.layers, fit.num_experts) != (trace.layers, trace.num_experts):
            raise ConfigError(
                f"the trace to fit on has {fit.layers} layers of {fit.num_experts} experts, the other "
                f"{trace.layers} of {trace.num_experts}; both must come from one model"
            )
        fitted = fit.accesses(config.batch)
    return simulate_accesses(
        trace.accesses(config.batch),
        trace.layers,
        trace.num_experts,
        config,
        fit=fitted,
        tokens=trace.tokens,
        top_k=trace.top_k,
        progress=progress,
    )


def simulate_accesses(
    accesses: Sequence[Access],
    layers: int,
    experts: int,
    config: SimulationConfig,
    fit: Sequence[Access] | None = None,
    tokens: int | None = None,
    top_k: int | None = None,
    progress: Progress | None = None,
    witnesses: list[list[Witness]] | None = None,
) -> Result:
    """The same for accesses made already: a sweep makes them once. `config.batch` and `config.seed` are not looked at.

    `tokens` (for tokens per second; one a step if not given) and `top_k` (for predictors; the largest access if not
    given) are of the trace. `witnesses`, an empty list, is filled with the witnesses of every cache's tiers.
    """
    parts = layers if config.scope == "layer" else 1
    _check(config, parts)
    steps = _steps(accesses)
    if config.semantics == "sequential":
        accesses, fit = _one_by_one(accesses), None if fit is None else _one_by_one(fit)
    largest = max((len(access.keys) for access in accesses), default=1)
    tiers = tier_configs(config, parts, 0 if config.staging else largest)
    driver: Driver
    if config.dirty or any(
        option is not None for option in (config.host_slots, config.predictor, config.warm_pinning, config.timing)
    ):
        driver = Clock(tiers, layers, experts, config, top_k or largest)
    else:
        driver = InstantDriver(tiers, layers, experts)
    prepare(driver.caches, accesses, fit)
    if witnesses is not None:
        witnesses.extend(attach(cache) for cache in driver.caches)
    begin = time.perf_counter()
    timeline = _run(driver, accesses, config.windows, progress)
    elapsed = time.perf_counter() - begin
    result = _result(driver, accesses, config, layers)
    result.steps, result.tokens = steps, steps if tokens is None else tokens
    result.timeline, result.wall_seconds = timeline, elapsed
    result.extra_staging = 0 if config.staging or not has_admission(config.policy) else largest
    return result


def _check(config: SimulationConfig, parts: int) -> None:
    """Raise `ConfigError` for what cannot be, or would do nothing."""
    if config.scope not in ("global", "layer"):
        raise ConfigError(f"scope must be global or layer, got {config.scope!r}")
    if config.semantics not in ("atomic", "sequential"):
        raise ConfigError(f"semantics must be atomic or sequential, got {config.semantics!r}")
    if config.windows < 1:
        raise ConfigError(f"windows: at least 1 is needed, got {config.windows}")
    if config.admission != "always" and not config.staging:
        raise ConfigError(f"admission {config.admission!r} needs staging slots; give staging, of `slots`")
    if config.host_policy is not None and config.host_slots is None:
        raise ConfigError("host_policy is of the second tier; give host_slots too")
    if config.exclusive and config.host_slots is None:
        raise ConfigError("exclusive is of two tiers; give host_slots too")
    if (config.spare or config.refill) and not config.exclusive:
        raise ConfigError("spare and refill are of exclusive tiers; give exclusive too")
    if config.predictor is None and (config.prefetch_displace or config.prefetch_control):
        raise ConfigError("prefetch_displace and prefetch_control do nothing without a predictor")
    if config.floor and parts > 1:
        raise ConfigError("floor is for scope global: with scope layer no layer can displace another's records")
    if config.timing is not None and config.semantics == "sequential":
        raise ConfigError("sequential accesses have no time: a machine serves an access at once; leave out the timing")
    for name, slots in (("slots", config.slots), ("host_slots", config.host_slots)):
        if slots is not None and slots < parts:
            each = " (one a layer)" if parts > 1 else ""
            raise CapacityError(f"{name}: at least {parts} needed{each}, got {slots}", minimum_slots=parts)
    if 0 < config.staging < parts:
        raise ConfigError(f"staging: with scope layer at least one slot a layer ({parts}), got {config.staging}")


def _steps(accesses: Iterable[Access]) -> int:
    """Forward passes: a layer that does not come after the last one begins another."""
    count, last = 0, 0
    for access in accesses:
        count += access.layer <= last or not count
        last = access.layer
    return count


def _one_by_one(accesses: Sequence[Access]) -> list[Access]:
    """Every need an access of its own, ascending within its access."""
    single: list[Access] = []
    for access in accesses:
        for index, key in enumerate(access.keys):
            tokens = access.tokens[index : index + 1]
            mass = access.mass[index : index + 1]
            single.append(Access(len(single) + 1, access.layer, (key,), tokens, access.phase, access.sequence, mass))
    return single


def _split(slots: int, parts: int) -> list[int]:
    """Slots for every part, the remainder to the first ones."""
    return [slots // parts + (part < slots % parts) for part in range(parts)]


def tier_configs(config: SimulationConfig, parts: int, extra: int) -> list[list[TierConfig]]:
    """The tiers of every cache, fastest first; `extra` staging slots where the policy asks for them."""
    levels = [(config.policy, config.slots)]
    if config.host_slots is not None:
        levels.append((config.host_policy or config.policy, config.host_slots))
    staging = _split(config.staging, parts)
    tiers: list[list[TierConfig]] = [[] for _ in range(parts)]
    for policy, slots in levels:
        added = extra if has_admission(policy) else 0
        for part, share in enumerate(_split(slots, parts)):
            tier = TierConfig(share + added, policy, config.admission, staging[part] + added, config.floor)
            tiers[part].append(tier)
    if config.exclusive:
        for cache in tiers:
            cache[1] = replace(cache[1], exclusive=True, spare=config.spare, refill=refills(config))
    return tiers


def refills(config: SimulationConfig) -> bool:
    """Whether what leaves tier 0 is read again rather than copied down: as told, or whichever is faster."""
    if not config.exclusive or config.refill is not None or config.timing is None:
        return bool(config.refill)
    timing = config.timing
    disk, down = (link.latency + timing.record_nbytes / (link.gbps * 1e9) for link in (timing.disk_read, timing.d2h))
    return disk < down


def has_admission(policy: str) -> bool:
    """Whether a policy decides on admission itself, and so needs staging slots."""
    return hasattr(find_policy(parse_policy(policy)[0]), "admit")


def prepare(caches: Sequence[Instant | Residency], accesses: Sequence[Access], fit: Sequence[Access] | None) -> None:
    """Fit the policies that learn beforehand; show the future to those that must know it."""
    for layer, cache in enumerate(caches):
        alone = len(caches) == 1
        for tier in tiers_of(cache):
            learn, foresee = getattr(tier.policy, "fit", None), getattr(tier.policy, "foresee", None)
            if learn is not None:
                if fit is None:
                    raise ConfigError(f"policy {tier.config.policy!r} is fitted beforehand: give a trace to fit on")
                learn(fit if alone else [access for access in fit if access.layer == layer])
            if foresee is not None:
                foresee(accesses if alone else [access for access in accesses if access.layer == layer])


def _run(
    driver: Driver, accesses: Sequence[Access], windows: int, progress: Progress | None
) -> list[tuple[int, float]]:
    """Serve everything, window by window; the hit rate of each."""
    timeline = []
    counters = [tier.hits for cache in driver.caches for tier in tiers_of(cache)[:1]]
    done, hits, total = 0, 0, len(accesses)
    for window in range(1, windows + 1):
        end = total * window // windows
        if end == done:
            continue
        chunk = accesses[done:end]
        driver.run(chunk)
        done, before, hits = end, hits, sum(map(sum, counters))
        timeline.append((done, (hits - before) / max(1, sum(len(access.keys) for access in chunk))))
        if progress is not None:
            progress(done, total)
    return timeline


def _result(driver: Driver, accesses: Sequence[Access], config: SimulationConfig, layers: int) -> Result:
    """The counters of all caches in one result; seconds and bytes are the clock's."""
    needs = [0] * layers
    for access in accesses:
        needs[access.layer] += len(access.keys)
    tops = [tiers_of(cache)[0] for cache in driver.caches]
    hosts = [tiers_of(cache)[1] for cache in driver.caches if len(tiers_of(cache)) > 1]
    misses = _summed([tier.misses for tier in tops], layers)
    result = Result(
        config=config,
        accesses=len(accesses),
        steps=0,
        tokens=0,
        needs=needs,
        hits=_summed([tier.hits for tier in tops], layers),
        lates=_summed([tier.lates for tier in tops], layers),
        misses=misses,
        host_hits=_summed([tier.hits for tier in hosts] + [tier.lates for tier in hosts], layers),
        host_misses=_summed([tier.misses for tier in hosts], layers),
        evictions=sum(tier.evictions for tier in tops),
        staged=sum(tier.staged for tier in tops),
        bytes_moved={"disk_read": sum(misses), "disk_write": 0, "h2d": 0, "d2h": 0},
        prefetches={"issued": 0, "useful": 0, "late": 0, "wasted": 0},
        demotions=sum(tier.demotions for tier in hosts),
        refills=sum(tier.refills for tier in hosts),
        demand_ratio=0.0,
        overcommitted=0.0,
        timeline=[],
        driver=driver.name,
    )
    if isinstance(driver, Clock):
        driver.report(result)
    slots = [slots for slots in _split(config.slots, layers)] if len(tops) > 1 else [config.slots / layers] * layers
    ratios = [len(access.keys) / slots[access.layer] for access in accesses]
    result.demand_ratio = sum(ratios) / max(1, len(ratios))
    result.overcommitted = sum(ratio > 1 for ratio in ratios) / max(1, len(ratios))
    return result


def _summed(lists: Sequence[Sequence[int]], layers: int) -> list[int]:
    return [sum(numbers[layer] for numbers in lists) for layer in range(layers)]
