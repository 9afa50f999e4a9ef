"""Policies that must be shown a trace before they serve it, for tests that run over the whole registry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moetier.access import Access
from moetier.policies import POLICIES, EvictionPolicy, make_policy

ONLINE = sorted(name for name, policy in POLICIES.items() if not (hasattr(policy, "foresee") or hasattr(policy, "fit")))


def prepare(policy: Any, accesses: Sequence[Access]) -> EvictionPolicy:
    """Show the policy what is to come, and let it learn from it, as far as it wants to."""
    for name in ("foresee", "fit"):
        if hasattr(policy, name):
            getattr(policy, name)(accesses)
    return policy


def prepared(name: str, layers: int, experts: int, slots: int, accesses: Sequence[Access]) -> EvictionPolicy:
    """`make_policy` and `prepare`."""
    return prepare(make_policy(name, layers, experts, slots), accesses)
