"""The teacher regression: environments, each with a frozen teacher of its own, and their samples as a dataset.

Made from a seed alone. A sample of environment e is an input x ~ N(0, 1), [width], and the target of e's teacher: a
random network of one hidden layer, y = W2_e · tanh(W1_e · x), [outputs], of variance near 1/2. No two teachers have
anything in common, so that a model has to keep something for every environment: that is what its experts are for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import Dataset

from moetier.errors import ConfigError

Sample = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Teachers:
    """The task. Its samples take environments x samples x (width + outputs) x 4 bytes of memory."""

    environments: int = 64
    samples: int = 512  # of each environment
    width: int = 64  # of inputs
    outputs: int = 8
    hidden: int = 16  # of the teachers
    noise: float = 0.0  # standard deviation of what is added to the targets: the loss cannot fall below its square
    seed: int = 0

    def check(self) -> None:
        """Raise `ConfigError` for numbers that cannot be."""
        for name in ("environments", "samples", "width", "outputs", "hidden"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.noise < float("inf"):
            raise ConfigError(f"noise: must be a number from 0, got {self.noise}")
        if not 0 <= self.seed < 2**31:
            raise ConfigError(f"seed: must be from 0 to 2**31 - 1, got {self.seed}")


class TeacherRegression(Dataset[Sample]):
    """The samples of all environments, one environment behind the other; `held_out` ones are others of the same task.

    An item is `inputs` [width] and `target` [outputs] float32, and `environment` [] int64.
    """

    def __init__(self, teachers: Teachers, held_out: bool = False):
        teachers.check()
        self.teachers = teachers
        count = teachers.environments * teachers.samples
        self.environments = torch.arange(teachers.environments).repeat_interleave(teachers.samples)  # [N]
        self._inputs = torch.empty(count, teachers.width)
        self._targets = torch.empty(count, teachers.outputs)
        for environment in range(teachers.environments):
            rows = slice(environment * teachers.samples, (environment + 1) * teachers.samples)
            self._inputs[rows], self._targets[rows] = _samples_of(teachers, environment, held_out)

    def __len__(self) -> int:
        return len(self._inputs)

    def __getitem__(self, index: int) -> Sample:
        return {
            "inputs": self._inputs[index],
            "environment": self.environments[index],
            "target": self._targets[index],
        }

    def batch(self, indices: Sequence[int] | torch.Tensor) -> Sample:
        """Many samples at once, stacked: what a `DataLoader` collates from single ones, [B, …]."""
        rows = torch.as_tensor(indices)
        return {"inputs": self._inputs[rows], "environment": self.environments[rows], "target": self._targets[rows]}


def _samples_of(teachers: Teachers, environment: int, held_out: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of one environment, [samples, width] and [samples, outputs]."""
    generator = torch.Generator().manual_seed(teachers.seed << 31 | environment)
    first = torch.randn(teachers.width, teachers.hidden, generator=generator) * teachers.width**-0.5
    second = torch.randn(teachers.hidden, teachers.outputs, generator=generator) * teachers.hidden**-0.5
    if held_out:
        generator.manual_seed((1 << 62) + (teachers.seed << 31 | environment))
    inputs = torch.randn(teachers.samples, teachers.width, generator=generator)
    targets = torch.tanh(inputs @ first) @ second
    if teachers.noise:
        targets += teachers.noise * torch.randn(targets.shape, generator=generator)
    return inputs, targets
