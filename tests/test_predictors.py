"""Every counting predictor against its definition written out slowly; its odds; the evaluation."""

from __future__ import annotations

from itertools import islice, pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetier import Access, ConfigError, ExpertKey
from moetier.predictors import PREDICTORS, Prediction, make_predictor
from moetier.predictors.evaluate import Evaluation, evaluate_trace
from moetier.predictors.reliability import Reliability, bins_of
from moetier.predictors.scored import ScoredPredictor
from moetier.registry import split_names
from moetier.trace import Trace
from routing import EXPERTS, LAYERS, TOP_K, random_trace, union_trace

COUNTING = ("previous-token", "layer-transition", "activation-matrix", "mix")


def follow(predictor: Any, accesses: list[Access], slow: Any) -> None:
    """The raw scores equal the slow definition's, after every access and at every distance."""
    for number, access in enumerate(accesses):
        predictor.observe(access)
        for distance in (1, 2, 3):
            target = (access.layer + distance) % LAYERS
            got = predictor.scores(access, target, distance)
            np.testing.assert_allclose(got, slow(accesses[: number + 1], target, distance), atol=1e-6)


def share(access: Access, expert: int) -> float:
    """Tokens that used the expert, over tokens."""
    counts = dict(zip(access.keys, access.tokens, strict=True))
    return counts.get(ExpertKey(access.layer, expert), 0) / max(1, round(sum(access.tokens) / TOP_K))


def union(access: Access, one: float) -> float:
    return 1 - (1 - one) ** max(1, round(sum(access.tokens) / TOP_K))


# -- definitions ------


@pytest.mark.parametrize("make", [lambda: random_trace(1, 30).accesses(), lambda: union_trace(2)])
def test_previous_token_is_the_last_selection_then_activity(make: Any) -> None:
    def slow(past: list[Access], target: int, distance: int) -> list[float]:
        of_layer = [access for access in past if access.layer == target]
        scores = []
        for expert in range(EXPERTS):
            last = bool(of_layer) and share(of_layer[-1], expert) > 0
            keep, average = 0.5 ** (1 / 4), 0.0
            for age, access in enumerate(reversed(of_layer)):
                average += (1 - keep) * keep**age * share(access, expert)
            scores.append(0.5 * last + 0.499 * union(past[-1], average))
        return scores

    follow(make_predictor("previous-token(half_life=4)", LAYERS, EXPERTS, TOP_K), make(), slow)


@pytest.mark.parametrize("half_life", [0, 3])
@pytest.mark.parametrize("make", [lambda: random_trace(3, 25).accesses(), lambda: union_trace(4)])
def test_layer_transition_is_the_mean_of_what_followed(make: Any, half_life: int) -> None:
    keep = 0.5 ** (1 / half_life) if half_life else 1.0

    def slow(past: list[Access], target: int, distance: int) -> list[float]:
        now = past[-1]
        used = [e for e in range(EXPERTS) if share(now, e) > 0]
        marginal = [sum(share(a, e) for a in past if a.layer == target) + 0.5 / EXPERTS for e in range(EXPERTS)]
        expected = [value / (sum(a.layer == target for a in past) + 1) for value in marginal]
        total = sum(share(now, e) for e in used)
        scores = [0.0] * EXPERTS
        for e in used:
            joint, alone = [0.0] * EXPERTS, 0.0
            for before, after in zip(past, past[distance:], strict=False):
                if before.layer != now.layer or before.sequence != after.sequence or share(before, e) == 0:
                    continue
                alone = alone * keep + share(before, e)
                joint = [joint[o] * keep + share(before, e) * share(after, o) for o in range(EXPERTS)]
            for o in range(EXPERTS):
                scores[o] += share(now, e) / total * (joint[o] + expected[o]) / (alone + 1)
        return [union(now, score) for score in scores]

    follow(make_predictor(f"layer-transition(half_life={half_life})", LAYERS, EXPERTS, TOP_K), make(), slow)


