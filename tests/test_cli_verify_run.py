"""`moetier verify` of a run: whole, damaged, and what it was not made for."""

from __future__ import annotations

import os
from pathlib import Path

from test_cli import call, said
from test_run_folder import KEYS, family, made, put


def test_verify_a_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with made(folder, keep=None) as run:
        assert call("verify", folder, code=2).stdout == ""  # somebody writes there
        for step in (10, 20):
            put(family(run), KEYS[step // 10], step)
            run.commit(step, attachments={"note": lambda path: path.write_text("note")})
    assert call("verify", folder).stdout == f"{folder}: whole: steps 10, 20; 8.0 KiB of experts read\n"
    assert call("verify", tmp_path).stdout == call("verify", folder).stdout  # --out of moetier train holds it
    assert said(call("verify", folder)) == ""
    assert "leave it out" in said(call("verify", folder, tmp_path, code=2))
    with open(folder / "weights.bin", "r+b") as file:
        file.write(b"\xff")
    os.truncate(folder / "steps" / "step-20.2" / "note", 1)
    result = call("verify", folder, code=4)
    first, second = result.stdout.splitlines()
    assert first.startswith("step 10, 20: ") and "weights of layer 0, expert 1" in first
    assert "step-20.2/note: damaged" in second
    assert "2 damaged; go on from a step that is not named" in said(result)
