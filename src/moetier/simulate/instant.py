"""One tier whose copies end at once: the decisions of the residency core without its books of flights.

It takes the core's own `Tier` (policy, admission, counters) and repeats what `Residency` decides when nothing is ever
in flight between two accesses: tests drive both and compare hook by hook. It knows no time, no second tier, no
prefetch, no pins and no dirty records; `clock` has the real core for these.

An access is served as the engine serves it: hits are leased, misses get slots, a lease is given back once its math is
done, residents before arrivals. With more experts than slots that order decides who leaves (waves).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from moetier.access import Access, ExpertKey
from moetier.errors import MoetierError
from moetier.tiers import Tier, TierConfig


class Instant:
    """A tier with `config.slots` slots; `tier` holds its policy and its counters."""

    def __init__(self, config: TierConfig, layers: int, experts: int):
        self.tier = Tier(0, config, layers, experts)
        self._resident: set[ExpertKey] = set()
        self._staged: set[ExpertKey] = set()  # in staging slots, until their math is done

    def run(self, accesses: Sequence[Access]) -> None:
        """Serve accesses in order. May be called again with those that follow."""
        tier, resident = self.tier, self._resident
        policy, hits, misses = tier.policy, tier.hits, tier.misses
        on_access, on_hit, on_insert, on_remove = policy.on_access, policy.on_hit, policy.on_insert, policy.on_remove
        ranking, slots = policy.victims, tier.config.slots
        plain = not tier.config.staging and not tier.config.floor
        evictions = 0
        for access in accesses:
            on_access(access)
            keys, layer = access.keys, access.layer
            missing = []
            for key in keys:
                if key in resident:
                    on_hit(key, access)
                else:
                    missing.append(key)
            count = len(missing)
            hits[layer] += len(keys) - count
            if not count:
                continue
            misses[layer] += count
            if not plain:
                self._serve(access, missing)
                continue
            need = count + len(resident) - slots
            if need <= 0:
                for key in missing:
                    resident.add(key)
                    on_insert(key, access)
                continue
            picked = []
            needed = {*keys}
            for key in ranking(access):
                if key not in needed:  # leased
                    picked.append(key)
                    if len(picked) == need:
                        break
            else:
                self._serve(access, missing)
                continue
            evictions += need
            for key in missing[: count - need]:
                resident.add(key)
                on_insert(key, access)
            for key, victim in zip(missing[count - need :], picked, strict=True):
                resident.remove(victim)
                on_remove(victim)
                resident.add(key)
                on_insert(key, access)
        tier.evictions += evictions

    # -- accesses with a floor, with staging, or in waves --------------------------------------------------------------

    def _serve(self, access: Access, missing: list[ExpertKey]) -> None:
        """Serve the misses of one access, whatever the tier's rules."""
        lacking = {*missing}
        ready = deque(key for key in access.keys if key not in lacking)
        leased = {*ready}
        arriving: list[ExpertKey] = []
        waiting = self._advance(access, missing, leased, arriving)
        while waiting:  # in waves: every lease given back, and every arrival, is a chance for those that wait
            if ready:
                key = ready.popleft()
                leased.remove(key)
                self._staged.discard(key)
                waiting = self._advance(access, waiting, leased, arriving)
                continue
            landed = arriving[:]
            if not landed:
                raise MoetierError(f"policy {self.tier.config.policy!r} names no victim for access {access.time}")
            arriving.clear()
            for key in landed:
                ready.append(key)
                if waiting:
                    waiting = self._advance(access, waiting, leased, arriving)
        self._staged.clear()

    def _advance(
        self, access: Access, waiting: list[ExpertKey], leased: set[ExpertKey], arriving: list[ExpertKey]
    ) -> list[ExpertKey]:
        """Give slots to as many keys as possible, by the rules of `Room`; returns those that get none."""
        tier, resident, staged = self.tier, self._resident, self._staged
        staging = tier.config.staging
        spare = tier.config.slots - staging - len(resident)
        free = spare + staging - len(staged)
        victims = self._eligible(access, len(waiting) - max(0, spare), leased)
        refused = []
        for key in waiting:
            if spare > 0:
                spare -= 1
                free -= 1
                self._insert(key, access)
            elif victims and (not staging or tier.admit(key, victims[-1], access)):
                self._evict(victims.pop())
                self._insert(key, access)
            elif free:
                free -= 1
                staged.add(key)
                tier.staged += 1
            else:
                refused.append(key)
                continue
            leased.add(key)
            arriving.append(key)
        return refused

    def _eligible(self, access: Access, need: int, leased: set[ExpertKey]) -> list[ExpertKey]:
        """Up to `need` victims, the best last; the floor is respected while others exist."""
        if need <= 0:
            return []
        tier, floor = self.tier, self.tier.config.floor
        picked: list[ExpertKey] = []
        below_floor: list[ExpertKey] = []
        taken: dict[int, int] = {}
        for key in tier.policy.victims(access):
            if key in leased:
                continue
            if floor:
                layer = key[0]
                if layer != access.layer and tier.residents[layer] - taken.get(layer, 0) <= floor:
                    below_floor.append(key)
                    continue
                taken[layer] = taken.get(layer, 0) + 1
            picked.append(key)
            if len(picked) == need:
                break
        picked += below_floor[: need - len(picked)]
        return picked[::-1]

    def _insert(self, key: ExpertKey, access: Access) -> None:
        self._resident.add(key)
        self.tier.residents[key[0]] += 1
        self.tier.policy.on_insert(key, access)

    def _evict(self, key: ExpertKey) -> None:
        self._resident.remove(key)
        self.tier.residents[key[0]] -= 1
        self.tier.evictions += 1
        self.tier.policy.on_remove(key)