@pytest.mark.parametrize("capacity", [1, 2, 10])
def test_activation_matrix_follows_the_sequence_that_is_most_alike(capacity: int) -> None:
    """The paper's intent: compare the rows so far; a full collection loses the least matched."""
    stored: list[list[Any]] = []  # [matrix, matches]
    state: dict[str, Any] = {"current": np.zeros((LAYERS, EXPERTS)), "sequence": 0, "seen": 0}

    def slow(past: list[Access], target: int, distance: int) -> Any:
        now = past[-1]
        if len(past) > state["seen"]:
            state["seen"] = len(past)
            if now.sequence != state["sequence"]:
                if len(stored) < capacity:
                    stored.append([state["current"], 0])
                else:
                    stored[min(range(capacity), key=lambda place: stored[place][1])] = [state["current"], 0]
                state["current"], state["sequence"] = np.zeros((LAYERS, EXPERTS)), now.sequence
            for key in now.keys:
                state["current"][key.layer, key.expert] += 1
        match = state["current"]
        if stored:
            rows = [layer for layer in range(LAYERS) if state["current"][layer].any()]

            def alike(place: int) -> float:
                pairs = [(state["current"][layer], stored[place][0][layer]) for layer in rows]
                return sum(float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in pairs)

            best = max(range(len(stored)), key=lambda place: (round(alike(place), 9), -place))
            stored[best][1] += 1
            match = stored[best][0]
        return TOP_K * match[target] / max(1.0, match[target].sum())

    trace = random_trace(5, tokens=60, sequences=6)
    follow(make_predictor(f"activation-matrix(capacity={capacity})", LAYERS, EXPERTS, TOP_K), trace.accesses(), slow)


def test_activation_matrix_tells_two_kinds_of_text_apart() -> None:
    """The released code would pick one of the stored matrices by chance."""
    tokens, kinds = 80, np.repeat(np.arange(8) % 2, 10)
    experts = np.stack([np.stack([kinds * 3 + layer % 2, kinds * 3 + 2], axis=1) for layer in range(LAYERS)], axis=1)
    sequence = np.repeat(np.arange(8), 10).astype(np.int32)
    trace = Trace(experts.astype(np.int16), EXPERTS, sequence, np.arange(tokens), np.ones(tokens, np.uint8))
    predictor = make_predictor("activation-matrix", LAYERS, EXPERTS, TOP_K)
    for access in trace.accesses():
        predictor.observe(access)
        if access.sequence >= 2 and access.layer < LAYERS - 1:
            named = {prediction.key.expert for prediction in islice(predictor.predict(access), TOP_K)}
            assert named == set(experts[access.sequence * 10, access.layer + 1].tolist())


def test_mix_weighs_the_counts_it_says() -> None:
    predictor: Any = make_predictor("mix", LAYERS, EXPERTS, TOP_K)
    accesses = random_trace(6, 20).accesses()
    for number, access in enumerate(accesses):
        predictor.observe(access)
        target = (access.layer + 1) % LAYERS
        past = accesses[: number + 1]
        of_layer = [a for a in past if a.layer == target]
        features = predictor.features(access, target, 1)
        floor = 0.1 * TOP_K / EXPERTS
        for e in range(EXPERTS):
            uses = [share(a, e) for a in of_layer]
            frequency = (sum(uses) + TOP_K / EXPERTS) / (len(uses) + 1)
            assert features[e, 7] == pytest.approx(np.log(frequency + floor))
            assert features[e, 8] == (bool(uses) and uses[-1] > 0)
            for column, half_life in enumerate((2, 8, 32, 128), 3):
                keep = 0.5 ** (1 / half_life)
                average = sum((1 - keep) * keep**age * use for age, use in enumerate(reversed(uses)))
                assert features[e, column] == pytest.approx(np.log(average + floor))
            if of_layer:
                rows = [o for o in range(EXPERTS) if share(of_layer[-1], o) > 0]
                pairs = list(pairwise(of_layer))
                chances = []
                for o in rows:
                    came = sum(share(a, o) * share(b, e) for a, b in pairs)
                    chances.append((came + frequency) / (sum(share(a, o) for a, _ in pairs) + 1))
                assert features[e, 2] == pytest.approx(np.log(np.mean(chances) + floor), abs=1e-5)


