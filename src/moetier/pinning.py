"""Warm pinning: keep the experts that were used most, after a while or at once from a saved profile.

As in SharpInference (issues 74 and 77): after K accesses the top N experts of every layer are pinned, layers ordered by
their accesses, never more than half of the tier. N is the experts a token uses, and zero when everything fits.

Off by default, because our own measurements say that it loses on real routing: the hot set changes with the text, and
a pinned slot is one that the policy cannot use (docs/planner.md). Hence the guard. It runs a second residency core of
the same tier without pins and without bytes (a ghost cache) on the same accesses, and adds up the hits that the pins
have cost so far: S <- max(0, S + hits without pins - hits), the one-sided CUSUM of Page (1954). Once S passes the
number of pinned slots, the pins have cost more loads than giving them up can (each freed slot is refilled once), and
they are dropped for good: the stopping rule of ski rental, without a parameter to tune.

Knows counts and a core's `pin` and `unpin`; knows no bytes, threads or seconds.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from moetier.access import Access, ExpertKey
from moetier.errors import ConfigError
from moetier.policies import find_policy, parse_policy
from moetier.profile import Profile
from moetier.residency import Residency
from moetier.tiers import TierConfig

Ghost = Callable[[Access], int]


class Pinnable(Protocol):
    """What is asked of a core: `Residency` and `Recorder` have it."""

    def pin(self, key: ExpertKey) -> None:
        """Keep a record."""

    def unpin(self, key: ExpertKey) -> None:
        """Let it go again."""


class GhostCore:
    """A tier without pins and without bytes, whose loads end at once: what the hits would have been."""

    def __init__(self, config: TierConfig, layers: int, experts: int):
        self._core = Residency([config], layers, experts)

    def __call__(self, access: Access) -> int:
        """Serve an access; its hits."""
        core = self._core
        ticket = core.acquire(access)
        hits = len(ticket.ready)
        while not ticket.done:
            for copy in core.take():
                core.completed(copy.id)
            while ticket.ready:
                core.release(ticket, ticket.ready.popleft())
        return hits


def ghost_of(core: Any, layers: int, experts: int) -> Ghost | None:
    """The ghost of a core's tier 0; none for a core of another kind, and for a policy that must be shown a trace."""
    configs: Sequence[TierConfig] = getattr(core, "configs", ())
    if not configs:
        return None
    factory = find_policy(parse_policy(configs[0].policy)[0])
    if hasattr(factory, "foresee") or hasattr(factory, "fit"):
        return None
    return GhostCore(configs[0], layers, experts)


