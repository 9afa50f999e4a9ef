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

    def updated(self, group: Mapping[str, Any]) -> Self:
        """These settings with the values of a torch parameter group, whose tensors of one element are read as numbers.

        What the group lacks stays, and so does what means something else there (Adafactor's `eps` is a pair). Raises
        `ConfigError` for a group that asks for what no optimizer here does.
        """
        for name in REFUSED:
            if group.get(name):
                raise ConfigError(f"{name}: experts are not trained with {name}=True; leave it off")
        names = [field.name for field in fields(self) if field.name in group]
        values = {name: plain(group[name]) for name in names}
        return replace(self, **{name: value for name, value in values.items() if self._takes(name, value)})

    def group(self) -> dict[str, Any]:
        """As defaults for a torch parameter group."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def to_json(self) -> dict[str, Any]:
        """As JSON may hold them; exact, since all numbers are finite and JSON has their shortest exact digits."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value.to_json() if isinstance(value, Settings) else value for name, value in values.items()}

    def from_json(self, saved: Mapping[str, Any]) -> Self:
        """What `to_json` of settings of this kind gave. Raises `ConfigError` for anything else."""
        try:
            values: dict[str, Any] = {
                name: own.from_json(value) if isinstance(own := getattr(self, name), Settings) else plain(value)
                for name, value in saved.items()
            }
            return replace(self, **values)
        except (AttributeError, TypeError) as error:
            raise ConfigError(f"saved settings {saved!r} are not those of this optimizer: {error}") from error

    def _takes(self, name: str, value: Any) -> bool:
        """Whether a group's value of this name means what it means here."""
        return True

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


def plain(value: Any) -> Any:
    """A setting as torch's groups hold it, without tensors: one-element tensors become numbers, lists tuples."""
    if isinstance(value, (list, tuple)):
        return tuple(plain(item) for item in value)
    item = getattr(value, "item", None)
    return value if item is None else item()
