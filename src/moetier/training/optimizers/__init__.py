"""Record optimizers, by name. A new one is one new file and one line in `OPTIMIZERS`.

A record optimizer is arithmetic on the fields of one expert: its weights, its gradients, its state. It never sees
slots, leases, stores or other experts, and keeps nothing between calls but constants; what it remembers is the state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from moetier.errors import ConfigError
from moetier.record import RecordLayout
from moetier.registry import build
from moetier.training.optimizers.adafactor import Adafactor
from moetier.training.optimizers.adam import Adam, AdamW
from moetier.training.optimizers.adamw8bit import AdamW8bit
from moetier.training.optimizers.fields import Fields
from moetier.training.optimizers.hot_cold import HotCold
from moetier.training.optimizers.settings import Hyper, Settings
from moetier.training.optimizers.sgd import SGD, Momentum
from moetier.training.optimizers.usage import Usage

__all__ = [
    "OPTIMIZERS",
    "Fields",
    "Hyper",
    "RecordOptimizer",
    "Settings",
    "check_optimizer",
    "make_optimizer",
    "name_of",
]


class RecordOptimizer(Protocol):
    """What the training engine asks of an optimizer."""

    @property
    def settings(self) -> Settings:
        """The settings that a torch parameter group starts from; `settings.updated(group)` reads a group back."""

    def usage(self, layers: int, experts: int) -> Usage | None:
        """The books by which experts are told apart, or None where all are treated alike."""

    def part(self, share: float) -> RecordOptimizer:
        """The optimizer for an expert with this share in the books; itself, where all are treated alike.

        A part's `state_layout` says what of the state it touches: None, and the state can stay where it is.
        """

    def state_layout(self, weights: RecordLayout) -> RecordLayout | None:
        """How the state of such experts lies in a record, or None where there is none.

        Names are those of the weights with a part: `gate_up_proj.master`, `gate_up_proj.exp_avg`. A new state is all
        zero bytes. Raises `ConfigError` naming a field that cannot be trained.
        """

    def begin(self, weights: Fields, state: Fields) -> None:
        """Make a zeroed state ready before anything else is done with it: masters are copied from the weights."""

    def update(self, weights: Fields, gradients: Fields, state: Fields, hyper: Hyper) -> None:
        """One step of one expert, in place; `state` is empty where there is none. Gradients are only read."""

    def idle(self, weights: Fields, state: Fields, missed: Sequence[Hyper]) -> bool:
        """The steps that the expert missed, ascending, exactly as zero gradients would have made them.

        Returns False only if no bit of weights or state was changed.
        """

    def idles(self, hyper: Hyper) -> bool:
        """Whether a zero-gradient step with these settings can change anything at all, whatever the state."""


OptimizerFactory = Callable[..., RecordOptimizer]

OPTIMIZERS: dict[str, OptimizerFactory] = {
    "adafactor": Adafactor,
    "adam": Adam,
    "adamw": AdamW,
    "adamw8bit": AdamW8bit,
    "hot-cold": HotCold,
    "momentum": Momentum,
    "sgd": SGD,
}


def make_optimizer(text: str) -> RecordOptimizer:
    """Build an optimizer by registry name, or a third party's by `"package.module:Class"`.

    Parameters follow in parentheses: `"adamw(lr=1e-4, weight_decay=0.1)"`. Raises `ConfigError` for a name that is
    neither, for parameters that the optimizer does not have, and for values that cannot be used.
    """
    optimizer: RecordOptimizer = build("optimizer", text, OPTIMIZERS)
    return optimizer


def name_of(place: str) -> str:
    """The registry's name for `"package.module:Class"`; the place itself where it has none."""
    names = {f"{made.__module__}:{getattr(made, '__qualname__', '')}": name for name, made in OPTIMIZERS.items()}
    return names.get(place, place)


def check_optimizer(text: str) -> None:
    """Raise `ConfigError` that names the setting `optim` for what `make_optimizer` cannot make."""
    try:
        make_optimizer(text)
    except ConfigError as error:
        raise ConfigError(f"optim: {error}") from error
