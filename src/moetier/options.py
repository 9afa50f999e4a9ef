"""How to tier a model's experts: the options of a run, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import get_args

from moetier.crew import Split
from moetier.errors import ConfigError
from moetier.levers import Levers
from moetier.misses import CPU_EXPERTS
from moetier.plan import parse_size
from moetier.policies import check_online, make_admission
from moetier.prefetch_binding import AUTO, OFF, check_prefetch
from moetier.profile import Profile
from moetier.registry import find
from moetier.stores.checkpoint import IOMode
from moetier.threads import default_readers
from moetier.writeback import make_writeback


@dataclass(frozen=True, slots=True)
class Options:
    """How to tier a model's experts. Sizes are bytes or text such as "8GiB"; None means what the machine can spare.

    `slots` (a number, or a share of all experts such as "25%") overrides the size of the fastest tier. Policies are
    names from `moetier.POLICIES`. `readers` are threads that read the disk (by default one per core, from two to four);
    `io` is auto, direct or buffered. `split` is how torch's CPU threads share a small step: by "experts" (needs dtypes
    and shapes whose products do not depend on the number of threads), by "products" (torch's own way), or "auto":
    where both have the same bits, whichever turns out to be faster.
    `pin_after` accesses, or at once with a saved `profile` (a file), the experts used most are pinned;
    `record_profile` counts uses for `model.moetier.profile()`. `store` is the folder of a packed store to read the
    experts from, or "none"; by default the one beside the checkpoint, if there is one (docs/packed-store.md).
    `prefetch` is auto, off, or the name of a predictor from `moetier.PREDICTORS`; where it does not pay it turns itself
    off. With a GPU, `cpu_experts` says which missing experts the CPU computes where they are: off, auto (as measured at
    load), always; other than off, outputs depend on timing in their last bits (docs/gpu.md). `cache_prior`, `keep_top`,
    `max_rank`, `max_mass` and `drop_misses` are the lossy levers, off by default: see `moetier.levers.Levers`.

    `train` is the folder of a training run: a new one, or one to go on with, from its last checkpoint or from
    `train_step` (docs/training.md). `slots` are then those of weights, on a GPU those in its memory; `state_slots` and
    `gradient_slots` those of optimizer states and gradients. `activation_memory` is what the results of up projections
    may take from forward to backward, which computes the others again; by default a quarter of what the slots could
    have on a CPU, and what they leave. `keep` checkpoints are kept; `writeback` is a policy of
    `moetier.writeback.WRITEBACKS`: when changed experts are written to the run folder. Left alone, `policy` is "zigzag"
    in training. The levers that choose again (`cache_prior` and the next three) then bend routing in training mode.
    """

    device_memory: str | int | None = None
    host_memory: str | int | None = None
    slots: str | int | None = None
    policy: str = "horizon"
    admission: str = "decode-only"
    context: int = 4096
    readers: int = field(default_factory=default_readers)
    io: IOMode = "auto"
    split: Split = "auto"
    record_events: bool = False
    pin_after: int | None = None
    profile: str | None = None
    record_profile: bool = False
    store: str | None = None
    cpu_experts: str = "off"
    prefetch: str = AUTO
    cache_prior: float = 0.0
    keep_top: int | None = None
    max_rank: int | None = None
    max_mass: float | None = None
    drop_misses: float = 0.0
    train: str | None = None
    train_step: int | None = None
    state_slots: str | int | None = None
    gradient_slots: str | int | None = None
    activation_memory: str | int | None = None
    keep: int = 2
    writeback: str = "evict"

    @property
    def levers(self) -> Levers:
        """The lossy levers."""
        return Levers(self.cache_prior, self.keep_top, self.max_rank, self.max_mass, self.drop_misses)

    def check(self) -> None:
        """Raise `ConfigError` for what can be known to be wrong without a model."""
        check_online(self.policy)
        make_admission(self.admission)
        find("cpu_experts", self.cpu_experts, CPU_EXPERTS)
        check_prefetch(self.prefetch)
        for name in ("device_memory", "host_memory", "activation_memory"):
            value = getattr(self, name)
            if value is not None:
                parse_size(value, name)
        if self.io not in ("auto", "direct", "buffered"):
            raise ConfigError(f"io: {self.io!r} is unknown; choose auto, direct or buffered")
        if self.split not in get_args(Split):
            raise ConfigError(f"split: {self.split!r} is unknown; choose {', '.join(get_args(Split))}")
        if self.readers < 1:
            raise ConfigError(f"readers: at least 1 thread is needed, got {self.readers}")
        if self.context < 1:
            raise ConfigError(f"context: at least 1 token is needed, got {self.context}")
        if self.pin_after is not None and self.pin_after < 1:
            raise ConfigError(f"pin_after: at least 1 access is needed, got {self.pin_after}")
        if self.profile is not None:
            Profile.load(self.profile)
        self.levers.check()
        self._check_training()

    def _check_training(self) -> None:
        if self.train is None:
            for name in ("train_step", "state_slots", "gradient_slots", "activation_memory"):
                if getattr(self, name) is not None:
                    raise ConfigError(f"{name}: only with train=RUN_FOLDER")
            return
        unused = {
            "cpu_experts": self.cpu_experts != "off",
            "prefetch": self.prefetch not in (AUTO, OFF),
            "pin_after": self.pin_after is not None,
            "profile": self.profile is not None,
            "drop_misses": self.levers.drop_misses > 0,
        }
        for name, asked in unused.items():
            if asked:
                raise ConfigError(f"{name}: not while a model is trained; leave it out, or leave train out")
        make_writeback(self.writeback, 1)
        if self.keep < 1:
            raise ConfigError(f"keep: at least 1 checkpoint must be kept, got {self.keep}")
