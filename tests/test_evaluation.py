"""`moetier eval`: perplexity against plain transformers, distances that must be zero, and what mistakes cost."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import family_class
from families import VOCAB
from moetier import ConfigError, StoreError
from moetier.evaluation import divergence, evaluate, windows_of
from moetier.levers import Levers
from test_cli import call, folder, said

__all__ = ["folder"]  # a fixture

TEXTS = [torch.randint(3, VOCAB, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (25, 14)]
SETTINGS = [Levers(), Levers(cache_prior=0.6), Levers(max_rank=2), Levers(drop_misses=1.0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_against_plain_transformers(dtype: torch.dtype, checkpoint: Any, plain: Any) -> None:
    """Perplexity as transformers gives it in one pass over each window; distances zero where nothing is lossy."""
    import moetier

    @contextmanager
    def load(levers: Levers) -> Iterator[Any]:
        kind = family_class("mixtral")
        model = moetier.from_pretrained(
            checkpoint("mixtral", dtype), slots=6, context=64, model_class=kind, prefetch="off", **levers.to_dict()
        )
        loaded.append(levers)
        yield model
        model.moetier.close()

    loaded: list[Levers] = []
    windows, told = windows_of(TEXTS, 24, 10), []
    assert [len(window) for window in windows] == [10, 10, 4, 10, 4]
    exact, again, prior, same, drop = evaluate(load, windows, SETTINGS, told.append)
    assert loaded == [Levers(), *SETTINGS] and sum(told) == 5 * 38
    total = 0.0
    for ids in windows:
        logits = plain("mixtral", dtype)(input_ids=torch.tensor([ids])).logits[0, :-1].double()
        total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum"))
    assert exact.predicted == 33 and exact.tokens == 38
    assert exact.nll == pytest.approx(total / 33, rel=1e-5 if dtype == torch.float32 else 1e-2)
    assert exact.perplexity == pytest.approx(math.exp(exact.nll))
    for outcome in (exact, again, same):
        assert (outcome.kl, outcome.agreement, outcome.overlap, outcome.dropped) == (0.0, 1.0, 1.0, 0.0)
        assert (outcome.nll, outcome.nbytes, outcome.hit_rate) == (exact.nll, exact.nbytes, exact.hit_rate)
    for outcome in (prior, drop):
        assert outcome.kl > 0 and outcome.nll != exact.nll and outcome.overlap < 1
        assert outcome.nbytes["disk→host"] < exact.nbytes["disk→host"]
    assert prior.dropped == 0 and drop.dropped == pytest.approx(1 - drop.overlap)


def test_kl_by_hand() -> None:
    exact, other = torch.tensor([0.5, 0.25, 0.25]).double().log(), torch.tensor([0.25, 0.5, 0.25]).double().log()
    assert divergence(exact, other) == pytest.approx(0.5 * math.log(2) - 0.25 * math.log(2))
    impossible = torch.tensor([0.5, 0.5, 0.0]).double().log()
    assert divergence(impossible, impossible) == 0.0
    assert divergence(impossible, exact) == pytest.approx(0.5 * math.log(2))
    assert divergence(exact, impossible) == math.inf


@settings(derandomize=True, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 20))
def test_kl_is_never_negative(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    first, second = (scale * torch.randn(50, generator=generator).double() for _ in range(2))
    exact, other = first.log_softmax(dim=0), second.log_softmax(dim=0)
    assert divergence(exact, other) >= 0 and divergence(exact, exact) == 0
    close = divergence(exact, (first + 1e-9 * second).log_softmax(dim=0))
    assert 0 <= close < 1e-6


def test_windows() -> None:
    assert windows_of([[1, 2, 3, 4, 5], [6]], None, 2) == [[1, 2], [3, 4]]  # a single token predicts nothing
    assert windows_of([[1, 2, 3, 4, 5], [6, 7]], 3, 9) == [[1, 2, 3], [6, 7]]
    with pytest.raises(ConfigError, match="2 tokens or more"):
        windows_of([[1], []], None, 8)


def test_no_room_for_the_exact_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    def full(**_: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(StoreError, match=r"cannot be kept there .No space left on device.; set TMPDIR"):
        next(evaluate(lambda levers: pytest.fail("nothing is loaded"), [[3, 4]], []))


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("It was the best of times, it was the worst of times.")
    return path


def test_a_table_and_a_file(folder: Path, text: Path, tmp_path: Path) -> None:
    tries = ("--try", "cache-prior=0.5,keep_top=1", "--try", "drop_misses=0.9")
    result = call("eval", folder, "--text", text, "--slots", 8, "--window", 20, *tries, "--json", tmp_path / "r.json")
    report = json.loads((tmp_path / "r.json").read_text())
    rows = report["results"]
    assert (report["version"], report["slots"], report["experts"], report["windows"]) == (1, 8, 24, 3)
    assert [row["tokens"] for row in rows] == [52] * 3 and rows[0]["predicted"] == 49
    assert [row["levers"]["cache_prior"] for row in rows] == [0.0, 0.5, 0.0]
    assert rows[0]["kl"] == 0 < rows[1]["kl"] and rows[2]["dropped"] > 0
    assert all(row["tokens_per_second"] > 0 and row["bytes_per_token"]["disk→host"] > 0 for row in rows)
    assert "49 predicted tokens, 8 of 24 experts in the fastest tier" in result.stdout
    for word in ("exact", "cache_prior=0.5", "keep_top=1", "drop_misses=0.9", f"{rows[1]['perplexity']:.3f}"):
        assert word in result.stdout


def test_the_same_options_as_run(folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts from a packed store, how threads share a step, who computes misses: all reach every loaded model."""
    import moetier

    model, store, out = tmp_path / "model", tmp_path / "model.moetier", tmp_path / "r.json"
    shutil.copytree(folder, model)
    call("pack", model, store)
    load, asked = moetier.from_pretrained, []

    def spy(*args: Any, **options: Any) -> Any:
        asked.append(tuple(options[name] for name in ("store", "split", "cpu_experts")))
        return load(*args, **options)

    monkeypatch.setattr(moetier, "from_pretrained", spy)
    common = ("eval", model, "--text", text, "--tokens", 8, "--slots", 8, "--try", "drop_misses=0.9", "--json", out)
    found = []
    for place, kind in ((None, "packed"), ("none", "checkpoint"), (store, "packed")):
        call(*common, *(() if place is None else ("--store", place)), "--split", "products")
        report = json.loads(out.read_text())
        assert report["store"] == {"kind": kind, "path": str(store if kind == "packed" else model)}
        for row in report["results"]:
            del row["tokens_per_second"], row["bytes_per_token"]  # records of a packed store are padded
        found.append(report["results"])
    assert found[0] == found[1] == found[2]
    assert asked[2:4] == [("none", "products", "off")] * 2
    result = call(*common, "--device", "cpu", "--cpu-experts", "always")
    assert asked[-1] == (None, "auto", "always")
    assert "warning: --cpu-experts is not used: the model computes on the CPU" in said(result)
    assert "cpu-experts" not in said(call(*common, "--device", "cpu", "--cpu-experts", "always", "--quiet"))


