"""Training that is killed at random moments resumes from a whole checkpoint, and ends in the same bits.

`MOETIER_KILLS` is how many kills there are; few by default.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

KILLS = int(os.environ.get("MOETIER_KILLS", "3"))
SCRIPT = Path(__file__).with_name("run_training_kills.py")


@pytest.mark.timeout(120 + 60 * KILLS)
def test_killed_and_resumed(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = checkpoint("qwen3_moe", torch.float32)
    command = [sys.executable, str(SCRIPT), str(folder), str(tmp_path), str(KILLS)]
    path = os.pathsep.join([str(SCRIPT.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "all ended the same" in done.stdout
