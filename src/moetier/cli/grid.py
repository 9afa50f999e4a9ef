"""From the flags of `moetier simulate` to configurations: parsing, and refusing what cannot be, flag by flag.

Knows nothing of files, processes and reports.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from moetier.errors import CapacityError, ConfigError
from moetier.plan import parse_size, parse_slots
from moetier.policies import ADMISSIONS, find_policy, make_policy, parse_policy
from moetier.predictors import make_predictor
from moetier.registry import split_names
from moetier.simulate.config import Link, Scope, Semantics, SimulationConfig, Timing
from moetier.tiers import spare_for
from moetier.trace import Trace

ORACLES = ("belady", "belady-forced")
REFILLS = {"never": False, "always": True, "auto": None}
SCOPES: dict[str, tuple[Scope, ...]] = {"global": ("global",), "layer": ("layer",), "both": ("global", "layer")}


@dataclass(frozen=True, slots=True)
class Machine:
    """The link and computing flags, as given; None where not."""

    record_size: str | None = None
    h2d_gbps: float | None = None
    d2h_gbps: float | None = None
    disk_read_gbps: float | None = None
    disk_write_gbps: float | None = None
    io_latency_ms: float | None = None
    layer_ms: float | None = None
    expert_ms: float | None = None

    def given(self) -> list[str]:
        """The flags that switch the clock on."""
        names = [name for name in self.__slots__ if name != "record_size" and getattr(self, name) is not None]
        return ["--" + name.replace("_", "-") for name in names]

    def timing(self, host: bool, dirty: bool, exclusive: bool, semantics: str) -> Timing | None:
        """The virtual machine, if a flag asks for one. What is not given keeps the default of `Timing`."""
        given = self.given()
        if not given:
            return None
        if self.record_size is None:
            raise ConfigError(f"{given[0]} needs --record-size: the bytes of one expert, such as 18MiB")
        if semantics == "sequential":
            raise ConfigError(f"--semantics sequential has no time: an access is served at once; leave out {given[0]}")
        for flag, wanted, without in (
            ("--h2d-gbps", host, "--host-slots: with one tier experts come from disk"),
            ("--d2h-gbps", exclusive or (host and dirty), "exclusive tiers (see --host-slots): nothing is copied down"),
            ("--disk-write-gbps", dirty, "--dirty: clean experts are dropped, not written back"),
        ):
            if flag in given and not wanted:
                raise ConfigError(f"{flag} does nothing without {without}")
        timing = Timing(parse_size(self.record_size, "--record-size"))
        links: dict[str, Any] = {}
        for name in ("h2d", "d2h", "disk_read", "disk_write"):
            link: Link = getattr(timing, name)
            gbps = getattr(self, f"{name}_gbps")
            if gbps is not None:
                link = replace(link, gbps=gbps)
            if self.io_latency_ms is not None and name.startswith("disk"):
                link = replace(link, latency=self.io_latency_ms / 1e3)
            links[name] = link
        layer, expert = (self.layer_ms or 0.0) / 1e3, (self.expert_ms or 0.0) / 1e3
        return replace(timing, layer_seconds=layer, expert_seconds=expert, **links)


@dataclass(frozen=True, slots=True)
class Grid:
    """The other flags, as given. Policies, sizes, scopes, batches and seeds are multiplied."""

    policy: str
    slots: str
    scope: str = "global"
    batch: str | None = None
    semantics: str = "atomic"
    seeds: int = 1
    oracle: bool = True
    admission: str = "always"
    staging: int = 0
    host_slots: str | None = None
    host_policy: str | None = None
    exclusive: bool | None = None  # None: as a run does, with two tiers
    spare: int | None = None  # None: as a run does
    refill: str | None = None  # None: never, as a run does
    predictor: str | None = None
    prefetch_confidence: float | None = None
    prefetch_limit: int | None = None
    prefetch_displace: bool = False
    prefetch_control: bool = False
    warm_pinning: int | None = None
    dirty: bool = False
    machine: Machine = Machine()

    def policies(self) -> list[str]:
        """Those named, and the oracles."""
        return list(dict.fromkeys([*split_policies(self.policy), *(ORACLES if self.oracle else ())]))

    def configs(self, trace: Trace, fitted: bool) -> list[SimulationConfig]:
        """All configurations for a trace; `fitted`: whether there is another to fit on. Raises `ConfigError`."""
        sizes = list(dict.fromkeys(_slots(text, trace, "--slots") for text in _items(self.slots, "--slots")))
        if self.scope not in SCOPES:
            raise ConfigError(f"--scope {self.scope}: choose one of {', '.join(SCOPES)}")
        if self.semantics not in ("atomic", "sequential"):
            raise ConfigError(f"--semantics {self.semantics}: choose atomic or sequential")
        self._check_sizes(sizes, trace)
        self._check_policies(min(sizes), trace, fitted)
        self._check_options(trace)
        self._check_tiers()
        common: dict[str, Any] = {
            "semantics": cast("Semantics", self.semantics),
            "admission": self.admission,
            "staging": self.staging,
            "host_slots": None if self.host_slots is None else _slots(self.host_slots, trace, "--host-slots"),
            "host_policy": self.host_policy,
            "predictor": self.predictor,
            "prefetch_displace": self.prefetch_displace,
            "prefetch_control": self.prefetch_control,
            "warm_pinning": self.warm_pinning,
            "dirty": self.dirty,
            "timing": self.machine.timing(self.host_slots is not None, self.dirty, self.is_exclusive, self.semantics),
            "relabel": self.seeds > 1,
        }
        common |= {
            name: getattr(self, name)
            for name in ("prefetch_confidence", "prefetch_limit")
            if getattr(self, name) is not None
        }
        return [
            SimulationConfig(
                policy, slots, scope=scope, batch=batch, seed=seed, **common, **self._tiers(scope, slots, trace)
            )
            for scope in SCOPES[self.scope]
            for batch in _batches(self.batch)
            for policy in self.policies()
            for slots in sizes
            for seed in (range(self.seeds) if self.seeds > 1 else (None,))
        ]

    @property
    def is_exclusive(self) -> bool:
        """Whether two tiers keep an expert once: as a run does, unless told otherwise."""
        return self.host_slots is not None and self.exclusive is not False

    def _tiers(self, scope: Scope, slots: int, trace: Trace) -> dict[str, Any]:
        """How exclusive tiers are kept apart, in each cache."""
        if not self.is_exclusive:
            return {}
        each = slots // trace.layers if scope == "layer" else slots
        spare = spare_for(each, trace.top_k) if self.spare is None else self.spare
        return {"exclusive": True, "spare": spare, "refill": REFILLS[self.refill or "never"]}

    def _check_tiers(self) -> None:
        for flag, given in (("--exclusive", self.exclusive), ("--inclusive", self.exclusive is False)):
            if given and self.host_slots is None:
                raise ConfigError(f"{flag} is of two tiers; give --host-slots too")
        for flag, value in (("--spare", self.spare), ("--refill", self.refill)):
            if value is not None and not self.is_exclusive:
                raise ConfigError(f"{flag} is of exclusive tiers; give --host-slots, and leave out --inclusive")
        if self.refill is not None and self.refill not in REFILLS:
            raise ConfigError(f"--refill {self.refill}: choose one of {', '.join(REFILLS)}")
        if self.refill == "always" and self.spare is not None:
            raise ConfigError("--refill always copies nothing down; leave out --spare")
        if self.refill == "auto" and not self.machine.given():
            raise ConfigError("--refill auto compares the links: it needs --disk-read-gbps or --d2h-gbps")

    def _check_sizes(self, sizes: Sequence[int], trace: Trace) -> None:
        if max(sizes) > trace.records:
            raise ConfigError(f"--slots {max(sizes)}: the model has {trace.records} experts in all; give at most that")
        if "layer" in SCOPES[self.scope] and min(sizes) < trace.layers:
            raise CapacityError(
                f"--slots: {min(sizes)} slots are less than one for each of the {trace.layers} layers, which "
                f"--scope {self.scope} divides them among; give at least {100 * trace.layers / trace.records:.2g}%",
                minimum_slots=trace.layers,
            )
        if self.staging >= min(sizes):
            raise ConfigError(
                f"--staging {self.staging}: staging slots are taken out of --slots, the smallest of which is "
                f"{min(sizes)}; give fewer"
            )

    def _check_policies(self, slots: int, trace: Trace, fitted: bool) -> None:
        named = [(name, "--policy") for name in self.policies()]
        named += [(self.host_policy, "--host-policy")] if self.host_policy else []
        for name, flag in named:
            try:
                make_policy(name, trace.layers, trace.num_experts, slots)
                factory = find_policy(parse_policy(name)[0])
            except ConfigError as error:
                raise ConfigError(f"{flag}: {error}") from None
            if hasattr(factory, "fit") and not fitted:
                raise ConfigError(f"{flag} {name}: it is fitted beforehand; give --fit FILE or --fit-split")

    def _check_options(self, trace: Trace) -> None:
        if self.admission not in ADMISSIONS:
            raise ConfigError(f"--admission {self.admission}: choose one of {', '.join(sorted(ADMISSIONS))}")
        if self.admission != "always" and not self.staging:
            raise ConfigError(f"--admission {self.admission} needs --staging: slots for misses that are turned away")
        if self.predictor is None:
            for flag, given in (
                ("--prefetch-confidence", self.prefetch_confidence is not None),
                ("--prefetch-limit", self.prefetch_limit is not None),
                ("--prefetch-displace", self.prefetch_displace),
                ("--prefetch-control", self.prefetch_control),
            ):
                if given:
                    raise ConfigError(f"{flag} does nothing without --predictor")
        else:
            try:
                make_predictor(self.predictor, trace.layers, trace.num_experts, trace.top_k)
            except ConfigError as error:
                raise ConfigError(f"--predictor: {error}") from None
        if self.prefetch_control:
            if not self.machine.given() or self.scope != "global":
                raise ConfigError("--prefetch-control measures time: it needs --disk-read-gbps and --scope global")
            if self.prefetch_displace or (self.prefetch_confidence, self.prefetch_limit) != (None, None):
                raise ConfigError(
                    "--prefetch-control chooses by itself; leave out --prefetch-confidence, -limit and -displace"
                )
        if self.host_policy and self.host_slots is None:
            raise ConfigError("--host-policy does nothing without --host-slots")
        if self.warm_pinning is not None and self.scope != "global":
            raise ConfigError("--warm-pinning chooses among all layers: it needs --scope global")


def split_policies(text: str) -> list[str]:
    """`slru(protected=0.5,x=1),lru` at the commas that are outside parentheses."""
    names = split_names(text)
    if not names:
        raise ConfigError("--policy: no policy is named")
    return names


def _items(text: str, flag: str) -> list[str]:
    items = [item.strip() for item in text.split(",") if item.strip()]
    if not items:
        raise ConfigError(f"{flag}: nothing is given")
    return items


def _slots(text: str, trace: Trace, flag: str) -> int:
    try:
        return parse_slots(text, trace.records)
    except ConfigError as error:
        raise ConfigError(str(error).replace("slots:", f"{flag}:", 1)) from None
    except CapacityError as error:
        raise CapacityError(str(error).replace("slots:", f"{flag}:", 1), error.minimum_slots) from None


def _batches(text: str | None) -> list[int | None]:
    if text is None:
        return [None]
    batches: list[int | None] = []
    for item in _items(text, "--batch"):
        if not item.isdecimal() or int(item) < 1:
            raise ConfigError(f"--batch: {item!r} is not a number of streams, 1 or more")
        batches.append(int(item))
    return list(dict.fromkeys(batches))
