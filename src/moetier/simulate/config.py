"""What a simulation is told, and what it tells. Plain data; JSON both ways."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Scope = Literal["global", "layer"]
Semantics = Literal["atomic", "sequential"]


@dataclass(frozen=True, slots=True)
class Link:
    """A path between tiers: bandwidth in GB/s (10**9 bytes a second), seconds of latency a copy, copies at a time."""

    gbps: float
    latency: float = 0.0
    depth: int = 1  # copies whose latencies overlap; the bandwidth is shared


@dataclass(frozen=True, slots=True)
class Timing:
    """A virtual machine. Without it a simulation has no time: every copy ends at once.

    `expert_seconds` is the math of one expert of an access for one token, `token_seconds` what each further token adds;
    `layer_seconds` is everything else of a layer (attention, router, shared experts), before its access.
    """

    record_nbytes: int
    disk_read: Link = Link(1.0, 1e-4, 4)
    disk_write: Link = Link(1.0, 1e-4, 4)
    h2d: Link = Link(12.0, 1e-5)  # used with two tiers only, as is d2h
    d2h: Link = Link(12.0, 1e-5)  # demotions, and changed records
    layer_seconds: float = 0.0
    expert_seconds: float = 0.0
    token_seconds: float = 0.0
    step_seconds: float = 0.0  # once per step: embeddings, head, sampling
    contention: float = 0.0  # compute takes this share longer while copies are under way
    miss_seconds: float = 0.0  # once per access that misses: decisions, cold caches
    predict_seconds: float = 0.0  # of asking the predictor, once per access, with `prefetch_control`
    wake_seconds: float = 0.0  # from the arrival that the compute thread waited for until it goes on


@dataclass(frozen=True, slots=True)
class SimulationConfig:
    """One simulated run. Slots are numbers of records; `host_slots` adds a second tier below the first."""

    policy: str
    slots: int
    host_slots: int | None = None
    host_policy: str | None = None  # of the second tier; the first's if not given
    exclusive: bool = False  # a record is kept once in the two tiers; see `TierConfig`
    spare: int = 0  # victims of the first tier that are copied down ahead
    refill: bool | None = None  # what left the first tier is read again instead; None: if the timing makes it cheaper
    scope: Scope = "global"  # "layer": every layer has its own slots, slots // layers each
    batch: int | None = None  # None: steps as recorded
    semantics: Semantics = "atomic"
    admission: str = "always"
    staging: int = 0  # slots, of `slots`, for misses that are turned away; see `Result.extra_staging`
    floor: int = 0  # residents a layer that other layers do not displace while another victim exists
    predictor: str | None = None  # prefetch with it
    prefetch_confidence: float = 0.5
    prefetch_limit: int = 4  # prefetches per access
    prefetch_displace: bool = False  # over victims, not only into free slots
    prefetch_control: bool = False  # as the engine does it: within a time budget, by the controller; needs a timing
    warm_pinning: int | None = None  # accesses before pinning
    seed: int | None = None  # order of the sequences; None: as they are
    relabel: bool = False  # renumber the experts by the seed: ties, which numbers decide, fall otherwise
    timing: Timing | None = None
    windows: int = 100  # points of the time line
    dirty: bool = False  # every use changes the record, as in training: what leaves tier 0 is written home

    def to_dict(self) -> dict[str, Any]:
        """For JSON; see `config_from_dict`."""
        return asdict(self)


def config_from_dict(values: dict[str, Any]) -> SimulationConfig:
    """The inverse of `SimulationConfig.to_dict`."""
    values = dict(values)
    if values.get("timing") is not None:
        timing = dict(values["timing"])
        for name in ("disk_read", "disk_write", "h2d", "d2h"):
            timing[name] = Link(**timing[name])
        values["timing"] = Timing(**timing)
    return SimulationConfig(**values)


@dataclass(slots=True)
class Result:
    """What one simulated run did. Lists are per layer unless said otherwise; counts are of needs.

    A *need* is one expert of one access, however many tokens want it: the denominator of every rate here.
    """

    config: SimulationConfig
    accesses: int
    steps: int
    tokens: int
    needs: list[int]
    hits: list[int]  # tier 0
    lates: list[int]
    misses: list[int]
    host_hits: list[int]  # tier 1: of the misses (and lates are hits on their way)
    host_misses: list[int]
    evictions: int
    staged: int
    bytes_moved: dict[str, int]  # per link, in records if there is no timing: disk_read, disk_write, h2d, d2h
    prefetches: dict[str, int]  # issued, useful, late, wasted, cancelled
    demand_ratio: float  # mean of (experts needed per access / slots per layer)
    overcommitted: float  # share of accesses where that is above 1
    timeline: list[tuple[int, float]]  # (accesses so far, hit rate of the window)
    seconds: dict[str, float] = field(default_factory=dict)  # virtual: total, compute, wait, and busy per link
    wall_seconds: float = 0.0
    pinned: list[tuple[int, int]] = field(default_factory=list)
    pinning: dict[str, Any] = field(default_factory=dict)  # hit rate before and after warming, dropped by the guard
    prefetch_control: dict[str, Any] = field(default_factory=dict)  # the controller's decision, if there is one
    extra_staging: int = 0  # slots beside `slots`, per cache, for what a policy with admission of its own turns away
    demotions: int = 0  # records copied from the first tier down into the second
    refills: int = 0  # records read again into the second after they left the first
    driver: str = ""  # "instant" or "clock": which one served it; their decisions are the same

    @property
    def hit_rate(self) -> float:
        """Hits over needs; a late arrival is not a hit."""
        return sum(self.hits) / max(1, sum(self.needs))

    @property
    def miss_rate(self) -> float:
        """Misses over needs."""
        return sum(self.misses) / max(1, sum(self.needs))

    @property
    def tokens_per_second(self) -> float | None:
        """Of the virtual machine; None without timing."""
        return self.tokens / self.seconds["total"] if self.seconds.get("total") else None

    def to_dict(self) -> dict[str, Any]:
        """For JSON; see `result_from_dict`."""
        return asdict(self)


def result_from_dict(values: dict[str, Any]) -> Result:
    """The inverse of `Result.to_dict`."""
    values = dict(values)
    values["config"] = config_from_dict(values["config"])
    values["timeline"] = [(int(count), float(rate)) for count, rate in values["timeline"]]
    values["pinned"] = [(int(layer), int(expert)) for layer, expert in values["pinned"]]
    return Result(**values)
