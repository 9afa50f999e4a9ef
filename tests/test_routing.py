"""The rules by which experts are chosen again or dropped: against plain Python, by hand, and what always holds."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moetier.interception import Scale
from moetier.routing import (
    cold_misses,
    logits_of,
    order_of,
    prefer_residents,
    prefer_within_rank,
    score_range,
    settle,
    without,
)

quick = settings(derandomize=True, deadline=None, max_examples=150)
INF = float("inf")


# -- plain Python ------------------------------------------------------------------------------------------------------


def scores(*rows: list[float]) -> Any:
    return np.array(rows, dtype=np.float32)


def order(z: Any, own: set[int]) -> list[int]:
    """Best first; the router's own choices win ties."""
    return sorted(range(len(z)), key=lambda e: (e not in own, -z[e], e))


def prior_of_one(z: Any, own: set[int], held: Any, bonus: float, keep: int) -> set[int]:
    ranks = order(z, own)
    biased = (np.asarray(z, np.float32) + np.float32(bonus) * np.asarray(held, np.float32)).tolist()
    rest = sorted(ranks[keep:], key=lambda e: (-biased[e], ranks.index(e)))
    return {*ranks[:keep], *rest[: len(own) - keep]}


def rank_of_one(z: Any, own: set[int], held: Any, keep: int, max_rank: int) -> set[int]:
    ranks = order(z, own)
    first = ranks[:keep] + [e for e in ranks[keep:max_rank] if held[e] and z[e] > -INF]
    return set((first + [e for e in ranks if e not in first])[: len(own)])


@st.composite
def routings(draw: Any) -> dict[str, Any]:
    """Scores with ties and forbidden experts, the router's choice, residents, how many to keep."""
    tokens, experts = draw(st.integers(1, 3)), draw(st.integers(2, 10))
    top_k = draw(st.integers(1, experts))
    score = st.sampled_from([-2.0, -1.0, 0.5, 0.75, 1.0, 3.0])
    rows = [draw(st.lists(score, min_size=experts, max_size=experts)) for _ in range(tokens)]
    z = torch.tensor(rows)
    own = z.topk(top_k, dim=1).indices
    forbidden = torch.tensor(draw(st.lists(st.booleans(), min_size=experts, max_size=experts)))
    z = z.masked_fill(forbidden & ~torch.zeros_like(z, dtype=torch.bool).scatter_(1, own, True), -INF)
    held = torch.tensor(draw(st.lists(st.booleans(), min_size=experts, max_size=experts)))
    arrays = {"z": z.numpy(), "own": own.numpy(), "held": held.numpy()}
    return {**arrays, "keep": draw(st.integers(0, top_k)), "top_k": top_k}


def sets(index: Any) -> list[set[int]]:
    return [set(row) for row in index.tolist()]


# -- choosing again ----------------------------------------------------------------------------------------------------


@quick
@given(routings(), st.floats(0, 5, width=32))
def test_cache_prior_is_the_papers_rule(case: dict[str, Any], bonus: float) -> None:
    z, own, held, keep = case["z"], case["own"], case["held"], case["keep"]
    chosen = prefer_residents(z, own, held, bonus, keep)
    expected = [prior_of_one(*row, held.tolist(), bonus, keep) for row in zip(z.tolist(), sets(own), strict=True)]
    assert sets(chosen) == expected


@quick
@given(routings(), st.integers(0, 10))
def test_max_rank_is_its_rule(case: dict[str, Any], extra: int) -> None:
    z, own, held, keep = case["z"], case["own"], case["held"], case["keep"]
    max_rank = min(case["top_k"] + extra, z.shape[1])
    chosen = prefer_within_rank(z, own, held, keep, max_rank)
    assert sets(chosen) == [
        rank_of_one(*row, held.tolist(), keep, max_rank) for row in zip(z.tolist(), sets(own), strict=True)
    ]
    if max_rank == case["top_k"]:
        assert sets(chosen) == sets(own)


