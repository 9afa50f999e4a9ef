"""The planner's forecast: tokens per second of a model under budgets that nobody has tried yet.

A short warm run is observed access by access (`Observation`), a `Timing` is fitted to it, and the recorded routing is
served at every budget by the real residency core behind a virtual clock with that timing. Nothing here measures: that
is `measure`, which needs torch and the model. What is modelled: math of residents beside the loads of the others (no
prefetch), math that is slower while copies are under way, and what an access that misses costs besides. What is not:
attention that grows with the context, sampling, other processes. docs/planner.md has the limits and the errors found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from moetier.access import Access, Phase
from moetier.errors import ConfigError
from moetier.profile import Profile
from moetier.simulate.clock import Clock
from moetier.simulate.config import Link, SimulationConfig, Timing
from moetier.tiers import configure
from moetier.trace import Trace

ENOUGH = 24  # observations of a kind, before anything is concluded from them
NEAR = 0.9  # of the best speed: what counts as nearly as fast
FLAT = 0.05  # hit rate above the share of slots: below it the cache gives little more than its size


@dataclass(frozen=True, slots=True)
class Observation:
    """One access of a warm run; times in seconds.

    `beside` experts were computed before the last miss had arrived. `before` is the time since the access before it
    ended, `after_miss` says whether that one missed. `loading` is the time from its start to the arrival of its last
    miss, in the fastest tier; `from_disk` of the `misses` came from home, the others from the host tier.
    """

    layer: int
    experts: int
    misses: int
    from_disk: int
    beside: int
    before: float
    after_miss: bool
    compute: float
    decide: float
    loading: float


@dataclass(frozen=True, slots=True)
class Measured:
    """What a machine was found to do with one model: the timing fitted, and what it rests on.

    `disk_alone` is the disk with nothing else going on, as read by the engine's readers: GB/s, and seconds of latency.
    `loads_observed` says whether the timing's disk is the one observed beside the math, or that one.
    """

    timing: Timing
    disk_alone: Link
    observations: int
    missing: int
    loads_observed: bool
    warm_tokens_per_second: float
    warm_slots: int
    direct_io: bool

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def fit(observations: Sequence[Observation], record_nbytes: int, disk_alone: Link, h2d: Link | None = None) -> Timing:
    """The timing that explains the observations: means, from which the outermost twentieths are left out.

    Clean accesses (all hits) give the math and the rest of a layer; those that miss give what is added to it. The sum
    of the time observed is kept: what math beside copies took longer becomes `contention`, what decisions and the next
    layer took longer becomes `miss_seconds`. The disk is fitted to the loads observed beside the math, as latency plus
    seconds per record, where there are enough of them; else `disk_alone` is taken. Raises `ConfigError` for too few
    observations.
    """
    clean = [seen for seen in observations if not seen.misses]
    missed = [seen for seen in observations if seen.misses]
    if len(clean) < ENOUGH:
        raise ConfigError(
            f"the warm run had {len(clean)} accesses without a miss, at least {ENOUGH} are needed to tell math from "
            "waiting; give it more tokens or more slots"
        )
    experts = sum(seen.experts for seen in clean)
    expert_seconds = _mean([seen.compute / seen.experts for seen in clean]) if experts else 0.0
    decide = _mean([seen.decide for seen in clean])
    between = [seen.before for seen in observations if seen.layer and not seen.after_miss]
    layer_seconds = _mean(between) if len(between) >= ENOUGH else _mean([o.before for o in observations if o.layer])
    steps = [seen.before for seen in observations if not seen.layer and not seen.after_miss]
    step_seconds = max(0.0, _mean(steps) - layer_seconds) if steps else 0.0
    contention = miss_seconds = 0.0
    if len(missed) >= ENOUGH:
        alone = expert_seconds * sum(seen.experts for seen in missed)
        beside = expert_seconds * sum(seen.beside for seen in missed)
        longer = sum(seen.compute for seen in missed) - alone
        contention = min(2.0, max(0.0, longer / beside)) if beside else 0.0
        later = [seen.before for seen in observations if seen.layer and seen.after_miss]
        late = _mean(later) - layer_seconds if later else 0.0
        miss_seconds = max(0.0, _mean([seen.decide for seen in missed]) - decide + late)
    observed = _fit_loads(missed, record_nbytes, disk_alone) if h2d is None else None
    return Timing(
        record_nbytes,
        disk_read=observed or disk_alone,
        h2d=h2d or Link(12.0, 1e-5),
        layer_seconds=layer_seconds + decide,
        expert_seconds=expert_seconds,
        step_seconds=step_seconds,
        contention=contention,
        miss_seconds=miss_seconds,
    )


def _fit_loads(missed: Sequence[Observation], record_nbytes: int, alone: Link) -> Link | None:
    """Latency and bandwidth from the time until the last of m misses had arrived, by least squares over the means."""
    by_misses: dict[int, list[float]] = {}
    for seen in missed:
        if seen.from_disk == seen.misses:
            by_misses.setdefault(seen.misses, []).append(seen.loading)
    if sum(map(len, by_misses.values())) < ENOUGH:
        return None
    counts = np.array(sorted(by_misses), dtype=float)
    means = np.array([_mean(by_misses[int(count)]) for count in counts])
    weights = np.array([len(by_misses[int(count)]) for count in counts], dtype=float)
    seconds = float((weights * counts * means).sum() / (weights * counts**2).sum())  # through the origin
    latency = 0.0
    if len(counts) > 1:
        slope, offset = np.polyfit(counts, means, 1, w=np.sqrt(weights))
        if slope > 0 and offset > 0:
            seconds, latency = float(slope), float(offset)
    if seconds <= 0:
        return None
    return Link(record_nbytes / seconds / 1e9, latency, alone.depth)


def _mean(values: Sequence[float]) -> float:
    """Mean without the outermost twentieths."""
    ranked = sorted(values)
    cut = len(ranked) // 20
    kept = ranked[cut : len(ranked) - cut]
    return sum(kept) / len(kept)


# -- forecasts ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Workday:
    """The accesses to serve, and which of them count: decode accesses from index `count_from` on."""

    accesses: Sequence[Access]
    layers: int
    experts: int
    top_k: int
    count_from: int = 0
    independent: bool = False  # made up from a profile: no token remembers the one before

    @property
    def tokens(self) -> float:
        """Decoded tokens that count."""
        counted = (a for a in self.accesses[self.count_from :] if a.phase is Phase.DECODE and a.layer == 0)
        return sum(sum(access.tokens) for access in counted) / self.top_k


def from_trace(trace: Trace, tokens: int = 512, warm_up: float = 0.25) -> Workday:
    """The first `tokens` tokens of a trace as recorded; the first share `warm_up` of its decode steps does not count.

    Raises `ConfigError` for a trace without enough decode steps.
    """
    part = trace.first(tokens)
    if len(part.experts) and part.tokens < trace.tokens:  # not half a step
        part = part.take(part.step < trace.step[part.tokens]) if trace.step[part.tokens] == part.step[-1] else part
    accesses = part.accesses()
    decode = [index for index, access in enumerate(accesses) if access.phase is Phase.DECODE and access.layer == 0]
    if len(decode) < 4:
        raise ConfigError(
            f"the trace has {len(decode)} decode steps among its first {tokens} tokens; a forecast of decode speed "
            "needs at least 4, better hundreds"
        )
    return Workday(accesses, trace.layers, trace.num_experts, trace.top_k, decode[int(len(decode) * warm_up)])


def from_profile(profile: Profile, top_k: int, tokens: int = 256, seed: int = 0) -> Workday:
    """Tokens drawn independently with the profile's popularities: what skew alone gives.

    Real tokens resemble those before them, so real hit rates are higher; the forecast is a lower bound.
    """
    if not profile.uses.sum(axis=1).all():
        raise ConfigError("the profile has a layer without any use; record it over a longer run")
    if not 1 <= top_k <= profile.experts:
        raise ConfigError(f"a token uses {top_k} of {profile.experts} experts: that cannot be")
    rng = np.random.default_rng(seed)
    weights = np.log(np.maximum(profile.probabilities(), 1e-9))  # [L, E]
    noise = rng.gumbel(size=(tokens, profile.layers, profile.experts))
    chosen = np.argsort(-(weights + noise), axis=2)[:, :, :top_k].astype(np.int16)
    step = np.arange(tokens, dtype=np.int64)
    trace = Trace(chosen, profile.experts, np.zeros(tokens, np.int32), step, np.full(tokens, Phase.DECODE, np.uint8))
    return replace(from_trace(trace, tokens), independent=True)


@dataclass(frozen=True, slots=True)
class Forecast:
    """What is predicted for one budget. Without a timing there are no seconds (None), only counts.

    `compute` and `wait` are seconds per token; `bound` is what takes more of the time, compute or disk.
    """

    slots: int
    host_slots: int | None
    share: float
    hit_rate: float
    loads_per_token: float
    bytes_per_token: float
    tokens_per_second: float | None = None
    compute: float | None = None
    wait: float | None = None
    bound: str = ""


def forecast(
    work: Workday,
    slots: int,
    record_nbytes: int,
    timing: Timing | None = None,
    policy: str = "horizon",
    admission: str = "decode-only",
    host_slots: int | None = None,
) -> Forecast:
    """Serve the accesses with so many slots, set up as the engine sets them up; count where it counts."""
    records = work.layers * work.experts
    sizes = [slots] if host_slots is None else [slots, host_slots]
    configs = [configure(size, records, work.layers, work.top_k, policy, admission) for size in sizes]
    config = SimulationConfig(policy, slots, host_slots, timing=timing)
    clock = Clock([configs], work.layers, work.experts, config, work.top_k)
    core, disk = clock.caches[0], clock.links[0]
    clock.run(work.accesses[: work.count_from])
    needs = hits = loads = 0
    seconds, parts = 0.0, {"compute": 0.0, "wait": 0.0}
    for access in work.accesses[work.count_from :]:
        counts = access.phase is Phase.DECODE
        before = clock.now, dict(clock.seconds), disk.copies
        resident = sum(core.holds(key) for key in access.keys) if counts else 0
        clock.run([access])
        if counts:
            needs += len(access.keys)
            hits += resident
            loads += disk.copies - before[2]
            seconds += clock.now - before[0]
            for name in parts:
                parts[name] += clock.seconds[name] - before[1][name]
    tokens = work.tokens
    counted: dict[str, Any] = {}
    if timing is not None and seconds > 0:
        counted = {name: value / tokens for name, value in parts.items()}
        counted["tokens_per_second"] = tokens / seconds
        counted["bound"] = "disk" if parts["wait"] > parts["compute"] else "compute"
    return Forecast(
        slots,
        host_slots,
        slots / records,
        hits / max(1, needs),
        loads / tokens,
        loads * record_nbytes / tokens,
        **counted,
    )


# -- words -------------------------------------------------------------------------------------------------------------


def advice(work: Workday, forecasts: Sequence[Forecast]) -> list[str]:
    """What the forecasts mean, in sentences: how well the model caches, where it slows down, what to give it."""
    said = []
    partial = [found for found in forecasts if found.share < 1]
    if partial:
        best = max(partial, key=lambda found: found.hit_rate - found.share)
        gain = best.hit_rate - best.share
        if gain < FLAT:
            said.append(
                f"This model will not cache well: at best {100 * best.hit_rate:.0f} % of the needed experts are found "
                f"with {100 * best.share:.0f} % of them resident, little more than chance. Give it memory, or a faster "
                "disk; no policy helps much."
            )
        else:
            said.append(
                f"It caches {'well' if gain > 0.2 else 'moderately'}: with {100 * best.share:.0f} % of the experts "
                f"resident {100 * best.hit_rate:.0f} % of the needed ones are found."
            )
    cycle = work.layers * work.top_k
    tight = [found for found in partial if found.slots < cycle]
    if tight:
        said.append(
            f"{', '.join(str(found.slots) for found in tight)} slots hold less than one token uses ({cycle} experts): "
            "most of it is read again for every token."
        )
    timed = [found for found in forecasts if found.tokens_per_second is not None]
    if timed:
        top = max(found.tokens_per_second or 0.0 for found in timed)
        enough = min(
            (found for found in timed if (found.tokens_per_second or 0.0) >= NEAR * top), key=lambda found: found.slots
        )
        said.append(
            f"{enough.slots} slots ({100 * enough.share:.0f} %) are the least of these budgets within "
            f"{100 * (1 - NEAR):.0f} % of the fastest."
        )
        slow = [f"{100 * found.share:.0f} %" for found in timed if found.bound == "disk"]
        if slow:
            said.append(f"At {', '.join(slow)} the disk decides the speed: most of the time is spent waiting for it.")
    if work.independent:
        said.append("From a profile, tokens are drawn independently: real text repeats itself more and hits more.")
    return said


@dataclass(frozen=True, slots=True)
class Split:
    """One way to divide the memory: tokens of context, the bytes its cache takes, the slots that are left."""

    context: int
    kv_nbytes: int
    forecast: Forecast


def recommend(splits: Sequence[Split]) -> Split:
    """The longest context that is nearly as fast as the fastest split; by hit rate where nothing was measured."""

    def worth(split: Split) -> float:
        found = split.forecast
        return found.hit_rate if found.tokens_per_second is None else found.tokens_per_second

    best = max(worth(split) for split in splits)
    return max((split for split in splits if worth(split) >= NEAR * best), key=lambda split: split.context)
