"""`moetier predict`: what it prints, what each mistake costs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

import moetier
from moetier.cli import app
from moetier.trace.files import write_trace
from routing import LAYERS, random_trace

DEMO = Path(moetier.__file__).parent / "demo_model"


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["predict", *map(str, arguments)])


def test_evaluate_a_trace_from_the_command_line(tmp_path: Path) -> None:
    write_trace(random_trace(12, planted=True), tmp_path / "t.parquet")
    result = invoke("evaluate", tmp_path / "t.parquet", "--distance", "1,2", "--json", tmp_path / "r.json")
    assert result.exit_code == 0 and "layer-transition" in result.stdout
    report = json.loads((tmp_path / "r.json").read_text())
    assert [(row["predictor"], row["distance"]) for row in report["results"]][:3] == [
        ("previous-token", 1),
        ("previous-token", 2),
        ("layer-transition", 1),
    ]
    assert all(len(row["layers"]) == LAYERS for row in report["results"])
    assert invoke("evaluate", tmp_path / "t.parquet", "--per-layer", "--predictor", "mix").exit_code == 0


def test_mistakes_cost_one_line(tmp_path: Path) -> None:
    trace = tmp_path / "t.parquet"
    write_trace(replace(random_trace(13), token_ids=None), trace)
    for arguments, code, says in (
        (("evaluate",), 2, "give either a trace file, or --model and --text"),
        (("evaluate", trace, "--model", DEMO, "--text", trace), 2, "give either"),
        (("evaluate", "--model", DEMO), 2, "--model and --text go together"),
        (("evaluate", trace, "--distance", "far"), 2, "--distance far: write numbers"),
        (("evaluate", trace, "--predictor", "next-gate"), 2, "evaluate it with --model and --text"),
        (("evaluate", trace, "--predictor", "oracle"), 2, "unknown predictor 'oracle'"),
        (("evaluate", "--model", DEMO, "--text", tmp_path / "none.txt"), 4, "none.txt: cannot be read"),
        (("train", "mix", trace, "--model", DEMO, "-o", tmp_path / "o"), 2, "'mix' is not trained"),
        (("train", "scoutgate", trace, "--model", DEMO, "-o", tmp_path / "o"), 2, "does not say which tokens"),
    ):
        result = invoke(*arguments)
        assert (result.exit_code, len(result.stderr.splitlines())) == (code, 1) and says in result.stderr, arguments


def test_train_and_use_on_the_demo_model(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from moetier.recording import RecordOptions, Text, record_texts

    model = moetier.from_pretrained(DEMO, slots="50%", device="cpu", context=64)
    words = "RETURN VALUE\n       On success, these functions return 0. On error, they return -1 and set errno.\n"
    texts = [Text(str(n), words * 2) for n in range(3)]
    options = RecordOptions(mode="prefill", tokens=48)
    trace = record_texts(model, AutoTokenizer.from_pretrained(DEMO), texts, options)
    model.moetier.close()
    write_trace(trace, tmp_path / "t.parquet")
    weights = tmp_path / "scout.safetensors"
    made = invoke("train", "scoutgate", tmp_path / "t.parquet", "--model", DEMO, "-o", weights, "--epochs", 2)
    assert made.exit_code == 0 and "loss on held-out text" in made.stderr, made.stderr
    text = tmp_path / "text.txt"
    text.write_text(words)
    names = f"next-gate,scoutgate(file={weights})"
    arguments = ("--model", DEMO, "--text", text, "--tokens", 16, "--predictor", names, "--json", tmp_path / "r.json")
    result = invoke("evaluate", *arguments, "--distance", "0,1")
    assert result.exit_code == 0, result.stderr
    rows = json.loads((tmp_path / "r.json").read_text())["results"]
    assert [row["distance"] for row in rows] == [0, 1, 1] and rows[0]["recall_k"] == 1.0