def choose(profile: Profile, slots: int, per_layer: int) -> list[ExpertKey]:
    """The keys to pin: the top `per_layer` experts of each layer, layers by accesses, at most half of the slots."""
    order = sorted(range(profile.layers), key=lambda layer: (-int(profile.accesses[layer]), layer))
    keys = [ExpertKey(layer, expert) for layer in order for expert in profile.top(layer, per_layer)]
    return sorted(keys[: slots // 2])


class WarmPinning:
    """Pins after `after` accesses, or at once from `profile`; tell it of every access with `observe`.

    `slots` is the size of tier 0, `top_k` the experts a token uses; `per_layer` overrides how many experts of a layer
    are pinned. `ghost` gives the hits of an access without pins, by default those of a core like `core`; with `guard`
    false nothing is ever unpinned. Raises `ConfigError` for a profile of another shape.
    """

    def __init__(
        self,
        core: Pinnable,
        layers: int,
        experts: int,
        slots: int,
        top_k: int,
        after: int | None = None,
        profile: Profile | None = None,
        per_layer: int | None = None,
        guard: bool = True,
        ghost: Ghost | None = None,
    ):
        if after is None and profile is None:
            raise ConfigError("warm pinning needs a number of accesses to wait for, or a profile")
        if after is not None and after < 1:
            raise ConfigError(f"pin_after: at least 1 access is needed, got {after}")
        if profile is not None:
            profile.require(layers, experts)
        fits = slots >= layers * experts
        self.per_layer = 0 if fits else top_k if per_layer is None else per_layer
        self.slots, self.after = slots, after
        self.state = "off" if not self.per_layer or slots < 2 else "warming"
        self.pinned: list[ExpertKey] = []  # what is, or was until it was dropped
        self.dropped_after: int | None = None  # accesses with pins
        self.regret = self.worst_regret = 0
        self._core, self._profile = core, Profile(layers, experts) if profile is None else profile
        self._given = profile is not None
        self._accesses = self._needs = self._hits = 0  # since the last change of state
        self._before = (0, 0, 0)  # accesses, needs, hits until pinning
        self._with_pins = (0, 0, 0)
        self._ghost_hits = 0
        self._ghost: Ghost | None = None
        if guard and self.state != "off":
            self._ghost = ghost if ghost is not None else ghost_of(core, layers, experts)
        self.guarded = self._ghost is not None
        if self._given and self.state != "off":
            self._pin()

    def observe(self, access: Access, hits: int) -> None:
        """An access was served, with so many hits in tier 0."""
        self._accesses += 1
        self._needs += len(access.keys)
        self._hits += hits
        if self.state in ("off", "dropped"):
            return
        without = self._ghost(access) if self._ghost is not None else hits
        if self.state == "warming":
            self._profile.add(access)
            if self.after is not None and self._accesses >= self.after:
                self._pin()
            return
        self._ghost_hits += without
        self.regret = max(0, self.regret + without - hits)
        self.worst_regret = max(self.worst_regret, self.regret)
        if self.regret > len(self.pinned):
            self._drop()

    def _pin(self) -> None:
        self.pinned = choose(self._profile, self.slots, self.per_layer)
        for key in self.pinned:
            self._core.pin(key)
        self._before = self._take_counts()
        self.state = "pinned"

    def _drop(self) -> None:
        for key in self.pinned:
            self._core.unpin(key)
        self.dropped_after = self._accesses
        self._with_pins = self._take_counts()
        self.state = "dropped"
        self._ghost = None

    def _take_counts(self) -> tuple[int, int, int]:
        counts = (self._accesses, self._needs, self._hits)
        self._accesses = self._needs = self._hits = 0
        return counts

    def report(self) -> dict[str, Any]:
        """For every report, in plain JSON types.

        `state` (off: everything fits, or fewer than 2 slots; warming; pinned; dropped), `after`, `from_profile`,
        `per_layer`, `pinned` ([layer, expert] pairs: what is pinned, or was when it was dropped), `guarded`,
        `dropped_after` (accesses with pins, or null), `hits_lost` (the guard's sum) and its maximum, and
        hit rates with the accesses they are over: `before` warming, `pinned` (with pins), `without` (what the ghost
        had over these), `dropped` (since then); a rate is null where there was nothing.
        """
        counts = (self._accesses, self._needs, self._hits)
        rates = {
            "before": self._before if self.state in ("pinned", "dropped") else counts,
            "pinned": counts if self.state == "pinned" else self._with_pins,
            "dropped": counts if self.state == "dropped" else (0, 0, 0),
        }
        with_pins = rates["pinned"]
        ghost = self._ghost_hits / with_pins[1] if self.guarded and with_pins[1] else None
        return {
            "state": self.state,
            "after": self.after,
            "from_profile": self._given,
            "per_layer": self.per_layer,
            "pinned": [[key.layer, key.expert] for key in self.pinned],
            "guarded": self.guarded,
            "dropped_after": self.dropped_after,
            "hits_lost": self.regret,
            "most_hits_lost": self.worst_regret,
            "accesses": {name: numbers[0] for name, numbers in rates.items()},
            "hit_rates": {name: numbers[2] / numbers[1] if numbers[1] else None for name, numbers in rates.items()}
            | {"without": ghost},
        }


def load_profile(path: str | os.PathLike[str], layers: int, experts: int, fingerprint: str = "") -> Profile:
    """A saved profile for a model of this shape. Raises `ConfigError`, naming the file, for any other.

    A profile of another checkpoint of the same shape (both fingerprints known) is refused too.
    """
    profile = Profile.load(path)
    profile.require(layers, experts, path)
    if fingerprint and profile.fingerprint and profile.fingerprint != fingerprint:
        raise ConfigError(
            f"{path}: the profile of another checkpoint of the same shape ({profile.model or profile.fingerprint}); "
            "record one with this model (--save-profile)"
        )
    return profile
