"""What an optimizer is told for a step: its settings, checked, and the number of the step.

Knows torch's parameter groups (whose learning rate may be a tensor); knows no tensors of a model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Self, TypeVar

from moetier.errors import ConfigError

# switches of torch's groups that change the arithmetic and that no optimizer here has
REFUSED = ("amsgrad", "maximize", "differentiable", "capturable")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Settings that a schedule may change from step to step; each optimizer adds its own.

    Names are those of torch's parameter groups. Raises `ConfigError` for a value that cannot be used.
    """

    lr: float
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        self._check_at_least("lr", 0.0)
        self._check_at_least("weight_decay", 0.0)

    @classmethod
    def from_group(cls, group: Mapping[str, Any]) -> Self:
        """The settings in a torch parameter group; tensors of one element are read, what the group lacks is default.

        Raises `ConfigError` for a group that asks for what this optimizer does not do.
        """
        for name in REFUSED:
            if group.get(name):
                raise ConfigError(f"{name}: experts are not trained with {name}=True; leave it off")
        return cls(**{field.name: plain(group[field.name]) for field in fields(cls) if field.name in group})

    def group(self) -> dict[str, Any]:
        """As defaults for a torch parameter group."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def _check_at_least(self, name: str, smallest: float) -> None:
        value = getattr(self, name)
        if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= smallest):
            raise ConfigError(f"{name}: {value!r} must be a number of at least {smallest:g}")

    def _check_share(self, name: str, value: Any) -> None:
        if not (isinstance(value, (int, float)) and 0.0 <= value < 1.0):
            raise ConfigError(f"{name}: {value!r} must be a number from 0 to below 1")


S = TypeVar("S", bound=Settings)


@dataclass(frozen=True, slots=True)
class Hyper:
    """One step: its number and the settings it is made with.

    `step` counts from 1. With dense semantics it is the optimizer's number of steps; where experts without tokens are
    skipped, it is the number of updates that this expert had, this one included (docs/optimizers.md).
    """

    step: int
    settings: Settings

    def __post_init__(self) -> None:
        if self.step < 1:
            raise ConfigError(f"step: steps count from 1, got {self.step}")

    @property
    def lr(self) -> float:
        """The learning rate of this step."""
        return self.settings.lr

    @property
    def weight_decay(self) -> float:
        """The weight decay of this step."""
        return self.settings.weight_decay

    def of(self, kind: type[S]) -> S:
        """The settings as those of one optimizer. Raises `TypeError` for another's."""
        if not isinstance(self.settings, kind):
            raise TypeError(f"{kind.__name__} are needed, got {type(self.settings).__name__}")
        return self.settings

    def at(self, step: int) -> Hyper:
        """The same settings for a step of another number."""
        return replace(self, step=step)


def to_json(settings: Settings) -> dict[str, Any]:
    """As JSON may hold them; exact, since the settings are finite."""
    return {
        field.name: to_json(value) if isinstance(value := getattr(settings, field.name), Settings) else value
        for field in fields(settings)
    }


def from_json(kind: type[S], saved: Mapping[str, Any]) -> S:
    """What `to_json` gave. Raises `ConfigError` or `TypeError` for anything else."""
    return kind(**{name: plain(value) for name, value in saved.items()})


def plain(value: Any) -> Any:
    """A setting as torch's groups hold it, without tensors: one-element tensors become numbers, lists tuples."""
    if isinstance(value, (list, tuple)):
        return tuple(plain(item) for item in value)
    item = getattr(value, "item", None)
    return value if item is None else item()
