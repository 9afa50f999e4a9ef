"""Packed stores of tiny checkpoints, for the tests of them."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import torch

from conftest import family_class
from moetier.packing import Checkpoint, Packed, pack


def mapped(folder: Path, name: str = "qwen3_moe", dtype: torch.dtype | None = None) -> Checkpoint:
    """A checkpoint as `pack` takes it."""
    return Checkpoint.open(
        folder, "auto" if dtype is None else str(dtype).removeprefix("torch."), model_class=family_class(name)
    )


def packed(
    folder: Path, out: Path, name: str = "qwen3_moe", dtype: torch.dtype | None = None, **options: Any
) -> Packed:
    """Pack it."""
    return pack(mapped(folder, name, dtype), out, **options)


def sums(folder: Path) -> dict[str, str]:
    """What every file of a folder holds."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def own(folder: Path, target: Path) -> Path:
    """A copy of a checkpoint that a test may change."""
    return Path(shutil.copytree(folder, target))
