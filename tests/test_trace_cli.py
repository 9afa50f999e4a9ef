"""`moetier trace`, as a user types it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moetier
from moetier.cli import app
from moetier.trace.files import read_trace, write_trace
from moetier.trace.synthetic import zipf_markov

DEMO = Path(moetier.__file__).parent / "demo_model"


def run(capfd: pytest.CaptureFixture[str], *words: Any) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `moetier trace …`."""
    try:
        code = app(["trace", *map(str, words)], prog_name="moetier", standalone_mode=True)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    out, err = capfd.readouterr()
    return code or 0, out, err


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_trace(zipf_markov(600, 2, 16, 2, sequences=4), "t.parquet")
    return tmp_path


def test_generate_and_info(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shape = ("--tokens", 50, "--layers", 2, "--experts", 8, "--top-k", 2)
    for kind, extra in (
        ("zipf-markov", ("--set", "skew=1.5", "--set", "sequences=5")),
        ("episode", ("--set", "batch=4", "--set", "envs_per_batch=2", "--set", "episode=10")),
        ("iid", ("--set", "envs=4")),
        ("uniform-control", ()),
    ):
        code, out, err = run(capfd, "generate", kind, "-o", "g.parquet", *shape, "--seed", 3, *extra)
        assert (code, out) == (0, ""), err
        assert "2 of 8 experts" in err
        code, out, _ = run(capfd, "info", "g.parquet", "--json")
        described = json.loads(out)
        assert code == 0 and described["layers"] == 2 and described["info"]["extra"]["seed"] == 3
        assert ("CONTROL" in described["info"]["source"]) == (kind == "uniform-control")
    trace = read_trace("g.parquet")
    assert trace.tokens == 50
    code, out, _ = run(capfd, "info", "t.parquet")
    assert code == 0 and "sequences" in out and "zipf_markov" in out


def test_import_and_export(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(capfd, "export", "t.parquet", "-o", "t.jsonl")[0] == 0
    assert run(capfd, "import", "t.jsonl", "-o", "back.parquet")[0] == 0
    assert np.array_equal(read_trace("back.parquet").experts, read_trace("t.parquet").experts)
    assert run(capfd, "export", "t.parquet", "-o", "t.csv")[0] == 0
    assert run(capfd, "export", "t.parquet", "-o", "t.bin")[0] == 0
    assert Path("t.csv").read_text().startswith("time,obj_id,size\n0,")
    assert Path("t.bin").stat().st_size == 600 * 2 * 2 * 24
    experts = np.zeros((5, 1, 1), np.uint8)
    np.savez("t.npz", experts=experts, offsets=np.array([0, 5]), num_experts=np.array(4))
    code, out, err = run(capfd, "import", "t.npz", "-o", "n.parquet")
    assert (code, out) == (0, "") and "5 tokens of 1 sequences" in err


def test_stats(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capfd, "stats", "t.parquet", "--json", "--tokens", 100)
    summary = json.loads(out)
    assert code == 0 and summary["version"] == 1 and summary["locality"]["sampled_tokens"] == 100
    code, out, _ = run(capfd, "stats", "t.parquet")
    assert code == 0
    for words in ("Gini", "SRP(16)", "LRU", "Working set", "pairs, next layer", "worth offloading? "):
        assert words in out, words
    assert f"{100 * summary['skew']['top_half'][0]:.1f}%"[:2] in out


def test_record(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("a.txt").write_text("And it came to pass in those days that the king went up to the house.")
    Path("b.txt").write_text("def main(argv):\n    return 0\n" * 4)
    flags = ("--tokens", 12, "--prompt", 4, "--slots", "50%", "-q")
    code, out, err = run(capfd, "record", DEMO, "--text", "a.txt", "--text", "b.txt", "-o", "r.parquet", *flags)
    assert (code, out) == (0, ""), err
    trace = read_trace("r.parquet")
    assert trace.tokens == 24 and trace.info.model == "demo_model"
    assert [sequence["name"] for sequence in trace.info.sequences] == ["a.txt", "b.txt"]
    code, _, err = run(capfd, "stats", "r.parquet", "--decode-only", "--json")
    assert code == 0, err
    code, _, err = run(capfd, "record", DEMO, "--text", "a.txt", "-o", "p.parquet", "--mode", "prefill", *flags[4:])
    assert code == 0, err
    code, _, err = run(capfd, "stats", "p.parquet", "--decode-only")
    assert code == 2 and "p.parquet: no tokens that were decoded" in err


BAD: list[tuple[tuple[Any, ...], int, str]] = [
    (("info", "absent.parquet"), 2, "absent.parquet"),
    (("stats", "text.txt"), 2, "text.txt"),
    (("import", "text.txt", "-o", "x.parquet"), 2, "--format txt"),
    (("import", "text.txt", "-o", "x.parquet", "--format", "jsonl"), 2, "text.txt, line 1"),
    (("import", "text.txt", "-o", "x.parquet", "--format", "npz"), 2, "text.txt"),
    (("export", "t.parquet", "-o", "x.foo"), 2, "--format foo"),
    (("export", "t.parquet", "-o", "absent/x.csv"), 2, "absent/x.csv"),
    (("generate", "random", "-o", "x.parquet"), 2, "random"),
    (("generate", "zipf-markov", "-o", "x.parquet", "--set", "skew"), 2, "--set skew"),
    (("generate", "zipf-markov", "-o", "x.parquet", "--set", "skew=a"), 2, "--set skew=a"),
    (("generate", "iid", "-o", "x.parquet", "--set", "episode=3"), 2, "--set episode=3"),
    (("generate", "episode", "-o", "x.parquet", "--set", "affinity=0"), 2, "uniform_control"),
    (("generate", "episode", "-o", "absent/x.parquet"), 2, "absent/x.parquet"),
    (("generate", "episode"), 2, "--output"),
    (("record", DEMO, "--text", "absent.txt", "-o", "x.parquet"), 2, "--text absent.txt"),
    (("record", DEMO, "--text", "empty.txt", "-o", "x.parquet"), 2, "--text empty.txt"),
    (("record", DEMO, "--text", "binary.txt", "-o", "x.parquet"), 2, "--text binary.txt"),
    (("record", DEMO, "--text", "text.txt", "-o", "absent/x.parquet"), 2, "absent/x.parquet"),
    (("record", DEMO, "--text", "text.txt", "-o", "x.parquet", "--mode", "train"), 2, "--mode train"),
    (("record", DEMO, "--text", "text.txt", "-o", "x.parquet", "--tokens", 9, "--prompt", 9), 2, "--tokens 9"),
    (("record", "absent/model", "--text", "text.txt", "-o", "x.parquet"), 4, "absent/model"),
]


@pytest.mark.parametrize(("words", "code", "message"), BAD, ids=[f"{words[0]}-{message}" for words, _, message in BAD])
def test_mistakes_are_one_line(
    here: Path, capfd: pytest.CaptureFixture[str], words: tuple[Any, ...], code: int, message: str
) -> None:
    Path("text.txt").write_text("hello\n")
    Path("empty.txt").write_text(" \n")
    Path("binary.txt").write_bytes(b"\xff\xfe\x00")
    got, out, err = run(capfd, *words)
    assert (got, out) == (code, ""), err
    assert err.startswith("error: ") and message in err and len(err.splitlines()) == 1
    assert not list(here.glob("**/x.*")) and not list(here.glob("**/.*tmp"))
