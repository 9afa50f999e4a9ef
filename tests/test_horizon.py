"""Horizon against a literal definition in plain Python, and the fit of its weights."""

from __future__ import annotations

import json
import math
import random
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetier.access import Access, ExpertKey
from moetier.errors import ConfigError
from moetier.policies import hazard, make_policy
from moetier.policies.hazard import HazardWeights
from moetier.policies.horizon import WEIGHTS, Horizon
from moetier.tuning import collect, fit_hazard, log_loss

pytestmark = pytest.mark.timeout(60)

Visits = list[tuple[int, set[int]]]


def access(time: int, layer: int, experts: set[int]) -> Access:
    return Access(time, layer, tuple(ExpertKey(layer, expert) for expert in sorted(experts)))


# -- the definition ---------------------------------------------------------------------------------------------------


def distances(visits: Visits, layers: int, experts: int) -> dict[ExpertKey, float]:
    """Expected distance to the next use after these visits, from the words of the docstrings."""
    passes: list[dict[int, set[int]]] = [{}]
    before = 0
    for layer, chosen in visits:
        if layer <= before:
            passes.append({})
        passes[-1][layer] = chosen
        before = layer
    here = visits[-1][0]
    result = {}
    for layer in range(layers):
        until = (layer - here - 1) % layers + 1
        mine = [index for index, past in enumerate(passes) if layer in past]
        for expert in range(experts):
            wasted = expected_in_vain(passes, mine, layer, expert, layers, experts) if mine else 4.0
            result[ExpertKey(layer, expert)] = until / layers + wasted
    return result


def expected_in_vain(
    passes: list[dict[int, set[int]]], mine: list[int], layer: int, expert: int, layers: int, experts: int
) -> float:
    present = mine[-1]
    features = []
    for half_life in (2, 8, 32, 128):
        keep = 0.5 ** (1 / half_life)
        average = len(passes[mine[0]][layer]) / experts
        for index in mine:
            average = keep * average + (1 - keep) * (expert in passes[index][layer])
        features.append(average)
    used = sum(expert in passes[index][layer] for index in mine)
    frequency = (used + len(passes[present][layer]) / experts) / (len(mine) + 1)
    features.append(frequency)

    def weight(past: int) -> float:
        age = present - past
        if past < 0 or age > hazard.MEMORY:
            return 0.0
        alike = 0.0
        for then, now in [(m, n) for n in range(present + 1) for m in [n - age] if m >= 0]:
            for at in range(layers):
                if (now, at) <= (present, layer) and at in passes[now]:
                    a, b = passes[now][at], passes[then].get(at, set())
                    alike = 0.85 * alike + 0.15 * len(a & b) / max(len(a), len(b))
        return math.exp(14 * (alike - 0.45)) * 0.998**age

    def wanted(index: int) -> bool:
        return expert in passes[index].get(layer, set())

    for lags, share in (((1,), 1.0), ((2, 3, 4), 1 / 3)):
        weights = {then: share * sum(weight(then - lag) for lag in lags) for then in range(present + 1)}
        hits = sum(w for then, w in weights.items() if wanted(then))
        features.append((hits + frequency) / (sum(weights.values()) + 1))
    chances = [min(max(feature, 1e-3), 1 - 1e-3) for feature in features]
    inputs = [math.log(chance / (1 - chance)) for chance in chances] + [1.0]
    miss, later = (
        1 / (1 + math.exp(sum(w * x for w, x in zip(row, inputs, strict=True))))
        for row in (WEIGHTS.next, WEIGHTS.later)
    )
    return miss * (1 + later + later**2 + later**3)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.sets(st.integers(0, 4), min_size=1)),
        min_size=1,
        max_size=30,
    )
)
def test_evicts_the_largest_expected_distance(visits: Visits) -> None:
    policy = Horizon(3, 5, 15)
    for layer in range(3):
        for expert in range(5):
            policy.on_insert(ExpertKey(layer, expert), Access(0, 0, ()))
    for time, (layer, chosen) in enumerate(visits, 1):
        policy.on_access(access(time, layer, chosen))
    ranking = list(policy.victims(access(len(visits), *visits[-1])))
    expected = distances(visits, 3, 5)
    assert sorted(ranking) == sorted(expected)
    found = [expected[key] for key in ranking]
    assert all(a >= b - 1e-4 for a, b in pairwise(found)), found


def test_what_is_older_than_the_memory_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hazard, "MEMORY", 4)
    policy, visits = Horizon(2, 16, 32), []
    for layer in range(2):
        for expert in range(16):
            policy.on_insert(ExpertKey(layer, expert), Access(0, 0, ()))
    for chosen in tokens(24, seed=3):
        for layer in range(2):
            visits.append((layer, chosen[layer]))
            now = access(len(visits), *visits[-1])
            policy.on_access(now)
            expected = distances(visits, 2, 16)
            found = [expected[key] for key in policy.victims(now)]
            assert all(a >= b - 1e-4 for a, b in pairwise(found)), found