@quick
@given(routings(), st.lists(st.floats(0, 8, width=32), min_size=2, max_size=5))
def test_what_always_holds(case: dict[str, Any], strengths: list[float]) -> None:
    z, own, held, keep, top_k = (case[name] for name in ("z", "own", "held", "keep", "top_k"))
    best = sets(order_of(z, own)[:, :keep])
    counts = []
    for bonus in sorted(strengths):
        chosen = prefer_residents(z, own, held, bonus, keep)
        assert all(len(row) == top_k for row in sets(chosen))  # K distinct experts
        assert all(kept <= row for kept, row in zip(best, sets(chosen), strict=True))
        counts.append(held[chosen].sum(axis=1))
        final, new = settle(z, own, chosen)
        assert sets(final) == sets(chosen) and np.isfinite(np.take_along_axis(z, final, axis=1)).all()
        for before, after, count in zip(own, final, new.tolist(), strict=True):
            assert len(set(after.tolist()) - set(before.tolist())) == count
            assert count or (before == after).all()
            assert all(held[e] for e in set(after.tolist()) - set(before.tolist()))  # never another miss
    for weaker, stronger in pairwise(counts):
        assert (weaker <= stronger).all()  # monotone: more residents for more λ
    assert sets(prefer_residents(z, own, held, 0.0, keep)) == sets(own)
    assert sets(prefer_residents(z, own, held, 9.0, top_k)) == sets(own)


def test_cache_prior_by_hand() -> None:
    z, held = scores([5.0, 4.0, 3.0, 2.0, 1.0]), np.array([False, False, False, True, True])
    own = np.array([[0, 1]])
    for bonus, keep, expected in (
        (1.9, 1, {0, 1}),
        (2.0, 1, {0, 1}),  # a tie is the router's
        (2.1, 1, {0, 3}),
        (4.5, 1, {0, 3}),
        (4.5, 0, {3, 4}),
        (4.5, 2, {0, 1}),
    ):
        assert sets(prefer_residents(z, own, held, bonus, keep)) == [expected]


def test_max_rank_and_mass_by_hand() -> None:
    shares = scores([0.4, 0.3, 0.15, 0.1, 0.05])
    held, own = np.array([False, False, False, True, True]), np.array([[0, 1]])
    for rank, mass, expected in (
        (2, None, {0, 1}),
        (3, None, {0, 1}),
        (4, None, {0, 3}),
        (5, None, {0, 3}),
        (5, 0.85, {0, 1}),  # 0.85 is ranked before expert 3
        (5, 0.86, {0, 3}),
        (3, 0.99, {0, 1}),
    ):
        for z, scale in ((np.log(shares) + 7, Scale.LOGITS), (shares * 3, Scale.SCORES)):
            assert sets(prefer_within_rank(z, own, held, 1, rank, mass, scale)) == [expected], (rank, mass)
    assert sets(prefer_within_rank(np.log(shares), own, held, 0, 5)) == [{3, 4}]


def test_a_new_choice_is_ordered_by_score() -> None:
    z, own = scores([1.0, 4.0, 3.0, 2.0], [1.0, 4.0, 3.0, 2.0]), np.array([[2, 1], [2, 1]])
    final, new = settle(z, own, np.array([[1, 2], [3, 1]]))
    assert final.tolist() == [[2, 1], [1, 3]] and new.tolist() == [0, 1]


def test_logits_come_back_from_probabilities() -> None:
    logits, own = scores([2.0, -1.0, 0.5, 3.0]), np.array([[3, 0]])
    probabilities = np.exp(logits) / np.exp(logits).sum()
    z = logits_of(probabilities, own, Scale.PROBABILITIES)
    assert np.allclose(z - z[:, :1], logits - logits[:, :1], atol=1e-6)
    assert np.array_equal(logits_of(logits, own, Scale.LOGITS), logits)
    assert score_range(z).tolist() == pytest.approx([4.0], abs=1e-6)


