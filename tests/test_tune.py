"""`moetier tune`: weights that a policy can be given, and an honest report of what they gain."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from moetier.cli import app
from moetier.policies.hazard import HazardWeights
from moetier.simulate.config import SimulationConfig
from moetier.simulate.run import simulate
from moetier.trace.files import write_trace
from moetier.trace.synthetic import zipf_markov


def test_fits_and_reports_on_held_out_sequences(tmp_path: Path) -> None:
    trace = zipf_markov(600, 3, 16, 2, sequences=4, seed=5)
    source, weights = tmp_path / "t.parquet", tmp_path / "w.json"
    write_trace(trace, source)
    result = CliRunner().invoke(app, ["tune", str(source), "-o", str(weights), "--slots", "30%", "--share", "0.5"])
    assert result.exit_code == 0, result.output
    assert "held out" in result.stdout and "horizon, fitted" in result.stdout
    assert HazardWeights.load(weights)
    assert simulate(trace, SimulationConfig(f"horizon(weights={weights})", 14)).hit_rate > 0


def test_refuses_bad_batches_and_missing_files(tmp_path: Path) -> None:
    for arguments, word in (
        (["x.parquet", "-o", str(tmp_path / "w.json"), "--batch", "0"], "--batch"),
        (["x.parquet", "-o", str(tmp_path / "no" / "w.json")], "--output"),
        ([str(tmp_path / "x.parquet"), "-o", str(tmp_path / "w.json")], "x.parquet"),
    ):
        result = CliRunner().invoke(app, ["tune", *arguments])
        assert result.exit_code in (2, 4) and word in result.stderr.replace("\n", ""), result.output
        assert not (tmp_path / "w.json").exists()
