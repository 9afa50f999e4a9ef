"""What the tests share: quiet libraries, tiny checkpoints made once, plain models to compare with."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: no test reaches the network
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import moetier
from families import FAMILIES, WITHOUT_HOOK, Family, available, make_checkpoint

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def family_class(name: str) -> Any:
    """The transformers class of a family; skips the test where this transformers has none."""
    family = FAMILIES.get(name) or WITHOUT_HOOK[name]
    if not available(family):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    return getattr(transformers, family.model)


def align(path: Path) -> None:
    """Pad the header of a safetensors file so that its data starts on a cache line.

    In float32 the CPU's product of one row depends, in the last bit, on whether the weights start on a multiple of 16
    bytes. transformers maps files into memory, so its own logits depend on the length of the header. A record follows
    that (`Recipe.alignment`), unless one of its fields is mapped and another is assembled, as only this family's are.
    """
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length] + b" " * (-(8 + length) % 64)
    path.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`checkpoint("mixtral", dtype)`: the folder of a family's tiny checkpoint. Made once: never write to it."""
    made: dict[tuple[str, torch.dtype], Path] = {}

    def get(name: str, dtype: torch.dtype = torch.bfloat16) -> Path:
        family_class(name)
        if (name, dtype) not in made:
            family: Family = FAMILIES.get(name) or WITHOUT_HOOK[name]
            path = tmp_path_factory.mktemp(name)
            make_checkpoint(family, path, dtype)
            if dtype == torch.float32 and name == "inkling2_text":
                align(path / "model.safetensors")
            made[name, dtype] = path
        return made[name, dtype]

    return get


@pytest.fixture(scope="session")
def plain(checkpoint: Callable[..., Path]) -> Callable[..., Any]:
    """`plain("mixtral", dtype)`: the family's model as transformers loads it, all in memory."""
    loaded: dict[tuple[str, torch.dtype], Any] = {}

    def get(name: str, dtype: torch.dtype = torch.bfloat16) -> Any:
        if (name, dtype) not in loaded:
            folder = checkpoint(name, dtype)
            loaded[name, dtype] = family_class(name).from_pretrained(folder, dtype="auto").eval()
        return loaded[name, dtype]

    return get


@pytest.fixture
def tiered(checkpoint: Callable[..., Path]) -> Iterator[Callable[..., Any]]:
    """`tiered("mixtral", slots=4)`: the same model with its experts out of core; closed after the test."""
    models: list[Any] = []

    def get(name_or_folder: str | Path, dtype_in_file: torch.dtype = torch.bfloat16, **options: Any) -> Any:
        if isinstance(name_or_folder, str):
            options.setdefault("model_class", family_class(name_or_folder))
            name_or_folder = checkpoint(name_or_folder, dtype_in_file)
        models.append(moetier.from_pretrained(name_or_folder, **{"slots": "25%", "context": 64} | options))
        return models[-1]

    yield get
    for model in models:
        model.moetier.close()


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield
