"""The half of the library that decides can be used without torch and transformers."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest

from moetier.policies import POLICIES
from moetier.predictors import PREDICTORS

MODULES = ["access", "errors", "tiers", "residency", "invariants", "policies", "eventlog", "plan", "trace", "simulate"]
MODULES += [
    "costs",
    "forecast",
    "levers",
    "misses",
    "pinning",
    "profile",
    "stress",
    "prefetch",
    "threads",
    "overlap",
    "timeline",
    "training.balance",
    "training.kept",
    "training.orders",
    "perfetto",
    "predictors",
    "predictors.evaluate",
    "predictors.scoutgate_training",
]

SCRIPT = """
import importlib, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "safetensors", "accelerate"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
for name in sys.argv[1:]:
    importlib.import_module(name)

from moetier import Access, ExpertKey, Residency, TierConfig
for policy, factory in importlib.import_module("moetier.policies").POLICIES.items():
    if hasattr(factory, "foresee") or hasattr(factory, "fit"):
        continue
    core = Residency([TierConfig(2, policy)], 2, 2)
    ticket = core.acquire(Access(1, 0, (ExpertKey(0, 1),)))
    core.completed(core.take()[0].id)
    core.check()
assert not {"torch", "transformers"} & set(sys.modules)
"""


@pytest.mark.timeout(60)
def test_decisions_import_without_torch() -> None:
    names = [f"moetier.{module}" for module in MODULES if find_spec(f"moetier.{module}")]
    names += sorted({place.partition(":")[0] for place in PREDICTORS.values()})
    names += sorted({policy.__module__ for policy in POLICIES.values()} | {"moetier.policies.admission"})
    result = subprocess.run([sys.executable, "-c", SCRIPT, *names], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
