"""The benchmark of episodes, at the smallest sizes: all arms run, and the table and the picture have them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import common
import episodes


def test_everything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="the picture needs the extra `bench`")
    children: list[dict[str, Any]] = []

    def run(script: Path, spec: dict[str, Any], folder: Path) -> tuple[Any, common.Ended]:
        """In this process."""
        children.append(spec)
        return json.loads(json.dumps(episodes.child(json.loads(json.dumps(spec))))), common.Ended(0, "", 0)

    monkeypatch.setattr(common, "run_child", run)
    out, image = tmp_path / "found.json", tmp_path / "images" / "episodes.svg"
    arguments = ["--smoke", "--json", str(out), "--image", str(image), "--work", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["episodes.py", *arguments])
    episodes.main()
    found = json.loads(out.read_text())
    runs = {(run["arm"], run.get("episode_len")): run for run in found["runs"]}
    mixes = [("1 in a batch", 1), ("1 in a batch", 4), ("2 in a batch", 1), ("2 in a batch", 4)]
    assert list(runs) == [("memory", None), ("iid", None), *mixes]
    assert runs["memory", None]["read_bytes"] == 0 and runs["memory", None]["hit_rate"] is None
    assert runs["1 in a batch", 4]["hit_rate"] == 1  # two experts, four slots
    assert all(run["seconds"] > 0 and 0 <= run["hit_rate"] <= 1 for arm, run in runs.items() if arm[0] != "memory")
    long, shuffled = runs["1 in a batch", 4], runs["iid", None]
    assert long["experts"] < shuffled["experts"] and long["read_bytes"] < shuffled["read_bytes"]
    assert runs["memory", None]["held_out"] == pytest.approx(shuffled["held_out"], rel=1e-4)  # the same training
    text = capsys.readouterr().out
    assert "| in memory, shuffled |" in text and "| 2 | 4 |" in text and "held-out loss" in text
    assert image.read_text().startswith("<?xml") and image.with_suffix(".png").stat().st_size > 1000
    assert not [path for path in tmp_path.iterdir() if path.name not in ("found.json", "images")]
    monkeypatch.setattr(sys, "argv", ["episodes.py", "--plot", str(out), "--image", str(tmp_path / "again.svg")])
    episodes.main()
    assert (tmp_path / "again.svg").is_file() and capsys.readouterr().out == text


def test_the_defaults_fit_the_workload() -> None:
    from moetier.training.synthetic_run import Settings

    for workload, lengths, mixes in (
        (episodes.FULL, episodes.LENGTHS, episodes.MIXES),
        (episodes.TINY, (1, 4), (1, 2)),
    ):
        for arm in episodes.arms(lengths, mixes):
            Settings(**workload, **{name: arm[name] for name in arm if name != "arm"}).check()


def test_only_the_second_half_counts() -> None:
    names = ("seconds", "read_bytes", "written_bytes", "experts", "hits", "uses")
    steps = {name: [100.0, 100.0, 1.0, 3.0] for name in names} | {"loss": [0.0] * 4, "uses": [9, 9, 4, 4]}
    found = episodes.summary({"steps": steps, "loss": {"held_out": 0.5}})
    assert found["seconds"] == 2 and found["hit_rate"] == 0.5 and found["held_out"] == 0.5
