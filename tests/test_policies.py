"""Every registered policy against the contract of the core, and each known one against its literal definition."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetier.access import Access, ExpertKey, Phase
from moetier.errors import ConfigError
from moetier.policies import ADMISSIONS, POLICIES, EvictionPolicy, make_admission, make_policy
from moetier.residency import Residency
from moetier.tiers import TierConfig
from prepared import ONLINE, prepare, prepared

pytestmark = pytest.mark.timeout(30)

LAYERS, EXPERTS = 3, 5
ACCESSES = st.lists(
    st.tuples(st.integers(0, LAYERS - 1), st.sets(st.integers(0, EXPERTS - 1), min_size=1), st.integers(0, 4)),
    max_size=40,
)
SLOTS = st.sampled_from([1, 2, 3, 4, 8, 40])
every_policy = pytest.mark.parametrize("name", sorted(POLICIES))

Visits = list[tuple[int, set[int], int]]
Step = Callable[[Access, list[ExpertKey], list[ExpertKey], list[ExpertKey]], None]


def as_accesses(visits: Visits) -> list[Access]:
    return [
        Access(time, layer, tuple(ExpertKey(layer, expert) for expert in sorted(experts)))
        for time, (layer, experts, _) in enumerate(visits, 1)
    ]


def drive(
    policy: EvictionPolicy, slots: int, accesses: list[tuple[int, set[int], int]], step: Step | None = None
) -> list:
    """Feed a policy as the core does; `step(access, hits, evicted, inserted)`. Returns the ranking after each access.

    Evicts what the policy says, or sometimes (third number) another resident: leases, pins and failures do that.
    """
    resident: list[ExpertKey] = []
    rankings = []
    served = as_accesses(accesses)
    prepare(policy, served)
    for access, (_, _, odd) in zip(served, accesses, strict=True):
        keys = list(access.keys)
        policy.on_access(access)
        hits = [key for key in keys if key in resident]
        for key in hits:
            policy.on_hit(key, access)
        inserted = [key for key in keys if key not in hits][:slots]
        need = len(resident) + len(inserted) - slots
        victims = [key for key in policy.victims(access) if key not in hits][: max(0, need)]
        if odd == 1 and resident and resident[0] not in hits + victims:
            victims.append(resident[0])
        inserted = inserted[: slots - len(resident) + len(victims)]
        for key in victims:
            policy.on_remove(key)
            resident.remove(key)
        for key in inserted:
            policy.on_insert(key, access)
            resident.append(key)
        if step:
            step(access, hits, victims, inserted)
        ranking = list(policy.victims(access))
        assert len(ranking) == len(resident) and set(ranking) == set(resident)
        assert ranking == list(policy.victims(access)), "victims() is not pure"
        assert ranking[:2] == list(islice(policy.victims(access), 2))
        assert all(type(key) is ExpertKey for key in ranking)
        rankings.append(ranking)
    return rankings


# -- all policies -----------------------------------------------------------------------------------------------------


@every_policy
@settings(max_examples=40, deadline=None, derandomize=True)
@given(slots=SLOTS, accesses=ACCESSES)
def test_ranks_exactly_the_residents_and_is_deterministic(name: str, slots: int, accesses: Visits) -> None:
    first, second = (drive(make_policy(name, LAYERS, EXPERTS, slots), slots, accesses) for _ in range(2))
    assert first == second


@every_policy
def test_large_tier_is_ranked_lazily_and_whole(name: str) -> None:
    keys = [ExpertKey(layer, expert) for layer in range(20) for expert in range(50)]
    accesses = [Access(time, key.layer, (key,)) for time, key in enumerate(keys, 1)]
    policy = prepared(name, 20, 64, 1000, accesses)
    for access in accesses:
        policy.on_access(access)
        policy.on_insert(access.keys[0], access)
    assert sorted(policy.victims(access)) == sorted(keys)


@every_policy
def test_older_waiting_access_does_not_upset_the_order(name: str) -> None:
    """An access that waited for slots asks for victims after later accesses were served."""
    old = Access(1, 0, (ExpertKey(0, 0),))
    news = [ExpertKey(time % LAYERS, time % EXPERTS) for time in range(2, 8)]
    accesses = [old, *(Access(time, key.layer, (key,)) for time, key in enumerate(news, 2))]
    policy = prepared(name, LAYERS, EXPERTS, 8, accesses)
    policy.on_access(old)
    for later in accesses[1:]:
        policy.on_access(later)
        policy.on_insert(later.keys[0], later)
    assert len(list(policy.victims(old))) == 6
    if name in ("lru", "lfru", "lfu"):
        assert list(policy.victims(old)) == list(policy.victims(later))


@pytest.mark.parametrize("name", ONLINE)
@pytest.mark.parametrize("slots", [1, 2, 3, 4, 30])
def test_serves_in_a_core(name: str, slots: int) -> None:
    core = Residency([TierConfig(slots, name)], LAYERS, EXPERTS)
    for time in range(1, 40):
        layer = time % LAYERS
        serve(core, Access(time, layer, tuple(ExpertKey(layer, (time * 7 + i) % EXPERTS) for i in range(2))))
    assert len(core.residents()) == min(slots, LAYERS * EXPERTS)


def serve(core: Residency, access: Access) -> int:
    """Serve an access at once; how many experts were hits."""
    ticket = core.acquire(access)
    hits = len(ticket.ready)
    while not ticket.done:
        for copy in core.take():
            core.completed(copy.id)
        while ticket.ready:
            core.release(ticket, ticket.ready.popleft())
        core.check()
    return hits


# -- definitions ------------------------------------------------------------------------------------------------------


class Facts:
    """What a slow reference needs, kept by a test step."""

    def __init__(self) -> None:
        self.now = 0
        self.order: list[ExpertKey] = []
        self.uses: dict[ExpertKey, int] = {}
        self.last: dict[ExpertKey, int] = {}
        self.history: list[Access] = []

    def step(self, access: Access, hits: list[ExpertKey], evicted: list[ExpertKey], inserted: list[ExpertKey]) -> None:
        self.now = access.time
        self.history.append(access)
        for key in evicted:
            self.order.remove(key)
        for key in hits + inserted:
            if key in self.order:
                self.order.remove(key)
            self.order.append(key)
            self.uses[key] = self.uses.get(key, 0) + 1
            self.last[key] = access.time


def assert_ascending(ranking: list[ExpertKey], score: Callable[[ExpertKey], float]) -> None:
    scores = [score(key) for key in ranking]
    assert all(a <= b + 1e-9 * (1 + abs(b)) for a, b in pairwise(scores)), scores


@settings(max_examples=60, deadline=None, derandomize=True)
@given(slots=SLOTS, accesses=ACCESSES)
def test_lru_is_the_order_of_references(slots: int, accesses: Visits) -> None:
    facts = Facts()
    rankings = drive(make_policy("lru", LAYERS, EXPERTS, slots), slots, accesses, facts.step)
    if rankings:
        assert rankings[-1] == facts.order


@settings(max_examples=60, deadline=None, derandomize=True)
@given(slots=SLOTS, accesses=ACCESSES)
def test_lfru_is_uses_over_age(slots: int, accesses: Visits) -> None:
    facts = Facts()
    rankings = drive(make_policy("lfru", LAYERS, EXPERTS, slots), slots, accesses, facts.step)
    if rankings:
        assert_ascending(rankings[-1], lambda key: facts.uses[key] / (facts.now - facts.last[key] + 1))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(slots=SLOTS, accesses=ACCESSES)
def test_lfu_is_lifetime_uses_then_recency(slots: int, accesses: Visits) -> None:
    facts = Facts()
    rankings = drive(make_policy("lfu", LAYERS, EXPERTS, slots), slots, accesses, facts.step)
    if rankings:
        scores = [(facts.uses[key], facts.last[key]) for key in rankings[-1]]
        assert scores == sorted(scores)


class SlowSLRU:
    """The definition in words, as lists: 25 % probationary, 75 % protected."""

    def __init__(self, slots: int):
        self.room = int(slots * 0.75)
        self.probationary: list[ExpertKey] = []  # least recent first
        self.protected: list[ExpertKey] = []
        self.uses: dict[ExpertKey, int] = {}
        self.newest: ExpertKey | None = None

    def step(self, access: Access, hits: list[ExpertKey], evicted: list[ExpertKey], inserted: list[ExpertKey]) -> None:
        for key in hits:
            self.uses[key] += 1
            (self.protected if key in self.protected else self.probationary).remove(key)
            (self.protected if self.room else self.probationary).append(key)
            if len(self.protected) > self.room:
                self.probationary.append(self.protected.pop(0))
        for key in evicted:
            (self.protected if key in self.protected else self.probationary).remove(key)
        for key in inserted:
            self.uses[key] = self.uses.get(key, 0) + 1
            self.probationary.append(key)
            self.newest = key

    def ranking(self) -> list[ExpertKey]:
        candidates = [key for key in self.probationary if key != self.newest]
        ranked = []
        while candidates:
            fewest = min(self.uses[key] for key in candidates)
            victim = next(key for key in candidates if self.uses[key] == fewest)
            candidates.remove(victim)
            ranked.append(victim)
        return ranked + self.protected + [key for key in self.probationary if key == self.newest]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(slots=SLOTS, accesses=ACCESSES)
def test_slru_is_its_definition(slots: int, accesses: Visits) -> None:
    reference = SlowSLRU(slots)
    rankings = drive(make_policy("slru", LAYERS, EXPERTS, slots), slots, accesses, reference.step)
    if rankings:
        assert rankings[-1] == reference.ranking()


def test_slru_demotion_does_not_expose_the_newest_insert() -> None:
    policy = make_policy("slru", 1, 16, 4)  # three protected slots
    a, b, c, d, e = (ExpertKey(0, expert) for expert in range(5))
    access = Access(1, 0, (a,))
    for key in (a, b, c, d):
        policy.on_insert(key, access)
    for key in (a, b, c):
        policy.on_hit(key, access)
    policy.on_remove(d)
    policy.on_insert(e, access)
    policy.on_hit(e, access)  # promoted: a is demoted behind everything inserted before
    policy.on_remove(b)
    policy.on_insert(d, access)
    assert next(policy.victims(access)) == a


def hits_of(policy: str, slots: int) -> int:
    """A model of 8 layers that wants the same two experts of each layer for every token: a cycle of 16 keys."""
    core = Residency([TierConfig(slots, policy)], 8, 4)
    hits = 0
    for time in range(1, 20 * 8 + 1):
        layer = time % 8
        hits += serve(core, Access(time, layer, (ExpertKey(layer, 0), ExpertKey(layer, 1))))
    return hits


def test_below_one_cycle_lru_hits_nothing_and_horizon_does() -> None:
    assert hits_of("lru", 14) == 0
    assert hits_of("lru", 15) == 19 * 8  # an access is atomic: a miss does not displace its neighbour that is a hit
    assert hits_of("horizon", 14) > 19 * 16 * 0.7
    assert hits_of("lru", 16) == hits_of("horizon", 16) == 19 * 16


# -- admission and the registries -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(ADMISSIONS))
def test_admission_answers_yes_or_no_and_admits_in_decode(name: str) -> None:
    admission = make_admission(name)
    a, b = ExpertKey(0, 0), ExpertKey(0, 1)
    for phase in Phase:
        answers = {admission.admit(a, b, Access(1, 0, (a,), phase=phase)) for _ in range(3)}
        assert answers in ({True}, {False})
    assert admission.admit(a, b, Access(1, 0, (a,), phase=Phase.DECODE))


def test_decode_only_turns_prefill_away() -> None:
    a, b = ExpertKey(0, 0), ExpertKey(0, 1)
    assert not make_admission("decode-only").admit(a, b, Access(1, 0, (a,), phase=Phase.PREFILL))
    assert make_admission("always").admit(a, b, Access(1, 0, (a,), phase=Phase.PREFILL))


def test_names_that_are_not_registered() -> None:
    with pytest.raises(
        ConfigError,
        match=r"unknown policy 'mru'; choose one of: activation-matrix, .*, zigzag, or",
    ):
        make_policy("mru", 1, 1, 1)
    with pytest.raises(ConfigError, match=r"policy 'no.such:Thing' cannot be imported"):
        make_policy("no.such:Thing", 1, 1, 1)
    with pytest.raises(ConfigError, match=r"unknown admission policy 'never'; choose one of: always, decode-only"):
        make_admission("never")
    assert type(make_policy("moetier.policies.lru:LRU", 1, 1, 1)) is POLICIES["lru"]
