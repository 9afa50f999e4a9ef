"""The policies of the field: traces checked by hand, slow literal definitions, other libraries, exhaustive search."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetier.access import Access, ExpertKey
from moetier.errors import ConfigError
from moetier.policies import POLICIES, EvictionPolicy, make_policy
from moetier.residency import Residency
from moetier.tiers import TierConfig
from prepared import prepare, prepared

pytestmark = pytest.mark.timeout(30)

LAYERS, EXPERTS = 3, 5
CONFORMANCE = sorted((Path(__file__).parent / "conformance").glob("*.txt"))


@dataclass
class Step:
    """What happened in one access."""

    access: Access
    hits: list[ExpertKey]
    evicted: list[ExpertKey]
    inserted: list[ExpertKey]
    staged: list[ExpertKey]


@dataclass
class Cache:
    """The core in a few lines: atomic accesses, victims asked for once, free slots first, then admission."""

    policy: Any
    slots: int
    staging: int = 0
    residents: list[ExpertKey] = field(default_factory=list)

    def serve(self, access: Access) -> Step:
        policy, residents = self.policy, self.residents
        policy.on_access(access)
        hits = [key for key in access.keys if key in residents]
        missing = [key for key in access.keys if key not in residents]
        for key in hits:
            policy.on_hit(key, access)
        need = len(missing) - (self.slots - len(residents))
        victims = [key for key in policy.victims(access) if key not in access.keys][: max(0, need)]
        admit = getattr(policy, "admit", None) if self.staging else None
        step = Step(access, hits, [], [], [])
        for key in missing:
            if len(residents) >= self.slots:
                if not victims or (admit and not admit(key, victims[0], access)):
                    step.staged.append(key)
                    continue
                policy.on_remove(victims[0])
                residents.remove(victims[0])
                step.evicted.append(victims.pop(0))
            policy.on_insert(key, access)
            residents.append(key)
            step.inserted.append(key)
        return step

    def run(self, accesses: Sequence[Access]) -> list[Step]:
        prepare(self.policy, accesses)
        return [self.serve(access) for access in accesses]


# -- traces checked by hand -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CONFORMANCE, ids=lambda path: path.stem)
def test_conformance(path: Path) -> None:
    facts: dict[str, str] = {}
    expected = []
    for line in path.read_text().splitlines():
        line = line.partition("#")[0].strip()
        name, _, value = line.partition(" ")
        if name.endswith(":"):
            wanted, *columns = (part.split() for part in value.split("|"))
            told = {column[0]: [word for word in column[1:] if word != "-"] for column in columns}
            expected.append((int(name[:-1]), [int(word) for word in wanted], told))
        elif line:
            facts[name] = value
    accesses = [
        Access(time, layer, tuple(ExpertKey(layer, expert) for expert in experts))
        for time, (layer, experts, _) in enumerate(expected, 1)
    ]
    slots, staging = int(facts["slots"]), int(facts.get("staging", "0"))
    policy = make_policy(facts["policy"], 2, 10, slots + staging)
    steps = Cache(policy, slots, staging).run(accesses)
    for number, (step, (_, _, told)) in enumerate(zip(steps, expected, strict=True), 1):
        happened = {
            "hits": [str(key.expert) for key in step.hits],
            "evicts": [f"{key.layer}.{key.expert}" for key in step.evicted],
            "stages": [str(key.expert) for key in step.staged],
        }
        assert happened == {"hits": [], "evicts": [], "stages": []} | told, f"access {number} of {path.name}"


def test_every_classical_policy_has_two_traces() -> None:
    names = [path.read_text().partition("policy ")[2].split()[0].partition("(")[0] for path in CONFORMANCE]
    for policy in ("belady", "belady-forced", "fifo", "lfru", "lfu", "lru", "slru"):
        assert names.count(policy) >= 2, policy


# -- other libraries --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "theirs", "version"),
    [("fifo", "FIFOCache", "5.5"), ("lru", "LRUCache", "5.5"), ("lfu(memory=false)", "LFUCache", "8.0")],
)
@pytest.mark.parametrize("slots", [1, 2, 7, 20])
def test_one_key_at_a_time_is_what_cachetools_does(name: str, theirs: str, version: str, slots: int) -> None:
    cachetools = pytest.importorskip("cachetools", minversion=version)  # before 8, its LFU breaks ties differently
    rng = random.Random(slots)
    popular = [min(int(rng.paretovariate(0.7)), 30) - 1 for _ in range(3000)]
    cache = Cache(make_policy(name, 3, 10, slots), slots)
    other = getattr(cachetools, theirs)(slots)
    for time, number in enumerate(popular, 1):
        key = ExpertKey(number // 10, number % 10)
        step = cache.serve(Access(time, key.layer, (key,)))
        assert bool(step.hits) == (key in other)
        if key in other:
            other[key]
        else:
            other[key] = None
        assert set(cache.residents) == set(other)


# -- literal definitions ----------------------------------------------------------------------------------------------


def made_up(length: int, seed: int) -> tuple[int, list[Access]]:
    """Slots, and accesses with all that a runtime may know about them."""
    rng = random.Random(seed)
    knows_tokens, knows_mass = rng.random() < 0.5, rng.random() < 0.5
    accesses, sequence = [], 0
    for time in range(1, length + 1):
        layer = rng.randrange(LAYERS)
        experts = sorted(rng.sample(range(EXPERTS), rng.randint(1, EXPERTS - 1)))
        tokens = tuple(rng.randint(1, 3) for _ in experts) if knows_tokens else ()
        mass = tuple(rng.randint(1, 8) / 8 for _ in experts) if knows_mass else ()
        sequence += rng.random() < 0.15
        keys = tuple(ExpertKey(layer, expert) for expert in experts)
        accesses.append(Access(time, layer, keys, tokens, sequence=sequence, mass=mass))
    return rng.choice([1, 2, 3, 4, 8, 40]), accesses


def served() -> st.SearchStrategy[tuple[int, list[Access]]]:
    return st.builds(made_up, st.integers(1, 30), st.integers(0, 2**32))


literally = settings(max_examples=100, deadline=None, derandomize=True)


def replay(name: str, slots: int, accesses: list[Access], check: Callable[[list[Step], list[ExpertKey]], None]) -> Any:
    """Serve, and check the ranking after every access against the history so far."""
    cache = Cache(prepared(name, LAYERS, EXPERTS, slots, accesses), slots)
    history: list[Step] = []
    for access in accesses:
        history.append(cache.serve(access))
        ranking = list(cache.policy.victims(access))
        assert sorted(ranking) == sorted(cache.residents)
        check(history, ranking)
    return cache.policy


def assert_ascending(ranking: list[ExpertKey], score: Callable[[ExpertKey], float]) -> None:
    scores = [score(key) for key in ranking]
    assert all(a <= b + 1e-9 * (1 + abs(b)) for a, b in pairwise(scores)), list(zip(ranking, scores, strict=True))


def accesses_of(history: Iterable[Step], layer: int) -> list[Access]:
    return [step.access for step in history if step.access.layer == layer]


def weight_of(access: Access, key: ExpertKey, kind: str) -> float:
    values = getattr(access, kind)
    return values[access.keys.index(key)] if key in access.keys else 0.0


@literally
@given(served())
def test_fifo_is_the_order_of_insertion(case: tuple[int, list[Access]]) -> None:
    def check(history: list[Step], ranking: list[ExpertKey]) -> None:
        inserted: dict[ExpertKey, int] = {}
        for number, key in enumerate(key for step in history for key in step.inserted):
            inserted[key] = number
        assert ranking == sorted(ranking, key=inserted.__getitem__)

    replay("fifo", *case, check)


@literally
@given(served(), st.booleans())
def test_lfu_is_uses_then_recency(case: tuple[int, list[Access]], memory: bool) -> None:
    def check(history: list[Step], ranking: list[ExpertKey]) -> None:
        uses: dict[ExpertKey, int] = {}
        last: dict[ExpertKey, int] = {}
        for number, (step, key) in enumerate((s, k) for s in history for k in s.evicted + s.hits + s.inserted):
            if key in step.evicted:
                uses[key] = uses[key] if memory else 0
            else:
                uses[key] = uses.get(key, 0) + 1
                last[key] = number
        assert ranking == sorted(ranking, key=lambda key: (uses[key], last[key]))

    replay(f"lfu(memory={memory})", *case, check)


@literally
@given(served())
def test_least_stale_is_two_queues(case: tuple[int, list[Access]]) -> None:
    def check(history: list[Step], ranking: list[ExpertKey]) -> None:
        stale: list[ExpertKey] = []
        fresh: list[ExpertKey] = []
        before = -1
        for step in history:
            if step.access.layer <= before:
                stale, fresh = stale + fresh, []
            before = step.access.layer
            for key in step.evicted:
                (stale if key in stale else fresh).remove(key)
            for key in step.hits + step.inserted:
                if key in stale:
                    stale.remove(key)
                if key not in fresh:
                    fresh.append(key)
        by_layer = [sorted(queue, key=lambda key: key.layer) for queue in (stale, fresh)]  # stable: FIFO within a layer
        assert ranking == by_layer[0] + by_layer[1]

    # hits join the queue before inserts here, and evictions come first: no order within one access depends on it
    replay("least-stale", *case, check)


@literally
@given(served(), st.sampled_from([0.5, 0.9]))
def test_ebco_is_co_occurrence_with_the_active_set(case: tuple[int, list[Access]], decay: float) -> None:
    def check(history: list[Step], ranking: list[ExpertKey]) -> None:
        def together(a: ExpertKey, b: ExpertKey) -> float:
            value = 0.0
            for access in accesses_of(history, a.layer):
                value = decay * value + (1 - decay) * (a != b and a in access.keys and b in access.keys)
            return value

        def score(key: ExpertKey) -> float:
            return sum(together(key, other) for other in accesses_of(history, key.layer)[-1].keys)

        assert_ascending(ranking, score)

    replay(f"ebco(decay={decay})", *case, check)


@literally
@given(served(), st.sampled_from([0.1, 0.5]))
def test_mrs_is_an_average_of_router_scores(case: tuple[int, list[Access]], alpha: float) -> None:
    def check(history: list[Step], ranking: list[ExpertKey]) -> None:
        def score(key: ExpertKey) -> float:
            state = 0.0
            for access in accesses_of(history, key.layer):
                if access.mass:
                    new = weight_of(access, key, "mass") / sum(access.mass)
                elif access.tokens:
                    new = weight_of(access, key, "tokens") / sum(access.tokens)
                else:
                    new = (key in access.keys) / len(access.keys)
                state = alpha * new + (1 - alpha) * state
            return state

        assert_ascending(ranking, score)

    replay(f"mrs(alpha={alpha})", *case, check)


def watermark_credit(history: list[Step], key: ExpertKey, alpha: float, gamma: float) -> float:
    visits = accesses_of(history, key.layer)
    if not visits:
        return 0.0
    chance = float(key in visits[0].keys)
    for access in visits[1:]:
        chance = (1 - alpha) * chance + alpha * (key in access.keys)
    now = history[-1].access.layer
    distance = key.layer - now if key.layer >= now else LAYERS - now + key.layer
    return chance * math.exp(-gamma * distance)


@literally
@given(served(), st.sampled_from([(0.5, 0.02), (0.1, 0.3)]))
def test_watermark_is_credit_and_admits_above_the_mark(
    case: tuple[int, list[Access]], horizon: tuple[float, float]
) -> None:
    every = [ExpertKey(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]

    def check(history: list[Step], ranking: list[ExpertKey]) -> None:
        credit = {key: watermark_credit(history, key, *horizon) for key in every}
        assert_ascending(ranking, credit.__getitem__)
        access = history[-1].access
        mark = sorted(credit.values(), reverse=True)[len(ranking) - 1]
        for incoming in set(access.keys) - set(ranking):
            for victim in set(ranking) - set(access.keys):
                clear = credit[incoming] - 1.05 * mark, mark - credit[victim]
                if all(abs(distance) > 1e-9 for distance in clear):
                    assert policy.admit(incoming, victim, access) == (min(clear) > 0)

    slots, accesses = case
    cache = Cache(make_policy(f"watermark(alpha={horizon[0]}, gamma={horizon[1]})", LAYERS, EXPERTS, slots), slots)
    policy, history = cache.policy, []
    for access in accesses:
        history.append(cache.serve(access))
        check(history, list(policy.victims(access)))


@literally
@given(served())
def test_watermark_follows_the_subgradient(case: tuple[int, list[Access]]) -> None:
    slots, step = 3, 0.05
    policy = make_policy(f"watermark(marks=subgradient, step={step}, hysteresis=0)", LAYERS, EXPERTS, slots)
    every = [ExpertKey(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]
    history, mark = [], 0.0
    for access in case[1]:
        policy.on_access(access)
        history.append(Step(access, [], [], [], []))
        credit = {key: watermark_credit(history, key, 0.5, 0.02) for key in every}
        if min(abs(value - mark) for value in credit.values()) < 1e-9 and mark > 0:
            return  # rounding decides from here on
        mark = max(0.0, mark + step * (sum(value >= mark for value in credit.values()) - slots))
        for key in every:
            if abs(credit[key] - mark) > 1e-9:
                assert policy.admit(key, min(every, key=credit.__getitem__), access) == (credit[key] > mark)


def test_watermark_mixes_in_a_predictor() -> None:
    policy: Any = make_policy("watermark(eta=0.25, gamma=0)", 1, 3, 3)
    first, second, third = (ExpertKey(0, expert) for expert in range(3))
    for time, key in enumerate((first, second, third), 1):
        access = Access(time, 0, (key,))
        policy.on_access(access)
        policy.on_insert(key, access)
    assert list(policy.victims(access)) == [second, first, third] or list(policy.victims(access))[-1] == third
    policy.predict(0, [0.0, 1.0, 0.0])  # 0.75 * 0.25 + 0.25 for the second, 0.75 * 0.5 for the third
    assert list(policy.victims(access)) == [first, third, second]


@literally
@given(served())
def test_hobbit_is_a_mix_of_four_terms(case: tuple[int, list[Access]]) -> None:
    weights = {"lru": 0.4, "lfu": 0.3, "lhu": 0.2, "fld": 0.1}

    def check(history: list[Step], ranking: list[ExpertKey]) -> None:
        now = history[-1].access
        token, before = 0, None
        recency: dict[ExpertKey, int] = {}
        frequency: dict[ExpertKey, int] = {}
        high: dict[ExpertKey, int] = {}
        for access in (step.access for step in history):
            if before is not None and access.sequence != before.sequence:
                token, before = 0, None
                recency, frequency, high = {}, {}, {}
            if before is None or access.layer <= before.layer:
                token += 1
            before = access
            ahead = 0.0
            masses = access.mass or (0,) * len(access.keys)
            for mass, key in sorted(zip(masses, access.keys, strict=True), key=lambda pair: -pair[0]):
                recency[key] = token
                frequency[key] = frequency.get(key, 0) + 1
                high[key] = high.get(key, 0) + (ahead <= 0.6 * sum(masses))
                ahead += mass

        def priority(key: ExpertKey) -> float:
            terms = (
                recency.get(key, 0) / token,
                frequency.get(key, 0) / token,
                high.get(key, 0) / token,
                1 - ((key.layer - now.layer) % LAYERS) / LAYERS,
            )
            return sum(weight * term for weight, term in zip(weights.values(), terms, strict=True))

        assert_ascending(ranking, priority)

    replay(f"hobbit({', '.join(f'{name}={weight}' for name, weight in weights.items())})", *case, check)


@literally
@given(served(), st.sampled_from([(4, 0.5), (6, 0.4), (256, 0.02)]))
def test_dali_is_lru_behind_which_are_the_hot(case: tuple[int, list[Access]], window: tuple[int, float]) -> None:
    size, share = window

    def check(history: list[Step], ranking: list[ExpertKey]) -> None:
        last = {key: number for number, key in enumerate(k for s in history for k in s.hits + s.inserted)}

        def hot(key: ExpertKey) -> bool:
            return sum(key in access.keys for access in accesses_of(history, key.layer)[-size:]) >= share * size

        assert ranking == sorted(ranking, key=lambda key: (hot(key), last[key]))

    replay(f"dali(window={size}, share={share})", *case, check)


@literally
@given(served(), served())
def test_static_keeps_the_most_used_of_the_fitted_trace(
    case: tuple[int, list[Access]], other: tuple[int, list[Access]]
) -> None:
    slots, accesses = case
    uses: dict[ExpertKey, int] = {}
    for key in (key for access in other[1] for key in access.keys):
        uses[key] = uses.get(key, 0) + 1
    pinned = sorted(uses, key=lambda key: (-uses[key], key))[:slots]
    policy: Any = make_policy("static", LAYERS, EXPERTS, slots)
    policy.fit(other[1])
    cache, history = Cache(policy, slots, staging=1), []
    for access in accesses:
        step = cache.serve(access)
        history.append(step)
        last = {key: number for number, key in enumerate(k for s in history for k in s.hits + s.inserted)}
        outside = sorted(set(cache.residents) - set(pinned), key=last.__getitem__)
        assert list(policy.victims(access)) == outside + [key for key in reversed(pinned) if key in cache.residents]
    for time, key in enumerate(pinned, len(accesses) + 1):
        cache.serve(Access(time, key.layer, (key,)))
    assert set(pinned) <= set(cache.residents), "once all were used, all are there"


def test_static_admits_what_is_worth_a_slot() -> None:
    often, seldom, new, old = (ExpertKey(0, expert) for expert in range(4))
    trace = [Access(1, 0, (often,)), Access(2, 0, (often, seldom))]
    full: Any = prepare(make_policy("static", 1, 4, 2), trace)
    spare: Any = prepare(make_policy("static", 1, 4, 3), trace)
    for policy in (full, spare):
        assert policy.admit(often, seldom, trace[0]) and policy.admit(seldom, old, trace[0])
        assert not policy.admit(seldom, often, trace[0]) and not policy.admit(new, seldom, trace[0])
    assert spare.admit(new, old, trace[0]) and not full.admit(new, old, trace[0])


@literally
@given(served(), st.sampled_from([1, 2, 9]))
def test_activation_matrix_follows_the_most_similar_sequence(case: tuple[int, list[Access]], library: int) -> None:
    """Follows the policy's own choice among matrices that are equally near, after checking that they are."""
    Matrix = list[list[float]]

    def empty() -> Matrix:
        return [[0.0] * EXPERTS for _ in range(LAYERS)]

    def cosine(a: list[float], b: list[float]) -> float:
        lengths = math.hypot(*a) * math.hypot(*b)
        return sum(x * y for x, y in zip(a, b, strict=True)) / lengths if lengths else 0.0

    slots, accesses = case
    policy: Any = make_policy(f"activation-matrix(library={library})", LAYERS, EXPERTS, slots)
    cache = Cache(policy, slots)
    stored: list[Matrix] = []
    matched: list[int] = []
    running, sequence = empty(), accesses[0].sequence
    for access in accesses:
        cache.serve(access)
        if access.sequence != sequence:
            if len(stored) < library:
                stored.append(running)
                matched.append(0)
            else:
                place = min(range(library), key=matched.__getitem__)
                stored[place], matched[place] = running, 0
            running, sequence = empty(), access.sequence
        for index, key in enumerate(access.keys):
            running[key.layer][key.expert] += access.tokens[index] if access.tokens else 1
        chosen = running
        if stored:
            rows = range(access.layer + 1)
            distances = [1 - sum(cosine(running[row], matrix[row]) for row in rows) / len(rows) for matrix in stored]
            assert distances[policy._best] <= min(distances) + 1e-9
            matched[policy._best] += 1
            chosen = stored[policy._best]

        def priority(key: ExpertKey, chosen: Matrix = chosen, now: int = access.layer) -> float:
            row = chosen[key.layer]
            ratio = row[key.expert] / sum(row) if sum(row) else 0.0
            until = next(d for d in range(1, LAYERS + 1) if (now + d) % LAYERS == key.layer)
            return (ratio + 1e-8) * (1 - until / (LAYERS + 1))

        assert_ascending(list(policy.victims(access)), lambda key: 1e6 * priority(key))


