"""Statistics of traces, against brute force and against traces whose answer is known."""

from __future__ import annotations

import json
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetier.access import Phase
from moetier.errors import ConfigError
from moetier.trace import Trace
from moetier.trace.locality import co_occurrence, layer_cache_hits, sample, segment_cache_hits, segment_routing
from moetier.trace.stats import (
    demand_of,
    overlap_of,
    reuse_of,
    skew_of,
    smaller_before,
    stack_distances,
    union_of_streams,
    working_set,
)
from moetier.trace.summary import summarise
from moetier.trace.synthetic import environments, uniform_control, zipf_markov

QUICK = settings(derandomize=True, deadline=None, max_examples=80)


def trace_of(experts: Any, num_experts: int, sequence: Any = None, step: Any = None) -> Trace:
    array = np.array(experts, dtype=np.int16)
    tokens = len(array)
    return Trace(
        experts=array,
        num_experts=num_experts,
        sequence=np.array(sequence if sequence is not None else [0] * tokens, dtype=np.int32),
        step=np.array(step if step is not None else range(tokens), dtype=np.int64),
        phase=np.full(tokens, Phase.DECODE, dtype=np.uint8),
    )


@QUICK
@given(st.permutations(list(range(17))).map(lambda values: values[:13]))
def test_smaller_before(values: list[int]) -> None:
    ranks = np.argsort(np.argsort(values))
    expected = [sum(other < value for other in values[:index]) for index, value in enumerate(values)]
    assert smaller_before(ranks).tolist() == expected


@QUICK
@given(st.lists(st.integers(0, 6), max_size=60))
def test_stack_distances(records: list[int]) -> None:
    stack: OrderedDict[int, None] = OrderedDict()
    expected = []
    for record in records:
        expected.append(list(reversed(stack)).index(record) if record in stack else -1)
        stack[record] = None
        stack.move_to_end(record)
    assert stack_distances(np.array(records, dtype=np.int64)).tolist() == expected


def test_skew_of_known_usage() -> None:
    even = skew_of(trace_of([[[e]] for e in range(8)] * 3, 8))
    assert even.gini == pytest.approx([0]) and even.entropy == pytest.approx([1]) and even.top_half == [0.5]
    assert even.zipf == pytest.approx([0]) and even.unused == [0]
    one = skew_of(trace_of([[[5]]] * 9, 8))
    assert one.gini == pytest.approx([7 / 8]) and one.entropy == [0] and one.top_half == [1] and one.unused == [7]
    zipf = skew_of(zipf_markov(60_000, 1, 16, 1, skew=1.2, topic_skew=0, topics=1, persistence=0))
    assert zipf.zipf[0] == pytest.approx(1.2, abs=0.08)


def test_overlap_of_known_tokens() -> None:
    overlap = overlap_of(trace_of([[[0, 1]], [[1, 2]], [[5, 6]], [[6, 5]]], 8, sequence=[0, 0, 1, 1]))
    assert overlap.consecutive == [3 / 4], "not across sequences"
    even = overlap_of(uniform_control(4000, 1, 16, 4))
    assert even.consecutive[0] == pytest.approx(4 / 16, abs=0.01) and even.chance[0] == pytest.approx(4 / 16, abs=0.01)
    sparse = overlap_of(trace_of([[[0, -1]], [[0, -1]], [[1, -1]]], 8))
    assert sparse.consecutive == [0.5], "what is not there is not shared"


def test_demand() -> None:
    demand = demand_of(trace_of([[[0, 1]], [[1, 2]], [[3, 4]]], 8, step=[0, 0, 1]))
    assert (demand.records_per_token, demand.per_access, demand.accesses, demand.needs) == (2, 2.5, 2, 5)
    shares = union_of_streams(environments(50, 2, 8, 2, batch=20))
    assert list(shares) == [1, 2, 4, 8, 16] and shares[1] == 2 / 8
    assert list(shares.values()) == sorted(shares.values())
    assert list(union_of_streams(trace_of([[[0]]], 4))) == [1]


