"""The package's public names: sorted, importable, documented, and free of torch until one of them needs it."""

from __future__ import annotations

import subprocess
import sys

import pytest

import moetier


def test_all_is_sorted_and_without_repeats() -> None:
    names = moetier.__all__
    assert len(set(names)) == len(names)
    constants = sorted(name for name in names if name.isupper())
    classes = sorted(name for name in names if name[0].isupper() and not name.isupper())
    others = sorted(name for name in names if name[0].islower())
    assert names == [*constants, *classes, *others]


@pytest.mark.parametrize("name", moetier.__all__)
def test_every_name_exists_and_is_documented(name: str) -> None:
    value = getattr(moetier, name)
    if name != "POLICIES":
        assert value.__doc__ and value.__name__ == name


def test_a_name_that_does_not_exist() -> None:
    with pytest.raises(AttributeError, match="module 'moetier' has no attribute 'from_pretraned'"):
        _ = moetier.from_pretraned


def test_errors_are_one_family() -> None:
    errors = [value for name in moetier.__all__ if name.endswith("Error") and (value := getattr(moetier, name))]
    assert all(issubclass(error, moetier.MoetierError) for error in errors)
    assert issubclass(moetier.ConfigError, ValueError) and issubclass(moetier.StoreError, OSError)
    assert issubclass(moetier.CheckpointError, moetier.StoreError)


@pytest.mark.parametrize(
    "statement",
    [
        "import moetier",
        "import moetier; moetier.Residency([moetier.TierConfig(2)], 1, 4)",
        "from moetier import POLICIES, Access, ExpertKey, Machine, Workload, make_plan",
        "import moetier.eventlog",
    ],
)
def test_importing_does_not_import_torch(statement: str) -> None:
    code = f"{statement}\nimport sys\nprint([n for n in ('torch', 'transformers', 'safetensors') if n in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