@pytest.mark.parametrize("name", ["mrs", "ebco(decay=0.5)", "watermark"])
def test_averages_survive_many_visits(name: str) -> None:
    """The common scale of a layer would underflow after about a thousand visits at one half."""
    policy = make_policy(name, 2, 4, 8)
    rare, pair = ExpertKey(0, 0), (ExpertKey(0, 1), ExpertKey(0, 2))
    for time in range(1, 3001):
        access = Access(time, 0, (rare, *pair) if time % 100 == 1 else pair if time % 3 else (*pair, ExpertKey(0, 3)))
        policy.on_access(access)
    for key in (pair[0], rare, pair[1], ExpertKey(0, 3)):
        policy.on_insert(key, access)
    order = list(policy.victims(access))
    assert order[:2] == [rare, ExpertKey(0, 3)]


# -- the oracles ------------------------------------------------------------------------------------------------------


def fewest_misses(accesses: list[Access], slots: int, bypass: bool) -> int:
    """Exhaustive search over everything that the rules of an oracle allow."""
    reached = {frozenset[ExpertKey](): 0}
    for access in accesses:
        after: dict[frozenset[ExpertKey], int] = {}
        for residents, misses in reached.items():
            missing = [key for key in access.keys if key not in residents]
            free = slots - len(residents)
            filled, rest = residents | set(missing[:free]), missing[free:]
            victims = residents.difference(access.keys)
            for admitted in range(len(rest) + 1) if bypass else [len(rest)]:
                for incoming in combinations(rest, admitted):
                    for outgoing in combinations(victims, admitted):
                        state = (filled - set(outgoing)) | set(incoming)
                        after[state] = min(after.get(state, misses + len(missing)), misses + len(missing))
        reached = after
    return min(reached.values())