@QUICK
@given(seed=st.integers(0, 1000), share=st.sampled_from([10, 30, 50, 80]))
def test_lru_from_distances_is_lru(seed: int, share: int) -> None:
    trace = zipf_markov(60, 3, 8, 2, sequences=3, prompt=5, seed=seed)
    slots, hits, needs = share * trace.records // 100, 0, 0
    cache: OrderedDict[Any, None] = OrderedDict()
    for access in trace.accesses():
        for key in access.keys:
            needs += 1
            hits += key in cache
            cache[key] = None
            cache.move_to_end(key)
            if len(cache) > slots:
                cache.popitem(last=False)
    assert reuse_of(trace, (share,)).lru[share] == pytest.approx(hits / needs)


def test_reuse_of_a_loop() -> None:
    """One expert per layer, always the same: every layer comes back after one step, and after all other records."""
    reuse = reuse_of(trace_of([[[1], [2], [3]]] * 50, 8))
    assert set(reuse.steps.values()) == {1} and set(reuse.records.values()) == {2}
    assert reuse.first == pytest.approx(3 / 150)
    cliff = reuse_of(trace_of([[[token % 4], [token % 4]] for token in range(80)], 4), (75, 100)).lru
    assert cliff == {75: 0, 100: pytest.approx(152 / 160)}


def test_working_set() -> None:
    trace = trace_of([[[token % 4]] for token in range(8)] + [[[0]]] * 4, 8, sequence=[0] * 8 + [1] * 4)
    assert working_set(trace) == {1: 1 / 8, 2: (4 * 2 + 2 * 1) / 6 / 8, 4: (4 + 4 + 1) / 3 / 8, 8: 4 / 8}


def test_sample_is_even_and_whole() -> None:
    trace = zipf_markov(1000, 1, 8, 2, sequences=10)
    part = sample(trace, 300)
    assert part.tokens == 300 and part.sequences() == [0, 3, 6]
    assert sample(trace, 5000).tokens == 1000
    assert sample(trace, 7).tokens == 7


def srp_by_hand(trace: Trace, length: int) -> float:
    """The definition, one threshold, segment and expert at a time."""
    best = 0.0
    for alpha in range(length + 1):
        matches = predicted = active = 0
        for sequence in trace.sequences():
            tokens = trace.experts[trace.sequence == sequence]
            for begin in range(len(tokens) - length + 1):
                for layer in range(trace.layers):
                    for expert in range(trace.num_experts):
                        uses = int((tokens[begin : begin + length, layer] == expert).any(axis=1).sum())
                        active += uses
                        if uses >= alpha:
                            matches += uses
                            predicted += length
        best = max(best, 2 * matches / (predicted + active))
    return best


def test_segment_routing() -> None:
    trace = zipf_markov(60, 2, 6, 2, sequences=3)
    for length in (1, 3, 8):
        assert segment_routing(trace, length) == pytest.approx(srp_by_hand(trace, length))
    assert segment_routing(trace, 1) == 1, "a token keeps to its own experts"
    assert segment_routing(trace, 21) is None
    assert segment_routing(trace_of([[[1, 2]]] * 9, 8), 4) == 1


def caches_by_hand(trace: Trace, size: int, lookahead: int) -> float:
    hits = needs = 0
    for sequence in trace.sequences():
        tokens = trace.experts[trace.sequence == sequence]
        for layer in range(trace.layers):
            cache: dict[int, int] = {}  # expert -> last use
            for now, chosen in enumerate(tokens[:, layer].tolist()):
                needs += len(chosen)
                missing = [expert for expert in chosen if expert not in cache]
                hits += len(chosen) - max(0, len(missing) - (size - len(cache)))
                cache |= dict.fromkeys(chosen, now)
                ahead = tokens[now + 1 : now + 1 + lookahead, layer]
                victims = sorted(
                    (expert for expert in cache if expert not in chosen),
                    key=lambda expert: ((ahead == expert).sum(), cache[expert]),
                )
                while len(cache) > size:
                    del cache[victims.pop(0)]
    return hits / needs


