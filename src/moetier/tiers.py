"""What the residency core keeps its books in: copy orders, records in slots, tickets, tiers.

Plain data with no decisions in it; `residency.py` and its parts are the only writers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from enum import Enum, IntEnum
from typing import NamedTuple

from moetier.access import Access, ExpertKey
from moetier.errors import CapacityError, ConfigError
from moetier.policies import AdmissionPolicy, Admits, EvictionPolicy, make_admission, make_policy


class Place(NamedTuple):
    """A slot of a tier. Home is the tier after the last one, with slot -1."""

    tier: int
    slot: int


class Kind(IntEnum):
    """Why a copy is ordered."""

    LOAD = 0  # on demand
    PREFETCH = 1
    WRITE_BACK = 2
    DEMOTE = 3  # a clean record of tier 0 down into tier 1, in the background
    CLEAN = 4  # a changed record home, in the background; it stays


class Copy(NamedTuple):
    """An order for the mover: move the record of `key` from `source` to `target`, then report `id` as completed."""

    id: int
    key: ExpertKey
    source: Place
    target: Place
    kind: Kind


BACKGROUND = (Kind.PREFETCH, Kind.DEMOTE, Kind.CLEAN)  # nobody waits for these: demand goes first
HOMEWARD = (Kind.WRITE_BACK, Kind.CLEAN)  # what is written to the store


class State(Enum):
    """Of a record in a slot."""

    LOADING = "loading"
    READY = "ready"
    LEAVING = "leaving"  # dirty and on its way home; the slot is already promised to another key


LOADING, READY, LEAVING = State  # by name: looking a member up in its class costs more than a comparison


class Entry:
    """A record's stay in a slot."""

    __slots__ = (
        "after",
        "copy",
        "dirty",
        "heir",
        "key",
        "leases",
        "lost",
        "place",
        "prefetched",
        "round",
        "stale",
        "state",
        "tickets",
        "tier",
        "transient",
    )

    def __init__(self, tier: Tier, key: ExpertKey, place: Place, copy: int, round: int = 0):
        self.tier = tier
        self.key = key
        self.place = place
        self.state = LOADING
        self.copy = copy  # the order that fills it while LOADING, that saves it while LEAVING
        self.leases = 0  # users in tier 0, copies that read it
        self.dirty = False
        self.transient = False  # staged: dropped after use, unknown to the policy
        self.prefetched = False  # by a prefetch, not demanded yet
        self.round = round  # of the model, in which it was loaded
        self.lost = False  # its demotion failed, it goes without; staged: not wanted any more, it goes on arrival
        self.stale = False  # LOADING, and its source was changed meanwhile: copied once more
        self.after: Entry | None = None  # the leaving record that must be home before the slot can be filled
        self.heir: Entry | None = None  # the other way round
        self.tickets: list[Ticket] = []  # who waits for it: while LOADING, or to change it while it is written home


FREE, STAGING = "free", "staging"  # slots that nobody has to leave
Grant = Entry | str


NOWHERE: frozenset[ExpertKey] = frozenset()


class Ticket:
    """One access being served. `ready` holds leased keys in the order they became so; the caller pops and releases."""

    __slots__ = ("access", "failed", "in_place", "leased", "number", "ready", "waiting")

    def __init__(self, number: int, access: Access):
        self.number = number
        self.access = access
        self.ready: deque[ExpertKey] = deque()
        self.leased: set[ExpertKey] = set()  # ready, in use, or loading
        self.in_place: frozenset[ExpertKey] = NOWHERE  # of its keys, those served in tier 1 instead of tier 0
        self.waiting: list[ExpertKey] = []  # no slot yet: the access runs in waves
        self.failed: int | None = None  # id of a copy that failed; the caller must abort

    @property
    def done(self) -> bool:
        """Every expert was served and released. Never true of an access that failed: it ends by `abort`."""
        return not self.leased and not self.waiting and self.failed is None


@dataclass(frozen=True, slots=True)
class TierConfig:
    """One tier. `staging` slots serve misses that admission turns away (without any, it cannot turn away); `floor`
    residents a layer are not displaced by other layers while another victim exists.

    Of tier 1 only: `exclusive` keeps a record once in tiers 0 and 1 where both are full (`exclusive.py`). The next
    `spare` victims of tier 0 are then copied down ahead of time; with `refill`, for a disk that is cheaper than the
    link, what has left tier 0 is read from home again instead. With `updates` records are changed here and nowhere
    else: accesses of `Part.UPDATE` are served in this tier, wherever else the record is."""

    slots: int
    policy: str = "horizon"
    admission: str = "always"
    staging: int = 0
    floor: int = 0
    exclusive: bool = False
    spare: int = 0
    refill: bool = False
    updates: bool = False


