"""Training that is killed at random moments resumes from a whole checkpoint, and ends in the same bits.

`MOETIER_KILLS` is how many kills there are; few by default.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moetier.stores.runfolder import RunFolder

KILLS = int(os.environ.get("MOETIER_KILLS", "2"))
STEPS = 8  # of a run; a killed one begins anew when it has ended
CHILD = Path(__file__).with_name("train_child.py")
PATH = os.pathsep.join([str(CHILD.parent), os.environ.get("PYTHONPATH", "")])


def start(checkpoint: Path, run: Path, result: Path) -> subprocess.Popen[str]:
    command = [sys.executable, str(CHILD), str(checkpoint), str(run), str(STEPS), str(result)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"PYTHONPATH": PATH, "HF_HUB_OFFLINE": "1"},
    )


def finish(child: subprocess.Popen[str]) -> float:
    """Let it end; the seconds that its steps took."""
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    begin = time.monotonic()
    out, _ = child.communicate()
    assert child.returncode == 0, out
    return time.monotonic() - begin


@pytest.mark.timeout(120 + 60 * KILLS)
def test_killed_and_resumed(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = checkpoint("qwen3_moe", torch.float32)
    seconds = finish(start(folder, tmp_path / "whole", tmp_path / "expected"))
    expected = load_file(tmp_path / "expected")
    draw = random.Random(0)
    killed = number = 0
    while killed < KILLS:  # one run after the other, each killed until it is through
        number += 1
        run, result = tmp_path / f"run{number}", tmp_path / f"result{number}"
        last = 0
        while not result.exists():
            child = start(folder, run, result)
            assert child.stdout is not None
            if killed < KILLS:
                if draw.random() < 0.9:
                    child.stdout.readline()  # it has begun
                time.sleep(draw.random() * seconds / 2)
                child.send_signal(signal.SIGKILL)
            child.communicate()
            killed += child.returncode == -signal.SIGKILL
            last = check(run, last)
        assert same(load_file(result), expected)


def check(run: Path, last: int) -> int:
    """Whatever is there is whole, and no commit was lost; the newest."""
    if not RunFolder.exists(run):
        return 0
    with RunFolder.open(run, write=False) as opened:
        assert not list(opened.verify())
        newest = opened.step or 0
        assert newest >= last
        return newest


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())