@settings(derandomize=True, deadline=None, max_examples=25)
@given(seed=st.integers(0, 1000), size=st.sampled_from([2, 3, 4, 6]), lookahead=st.sampled_from([0, 1, 5]))
def test_segment_cache_hits(seed: int, size: int, lookahead: int) -> None:
    """Ties between experts used in the same token are broken either way, so experts come one per token here too."""
    trace = zipf_markov(60, 2, 8, 1, sequences=2, seed=seed)
    expected = caches_by_hand(trace, size, lookahead)
    assert segment_cache_hits(trace, size, lookahead) == pytest.approx(expected)


def test_caches_of_known_hit_rates() -> None:
    loop = trace_of([[[token % 4]] for token in range(400)], 8)
    assert layer_cache_hits(loop, 3) < 0.02, "LRU on a loop that is one too long"
    assert layer_cache_hits(loop, 4) == 1, "filling an empty cache is free"
    assert segment_cache_hits(loop, 3, 2) > 0.6, "knowing the future"
    random = uniform_control(3000, 2, 16, 4)
    assert layer_cache_hits(random, 2) == pytest.approx(0.5, abs=0.02), "slots over experts"
    both = [segment_cache_hits(zipf_markov(800, 2, 32, 4), ratio, 16) for ratio in (1, 2, 3)]
    assert both == sorted(both)


def test_co_occurrence_needs_a_tie_between_experts() -> None:
    independent = co_occurrence(zipf_markov(8000, 3, 16, 3, topics=1, topic_skew=0, persistence=0, skew=1.0))
    for value in independent.values():
        assert value is not None
        assert value.over_all == pytest.approx(1, abs=0.05) and value.within == pytest.approx(1, abs=0.05)
    topics = co_occurrence(zipf_markov(8000, 3, 16, 3, topics=8, stay=1, persistence=0, skew=0, topic_skew=2))
    for value in topics.values():
        assert value is not None and value.over_all > 1.3 and value.within == pytest.approx(1, abs=0.08)
    rng = np.random.default_rng(0)
    first = rng.integers(0, 8, 4000)
    tied = co_occurrence(trace_of(np.stack([first, (first + 3) % 8], axis=1)[:, :, None], 8))
    assert tied["same_layer"] is None
    cross = tied["next_layer"]
    assert cross is not None and cross.within == pytest.approx(8, rel=0.1)
    assert co_occurrence(trace_of([[[0, 1]]] * 5, 4))["next_layer"] is None


@pytest.mark.parametrize(
    ("trace", "answer"),
    [
        (zipf_markov(600, 3, 64, 4, sequences=2, persistence=0.7), "yes"),
        (zipf_markov(600, 3, 32, 4, sequences=2, persistence=0.0, skew=0.8, topic_skew=0.5), "partly"),
        (uniform_control(600, 3, 32, 4, sequences=2), "no"),
        (environments(30, 3, 8, 2, batch=32, envs_per_batch=8), "saturated"),
    ],
    ids=["yes", "partly", "no", "saturated"],
)
def test_the_verdict(trace: Trace, answer: str) -> None:
    summary = summarise(trace, tokens=600)
    assert summary["verdict"]["answer"] == answer
    assert json.loads(json.dumps(summary))["verdict"]["sentences"]
    cliff = f"fewer slots than {trace.layers * trace.top_k}"
    assert any(cliff in sentence for sentence in summary["verdict"]["sentences"])


def test_small_and_odd_traces_have_a_summary() -> None:
    for trace in (trace_of([[[0]]], 1), trace_of([[[0, -1], [1, 2]]] * 3, 3), trace_of([[[0, 1]]] * 5, 2)):
        json.dumps(summarise(trace))
    with pytest.raises(ConfigError, match="no tokens"):
        summarise(trace_of(np.empty((0, 1, 1)), 4))