def configure(
    slots: int, records: int, layers: int, top_k: int, policy: str = "horizon", admission: str = "decode-only"
) -> TierConfig:
    """A tier as the engine sets it up: staging for what admission turns away, and a floor for every layer."""
    everything_fits = slots >= records
    roomy = slots >= 16 and not everything_fits
    return TierConfig(
        slots=slots,
        policy=policy,
        admission=admission if roomy else "always",
        staging=min(top_k, slots // 8) if roomy and admission != "always" else 0,
        floor=0 if everything_fits else min(top_k, slots // (2 * layers)),
    )


def configure_all(
    sizes: Sequence[int],
    records: int,
    layers: int,
    top_k: int,
    policy: str = "horizon",
    admission: str = "decode-only",
) -> list[TierConfig]:
    """All tiers as the engine sets them up, fastest first: two are exclusive, so that together they hold more."""
    tiers = [configure(slots, records, layers, top_k, policy, admission) for slots in sizes]
    if len(tiers) > 1:
        tiers[1] = replace(tiers[1], exclusive=True, spare=spare_for(sizes[0], top_k))
    return tiers


def spare_for(slots: int, top_k: int) -> int:
    """How many victims of a tier 0 of this size the engine copies down ahead."""
    return min(top_k, slots // 8)


class Tier:
    """The books of one tier: who has which slot, and what happened here."""

    def __init__(self, index: int, config: TierConfig, layers: int, experts: int):
        if config.slots < 1:
            raise CapacityError(f"a tier needs at least 1 slot, got {config.slots}", minimum_slots=1)
        if not 0 <= config.staging < config.slots:
            raise ConfigError(f"staging must be between 0 and slots - 1 = {config.slots - 1}, got {config.staging}")
        if config.floor < 0:
            raise ConfigError(f"floor must not be negative, got {config.floor}")
        if config.spare < 0:
            raise ConfigError(f"spare must not be negative, got {config.spare}")
        if (config.spare or config.refill) and not config.exclusive:
            raise ConfigError("spare and refill do nothing in a tier that is not exclusive")
        if config.exclusive and index != 1:
            raise ConfigError(f"tier 1 can be exclusive, towards tier 0; tier {index} cannot")
        if config.updates and (index != 1 or config.exclusive):
            raise ConfigError("updates are made in tier 1, below a tier 0 that shares its records with it")
        self.config, self.index = config, index
        ranked = config.slots - config.staging  # what is staged is none of the policy's business
        self.policy: EvictionPolicy = make_policy(config.policy, layers, experts, ranked)
        self.admission: AdmissionPolicy = make_admission(config.admission)
        self._policy_admits: Admits | None = getattr(self.policy, "admit", None)
        self.entries: dict[ExpertKey, Entry] = {}
        self.free = [Place(index, slot) for slot in range(config.slots - 1, -1, -1)]
        self.transients = 0
        self.residents = [0] * layers  # per layer, transients not counted
        self.hits, self.lates, self.misses = ([0] * layers for _ in range(3))
        self.evictions = self.write_backs = self.staged = self.in_place = 0
        self.demotions = self.refills = 0

    def admit(self, incoming: ExpertKey, victim: ExpertKey, access: Access) -> bool:
        """Whether the admission policy, and the eviction policy if it has a say, let `incoming` displace `victim`."""
        admits = self._policy_admits
        return self.admission.admit(incoming, victim, access) and (admits is None or admits(incoming, victim, access))

    def insert(self, entry: Entry, access: Access) -> None:
        """Enter a record that was given a slot."""
        key = entry.key
        self.entries[key] = entry
        if entry.transient:
            self.transients += 1
        else:
            self.residents[key[0]] += 1
            self.policy.on_insert(key, access)

    def remove(self, entry: Entry) -> None:
        """Strike a record; what becomes of its slot is for the caller to say."""
        key = entry.key
        del self.entries[key]
        if entry.transient:
            self.transients -= 1
        else:
            self.residents[key[0]] -= 1
            self.policy.on_remove(key)

    def counters(self) -> dict[str, object]:
        """Hits, lates and misses per layer, and totals of what they caused."""
        return {
            "slots": self.config.slots,
            "policy": self.config.policy,
            "hits": list(self.hits),
            "lates": list(self.lates),
            "misses": list(self.misses),
            "evictions": self.evictions,
            "write_backs": self.write_backs,
            "staged": self.staged,
            "in_place": self.in_place,
            "demotions": self.demotions,
            "refills": self.refills,
        }


def classify(tiers: Sequence[Tier], missing: list[ExpertKey], access: Access) -> None:
    """Count where in these tiers, the fastest first, what the tiers above miss is found, and tell their policies."""
    for tier in tiers:
        absent = []
        for key in missing:
            entry = tier.entries.get(key)
            if entry is None:
                absent.append(key)
                continue
            counter = tier.hits if entry.state is READY else tier.lates
            counter[access.layer] += 1
            if not entry.transient:
                tier.policy.on_hit(key, access)
        missing = absent
        tier.misses[access.layer] += len(missing)


class Orders:
    """The copies that have not ended. Those that wait for others (blocked) go out when the last of these has ended."""

    def __init__(self) -> None:
        self.copies: dict[int, Copy] = {}
        self.ready: list[Copy] = []  # to be taken
        self.blockers: dict[int, int] = {}  # blocked copy -> how many it waits for
        self.dependents: dict[int, list[int]] = {}  # copy -> copies that wait for it

    def add(self, copy: Copy, blockers: Sequence[int]) -> None:
        """Order a copy that must not start before `blockers` have ended."""
        self.copies[copy.id] = copy
        if not blockers:
            self.ready.append(copy)
            return
        self.blockers[copy.id] = len(blockers)
        for blocker in blockers:
            self.dependents.setdefault(blocker, []).append(copy.id)

    def take(self) -> list[Copy]:
        """What can start; demand before what is done in the background."""
        orders, self.ready = self.ready, []
        if len(orders) > 1:
            orders.sort(key=lambda copy: copy.kind in BACKGROUND)
        return orders

    def withdraw(self, copy_id: int) -> Copy:
        """Take back a copy that has not started."""
        if not self.blockers.pop(copy_id, 0):
            self.ready = [copy for copy in self.ready if copy.id != copy_id]
        return self.copies.pop(copy_id)

    def started(self, copy_id: int) -> bool:
        """Whether a copy that has not ended was taken: the mover may be at it."""
        return copy_id not in self.blockers and all(copy.id != copy_id for copy in self.ready)

    def again(self, copy_id: int, copy: Copy) -> None:
        """A copy that has ended has to be made once more, as `copy`; what waits for it goes on waiting."""
        self.add(copy, ())
        if copy_id in self.dependents:
            self.dependents[copy.id] = self.dependents.pop(copy_id)

    def unblock(self, copy_id: int) -> None:
        """This copy has ended: let go those that waited for it only."""
        for dependent in self.dependents.pop(copy_id, ()):
            if dependent in self.blockers:  # not undone meanwhile
                self.blockers[dependent] -= 1
                if not self.blockers[dependent]:
                    del self.blockers[dependent]
                    self.ready.append(self.copies[dependent])

    def undo_dependents(self, copy_id: int) -> list[Copy]:
        """Forget the copies that wait for this one, which failed; the caller undoes what they were for."""
        doomed = [dependent for dependent in self.dependents.pop(copy_id, ()) if self.blockers.pop(dependent, 0)]
        return [self.copies.pop(dependent) for dependent in doomed]


class Room:
    """Slots that a tier can give to a batch of misses: free ones first, then victims, then staging.

    A slot is granted as the victim that has to leave it, or as FREE or STAGING.
    """

    def __init__(self, tier: Tier, access: Access, background: bool = False):
        self.tier, self.access, self.background = tier, access, background
        self.spare = len(tier.free) - (tier.config.staging - tier.transients)
        self.victims: list[Entry] = []  # best last: popped from the end
        self.doubles: Container[ExpertKey] = ()  # of the victims, those that lose nothing by going
        self.given: set[ExpertKey] = set()  # staged prefetches that give way

    def grant(self, key: ExpertKey) -> Grant | None:
        """A slot for `key`, or nothing."""
        if self.spare > 0:
            self.spare -= 1
            return FREE
        tier, staging, victims = self.tier, self.tier.config.staging, self.victims
        if victims and (
            not staging or victims[-1].key in self.doubles or tier.admit(key, victims[-1].key, self.access)
        ):
            return victims.pop()
        if tier.free:  # kept free for staging: nothing is spare
            return STAGING
        if victims and not tier.transients and len(tier.entries) > tier.config.slots - staging:
            return victims.pop()  # staged records that could not be saved stay: they must not block the others
        return self._staged_prefetch() if tier.transients and not self.background else None

    def _staged_prefetch(self) -> Entry | None:
        """Demand goes before what was staged ahead of it."""
        for key, entry in self.tier.entries.items():
            if entry.transient and entry.prefetched and entry.state is READY and key not in self.given:
                self.given.add(key)
                return entry
        return None

    def take_back(self, grant: Grant) -> None:
        """The last grant is not used."""
        if isinstance(grant, Entry) and grant.transient:
            self.given.discard(grant.key)
        elif isinstance(grant, Entry):
            self.victims.append(grant)
        elif grant is FREE:
            self.spare += 1