def test_mix_finds_planted_transitions_and_beats_its_parts() -> None:
    trace = random_trace(7, tokens=200, sequences=8, planted=True)
    evaluation = evaluate_trace(trace, ["mix", "layer-transition", "previous-token"], (1,))
    recall = {row["predictor"]: row["recall_k"] for row in evaluation.results()}
    assert recall["mix"] > 0.95 and recall["layer-transition"] > 0.95 and recall["previous-token"] < 0.6


# -- what they share ------


@pytest.mark.parametrize("name", COUNTING)
@settings(max_examples=8, derandomize=True, deadline=None)
@given(seed=st.integers(0, 1000), batch=st.sampled_from([1, 2, 3]))
def test_predictions_are_a_ranking_of_the_layer_with_probabilities(name: str, seed: int, batch: int) -> None:
    predictor = make_predictor(name, LAYERS, EXPERTS, TOP_K)
    twin = make_predictor(name, LAYERS, EXPERTS, TOP_K)
    for access in random_trace(seed, 24).accesses(batch=batch):
        predictor.observe(access)
        twin.observe(access)
        for distance in (1, 3):
            predictions = list(predictor.predict(access, distance))
            assert {p.key for p in predictions} == {((access.layer + distance) % LAYERS, e) for e in range(EXPERTS)}
            chances = [p.probability for p in predictions]
            assert all(0 <= chance <= 1 for chance in chances) and chances == sorted(chances, reverse=True)
            assert all(p.due == distance for p in predictions)
            assert predictions == list(twin.predict(access, distance)), "equal inputs, equal predictions"


def test_probabilities_become_frequencies() -> None:
    rng, reliability = np.random.default_rng(0), Reliability()
    raw = np.array([0.02, 0.1, 0.3, 0.9])
    truth = np.array([0.05, 0.05, 0.5, 0.6])
    bins = bins_of(raw)
    assert reliability.probability(bins) == pytest.approx(raw, abs=0.06), "before anything is known"
    for _ in range(4096):
        reliability.learn(bins, (rng.random(4) < truth).nonzero()[0])
    learned = reliability.probability(bins)
    assert learned == pytest.approx(truth, abs=0.03) and (np.diff(learned) >= 0).all()


