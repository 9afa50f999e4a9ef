"""Eviction policies, by name. A new policy is one new file and one line in `POLICIES`.

A policy only ranks: it never sees slots, leases, pins or bytes. The residency core takes its order and skips what must
not go (leased, pinned, loading, protected by the per-layer floor).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Protocol

from moetier.access import Access, ExpertKey
from moetier.errors import ConfigError
from moetier.policies.admission import ADMISSIONS, AdmissionPolicy
from moetier.policies.horizon import Horizon
from moetier.policies.lfru import LFRU
from moetier.policies.lfu import LFU
from moetier.policies.lru import LRU
from moetier.policies.slru import SLRU

__all__ = ["ADMISSIONS", "POLICIES", "AdmissionPolicy", "EvictionPolicy", "make_admission", "make_policy"]


class EvictionPolicy(Protocol):
    """What the core asks of a policy. One instance serves one tier.

    Constructed as `Policy(layers, experts, slots)`: MoE layers, experts per layer, slots of the tier.
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


PolicyFactory = Callable[[int, int, int], EvictionPolicy]

POLICIES: dict[str, PolicyFactory] = {
    "horizon": Horizon,
    "lfru": LFRU,
    "lfu": LFU,
    "lru": LRU,
    "slru": SLRU,
}


def make_policy(name: str, layers: int, experts: int, slots: int) -> EvictionPolicy:
    """Build a policy by registry name, or a third party's by `"package.module:Class"`.

    Raises `ConfigError` for a name that is neither.
    """
    factory = POLICIES.get(name)
    if factory is None and ":" in name:
        module, _, attribute = name.partition(":")
        try:
            factory = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"policy {name!r} cannot be imported: {error}") from error
    if factory is None:
        known = ", ".join(sorted(POLICIES))
        raise ConfigError(f'unknown policy {name!r}; choose one of: {known}, or give "package.module:Class"')
    return factory(layers, experts, slots)


def make_admission(name: str) -> AdmissionPolicy:
    """Build an admission policy by registry name; raises `ConfigError` for an unknown one."""
    if name not in ADMISSIONS:
        known = ", ".join(sorted(ADMISSIONS))
        raise ConfigError(f"unknown admission policy {name!r}; choose one of: {known}")
    return ADMISSIONS[name]()
