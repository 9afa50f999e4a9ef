"""What the residency core keeps its books in: copy orders, records in slots, tickets, tiers.

Plain data with no decisions in it; `residency.py` is the only writer.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import NamedTuple

from moetier.access import Access, ExpertKey
from moetier.errors import CapacityError, ConfigError
from moetier.policies import AdmissionPolicy, EvictionPolicy, make_admission, make_policy


class Place(NamedTuple):
    """A slot of a tier. Home is the tier after the last one, with slot -1."""

    tier: int
    slot: int


class Kind(IntEnum):
    """Why a copy is ordered."""

    LOAD = 0  # on demand
    PREFETCH = 1
    WRITE_BACK = 2


class Copy(NamedTuple):
    """An order for the mover: move the record of `key` from `source` to `target`, then report `id` as completed."""

    id: int
    key: ExpertKey
    source: Place
    target: Place
    kind: Kind


class State(Enum):
    """Of a record in a slot."""

    LOADING = "loading"
    READY = "ready"
    LEAVING = "leaving"  # dirty and on its way home; the slot is already promised to another key


class Entry:
    """A record's stay in a slot."""

    __slots__ = (
        "copy",
        "dirty",
        "key",
        "leases",
        "prefetched",
        "slot",
        "state",
        "tickets",
        "transient",
        "vacating",
    )

    def __init__(self, key: ExpertKey, slot: int, copy: int, vacating: int | None):
        self.key = key
        self.slot = slot
        self.transient = False  # staged: dropped after use, unknown to the policy
        self.state = State.LOADING
        self.leases = 0
        self.dirty = False
        self.prefetched = False  # by a prefetch, not demanded yet
        self.copy = copy  # the order that fills it, while LOADING
        self.vacating = vacating  # write-back that must end before the slot can be filled
        self.tickets: list[Ticket] = []  # who waits for it, while LOADING


class Ticket:
    """One access being served. `ready` holds leased keys in the order they became ready; the caller pops and releases."""

    __slots__ = ("access", "failed", "leased", "number", "ready", "waiting")

    def __init__(self, number: int, access: Access):
        self.number = number
        self.access = access
        self.ready: deque[ExpertKey] = deque()
        self.leased: set[ExpertKey] = set()  # ready, in use, or loading
        self.waiting: list[ExpertKey] = []  # no slot yet: the access runs in waves
        self.failed: int | None = None  # id of a copy that failed; the caller must abort

    @property
    def done(self) -> bool:
        """Every expert was served and released."""
        return not (self.leased or self.waiting)


@dataclass(frozen=True, slots=True)
class TierConfig:
    """One tier. `staging` slots serve misses that admission turns away; `floor` residents a layer are not displaced by
    other layers while another victim exists."""

    slots: int
    policy: str = "horizon"
    admission: str = "always"
    staging: int = 0
    floor: int = 0


class Tier:
    """The books of one tier."""

    def __init__(self, config: TierConfig, layers: int, experts: int):
        if config.slots < 1:
            raise CapacityError(f"a tier needs at least 1 slot, got {config.slots}", minimum_slots=1)
        if not 0 <= config.staging < config.slots:
            raise ConfigError(f"staging must be between 0 and slots - 1 = {config.slots - 1}, got {config.staging}")
        self.config = config
        self.policy: EvictionPolicy = make_policy(config.policy, layers, experts, config.slots)
        self.admission: AdmissionPolicy = make_admission(config.admission)
        self.entries: dict[ExpertKey, Entry] = {}
        self.free = list(range(config.slots - 1, -1, -1))
        self.transients = 0
        self.residents = [0] * layers  # per layer, transients not counted
        self.hits, self.lates, self.misses = ([0] * layers for _ in range(3))
        self.evictions = self.write_backs = self.staged = 0


class Room:
    """Slots that a tier can give to a batch of misses: free ones first, then victims, then staging."""

    def __init__(self, tier: Tier, access: Access):
        self.tier, self.access = tier, access
        self.spare = len(tier.free) - (tier.config.staging - tier.transients)
        self.victims: list[Entry] = []  # best last: popped from the end

    def offer(self, key: ExpertKey) -> Entry | bool | None:
        """What `key` would get: a victim's slot, True for a free slot, False for a staging slot, None for nothing."""
        if self.spare > 0:
            return True
        tier = self.tier
        if self.victims:
            victim = self.victims[-1]
            if not tier.config.staging or tier.admission.admit(key, victim.key, self.access):
                return victim
        return False if tier.free and tier.config.staging > tier.transients else None

    def accept(self, offer: Entry | bool) -> None:
        """The last offer was used."""
        if offer is True:
            self.spare -= 1
        elif offer:
            self.victims.pop()