def test_a_prediction_is_compared_with_the_access_it_was_for() -> None:
    class Always(ScoredPredictor):
        def learn(self, access: Access, used: Any) -> None: ...

        def scores(self, access: Access, target: int, distance: int) -> Any:
            return np.array([0.9, 0.9, 0.1, 0.1])

    predictor = Always(2, 4, 2)
    for time in range(1, 1200):
        layer = time % 2
        keys = tuple(ExpertKey(layer, e) for e in ((0, 1) if layer else (2, 3)))
        access = Access(time, layer, keys, (1, 1))
        predictor.observe(access)
        last = list(predictor.predict(access, 1))
        if time % 2 == 0:
            right = last
    assert [p.key for p in right[:2]] == [(1, 0), (1, 1)] and right[0].probability > 0.95
    assert max(p.probability for p in last) < 0.55, "the other layer never needs what it is said to"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nonsense", "unknown predictor 'nonsense'; choose one of: activation-matrix"),
        ("mix(power=2)", "no parameter 'power'; it has no parameters"),
        ("previous-token(half=2)", "its parameters are: half_life"),
        ("previous-token(half_life=0)", "half_life must be positive"),
        ("activation-matrix(capacity=0)", "capacity must be a whole number from 1"),
        ("scoutgate", "scoutgate(file=...)"),
        ("scoutgate(file=/nowhere/x)", "there is no such file"),
        ("no.such.module:Thing", "cannot be imported"),
    ],
)
def test_wrong_names_are_told(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        make_predictor(text, LAYERS, EXPERTS, TOP_K)
    assert says in str(error.value)


def test_names_are_split_outside_parentheses() -> None:
    assert split_names("mix, scoutgate(file=a,b=1) ,next-gate") == ["mix", "scoutgate(file=a,b=1)", "next-gate"]
    assert split_names(" , ") == []
    assert make_predictor("moetier.predictors.mix:Mix", 2, 4, 2).__class__.__name__ == "Mix"
    assert set(COUNTING) < set(PREDICTORS)


# -- evaluation ------


class Fixed:
    """Names the same experts always, one sure and one not."""

    def __init__(self, layers: int, experts: int, top_k: int):
        self.layers = layers

    def observe(self, access: Access, hidden: Any = None) -> None: ...

    def predict(self, access: Access, distance: int = 1) -> Any:
        target = (access.layer + distance) % self.layers
        return [Prediction(ExpertKey(target, e), p, distance) for e, p in ((0, 0.8), (1, 0.3))]


def test_the_evaluation_counts_as_it_says() -> None:
    trace = random_trace(8, tokens=40, sequences=4)
    row, ahead = evaluate_trace(trace, [f"{__name__}:Fixed"], (1, 2)).results()
    measured = trace.experts[trace.sequence >= 2]
    before = trace.experts[20 - 1 : -1]
    needs = measured[:, 1:]  # layer 0 is reached from another token
    hit = (needs == 0) | (needs == 1)
    new = ~(needs[..., None] == before[:, 1:, None, :]).any(-1)
    assert row["recall_k"] == row["recall_2k"] == pytest.approx(hit.sum() / needs.size)
    assert row["whole_2k"] == pytest.approx(hit.all(-1).mean())
    assert row["fresh_recall_2k"] == pytest.approx((hit & new).sum() / new.sum())
    assert row["sure_precision"] == pytest.approx((needs == 0).any(-1).mean())
    assert row["sure_recall"] == pytest.approx((needs == 0).any(-1).sum() / needs.size)
    rates = (needs == 0).any(-1).mean(), (needs == 1).any(-1).mean()
    assert row["calibration_error"] == pytest.approx((abs(rates[0] - 0.8) + abs(rates[1] - 0.3)) / 2)
    assert [layer["accesses"] for layer in row["layers"]] == [18, 20, 20], "texts do not follow from one another"
    assert ahead["accesses"] == 20 and ahead["next_token"]["accesses"] == 36
    assert row["reliability"][8] == {"predictions": 40, "probability": pytest.approx(0.8), "frequency": rates[0]}


def test_the_evaluation_refuses_what_it_cannot_do() -> None:
    trace = random_trace(9)
    for names, distances, says in (
        (["next-gate"], (1,), "needs the model itself"),
        (["mix"], (4,), "mix looks at most 3 layers ahead"),
        (["mix"], (0, 1), "none of these predictors has it"),
        (["mix"], (), "give 1 or more"),
    ):
        with pytest.raises(ConfigError, match=says):
            evaluate_trace(trace, names, distances)
    with pytest.raises(ConfigError, match="no tokens"):
        evaluate_trace(trace.first(0), ["mix"])


def test_evaluation_by_hand_is_what_the_helper_runs() -> None:
    trace = random_trace(14)
    evaluation = Evaluation({"mix": make_predictor("mix", LAYERS, EXPERTS, TOP_K)}, LAYERS, (1,))
    for number, access in enumerate(trace.accesses()):
        evaluation.access(access, measured=trace.sequence[number // LAYERS] >= 1)
    assert evaluation.results() == evaluate_trace(trace, ["mix"], (1,)).results()
