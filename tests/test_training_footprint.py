"""What a step keeps in memory is measured on the model, and the measurement leaves no trace."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moetier.hf import find_experts
from moetier.training import footprint
from training import NAME, load_reference

SCRIPT = """
import os
if {value!r}: os.environ["MALLOC_MMAP_THRESHOLD_"] = "1"
from moetier.training.allocator import give_large_blocks_back
print(give_large_blocks_back())
"""


def test_what_autograd_saves_is_counted(checkpoint: Callable[..., Path]) -> None:
    """As hooks on a whole forward see it, at another length; the experts in memory save more than tiered ones."""
    model = load_reference(checkpoint(NAME, torch.float32)).eval()
    modules = find_experts(model)
    draws = torch.get_rng_state()
    per_token = footprint.saved_per_token(model, modules)
    assert torch.equal(torch.get_rng_state(), draws)
    assert all("forward" not in vars(module) for _, module in modules)
    saved = footprint._saved_nbytes(model, modules, 96)
    assert saved == pytest.approx(96 * per_token, rel=0.05)
    hidden = model.config.hidden_size * 4
    assert per_token > 3 * 8 * hidden  # three layers, each with eight hidden states at least


def test_other_models_are_estimated(checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_reference(checkpoint(NAME, torch.float32)).eval()
    modules = find_experts(model)

    def refuse(*_: Any, **__: Any) -> None:
        raise TypeError("pixels, please")

    monkeypatch.setattr(model, "forward", refuse)
    config = model.config
    estimate = footprint.LAYER_COPIES * config.num_hidden_layers * config.hidden_size * 4
    assert footprint.saved_per_token(model, modules) == estimate
    more = footprint.training_workspace_nbytes(model, modules, 2, 200, 3, 0)
    less = footprint.training_workspace_nbytes(model, modules, 2, 100, 3, 0)
    assert more - less >= 100 * estimate


@pytest.mark.parametrize("value", ["", "1"])
def test_the_environment_has_the_last_word_about_the_allocator(value: str) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT.format(value=value)], capture_output=True, text=True)
    changed = done.stdout.strip() == "True"
    assert not changed if value else changed or not sys.platform.startswith("linux")
