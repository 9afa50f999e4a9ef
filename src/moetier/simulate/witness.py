"""A witness of decisions: a policy that passes every hook on and keeps what it was told, access by access.

Put around the policy of any driver it sees what all of them must agree on: which needs were hits, which records were
given a slot, which lost theirs. A witness knows neither slots nor flights: a late arrival is a hit to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from moetier.access import Access, ExpertKey
from moetier.policies import EvictionPolicy
from moetier.residency import Residency
from moetier.simulate.instant import Instant
from moetier.tiers import Tier

__all__ = ["Noted", "Witness", "attach", "tiers_of"]


@dataclass(slots=True)
class Noted:
    """What a tier did about one access; `hooks` has hits, inserts (+) and removals (-) in the order of the calls.

    What a prefetch causes counts for the access before it, what a late wave causes for the access that runs.
    """

    time: int
    layer: int
    needs: tuple[ExpertKey, ...]
    hits: list[ExpertKey] = field(default_factory=list)  # late arrivals among them
    inserted: list[ExpertKey] = field(default_factory=list)
    victims: list[ExpertKey] = field(default_factory=list)
    hooks: list[tuple[str, ExpertKey]] = field(default_factory=list)

    @property
    def staged(self) -> list[ExpertKey]:
        """Needs that were neither resident nor given a slot; meaningful for tier 0, which serves every need."""
        known = {*self.hits, *self.inserted}
        return [key for key in self.needs if key not in known]


class Witness:
    """Around a policy: the same decisions, and `noted`."""

    def __init__(self, policy: EvictionPolicy):
        self.policy = policy
        self.noted: list[Noted] = []

    def on_access(self, access: Access) -> None:
        """Begin a note."""
        self.noted.append(Noted(access.time, access.layer, access.keys))
        self.policy.on_access(access)

    def on_insert(self, key: ExpertKey, access: Access) -> None:
        """Note an insert."""
        note = self.noted[-1]
        note.inserted.append(key)
        note.hooks.append(("+", key))
        self.policy.on_insert(key, access)

    def on_hit(self, key: ExpertKey, access: Access) -> None:
        """Note a hit."""
        note = self.noted[-1]
        note.hits.append(key)
        note.hooks.append(("hit", key))
        self.policy.on_hit(key, access)

    def on_remove(self, key: ExpertKey) -> None:
        """Note a victim."""
        note = self.noted[-1]
        note.victims.append(key)
        note.hooks.append(("-", key))
        self.policy.on_remove(key)

    def victims(self, access: Access) -> Iterator[ExpertKey]:
        """As the policy ranks them."""
        return self.policy.victims(access)


def tiers_of(driver: Residency | Instant) -> list[Tier]:
    """The books of a driver, fastest tier first. To look at, or to prepare before the first access."""
    return [driver.tier] if isinstance(driver, Instant) else driver._tiers


def attach(driver: Residency | Instant) -> list[Witness]:
    """Put a witness around the policy of every tier. Before the first access: what is resident must be known to it."""
    witnesses = []
    for tier in tiers_of(driver):
        tier.policy = witness = Witness(tier.policy)
        witnesses.append(witness)
    return witnesses
