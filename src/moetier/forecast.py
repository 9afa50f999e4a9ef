"""The planner's forecast: tokens per second of a model under budgets that nobody has tried yet.

A short warm run is observed access by access (`Observation`), a `Timing` is fitted to it, and the recorded routing is
served at every budget by the real residency core behind a virtual clock with that timing. Nothing here measures: that
is `measure`, which needs torch and the model. What is modelled: math of residents beside the loads of the others (no
prefetch), math that is slower while copies are under way, and what an access that misses costs besides. What is not:
attention that grows with the context, sampling, other processes. docs/planner.md has the limits and the errors found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from moetier.access import Access, Phase
from moetier.errors import ConfigError
from moetier.profile import Profile
from moetier.simulate.clock import Clock
from moetier.simulate.config import Link, SimulationConfig, Timing
from moetier.tiers import TierConfig, configure_all
from moetier.trace import Trace

ENOUGH = 24  # observations of a kind, before anything is concluded from them
NEAR = 0.9  # of the best speed: what counts as nearly as fast
FLAT = 0.05  # hit rate above the share of slots: below it the cache gives little more than its size


@dataclass(frozen=True, slots=True)
class Observation:
    """One access of a warm run; times in seconds.

    `before` is the time since the access before it ended, `after_miss` says whether that one missed. `beside` experts
    were computed before the last miss had arrived. The thread waited `waits` times, `wait` seconds in all, of which it
    needed `wake` to go on after the arrival that it waited for.
    """

    access: Access
    misses: int
    before: float
    after_miss: bool
    beside: int
    compute: float
    decide: float
    waits: int
    wait: float
    wake: float


@dataclass(frozen=True, slots=True)
class Measured:
    """What a machine was found to do with one model: the timing fitted, and what it rests on.

    `disk_alone` is the disk with nothing else going on, as read by the engine's readers; the timing's disk is what it
    gives beside the math.
    """

    timing: Timing
    disk_alone: Link
    observations: int
    missing: int
    warm_tokens_per_second: float
    warm_slots: int
    direct_io: bool

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def fit(observations: Sequence[Observation], record_nbytes: int, disk: Link, h2d: Link | None = None) -> Timing:
    """The timing that explains the decode accesses among the observations, but for the waiting: see `calibrate`.

    Means, from which the outermost twentieths are left out. Clean accesses (all hits) give the math of an expert and
    the rest of a layer; those that miss give what is added to it: math beside copies takes longer (`contention`), so do
    decisions and the layer that follows (`miss_seconds`). Raises `ConfigError` for too few clean accesses.
    """
    decode = [seen for seen in observations if seen.access.phase is Phase.DECODE and seen.access.keys]
    clean = [seen for seen in decode if not seen.misses]
    missed = [seen for seen in decode if seen.misses]
    if len(clean) < ENOUGH:
        raise ConfigError(
            f"the warm run had {len(clean)} accesses without a miss; at least {ENOUGH} are needed to tell math from "
            "waiting: give it more tokens or more slots"
        )
    expert_seconds = _mean([seen.compute / len(seen.access.keys) for seen in clean])
    decide = _mean([seen.decide for seen in clean])
    inner = [seen for seen in decode if seen.access.layer]
    between = [seen.before for seen in inner if not seen.after_miss]
    layer_seconds = _mean(between if len(between) >= ENOUGH else [seen.before for seen in inner] or [0.0])
    steps = [seen.before for seen in decode if not seen.access.layer]
    step_seconds = max(0.0, _mean(steps) - layer_seconds) if steps else 0.0
    contention = miss_seconds = wake_seconds = 0.0
    if len(missed) >= ENOUGH:
        usual = _middle(missed, lambda seen: seen.compute / len(seen.access.keys))
        longer = sum(seen.compute - expert_seconds * len(seen.access.keys) for seen in usual)
        beside = expert_seconds * sum(seen.beside for seen in usual)
        contention = max(0.0, longer / beside) if beside else 0.0
        later = [seen.before for seen in inner if seen.after_miss]
        late = _mean(later) - layer_seconds if later else 0.0
        miss_seconds = max(0.0, _mean([seen.decide for seen in missed]) - decide + late)
    if waited := [seen for seen in missed if seen.waits]:
        wake_seconds = _mean([seen.wake / seen.waits for seen in waited])
    return Timing(
        record_nbytes,
        disk_read=disk,
        h2d=h2d or Link(12.0, 1e-5),
        layer_seconds=layer_seconds + decide,
        expert_seconds=expert_seconds,
        step_seconds=step_seconds,
        contention=contention,
        miss_seconds=miss_seconds,
        wake_seconds=wake_seconds,
    )


def calibrate(
    timing: Timing, observations: Sequence[Observation], layers: int, experts: int, tiers: Sequence[TierConfig]
) -> Timing:
    """The timing with the disk's bandwidth beside the math: the one at which the warm run, served again on the virtual
    clock, waits as long as it really did.

    At most four times faster or slower than given; as it is where the run did not wait.
    """
    waited = sum(seen.wait for seen in observations if seen.access.phase is Phase.DECODE)
    work = Workday([seen.access for seen in observations], layers, experts, 1)
    if waited <= 0 or not any(seen.misses for seen in observations):
        return timing

    def at(factor: float) -> Timing:
        return replace(timing, disk_read=replace(timing.disk_read, gbps=timing.disk_read.gbps * factor))

    low, high = 0.25, 4.0  # too slow, too fast
    for _ in range(12):
        middle = (low * high) ** 0.5
        if serve(work, tiers, at(middle)).wait > waited:
            low = middle
        else:
            high = middle
    return at((low * high) ** 0.5)


def _middle(seen: Sequence[Observation], value: Callable[[Observation], float]) -> list[Observation]:
    """Without the outermost twentieths."""
    ranked = sorted(seen, key=value)
    cut = len(ranked) // 20
    return ranked[cut : len(ranked) - cut]


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


@dataclass(slots=True)
class Served:
    """What happened in the accesses that count: numbers of records, seconds."""

    needs: int = 0
    hits: int = 0
    loads: int = 0
    seconds: float = 0.0
    compute: float = 0.0
    wait: float = 0.0


def serve(work: Workday, tiers: Sequence[TierConfig], timing: Timing | None) -> Served:
    """Serve the accesses on the virtual clock; decode accesses from `count_from` on are counted."""
    config = SimulationConfig(tiers[0].policy, tiers[0].slots, timing=timing)
    clock = Clock([list(tiers)], work.layers, work.experts, config, work.top_k)
    core, disk, found = clock.caches[0], clock.links[0], Served()
    clock.run(work.accesses[: work.count_from])
    for access in work.accesses[work.count_from :]:
        if access.phase is not Phase.DECODE:
            clock.run([access])
            continue
        now, compute, wait, copies = clock.now, clock.seconds["compute"], clock.seconds["wait"], disk.copies
        found.needs += len(access.keys)
        found.hits += sum(core.holds(key) for key in access.keys)
        clock.run([access])
        found.loads += disk.copies - copies
        found.seconds += clock.now - now
        found.compute += clock.seconds["compute"] - compute
        found.wait += clock.seconds["wait"] - wait
    return found


def forecast(
    work: Workday,
    slots: int,
    record_nbytes: int,
    timing: Timing | None = None,
    policy: str = "horizon",
    admission: str = "decode-only",
    host_slots: int | None = None,
) -> Forecast:
    """Serve the accesses with so many slots, set up as the engine sets them up."""
    records = work.layers * work.experts
    sizes = [slots] if host_slots is None else [slots, host_slots]
    tiers = configure_all(sizes, records, work.layers, work.top_k, policy, admission)
    found, tokens = serve(work, tiers, timing), work.tokens
    counted: dict[str, Any] = {}
    if timing is not None and found.seconds > 0:
        counted = {"compute": found.compute / tokens, "wait": found.wait / tokens}
        counted["tokens_per_second"] = tokens / found.seconds
        counted["bound"] = "disk" if found.wait > found.compute else "compute"
    return Forecast(
        slots,
        host_slots,
        slots / records,
        found.hits / max(1, found.needs),
        found.loads / tokens,
        found.loads * record_nbytes / tokens,
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
