"""Eviction policies, by name. A new policy is one new file and one line in `POLICIES`.

A policy only ranks: it never sees slots, leases, pins or bytes. The residency core takes its order and skips what must
not go (leased, pinned, loading, protected by the per-layer floor).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from moetier.access import Access, ExpertKey
from moetier.errors import ConfigError
from moetier.policies.activation_matrix import ActivationMatrix
from moetier.policies.admission import ADMISSIONS, AdmissionPolicy
from moetier.policies.belady import Belady, ForcedBelady
from moetier.policies.dali import Dali
from moetier.policies.ebco import EBCO
from moetier.policies.fifo import FIFO
from moetier.policies.hobbit import Hobbit
from moetier.policies.horizon import Horizon
from moetier.policies.least_stale import LeastStale
from moetier.policies.lfru import LFRU
from moetier.policies.lfu import LFU
from moetier.policies.lru import LRU
from moetier.policies.mrs import MRS
from moetier.policies.slru import SLRU
from moetier.policies.static import Static
from moetier.policies.watermark import Watermark
from moetier.policies.zigzag import Zigzag
from moetier.registry import build, find, parse_name

__all__ = [
    "ADMISSIONS",
    "POLICIES",
    "AdmissionPolicy",
    "Admits",
    "EvictionPolicy",
    "check_online",
    "find_policy",
    "make_admission",
    "make_policy",
    "parse_policy",
]


class EvictionPolicy(Protocol):
    """What the core asks of a policy. One instance serves one tier.

    Constructed as `Policy(layers, experts, slots, **parameters)`: MoE layers, experts per layer, slots of the tier
    without its staging slots.

    Three more methods are found by name where a policy has them:

    - `admit(incoming, victim, access) -> bool`: admission control (bypass). Asked, in ascending order of the missing
      keys, when a tier with staging slots has no free slot; False sends the record through a staging slot;
    - `foresee(accesses)`: an offline policy is shown the whole future before the first access;
    - `fit(accesses)`: a fitted policy learns from a trace that is disjoint from the one it will serve.
    """

    def on_access(self, access: Access) -> None:
        """Every access, before its hits and inserts; `access.keys` are the experts it needs."""

    def on_insert(self, key: ExpertKey, access: Access) -> None:
        """`key` was given a slot."""

    def on_hit(self, key: ExpertKey, access: Access) -> None:
        """`key` is resident (or on its way) and the access needs it."""

    def on_remove(self, key: ExpertKey) -> None:
        """`key` lost its slot."""

    def victims(self, access: Access) -> Iterator[ExpertKey]:
        """Residents, best victim first. Pure; it is not read on after the policy has been told of a change."""


Admits = Callable[[ExpertKey, ExpertKey, Access], bool]
PolicyFactory = Callable[..., EvictionPolicy]

POLICIES: dict[str, PolicyFactory] = {
    "activation-matrix": ActivationMatrix,
    "belady": Belady,
    "belady-forced": ForcedBelady,
    "dali": Dali,
    "ebco": EBCO,
    "fifo": FIFO,
    "hobbit": Hobbit,
    "horizon": Horizon,
    "least-stale": LeastStale,
    "lfru": LFRU,
    "lfu": LFU,
    "lru": LRU,
    "mrs": MRS,
    "slru": SLRU,
    "static": Static,
    "watermark": Watermark,
    "zigzag": Zigzag,
}


def make_policy(text: str, layers: int, experts: int, slots: int) -> EvictionPolicy:
    """Build a policy by registry name, or a third party's by `"package.module:Class"`.

    Parameters of a policy follow in parentheses: `"slru(protected=0.5)"`. Raises `ConfigError` for a name that is
    neither, and for parameters that the policy does not have.
    """
    policy: EvictionPolicy = build("policy", text, POLICIES, layers, experts, slots)
    return policy


def find_policy(name: str) -> PolicyFactory:
    """The class behind a name without parameters. Raises `ConfigError` for an unknown one."""
    return find("policy", name, POLICIES)


def check_online(text: str) -> None:
    """Refuse what a real run cannot have: no policy, or one that must be shown the future, or a trace to fit on."""
    make_policy(text, 1, 1, 1)
    name, _ = parse_policy(text)
    factory = find_policy(name)
    if hasattr(factory, "foresee"):
        raise ConfigError(f"policy {name!r} is an oracle that must be shown the future: it exists in simulations only")
    if hasattr(factory, "fit"):
        raise ConfigError(
            f"policy {name!r} has to be fitted on a trace: it exists in simulations only; "
            "to keep chosen experts in a run, use a profile with warm pinning"
        )


def parse_policy(text: str) -> tuple[str, dict[str, Any]]:
    """`name(key=value, ...)` as a name and its parameters."""
    return parse_name("policy", text)


def make_admission(name: str) -> AdmissionPolicy:
    """Build an admission policy by registry name; raises `ConfigError` for an unknown one."""
    if name not in ADMISSIONS:
        known = ", ".join(sorted(ADMISSIONS))
        raise ConfigError(f"unknown admission policy {name!r}; choose one of: {known}")
    return ADMISSIONS[name]()
