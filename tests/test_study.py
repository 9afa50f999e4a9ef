"""The co-occurrence study: it runs, its words follow from its numbers, and the commands write what they show."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moetier.cli import app
from moetier.cli.study import ROUTING
from moetier.study import Finding, _compare, ebco_study, fine_grained, many_decoders, mixtral_shaped, to_markdown
from moetier.trace import Trace
from moetier.trace.files import read_trace
from moetier.trace.synthetic import zipf_markov


@pytest.mark.parametrize(
    ("differences", "words"),
    [
        ([0.02, 0.05], "A is above B at every size (+2.0 to +5.0 points)."),
        ([-0.05, -0.02], "A is below B at every size"),
        ([-0.004, 0.01], "within a point of each other"),
        ([-0.03, -0.001], "A is below B at some sizes and within a point of it at the others"),
        ([0.001, 0.03], "A is above B at some sizes and within a point of it at the others"),
        ([-0.03, 0.03], "A is above B at some sizes and below it at others"),
    ],
)
def test_words_follow_from_the_numbers(differences: list[float], words: str) -> None:
    assert words in _compare("A", "B", differences)


def test_the_shapes_are_those_of_the_models() -> None:
    for trace, shape in ((mixtral_shaped(16, 2, 0), (32, 8, 2)), (fine_grained(16, 2, 0), (6, 256, 8))):
        assert (trace.layers, trace.num_experts, trace.top_k) == shape


def test_all_four_questions_are_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """On models with fewer layers and experts, so that it takes seconds."""

    def small(layers: int, experts: int) -> Callable[[int, int, int], Trace]:
        return lambda tokens, sequences, seed: zipf_markov(tokens, layers, experts, 2, sequences=sequences, seed=seed)

    monkeypatch.setattr("moetier.study.mixtral_shaped", small(4, 8))
    monkeypatch.setattr("moetier.study.fine_grained", small(2, 64))
    real = zipf_markov(60, 3, 16, 2, sequences=4, seed=3)
    heard: list[str] = []
    findings = ebco_study(real, scale=0.05, progress=heard.append)
    assert len(findings) == len(heard) == 4
    for finding in findings:
        assert finding.tables and finding.words
        for table in finding.tables:
            assert table.rows and all(len(row) == len(table.columns) for row in table.rows)
    text = to_markdown(findings)
    assert all(finding.question in text for finding in findings)


def test_oracle_is_never_below_and_policies_differ_where_eviction_matters() -> None:
    finding: Finding = many_decoders(zipf_markov(128 * 3, 4, 64, 4, sequences=128, seed=0))
    (table,) = finding.tables
    for row in table.rows:
        rates = dict(zip(table.columns[2:], map(float, row[2:]), strict=True))
        assert rates["belady"] >= max(rates.values()) - 0.05


def test_the_packaged_routing_is_that_of_the_demo_model() -> None:
    trace = read_trace(ROUTING)
    config = json.loads((ROUTING.parent / "config.json").read_text())
    assert (trace.layers, trace.num_experts, trace.top_k) == (
        config["num_hidden_layers"],
        config["num_local_experts"],
        config["num_experts_per_tok"],
    )
    assert trace.token_ids is None, "the texts are not ours to ship"
    assert len({sequence["name"].split("-")[0] for sequence in trace.info.sequences}) == 6


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moetier.study.ebco_study", lambda *args, **kwargs: [Finding("Why?", [], ["Because."])])
    files = [tmp_path / "s.json", tmp_path / "s.md"]
    result = CliRunner().invoke(app, ["study", "ebco", "--json", str(files[0]), "--markdown", str(files[1])])
    assert result.exit_code == 0, result.output
    assert "Why?" in result.stdout and "Because." in result.stdout
    assert json.loads(files[0].read_text())[0]["words"] == ["Because."]
    assert "### 1. Why?" in files[1].read_text()


def test_command_refuses_what_is_no_trace(tmp_path: Path) -> None:
    missing = tmp_path / "none.parquet"
    result = CliRunner().invoke(app, ["study", "ebco", str(missing)])
    assert result.exit_code in (2, 4) and str(missing) in result.stderr.replace("\n", "")