def test_windows_longer_than_the_model_is_made_for(folder: Path, text: Path) -> None:
    result = call("eval", folder, "--text", text, "--slots", 8, "--tokens", 4, "--window", 300)
    assert "warning: windows of 300 tokens, but the model is made for 256" in said(result)
    quiet = call("eval", folder, "--text", text, "--slots", 8, "--tokens", 4, "--window", 300, "--quiet")
    assert quiet.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--try", "speed=2"], 2, "error: --try speed=2: 'speed=2' is no lever; write name=value of: cache_prior"),
        (["--try", "cache_prior=2"], 2, "error: --try cache_prior=2: cache_prior: must be a number between 0 and 1"),
        (["--try", "max_rank=99"], 2, "error: --try max_rank=99: max_rank: this model chooses 3 of 8 experts"),
        (["--text", "none.txt"], 4, "error: --text none.txt: cannot be read: No such file"),
        (["--slots", "none"], 2, "slots"),
        (["--dtype", "int8"], 2, "--dtype int8: choose one of"),
        (["--window", "1"], 2, "--window"),
        (["--split", "rows"], 2, "error: --split: 'rows' is unknown; choose"),
        (["--cpu-experts", "maybe"], 2, "error: unknown --cpu-experts 'maybe'"),
        (["--store", "nowhere"], 2, "error: --store: nowhere"),
        (["--json", "/nowhere/at/all.json"], 2, "--json /nowhere/at/all.json: cannot be written"),
    ],
)
def test_mistakes(arguments: list[str], code: int, says: str, folder: Path, text: Path) -> None:
    result = call("eval", folder, "--text", text, "--tokens", 6, *arguments, code=code)
    assert says in said(result) and result.stdout == ""


def test_a_text_is_needed(folder: Path) -> None:
    assert "--text" in said(call("eval", folder, code=2))


@pytest.fixture
def run(folder: Path) -> Callable[..., Any]:
    def get(*arguments: object, code: int = 0) -> Any:
        fast = ("--slots", "6", "--context", "64", "--max-new-tokens", "12", "--greedy")
        return call("run", folder, "Once upon a time", *fast, *arguments, code=code)

    return get


def test_run_with_levers(run: Callable[..., Any], tmp_path: Path) -> None:
    plain = run()
    assert "routing kept" not in plain.stderr
    assert run("--cache-prior", 0, "--drop-misses", 0).stdout == plain.stdout
    result = run("--cache-prior", 0.5, "--drop-misses", 0.5, "--stats-json", tmp_path / "s.json")
    levers = json.loads((tmp_path / "s.json").read_text())["levers"]
    assert levers["choices"] == 11 * 3 * 3 and 0 < levers["changed"] + levers["dropped"] < levers["choices"]
    assert f"{levers['changed']} changed, {levers['dropped']} dropped by cache_prior=0.5,drop_misses=0.5" in said(
        result
    )


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--cache-prior 1.5", "error: --cache-prior: must be a number between 0 and 1, got 1.5"),
        ("--keep-top 1", "error: --keep-top: does nothing without"),
        ("--cache-prior 0.2 --max-rank 4", "error: --cache-prior: cannot be combined with max_rank"),
        ("--max-rank 9", "error: --max-rank: this model chooses 3 of 8 experts"),
        ("--max-mass 0", "error: --max-mass: must be above 0"),
        ("--drop-misses nan", "error: --drop-misses: must be a number between 0 and 1"),
    ],
)
def test_run_refuses(flags: str, says: str, run: Callable[..., Any]) -> None:
    result = run(*flags.split(), code=2)
    assert says in said(result) and result.stdout == ""
