"""A run survives its process being killed, whenever that is. `MOETIER_KILLS=300` kills more often."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROUNDS = int(os.environ.get("MOETIER_KILLS", "6"))


@pytest.mark.timeout(120 + 3 * ROUNDS)
def test_kills() -> None:
    script = Path(__file__).with_name("run_kills.py")
    ended = subprocess.run([sys.executable, str(script), str(ROUNDS)], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith(f"{ROUNDS} kills")
