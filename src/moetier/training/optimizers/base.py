"""What the optimizers have in common: the layout of the state, masters, and catching up chunk by chunk.

Knows how an update and a missed step are carried out on one record; the formula is each optimizer's own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Self

import torch

from moetier.record import Field, RecordLayout
from moetier.training.optimizers.fields import (
    HALF,
    MASTER,
    Fields,
    Zeros,
    chunks,
    state_name,
    untouched,
    working,
    working_dtype,
)
from moetier.training.optimizers.settings import Hyper, Settings
from moetier.training.optimizers.usage import Usage

Part = tuple[str, torch.dtype, tuple[int, ...]]  # of a field's state: name, dtype, shape
Tensors = Sequence[torch.Tensor]


class FieldwiseOptimizer(ABC):
    """An optimizer that updates every field of a record on its own, as if it were a parameter.

    `settings` are those that a torch parameter group starts from. With `masters`, half-precision fields are updated in
    an fp32 copy that is part of the state; without, in their own precision, as torch.optim does with such parameters.
    """

    def __init__(self, settings: Settings, masters: bool = True):
        self.settings = settings
        self.masters = masters

    @abstractmethod
    def parts(self, field: Field, dtype: torch.dtype) -> list[Part]:
        """The state of a field that is updated in `dtype`, but for the master."""

    @abstractmethod
    def step(self, params: Tensors, gradients: Tensors, states: Sequence[Fields], hyper: Hyper) -> None:
        """Update fields in place; a gradient has its field's dtype, a state the parts of its field."""

    @abstractmethod
    def catch_up(self, param: torch.Tensor, state: Fields, missed: Sequence[Hyper]) -> bool:
        """Make the missed zero-gradient steps of one field; True if anything may have changed."""

    @abstractmethod
    def idles(self, hyper: Hyper) -> bool:
        """Whether a zero-gradient step with these settings can change anything, whatever the state."""

    def usage(self, layers: int, experts: int) -> Usage | None:
        """None: all experts are treated alike."""
        return None

    def part(self, share: float) -> Self:
        """Itself: all experts are treated alike."""
        return self

    def state_layout(self, weights: RecordLayout) -> RecordLayout | None:
        """The state's record, or None where there is none. Raises `ConfigError` for fields that cannot be trained."""
        parts: list[Part] = []
        for field in weights.fields:
            dtype = working_dtype(field, self.masters)
            if self.masters and field.dtype in HALF:
                parts.append((state_name(field.name, MASTER), dtype, field.shape))
            parts += [(state_name(field.name, name), kind, shape) for name, kind, shape in self.parts(field, dtype)]
        return RecordLayout.of(parts) if parts else None

    def begin(self, weights: Fields, state: Fields) -> None:
        """Make a zeroed state ready for its first step: copy the masters from the weights."""
        for name, weight in weights.items():
            master = state.get(state_name(name, MASTER))
            if master is not None:
                master.copy_(weight)

    def update(self, weights: Fields, gradients: Fields, state: Fields, hyper: Hyper) -> None:
        """One step, in place. Gradients are cast to the dtype that is updated, if they have another."""
        params = [working(name, weights, state) for name in weights]
        cast = [gradients[name].to(param.dtype) for name, param in zip(weights, params, strict=True)]
        self.step(params, cast, [self._parts(name, state) for name in weights], hyper)
        for weight, param in zip(weights.values(), params, strict=True):
            if param is not weight:
                weight.copy_(param)

    def idle(self, weights: Fields, state: Fields, missed: Sequence[Hyper]) -> bool:
        """The missed steps, in order, as if each had been made with a zero gradient; True if a bit may have changed."""
        steps = [hyper for hyper in missed if self.idles(hyper)]
        changed = False
        for name, weight in weights.items() if steps else ():
            param = working(name, weights, state)
            if self.catch_up(param, self._parts(name, state), steps):
                changed = True
                if param is not weight:
                    weight.copy_(param)
        return changed

    @staticmethod
    def _parts(name: str, state: Fields) -> dict[str, torch.Tensor]:
        prefix = state_name(name, "")
        return {
            key.removeprefix(prefix): tensor
            for key, tensor in state.items()
            if key.startswith(prefix) and key != state_name(name, MASTER)
        }


class ElementwiseOptimizer(FieldwiseOptimizer):
    """An optimizer whose every element is updated by itself, with `moments` of the field's own shape.

    That is what lets missed steps be made chunk by chunk, all of them on one chunk before the next is read.
    """

    moments: tuple[str, ...] = ()

    def __init__(self, settings: Settings, masters: bool = True):
        super().__init__(settings, masters)
        self._zeros = Zeros()

    @abstractmethod
    def still(self, hyper: Hyper) -> bool:
        """Whether a zero-gradient step leaves a field alone, to the last bit, whose moments are all zero bits."""

    def parts(self, field: Field, dtype: torch.dtype) -> list[Part]:
        """One tensor of the field's shape per moment."""
        return [(moment, dtype, field.shape) for moment in self.moments]

    def catch_up(self, param: torch.Tensor, state: Fields, missed: Sequence[Hyper]) -> bool:
        """Make the steps on one chunk after the other."""
        if all(self.still(hyper) for hyper in missed) and untouched(state):
            return False
        names = list(state)
        for chunk, *moments in chunks([param, *state.values()]):
            parts, zeros = dict(zip(names, moments, strict=True)), self._zeros.like(chunk)
            for hyper in missed:
                self.step([chunk], [zeros], [parts], hyper)
        return True