def test_masked_experts_stay_out() -> None:
    own = np.array([[0, 1]])
    for ranked, scale in (
        (scores([0.5, 0.25, 0.0, 0.0]), Scale.PROBABILITIES),
        (scores([0.5, 0.25, -INF, -INF]), Scale.SCORES),
        (scores([0.5, 0.25, 0.0, 0.0]), Scale.SCORES),
    ):
        z = logits_of(ranked, own, scale)
        assert z[0, 2:].tolist() == [-INF, -INF] and math.isfinite(float(score_range(z)[0]))
        held = np.array([False, False, True, True])
        assert sets(prefer_residents(z, own, held, 100.0, 0)) == [{0, 1}]
        assert sets(prefer_within_rank(z, own, held, 0, 4)) == [{0, 1}]
    z = logits_of(scores([0.5, 0.0, 0.0, 0.0]), own, Scale.PROBABILITIES)  # chosen though masked
    assert sets(prefer_residents(z, own, np.ones(4, dtype=np.bool_), 1.0, 1)) == [{0, 1}]


# -- dropping ----------------------------------------------------------------------------------------------------------


def test_cold_misses_by_hand() -> None:
    index = np.array([[0, 1, 2, 3]])
    weights = scores([0.5, 0.2, 0.2, 0.1])
    nothing, some = np.zeros(5, dtype=np.bool_), np.array([False, False, True, False, False])
    for share, held, expected in (
        (0.39, nothing, [0, 0, 0, 0]),  # an even weight is 0.25
        (0.5, nothing, [0, 0, 0, 1]),
        (0.79, nothing, [0, 0, 0, 1]),
        (0.81, nothing, [0, 1, 1, 1]),
        (0.81, some, [0, 1, 0, 1]),
        (4.0, nothing, [0, 1, 1, 1]),  # the best never
    ):
        for scale in (1.0, 2.5):  # a scaled router is the same router
            assert cold_misses(index, weights * np.float32(scale), held, share).astype(int).tolist() == [expected]


def test_an_expert_that_one_token_needs_is_loaded_for_all() -> None:
    index = np.array([[0, 1], [1, 2], [3, 2]])
    weights = scores([0.9, 0.1], [0.6, 0.4], [0.95, 0.05])
    nothing = np.zeros(4, dtype=np.bool_)
    dropped = cold_misses(index, weights, nothing, 0.9)
    assert dropped.astype(int).tolist() == [[0, 0], [0, 1], [0, 1]]  # 1 is the best of the second token
    assert not cold_misses(index, weights, nothing, 0.7).any()  # 2 has 0.4 there


@quick
@given(st.integers(0, 10_000), st.floats(0, 1))
def test_dropping_keeps_all_that_weighs(seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    index = rng.random((4, 6)).argsort(axis=1)[:, :3]
    weights, held = rng.random((4, 3)).astype(np.float32), rng.random(6) < 0.4
    dropped = cold_misses(index, weights, held, share)
    assert not (dropped & held[index]).any() and (dropped.sum(axis=1) < 3).all()
    assert not dropped[np.arange(4), weights.argmax(axis=1)].any()
    shares = weights / weights.sum(axis=1, keepdims=True)
    assert (shares[dropped] < share / 3 + 1e-6).all()
    kept, columns, empty = without(index, weights, dropped)
    given_weights = np.where(empty, 0, np.take_along_axis(weights, columns, axis=1))
    for token in range(4):
        served = [(int(e), float(w)) for e, w in zip(kept[token], given_weights[token], strict=True) if w]
        pairs = zip(index[token], weights[token], dropped[token], strict=True)
        assert served == [(int(e), float(w)) for e, w, gone in pairs if not gone]
        assert set(kept[token].tolist()) <= {e for e, _ in served}  # nothing else is asked for
    assert kept.shape[1] == int((~dropped).sum(axis=1).max())
