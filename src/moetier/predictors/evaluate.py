"""How good a predictor is on accesses it was not fitted on: recall by layer and distance, and calibration.

Torch-free; `live` feeds it from a running model. What a prefetch would pay is not told by any of this: see
`Prefetcher` and the simulator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np

from moetier.access import Access, ExpertKey, Phase
from moetier.errors import ConfigError
from moetier.predictors import Predictor, make_predictor
from moetier.trace import Trace

__all__ = ["Evaluation", "Quality", "evaluate_trace", "measured_from"]

BINS = 10


@dataclass
class Quality:
    """Counts over the accesses to one layer at one distance; k is the number of experts an access needs.

    `top`, `top2` of `needs` were among the k, 2k likeliest; `whole` of `accesses` had all of theirs among 2k. `fresh`
    needs were not used by the layer's last access, `fresh2` of them were among 2k: what a cache does not hold anyway.
    `bins` are, per tenth of probability, the predictions among 2k: how many, the sum of their probabilities, and how
    many came true.
    """

    accesses: int = 0
    needs: int = 0
    top: int = 0
    top2: int = 0
    whole: int = 0
    fresh: int = 0
    fresh2: int = 0
    bins: list[list[float]] = field(default_factory=lambda: [[0, 0.0, 0] for _ in range(BINS)])

    def add(self, other: Quality) -> None:
        """Sum up."""
        for name in ("accesses", "needs", "top", "top2", "whole", "fresh", "fresh2"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for mine, theirs in zip(self.bins, other.bins, strict=True):
            mine[:] = [a + b for a, b in zip(mine, theirs, strict=True)]

    def summary(self) -> dict[str, Any]:
        """Rates: recall at k and 2k, whole sets, fresh needs and their recall; precision and recall at a confidence of
        one half; mean distance of probability and frequency (expected calibration error). None where nothing counts."""
        sure = [sum(column) for column in zip(*self.bins[BINS // 2 :], strict=True)]
        read = sum(count for count, _, _ in self.bins)
        error = sum(abs(expected - came) for _, expected, came in self.bins)
        return {
            "accesses": self.accesses,
            "recall_k": _rate(self.top, self.needs),
            "recall_2k": _rate(self.top2, self.needs),
            "whole_2k": _rate(self.whole, self.accesses),
            "fresh": _rate(self.fresh, self.needs),
            "fresh_recall_2k": _rate(self.fresh2, self.fresh),
            "sure_precision": _rate(sure[2], sure[0]),
            "sure_recall": _rate(sure[2], self.needs),
            "calibration_error": _rate(error, read),
        }


def _rate(part: float, whole: float) -> float | None:
    return part / whole if whole else None


@dataclass
class _Guess:
    distance: int
    sequence: int
    likely: list[tuple[ExpertKey, float]]  # as many as might be needed, likeliest first


class Evaluation:
    """Runs predictors over accesses, in order, and scores what they said before each.

    Every access is observed, so that what learns online goes on learning; only those passed with `measured` count. A
    prediction counts if its access is one of the same sequence.
    """

    def __init__(self, predictors: dict[str, Predictor], layers: int, distances: Sequence[int]):
        self.predictors, self.layers = predictors, layers
        self.distances = check_distances(distances, predictors)
        self.table = {
            name: {(layer, distance): Quality() for layer in range(layers) for distance in self._of(predictor)}
            for name, predictor in predictors.items()
        }
        self._due: dict[tuple[str, int], list[_Guess]] = {}
        self._last: dict[int, set[ExpertKey]] = {}
        self._now = 0

    def access(self, access: Access, measured: bool, hidden: Any = None) -> None:
        """The next access; `hidden` is passed on."""
        self._now += 1
        wanted = set(access.keys)
        fresh = wanted - self._last.get(access.layer, set())
        self._last[access.layer] = wanted
        for name, predictor in self.predictors.items():
            guesses = self._due.pop((name, self._now), [])
            predictor.observe(access, hidden)
            for distance in self._of(predictor):
                likely = islice(predictor.predict(access, distance), 2 * len(wanted))
                guess = _Guess(distance, access.sequence, [(key, chance) for key, chance, _ in likely])
                if distance == 0:
                    guesses.append(guess)
                else:
                    self._due.setdefault((name, self._now + distance), []).append(guess)
            for guess in guesses if measured else ():
                if guess.sequence == access.sequence:
                    _score(self.table[name][access.layer, guess.distance], guess.likely, wanted, fresh)

    def _of(self, predictor: Predictor) -> list[int]:
        return [distance for distance in self.distances if distance >= getattr(predictor, "nearest", 1)]

    def results(self) -> list[dict[str, Any]]:
        """Per predictor and distance: the summary of the layers reached within the token's pass; `next_token`, that of
        the layers beyond its end; `layers`, by target layer; and the reliability table.
        """
        rows = []
        for name, table in self.table.items():
            for distance in sorted({distance for _, distance in table}):
                same, beyond = Quality(), Quality()
                for layer in range(self.layers):
                    (same if layer >= distance else beyond).add(table[layer, distance])
                bins = [
                    {"predictions": int(count), "probability": _rate(expected, count), "frequency": _rate(came, count)}
                    for count, expected, came in same.bins
                ]
                total = same.summary()
                if distance == 0:  # a control: no odds are learned for it
                    total["calibration_error"] = None
                rows.append(
                    {
                        "predictor": name,
                        "distance": distance,
                        **total,
                        "next_token": beyond.summary(),
                        "layers": [table[layer, distance].summary() for layer in range(self.layers)],
                        "reliability": bins,
                    }
                )
        return rows


def _score(
    quality: Quality, likely: list[tuple[ExpertKey, float]], wanted: set[ExpertKey], fresh: set[ExpertKey]
) -> None:
    named = {key for key, _ in likely}
    found = len(wanted & named)
    quality.accesses += 1
    quality.needs += len(wanted)
    quality.top += sum(key in wanted for key, _ in likely[: len(wanted)])
    quality.top2 += found
    quality.whole += found == len(wanted)
    quality.fresh += len(fresh)
    quality.fresh2 += len(fresh & named)
    for key, chance in likely:
        cell = quality.bins[min(BINS - 1, int(chance * BINS))]
        cell[0] += 1
        cell[1] += chance
        cell[2] += key in wanted


def check_distances(distances: Sequence[int], predictors: dict[str, Predictor]) -> list[int]:
    """Distinct distances in order. Raises `ConfigError` for one that a predictor cannot look."""
    if not distances or min(distances) < 0:
        raise ConfigError("--distance: give 1 or more layers ahead (0: the control of next-gate)")
    if 0 in distances and all(getattr(predictor, "nearest", 1) > 0 for predictor in predictors.values()):
        raise ConfigError("--distance 0 is the control of next-gate; none of these predictors has it")
    for name, predictor in predictors.items():
        farthest = getattr(predictor, "farthest", None)
        if farthest is not None and max(distances) > farthest:
            raise ConfigError(f"--distance {max(distances)}: {name} looks at most {farthest} layers ahead")
    return sorted(set(distances))


def measured_from(count: int) -> int:
    """Of `count` sequences, the number of the first that is measured: the first half is for learning."""
    return count // 2


def evaluate_trace(
    trace: Trace,
    names: Sequence[str],
    distances: Sequence[int] = (1, 2, 3),
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Predictors over a trace, one token at a time and one sequence after the other, prefills too.

    The first half of the sequences is observed, the other half is observed and measured (a single sequence is cut in
    the middle). `progress` is told of tokens done. Raises `ConfigError` for predictors that need a model.
    """
    if not trace.tokens:
        raise ConfigError("the trace has no tokens")
    predictors = {name: make_predictor(name, trace.layers, trace.num_experts, trace.top_k) for name in names}
    for name, predictor in predictors.items():
        needs = getattr(predictor, "needs", "")
        if needs == "model":
            raise ConfigError(f"{name} needs the model itself: evaluate it with --model and --text")
        if needs == "tokens" and trace.token_ids is None:
            raise ConfigError(f"{name} needs the tokens, which this trace does not have: record it again")
    trace = trace.of_sequences(trace.sequences())
    trace = replace(trace, step=np.arange(trace.tokens), phase=np.full(trace.tokens, Phase.DECODE, dtype=np.uint8))
    sequences = trace.sequences()
    first = measured_from(len(sequences))
    begin = int((trace.sequence == sequences[first]).argmax()) if first else trace.tokens // 2
    evaluation = Evaluation(predictors, trace.layers, distances)
    told = [predictor for predictor in predictors.values() if hasattr(predictor, "begin_step")]
    for token, accesses in enumerate(_by_token(trace)):
        fresh = token == 0 or trace.sequence[token] != trace.sequence[token - 1]
        for predictor in told:
            assert trace.token_ids is not None
            predictor.begin_step(trace.token_ids[token : token + 1], fresh)
        for access in accesses:
            evaluation.access(access, measured=token >= begin)
        if progress is not None:
            progress(1)
    return evaluation


def _by_token(trace: Trace) -> Iterator[list[Access]]:
    accesses = trace.accesses()
    for begin in range(0, len(accesses), trace.layers):
        yield accesses[begin : begin + trace.layers]
