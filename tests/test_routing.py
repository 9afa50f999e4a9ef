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
    return {"z": z, "own": own, "held": held, "keep": draw(st.integers(0, top_k)), "top_k": top_k}


def sets(index: torch.Tensor) -> list[set[int]]:
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
        counts.append(held[chosen].sum(dim=1))
        final, new = settle(z, own, chosen)
        assert sets(final) == sets(chosen) and torch.isfinite(z.gather(1, final)).all()
        for before, after, count in zip(own, final, new.tolist(), strict=True):
            assert len(set(after.tolist()) - set(before.tolist())) == count
            assert count or torch.equal(before, after)
            assert all(held[e] for e in set(after.tolist()) - set(before.tolist()))  # never another miss
    for weaker, stronger in pairwise(counts):
        assert (weaker <= stronger).all()  # monotone: more residents for more λ
    assert sets(prefer_residents(z, own, held, 0.0, keep)) == sets(own)
    assert sets(prefer_residents(z, own, held, 9.0, top_k)) == sets(own)


def test_cache_prior_by_hand() -> None:
    z, held = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0]]), torch.tensor([False, False, False, True, True])
    own = torch.tensor([[0, 1]])
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
    shares = torch.tensor([[0.4, 0.3, 0.15, 0.1, 0.05]])
    held, own = torch.tensor([False, False, False, True, True]), torch.tensor([[0, 1]])
    for rank, mass, expected in (
        (2, None, {0, 1}),
        (3, None, {0, 1}),
        (4, None, {0, 3}),
        (5, None, {0, 3}),
        (5, 0.85, {0, 1}),  # 0.85 is ranked before expert 3
        (5, 0.86, {0, 3}),
        (3, 0.99, {0, 1}),
    ):
        for z, scale in ((shares.log() + 7, Scale.LOGITS), (shares * 3, Scale.SCORES)):
            assert sets(prefer_within_rank(z, own, held, 1, rank, mass, scale)) == [expected], (rank, mass)
    assert sets(prefer_within_rank(shares.log(), own, held, 0, 5)) == [{3, 4}]


def test_a_new_choice_is_ordered_by_score() -> None:
    z, own = torch.tensor([[1.0, 4.0, 3.0, 2.0]] * 2), torch.tensor([[2, 1], [2, 1]])
    final, new = settle(z, own, torch.tensor([[1, 2], [3, 1]]))
    assert final.tolist() == [[2, 1], [1, 3]] and new.tolist() == [0, 1]


def test_logits_come_back_from_probabilities() -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5, 3.0]])
    own = torch.tensor([[3, 0]])
    z = logits_of(logits.softmax(dim=1), own, Scale.PROBABILITIES)
    assert torch.allclose(z - z[:, :1], logits - logits[:, :1], atol=1e-6)
    assert torch.equal(logits_of(logits, own, Scale.LOGITS), logits)
    assert score_range(z).tolist() == pytest.approx([4.0], abs=1e-6)


def test_masked_experts_stay_out() -> None:
    own = torch.tensor([[0, 1]])
    for ranked, scale in (
        (torch.tensor([[0.5, 0.25, 0.0, 0.0]]), Scale.PROBABILITIES),
        (torch.tensor([[0.5, 0.25, -INF, -INF]]), Scale.SCORES),
        (torch.tensor([[0.5, 0.25, 0.0, 0.0]]), Scale.SCORES),
    ):
        z = logits_of(ranked, own, scale)
        assert z[0, 2:].tolist() == [-INF, -INF] and math.isfinite(float(score_range(z)))
        held = torch.tensor([False, False, True, True])
        assert sets(prefer_residents(z, own, held, 100.0, 0)) == [{0, 1}]
        assert sets(prefer_within_rank(z, own, held, 0, 4)) == [{0, 1}]
    z = logits_of(torch.tensor([[0.5, 0.0, 0.0, 0.0]]), own, Scale.PROBABILITIES)  # chosen though masked
    assert sets(prefer_residents(z, own, torch.ones(4, dtype=torch.bool), 1.0, 1)) == [{0, 1}]


# -- dropping ----------------------------------------------------------------------------------------------------------


def test_cold_misses_by_hand() -> None:
    index = torch.tensor([[0, 1, 2, 3]])
    weights = torch.tensor([[0.5, 0.2, 0.2, 0.1]])
    nothing, some = torch.zeros(5, dtype=torch.bool), torch.tensor([False, False, True, False, False])
    for share, held, expected in (
        (0.4, nothing, [0, 0, 0, 0]),  # an even weight is 0.25
        (0.5, nothing, [0, 0, 0, 1]),
        (0.79, nothing, [0, 0, 0, 1]),
        (0.81, nothing, [0, 1, 1, 1]),
        (0.81, some, [0, 1, 0, 1]),
        (4.0, nothing, [0, 1, 1, 1]),  # the best never
    ):
        for scale in (1.0, 2.5):  # a scaled router is the same router
            assert cold_misses(index, weights * scale, held, share).int().tolist() == [expected]


def test_an_expert_that_one_token_needs_is_loaded_for_all() -> None:
    index = torch.tensor([[0, 1], [1, 2], [3, 2]])
    weights = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.95, 0.05]])
    dropped = cold_misses(index, weights, torch.zeros(4, dtype=torch.bool), 0.9)
    assert dropped.int().tolist() == [[0, 0], [0, 1], [0, 1]]  # 1 is the best of the second token
    assert cold_misses(index, weights, torch.zeros(4, dtype=torch.bool), 0.7).sum() == 0  # 2 has 0.4 there


@quick
@given(st.integers(0, 10_000), st.floats(0, 1))
def test_dropping_keeps_all_that_weighs(seed: int, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    index = torch.rand(4, 6, generator=generator).topk(3, dim=1).indices
    weights = torch.rand(4, 3, generator=generator).double()
    held = torch.rand(6, generator=generator) < 0.4
    dropped = cold_misses(index, weights, held, share)
    assert not (dropped & held[index]).any() and (dropped.sum(dim=1) < 3).all()
    shares = weights / weights.sum(dim=1, keepdim=True)
    assert (shares[dropped] < share / 3 + 1e-6).all()
    kept_index, kept = without(index, weights, dropped)
    for token in range(4):
        served = [(int(e), float(w)) for e, w in zip(kept_index[token], kept[token], strict=True) if w]
        pairs = zip(index[token], weights[token], dropped[token], strict=True)
        assert served == [(int(e), float(w)) for e, w, gone in pairs if not gone]
        assert set(kept_index[token].tolist()) <= {e for e, _ in served}  # nothing else is asked for
    assert kept.shape[1] == int((~dropped).sum(dim=1).max())
