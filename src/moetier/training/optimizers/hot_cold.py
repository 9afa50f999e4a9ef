"""Two optimizers in one: a full one for experts that are used often, a cheaper one for the others.

Which of the two an expert has depends on the share of recent steps that it was used in (`usage.py`). Decides between
optimizers and keeps their states apart; the arithmetic is theirs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import torch

from moetier.errors import ConfigError
from moetier.record import RecordLayout
from moetier.training.optimizers.base import FieldwiseOptimizer
from moetier.training.optimizers.fields import MASTER, Fields, state_name
from moetier.training.optimizers.settings import Hyper, Settings
from moetier.training.optimizers.usage import Usage

if TYPE_CHECKING:
    from moetier.training.optimizers import RecordOptimizer

CLOCK = "clock"  # of a side with state: the step before its first, and its last


@dataclass(frozen=True, slots=True, kw_only=True)
class HotColdSettings(Settings):
    """Settings of both sides; `lr` and `weight_decay` are the hot side's."""

    hot: Settings
    cold: Settings
    cold_lr: float = 1.0

    def updated(self, group: Mapping[str, Any]) -> Self:
        """One torch group for both: each side takes the names it knows, the cold one `cold_lr` times the rate."""
        hot = self.hot.updated(group)
        cold = replace(self.cold.updated(group), lr=hot.lr * self.cold_lr)
        return replace(self, lr=hot.lr, weight_decay=hot.weight_decay, hot=hot, cold=cold)


class HotCold:
    """`hot` for experts used in at least `threshold` of recent steps, `cold` for the others.

    A side that an expert comes to, or comes back to, begins with moments of zeros and counts its steps from 1; what it
    had before is not used. Half-precision weights have one master, which both sides update.

    Args:
        hot, cold: optimizers, by name or made; those of `OPTIMIZERS` but this one.
        threshold: share of steps, from 0 (all hot) to 1.
        half_life: steps after which a step counts half in the share.
        cold_lr: the cold side's learning rate is the group's times this. SGD needs far larger ones than AdamW.
        masters: as for every optimizer; for sides that are made by name.
    """

    def __init__(
        self,
        hot: str | FieldwiseOptimizer = "adamw",
        cold: str | FieldwiseOptimizer = "sgd",
        threshold: float = 0.25,
        half_life: float = 50.0,
        cold_lr: float = 1.0,
        masters: bool = True,
    ):
        if not 0.0 <= threshold <= 1.0:
            raise ConfigError(f"threshold: {threshold!r} must be a share from 0 to 1")
        if not cold_lr >= 0:
            raise ConfigError(f"cold_lr: {cold_lr!r} must be at least 0")
        self.threshold, self.half_life = threshold, half_life
        self._hot, self._cold = _Side("hot", _made(hot, masters)), _Side("cold", _made(cold, masters))
        if self._hot.optimizer.masters != self._cold.optimizer.masters:
            raise ConfigError("masters: the hot and the cold optimizer share them, so both must have them or neither")
        sides = self._hot.optimizer.settings, self._cold.optimizer.settings
        common = {"lr": sides[0].lr, "weight_decay": sides[0].weight_decay}
        self.settings = HotColdSettings(**common, hot=sides[0], cold=sides[1], cold_lr=cold_lr)
        Usage(1, 1, half_life)  # checks it

    def usage(self, layers: int, experts: int) -> Usage:
        """The books that `part` is asked by."""
        return Usage(layers, experts, self.half_life)

    def part(self, share: float) -> RecordOptimizer:
        """The optimizer of an expert with this share of uses. For steps that it missed: the share at its last use."""
        return self._hot if share >= self.threshold else self._cold

    def state_layout(self, weights: RecordLayout) -> RecordLayout | None:
        """Room for both sides: masters once, the rest under `hot.` and `cold.`."""
        fields = {
            field.name: (field.name, field.dtype, field.shape)
            for side in (self._hot, self._cold)
            for field in getattr(side.state_layout(weights), "fields", ())
        }
        return RecordLayout.of(list(fields.values())) if fields else None

    def begin(self, weights: Fields, state: Fields) -> None:
        """Copy the masters from the weights."""
        self._hot.begin(weights, state)

    def update(self, weights: Fields, gradients: Fields, state: Fields, hyper: Hyper) -> None:
        """Not without knowing how often the expert is used: that is what `part` is for."""
        raise TypeError("a hot-and-cold optimizer updates experts by its parts")

    def idle(self, weights: Fields, state: Fields, missed: Sequence[Hyper]) -> bool:
        """As `update`."""
        raise TypeError("a hot-and-cold optimizer updates experts by its parts")

    def idles(self, hyper: Hyper) -> bool:
        """Whether either side's zero-gradient step can change anything."""
        return self._hot.idles(hyper) or self._cold.idles(hyper)


