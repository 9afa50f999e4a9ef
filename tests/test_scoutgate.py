"""ScoutGate: it learns what tokens tell, and its files are what they say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moetier import Access, ConfigError
from moetier.predictors import make_predictor
from moetier.predictors.evaluate import evaluate_trace
from moetier.predictors.scoutgate import load, save
from moetier.predictors.scoutgate_training import train
from moetier.trace import Trace
from routing import EXPERTS, LAYERS, TOP_K, random_trace


def fitted(seed: int = 0, epochs: int = 30) -> tuple[Any, Trace]:
    trace = random_trace(10, tokens=600, sequences=6, planted=True)
    embeddings = np.random.default_rng(1).standard_normal((20, 16)).astype(np.float32)
    return train(trace, embeddings, projection=16, width=16, epochs=epochs, seed=seed, batch=64, rate=1e-2), trace


def test_scoutgate_learns_what_tokens_tell(tmp_path: Path) -> None:
    weights, trace = fitted()
    path = tmp_path / "scout.safetensors"
    save(weights, path)
    name = f"scoutgate(file={path})"
    rows = evaluate_trace(trace, [name, "previous-token"], (1, 2)).results()
    assert all(row["recall_k"] > 0.97 for row in rows[:2]) and rows[2]["recall_k"] < 0.6
    again = load(path)
    assert all(np.array_equal(getattr(again, n), getattr(weights, n)) for n in ("tokens", "context", "layer", "bias"))
    assert again.info == weights.info and again.info["held_out_loss"] < 0.1
    assert list(tmp_path.iterdir()) == [path]


def test_scoutgate_is_reproducible_and_what_it_was_in_training() -> None:
    (one, _), (two, _) = fitted(epochs=1), fitted(epochs=1)
    assert np.array_equal(one.expert, two.expert) and not np.array_equal(one.expert, fitted(1, 1)[0].expert)
    windows = np.array([[-1] * 7 + [3], [-1, -1, 0, 1, 2, 3, 4, 5]])
    for layer in range(LAYERS):
        for row, got in zip(windows, one.probabilities(windows, layer), strict=True):
            tower = one.layer[layer].astype(float)
            for place, token in enumerate(row):
                if token >= 0:
                    tower = tower + one.tokens[token].astype(float) @ one.context[place]
            assert got == pytest.approx(1 / (1 + np.exp(-(one.expert[layer] @ tower + one.bias[layer]))), abs=1e-5)


def test_scoutgate_reads_windows_of_each_row(tmp_path: Path) -> None:
    save(fitted(epochs=1)[0], tmp_path / "s")
    predictor: Any = make_predictor(f"scoutgate(file={tmp_path / 's'})", LAYERS, EXPERTS, TOP_K)
    with pytest.raises(ConfigError, match="not told any tokens"):
        predictor.scores(Access(1, 0, ()), 1, 1)
    predictor.begin_step(np.array([[1, 2, 3], [4, 5, 6]]))
    assert predictor._all.shape == (6, 8) and predictor._all[2].tolist() == [-1] * 5 + [1, 2, 3]
    predictor.begin_step(np.array([[7], [8]]))
    assert predictor._all.tolist() == [[-1] * 4 + [1, 2, 3, 7], [-1] * 4 + [4, 5, 6, 8]]
    predictor.begin_step(np.array([[9]]), fresh=True)
    assert predictor._all.tolist() == [[-1] * 7 + [9]]
    with pytest.raises(ConfigError, match="knows 20 tokens, got number 20"):
        predictor.begin_step(np.array([[20]]))


def test_damaged_scoutgates_are_refused(tmp_path: Path) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    weights = fitted(epochs=1)[0]
    save(weights, good)
    bad.write_bytes(good.read_bytes()[:-50])
    wrong = tmp_path / "wrong"
    save(replace(weights, layer=weights.layer[:, :-1].copy()), wrong)
    other = tmp_path / "other"
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(2)}, other)
    for path, says in ((bad, "damaged"), (wrong, "do not belong together"), (other, "not a scoutgate")):
        with pytest.raises(ConfigError, match=f"{path.name}: .*{says}"):
            load(path)
    with pytest.raises(ConfigError, match="was trained for 3 x 6 experts, this is 4 x 6"):
        make_predictor(f"scoutgate(file={good})", 4, EXPERTS, TOP_K)


def test_training_needs_tokens_that_exist() -> None:
    trace, embeddings = random_trace(11), np.zeros((20, 4), np.float32)
    for given_trace, table, says in (
        (replace(trace, token_ids=None), embeddings, "record it again"),
        (trace, embeddings[:5], "does not know"),
        (trace.first(10), embeddings, "too short"),
    ):
        with pytest.raises(ConfigError, match=says):
            train(given_trace, table)
