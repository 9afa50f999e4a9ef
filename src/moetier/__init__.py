"""moetier: run Mixture-of-Experts models whose experts do not fit in fast memory.

The torch-free half (`access`, `residency`, `policies`, `plan`, …) can be imported without torch; the names below that
need torch are loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moetier.access import Access, ExpertKey, Phase
from moetier.errors import (
    CapacityError,
    CheckpointError,
    ConfigError,
    MoetierError,
    StaleGraphError,
    StoreError,
    UnsupportedModelError,
)
from moetier.plan import Machine, Plan, Workload, make_plan
from moetier.policies import POLICIES
from moetier.residency import Residency
from moetier.tiers import TierConfig

if TYPE_CHECKING:
    from moetier.hf import TieredExpertsConfig
    from moetier.loading import from_pretrained
    from moetier.options import Options
    from moetier.training.optimizer import SGD, AdamW
    from moetier.training.peft import adaptable_experts
    from moetier.training.trainer import Trainer

__version__ = "0.1.0"

__all__ = [
    "POLICIES",
    "SGD",
    "Access",
    "AdamW",
    "CapacityError",
    "CheckpointError",
    "ConfigError",
    "ExpertKey",
    "Machine",
    "MoetierError",
    "Options",
    "Phase",
    "Plan",
    "Residency",
    "StaleGraphError",
    "StoreError",
    "TierConfig",
    "TieredExpertsConfig",
    "Trainer",
    "UnsupportedModelError",
    "Workload",
    "adaptable_experts",
    "from_pretrained",
    "make_plan",
]

_LAZY = {
    "AdamW": "moetier.training.optimizer",
    "Options": "moetier.options",
    "SGD": "moetier.training.optimizer",
    "TieredExpertsConfig": "moetier.hf",
    "Trainer": "moetier.training.trainer",
    "adaptable_experts": "moetier.training.peft",
    "from_pretrained": "moetier.loading",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