# -- routing that has something to learn ------------------------------------------------------------------------------


def tokens(count: int, seed: int) -> list[list[set[int]]]:
    """Two layers x 16 experts, top-2: words with experts of their own, of which each document uses its few."""
    source = random.Random(seed)
    routes = [[set(source.sample(range(16), 2)) for _ in range(2)] for _ in range(40)]
    text: list[list[set[int]]] = []
    while len(text) < count:
        words = source.sample(range(40), 6)
        phrase = [source.choice(words) for _ in range(12)]
        text += [routes[source.choice(words) if source.random() < 0.3 else word] for _ in range(6) for word in phrase]
    return text[:count]


def accesses_of(text: list[list[set[int]]]) -> list[Access]:
    return [
        access(2 * token + layer + 1, layer, chosen)
        for token, layers in enumerate(text)
        for layer, chosen in enumerate(layers)
    ]


def hits(name: str, accesses: list[Access], slots: int = 12, **parameters: HazardWeights | str) -> int:
    policy = Horizon(2, 16, slots, **parameters) if name == "horizon" else make_policy(name, 2, 16, slots)
    resident: set[ExpertKey] = set()
    count = 0
    for now in accesses:
        policy.on_access(now)
        for key in now.keys:
            if key in resident:
                policy.on_hit(key, now)
        missing = [key for key in now.keys if key not in resident]
        count += len(now.keys) - len(missing)
        need = max(0, len(missing) + len(resident) - slots)
        for key in [key for key in policy.victims(now) if key not in now.keys][:need]:
            policy.on_remove(key)
            resident.remove(key)
        for key in missing:
            policy.on_insert(key, now)
            resident.add(key)
    return count


def test_beats_lru_and_lfu_and_is_deterministic() -> None:
    accesses = accesses_of(tokens(600, seed=1))
    ours = hits("horizon", accesses)
    assert ours > 1.05 * max(hits("lru", accesses), hits("lfu", accesses))
    assert ours == hits("horizon", accesses)


def test_fit_predicts_better_than_the_default_and_repeats() -> None:
    accesses = accesses_of(tokens(2400, seed=1))
    weights = fit_hazard(accesses, 2, 16, share=0.5)
    assert weights == fit_hazard(accesses, 2, 16, share=0.5)
    unseen = collect(accesses_of(tokens(2400, seed=1))[2400:], 2, 16, share=0.5, seed=7)
    fitted, shipped = log_loss(weights, unseen), log_loss(WEIGHTS, unseen)
    assert fitted[0] < shipped[0] and fitted[1] < shipped[1]
    assert hits("horizon", accesses, weights=weights) > 0.98 * hits("horizon", accesses)


def test_fit_refuses_too_little_routing() -> None:
    with pytest.raises(ConfigError, match="too little routing to fit: 0 examples; record a longer trace"):
        fit_hazard(accesses_of(tokens(20, seed=1)), 2, 16)
    with pytest.raises(ConfigError, match="does not fit 1 layers x 16 experts"):
        fit_hazard(accesses_of(tokens(20, seed=1)), 1, 16)


# -- files of weights -------------------------------------------------------------------------------------------------


def test_weights_survive_a_file(tmp_path: Path) -> None:
    path = tmp_path / "weights.json"
    WEIGHTS.save(path)
    assert HazardWeights.load(path) == WEIGHTS
    accesses = accesses_of(tokens(100, seed=1))
    assert hits("horizon", accesses, weights=str(path)) == hits("horizon", accesses)
    assert isinstance(make_policy(f"horizon(weights={path})", 2, 16, 4), Horizon)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (None, "not a file of hazard weights"),
        ("{", "not a file of hazard weights"),
        ("[]", "not a file of hazard weights"),
        ('{"next": [1.0]}', "not a file of hazard weights"),
        (json.dumps({"features": list(hazard.FEATURES), "next": [1.0], "later": [1.0]}), "must be 8 finite numbers"),
        (json.dumps({"features": ["age"], "next": [1.0] * 8, "later": [1.0] * 8}), "must be 8 finite numbers"),
        (
            json.dumps({"features": list(hazard.FEATURES), "next": [math.nan] * 8, "later": [1.0] * 8}),
            "must be 8 finite numbers",
        ),
    ],
)
def test_bad_files_of_weights_are_named(tmp_path: Path, text: str | None, complaint: str) -> None:
    path = tmp_path / "weights.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=complaint) as caught:
        Horizon(2, 16, 4, weights=path)
    assert str(path) in str(caught.value)