class _Side:
    """One of the two, on its fields of the common state."""

    def __init__(self, name: str, optimizer: FieldwiseOptimizer):
        self.name, self.optimizer = name, optimizer

    @property
    def settings(self) -> Settings:
        return self.optimizer.settings

    def usage(self, layers: int, experts: int) -> Usage | None:
        return None

    def part(self, share: float) -> RecordOptimizer:
        return self

    def state_layout(self, weights: RecordLayout) -> RecordLayout | None:
        """What this side touches; None if it leaves the state where it is."""
        layout = self.optimizer.state_layout(weights)
        if layout is None:
            return None
        parts = [(self._own(field.name), field.dtype, field.shape) for field in layout.fields]
        if any(not _shared(field.name) for field in layout.fields):
            parts.append((self._own(CLOCK), torch.int64, (2,)))
        return RecordLayout.of(parts)

    def begin(self, weights: Fields, state: Fields) -> None:
        self.optimizer.begin(weights, state)

    def update(self, weights: Fields, gradients: Fields, state: Fields, hyper: Hyper) -> None:
        start = self._enter(state, hyper.step)
        self.optimizer.update(weights, gradients, self._fields(state), self._hyper(hyper, start))
        self._leave(state, hyper.step)

    def idle(self, weights: Fields, state: Fields, missed: Sequence[Hyper]) -> bool:
        if not missed:
            return False
        start = self._enter(state, missed[0].step)
        steps = [self._hyper(hyper, start) for hyper in missed]
        changed = self.optimizer.idle(weights, self._fields(state), steps)
        self._leave(state, missed[-1].step)
        return changed or self._own(CLOCK) in state

    def idles(self, hyper: Hyper) -> bool:
        return self.optimizer.idles(self._hyper(hyper, 0))

    def _hyper(self, hyper: Hyper, start: int) -> Hyper:
        settings = hyper.of(HotColdSettings)
        return Hyper(hyper.step - start, settings.hot if self.name == "hot" else settings.cold)

    def _enter(self, state: Fields, step: int) -> int:
        """The number of the step before this side's first, after making it that of a new start if there was a gap."""
        clock = state.get(self._own(CLOCK))
        if clock is None:
            return 0
        start, last = clock.tolist()
        if last == step - 1 and last > 0:
            return int(start)
        for name, tensor in state.items():
            if name.startswith(self._own("")):
                tensor.zero_()
        clock[0] = step - 1
        return step - 1

    def _leave(self, state: Fields, step: int) -> None:
        clock = state.get(self._own(CLOCK))
        if clock is not None:
            clock[1] = step

    def _fields(self, state: Fields) -> dict[str, torch.Tensor]:
        prefix = self._own("")
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in state.items()
            if _shared(name) or (name.startswith(prefix) and name != self._own(CLOCK))
        }

    def _own(self, name: str) -> str:
        return name if name and _shared(name) else state_name(self.name, name)


def _shared(name: str) -> bool:
    return name.endswith(state_name("", MASTER))


def _made(optimizer: str | FieldwiseOptimizer, masters: bool) -> FieldwiseOptimizer:
    from moetier.training.optimizers import make_optimizer  # which has this one

    made: Any = optimizer
    if isinstance(optimizer, str):
        text = optimizer if "(" in optimizer else f"{optimizer}(masters={masters})"
        made = make_optimizer(text)
    if not isinstance(made, FieldwiseOptimizer):
        raise ConfigError(f"hot-cold: {optimizer!r} cannot be one side of it; choose an optimizer such as adamw or sgd")
    return made
