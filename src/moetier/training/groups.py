"""Which parameters an optimizer takes, in which groups, and which record optimizer the experts get.

The experts' learning rate and weight decay are those of the group that their proxies are in. An optimizer of their own
that names them gets such a group.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from moetier.errors import ConfigError
from moetier.registry import parse_name
from moetier.training.optimizers import RecordOptimizer, Settings, make_optimizer
from moetier.training.proxy import Proxy

GROUPED = ("lr", "weight_decay")  # what is always the group's


def trained(model: torch.nn.Module, params: Any, experts: str | RecordOptimizer | None) -> Any:
    """The parameters to optimize: those given, else all that are not frozen.

    Where `experts` names a learning rate or weight decay, the proxies go into a group of their own that has it. Raises
    `ConfigError` if there are groups already.
    """
    chosen = [p for p in model.parameters() if p.requires_grad] if params is None else params
    named = parse_name("optimizer", experts)[1] if isinstance(experts, str) else {}
    own = {name: named[name] for name in GROUPED if name in named}
    if not own:
        return chosen
    chosen = [entry[1] if isinstance(entry, tuple) else entry for entry in chosen]
    if any(isinstance(entry, dict) for entry in chosen):
        raise ConfigError(
            f"experts={experts!r} sets {' and '.join(own)}, and there are groups of parameters: set it in the group of "
            "the experts' proxies (parameters named …experts.proxy.weight)"
        )
    proxies = {id(module.weight) for module in model.modules() if isinstance(module, Proxy)}
    rest = [p for p in chosen if id(p) not in proxies]
    return [{"params": rest}, {"params": [p for p in chosen if id(p) in proxies], **own}]


def chosen(experts: str | RecordOptimizer | None, own: RecordOptimizer) -> RecordOptimizer:
    """The experts' optimizer: `own` unless another was asked for."""
    if experts is None:
        return own
    return make_optimizer(experts) if isinstance(experts, str) else experts


def settings_in(group: Mapping[str, Any], start: Settings, own: bool) -> Settings:
    """What the experts' next step is made with: all that the group says if their optimizer is that of the parameters
    (`own`), else its learning rate and weight decay.
    """
    return start.updated(group if own else {name: group[name] for name in GROUPED})