def tiny_traces(count: int, seed: int) -> Iterable[tuple[int, list[Access]]]:
    rng = random.Random(seed)
    for _ in range(count):
        layers, experts, slots = rng.randint(1, 2), rng.randint(2, 4), rng.randint(1, 4)
        accesses = []
        for time in range(1, rng.randint(4, 14)):
            layer = rng.randrange(layers)
            chosen = sorted(rng.sample(range(experts), rng.randint(1, min(slots, experts, 3))))
            accesses.append(Access(time, layer, tuple(ExpertKey(layer, expert) for expert in chosen)))
        yield slots, accesses


@pytest.mark.parametrize(("name", "bypass"), [("belady", True), ("belady-forced", False)])
def test_no_policy_misses_less_than_belady(name: str, bypass: bool) -> None:
    for slots, accesses in tiny_traces(1500, seed=1):
        cache = Cache(make_policy(name, 2, 4, slots + 4 * bypass), slots, staging=4 * bypass)
        misses = sum(len(step.access.keys) - len(step.hits) for step in cache.run(accesses))
        assert misses == fewest_misses(accesses, slots, bypass), (slots, accesses)


@pytest.mark.parametrize("name", ["belady", "belady-forced"])
def test_belady_in_the_core_does_what_it_does_alone(name: str) -> None:
    """Staging, waves and all; and no online policy hits more."""
    for slots, accesses in tiny_traces(60, seed=2):
        staging = 4 if name == "belady" else 0
        alone: EvictionPolicy = make_policy(name, 2, 4, slots + staging)
        expected = sum(len(step.hits) for step in Cache(alone, slots, staging).run(accesses))
        core = Residency([TierConfig(slots + staging, name, staging=staging)], 2, 4)
        prepare(core._top.policy, accesses)
        hits = 0
        for access in accesses:
            ticket = core.acquire(access)
            hits += len(ticket.ready)
            while not ticket.done:
                for copy in core.take():
                    core.completed(copy.id)
                while ticket.ready:
                    core.release(ticket, ticket.ready.popleft())
            core.check()
        assert hits == expected
        online = Cache(make_policy("lru", 2, 4, slots), slots)
        assert sum(len(step.hits) for step in online.run(accesses)) <= hits


