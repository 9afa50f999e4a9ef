"""What a training run of a language model is told: its data's shape, its steps, its learning rates.

Pure numbers, no torch: which batch is whose and which learning rate a step has follow from the step's number alone, so
that going on after a stop is arithmetic. Knows no model, no files and no memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from moetier.errors import ConfigError
from moetier.training.orders import Draws, Indices


def constant(done: float) -> float:
    """The full rate."""
    return 1.0


def linear(done: float) -> float:
    """Down to zero on a line."""
    return 1.0 - done


def cosine(done: float) -> float:
    """Down to zero along half a cosine (Loshchilov and Hutter 2017)."""
    return 0.5 * (1.0 + math.cos(math.pi * done))


SCHEDULES: dict[str, Callable[[float], float]] = {"cosine": cosine, "linear": linear, "constant": constant}
IDLES = ("dense", "skip")
DTYPES = ("auto", "float32", "bfloat16")


@dataclass(frozen=True, slots=True)
class Settings:
    """All that the losses of a run depend on, beside its model and its texts. `steps` are the optimizer's, in all."""

    steps: int
    sequence_length: int = 256
    batch_size: int = 8
    accumulation: int = 1  # batches of a step
    lr: float = 1e-4
    warmup: int = 0  # steps
    schedule: str = "cosine"
    optim: str = "adamw"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0  # 0: no clipping
    idle: str = "dense"
    aux_loss: float | None = None  # None: as the model has it
    gradient_checkpointing: bool = False
    seed: int = 0
    dtype: str = "auto"

    def check(self) -> None:
        """Raise `ConfigError` for what can be known to be wrong without a model."""
        for name in ("steps", "sequence_length", "batch_size", "accumulation"):
            least = 2 if name == "sequence_length" else 1
            if getattr(self, name) < least:
                raise ConfigError(f"{name}: must be at least {least}, got {getattr(self, name)}")
        for name in ("lr", "weight_decay", "max_grad_norm"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ConfigError(f"{name}: must be a number of at least 0, got {getattr(self, name)}")
        if not 0 <= self.warmup <= self.steps:
            raise ConfigError(f"warmup: from 0 to the {self.steps} steps there are, got {self.warmup}")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed: must be from 0 to 2**63 - 1, got {self.seed}")
        if self.dtype == "float16":
            raise ConfigError("dtype: float16 gradients overflow without loss scaling; train in bfloat16 or float32")
        for name, known in {"schedule": tuple(SCHEDULES), "idle": IDLES, "dtype": DTYPES}.items():
            if getattr(self, name) not in known:
                raise ConfigError(f"{name}: {getattr(self, name)!r} is unknown; choose one of {', '.join(known)}")

    def lr_of(self, step: int) -> float:
        """The learning rate of a step, which count from 1: up to `lr` in `warmup` steps, then as scheduled."""
        if step <= self.warmup:
            return self.lr * step / self.warmup
        return self.lr * SCHEDULES[self.schedule]((step - 1 - self.warmup) / max(1, self.steps - self.warmup))

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    def check_same(self, before: Mapping[str, Any], where: str) -> None:
        """Raise `ConfigError` unless a run that was begun so can go on with these settings to the same bits."""
        now = self.to_dict()
        if self.schedule == "constant":  # then more steps are the same run, only longer
            now["steps"] = before.get("steps")
        differing = [f"{name} {before.get(name)}, not {now[name]}" for name in now if before.get(name) != now[name]]
        if differing:
            hint = (
                "; with a schedule other than constant all learning rates depend on steps"
                if "steps" in str(differing)
                else ""
            )
            raise ConfigError(
                f"{where}: the run was begun with {', '.join(differing)}{hint}; give the same, or another folder"
            )


class Batches:
    """Which blocks of the data each batch has: all once an epoch, shuffled by (seed, epoch).

    What is left of an epoch and fills no batch is left out; it is other blocks every time.
    """

    def __init__(self, blocks: int, batch_size: int, seed: int):
        self.per_epoch = blocks // batch_size
        if not self.per_epoch:
            raise ConfigError(
                f"batch_size: the texts have {blocks} blocks of sequence_length tokens, less than a batch of "
                f"{batch_size}; give more text, or a smaller batch_size or sequence_length"
            )
        self._blocks, self._batch_size, self._seed = blocks, batch_size, seed
        self._epoch = -1
        self._order: Indices

    def __getitem__(self, number: int) -> Indices:
        """The blocks of the batch with this number, over all epochs, from 0."""
        epoch, place = divmod(number, self.per_epoch)
        if epoch != self._epoch:
            self._order, self._epoch = Draws(self._seed, epoch).permutation(self._blocks), epoch
        return self._order[place * self._batch_size : (place + 1) * self._batch_size]