# -- what must be shown a trace, and parameters -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("static", r"call fit\(accesses\) with a profiling trace"),
        ("belady", r"'belady' needs the future: call foresee\(accesses\)"),
        ("belady-forced", r"'belady-forced' needs the future"),
    ],
)
def test_policies_that_were_shown_nothing_say_so(name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_policy(name, 1, 2, 2).on_access(Access(1, 0, (ExpertKey(0, 0),)))


def test_oracles_are_marked_offline() -> None:
    assert {name for name, policy in POLICIES.items() if getattr(policy, "offline", False)} == {
        "belady",
        "belady-forced",
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("slru(protected=1.5)", "protected must be between 0 and 1, got 1.5"),
        ("mrs(alpha=1)", "alpha must be greater than 0 and less than 1"),
        ("ebco(decay=0)", "decay must be greater than 0"),
        ("watermark(marks=guessed)", "marks must be exact or subgradient, got 'guessed'"),
        ("watermark(hysteresis=-1)", "hysteresis must be between 0 and inf"),
        ("dali(window=0)", "window must be between 1"),
        ("activation-matrix(library=0)", "library must be between 1"),
        ("fifo(size=3)", "policy 'fifo' has no parameter 'size'; it has no parameters"),
    ],
)
def test_parameters_that_make_no_sense(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_policy(text, 2, 4, 4)
