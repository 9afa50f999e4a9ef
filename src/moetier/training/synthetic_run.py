"""Runs of the teacher regression, in memory or tiered: settings in, a report out. What `moetier train synthetic` does.

Knows the order of a training loop and what is measured in it; where experts live is in `synthetic_home.py`.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader

from moetier.errors import ConfigError, MoetierError
from moetier.training.lookahead import Lookahead, Prefetches
from moetier.training.optimizers import check_optimizer
from moetier.training.orders import ORDERS
from moetier.training.samplers import EnvironmentSampler
from moetier.training.synthetic import SyntheticConfig, SyntheticModel, expert_ranks
from moetier.training.teachers import Sample, TeacherRegression, Teachers

REPORT_VERSION = 1
HELD_OUT = 16  # samples of every environment
SHOWN = 10  # steps that the first and the last loss are means of
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
OPTIMS = ("sgd", "momentum", "adamw")  # those of torch
IDLES = ("dense", "skip")
MOVED = ("read_bytes", "written_bytes", "hits", "uses")


@dataclass(frozen=True, slots=True)
class Settings:
    """One run. `n_experts` are those of every layer, `expert_width` is that between an expert's two products."""

    n_experts: int = 256
    n_envs: int = 64
    top_k: int = 2
    layers: int = 1
    width: int = 64
    expert_width: int = 128
    samples_per_env: int = 512
    dtype: str = "float32"
    steps: int = 200
    batch_size: int = 64
    sampler: str = "episode"
    episode_len: int = 64
    envs_per_batch: int = 4
    sort_by_expert: bool = False  # over windows of `episode_len` batches
    lookahead: int = 1
    optim: str = "adamw"  # of the experts, by name from `optimizers.OPTIMIZERS`
    lr: float = 3e-3
    weight_decay: float = 0.0
    max_grad_norm: float | None = None
    idle: str = "dense"  # what a step does to experts without tokens: dense or skip
    seed: int = 0

    def teachers(self) -> Teachers:
        """The task."""
        return Teachers(self.n_envs, self.samples_per_env, self.width, seed=self.seed)

    def config(self) -> SyntheticConfig:
        """The model."""
        return SyntheticConfig(
            num_experts=self.n_experts,
            num_experts_per_tok=self.top_k,
            num_hidden_layers=self.layers,
            hidden_size=self.width,
            intermediate_size=self.expert_width,
            num_environments=self.n_envs,
            num_outputs=self.teachers().outputs,
            seed=self.seed,
            dtype=self.dtype,
        )

    def check(self) -> None:
        """Raise `ConfigError` for what can be known to be wrong before anything is made."""
        for name in ("n_experts", "n_envs", "steps", "batch_size", "expert_width", "episode_len", "envs_per_batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: must be at least 1, got {getattr(self, name)}")
        check_optimizer(self.optim)
        choices = {"sampler": tuple(ORDERS), "dtype": tuple(DTYPES), "idle": IDLES}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ConfigError(f"{name}: {getattr(self, name)!r} is unknown; choose one of {', '.join(known)}")
        if self.sampler == "episode" and self.envs_per_batch > self.n_envs:
            raise ConfigError(
                f"envs_per_batch: {self.envs_per_batch} environments a batch, but there are {self.n_envs} in all"
            )
        if self.sampler == "episode" and self.batch_size % self.envs_per_batch:
            raise ConfigError(
                f"batch_size: {self.batch_size} samples cannot be shared by {self.envs_per_batch} environments evenly; "
                "give a multiple"
            )
        self.teachers().check()
        self.config().check()


class Trained(Protocol):
    """A model in training, wherever its experts are."""

    model: SyntheticModel
    first_step: int  # steps that were made before, by the run that goes on

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """What steps all of the model."""

    @property
    def prefetches(self) -> Prefetches | None:
        """Who is told of the experts of the next batches."""

    def counters(self) -> dict[str, Any]:
        """Cumulative: `read_bytes` and `written_bytes` from and to home, of all records; `hits` and `uses` of weights
        in the first tier; and `caches`, by name, what `ExpertCache.stats` says.
        """

    def begin(self, loader: Lookahead) -> None:
        """All is made: go on where the run stopped, if there was one."""

    def stepped(self, step: int, loader: Lookahead) -> None:
        """`step` steps are done."""

    def close(self, loader: Lookahead | None) -> None:
        """Training is over (with the loader), or has failed (without)."""


@dataclass(frozen=True, slots=True)
class Step:
    """What a step was. Bytes are from and to home, of all kinds of records."""

    number: int
    loss: float
    seconds: float  # by the clock on the wall, the wait for the batch included
    experts: int  # distinct ones that the batch uses, over all layers
    read_bytes: int
    written_bytes: int
    hits: int  # of the weights' uses, those that found them in the first tier
    uses: int


Tell = Callable[[Step, Trained], None]


class InMemory:
    """The control: every expert is an ordinary parameter of a plain model.

    `implementation` is that of its experts; the default is transformers' own. With "moetier_reference" (see
    `reference.py`) the run has the bits of a tiered one.
    """

    first_step = 0
    prefetches = None

    def __init__(self, settings: Settings, implementation: str | None = None):
        if settings.optim not in OPTIMS:
            raise ConfigError(f"optim: in memory there are {', '.join(OPTIMS)}; {settings.optim!r} is for tiered ones")
        if settings.idle != "dense":
            raise ConfigError("idle: in memory, torch updates all experts in every step; skip is for tiered ones")
        self.model = SyntheticModel(settings.config()).reset().to(DTYPES[settings.dtype])
        if implementation is not None:
            self.model.set_experts_implementation(implementation)
        self.optimizer = plain_optimizer(settings, self.model)
        self._max_norm = settings.max_grad_norm
        if self._max_norm is not None:
            self.optimizer.register_step_pre_hook(self._clip)

    def _clip(self, *args: Any) -> None:
        assert self._max_norm is not None
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._max_norm)

    def counters(self) -> dict[str, Any]:
        """Nothing is read or written."""
        return {**dict.fromkeys(MOVED, 0), "caches": {}}

    def begin(self, loader: Lookahead) -> None:
        """Every run begins anew."""

    def stepped(self, step: int, loader: Lookahead) -> None:
        """Nothing is kept."""

    def close(self, loader: Lookahead | None) -> None:
        """Nothing is open."""


def plain_optimizer(settings: Settings, model: SyntheticModel) -> torch.optim.Optimizer:
    """torch's own, for a model in memory; a parameter without a gradient is updated as with one of zeros."""
    given: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay, "fused": True}
    if settings.optim == "adamw":
        return torch.optim.AdamW(model.parameters(), **given)
    return torch.optim.SGD(model.parameters(), momentum=0.9 if settings.optim == "momentum" else 0.0, **given)


def loader_of(settings: Settings, model: SyntheticModel, target: Prefetches | None) -> Lookahead:
    """The batches of a run, with their experts foretold to `target`."""
    data = TeacherRegression(settings.teachers())
    sampler = EnvironmentSampler(
        data,
        settings.batch_size,
        settings.sampler,
        environments=data.environments,
        episode_length=settings.episode_len,
        envs_per_batch=settings.envs_per_batch,
        sort_keys=expert_ranks(model, data.environments) if settings.sort_by_expert else None,
        sort_window=settings.episode_len if settings.sort_by_expert else 0,
        seed=settings.seed,
    )
    loader: DataLoader[Sample] = DataLoader(data, batch_size=settings.batch_size, sampler=sampler)
    hint = None if target is None else model.hint
    return Lookahead(loader, settings.lookahead, hint, target)


def train(settings: Settings, make: Callable[[Settings], Trained], tell: Tell | None = None) -> dict[str, Any]:
    """Make a model with `make`, train it, and report; `tell` hears of every step. See `_report` for what comes back."""
    settings.check()
    begin = time.perf_counter()
    trained = make(settings)
    loader = None
    steps: list[Step] = []
    try:
        loader = loader_of(settings, trained.model, trained.prefetches)
        trained.begin(loader)
        ready = time.perf_counter()
        with torch.enable_grad():
            for step in _steps(settings, trained, loader):
                steps.append(step)
                if tell is not None:
                    tell(step, trained)
        counters = trained.counters()
        seconds = {"make": ready - begin, "train": time.perf_counter() - ready}
        held_out = evaluate(settings, trained.model)
    except BaseException:
        trained.close(None)
        raise
    trained.close(loader)
    return _report(settings, steps, held_out, counters, seconds)


@torch.no_grad()
def evaluate(settings: Settings, model: SyntheticModel) -> float:
    """The mean squared error over samples of all environments that were held out, `HELD_OUT` of each.

    The loss of the last steps is not that: it is of the environments that these steps had.
    """
    data = TeacherRegression(replace(settings.teachers(), samples=HELD_OUT), held_out=True)
    size = HELD_OUT * max(1, settings.batch_size // HELD_OUT)
    total = 0.0
    for begin in range(0, len(data), size):
        batch = data.batch(range(begin, min(begin + size, len(data))))
        total += float(model(**batch).loss) * len(batch["target"])
    return total / len(data)


def _steps(settings: Settings, trained: Trained, loader: Lookahead) -> Iterator[Step]:
    model, optimizer, number = trained.model, trained.optimizer, trained.first_step
    before = trained.counters()
    while number < settings.steps:
        begin = time.perf_counter()
        for batch in loader:
            waited = time.perf_counter() - begin
            experts = len(model.hint(batch))  # not of the step: nobody else asks
            begin = time.perf_counter()
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            number += 1
            trained.stepped(number, loader)
            value = loss.item()
            seconds = waited + time.perf_counter() - begin
            if not math.isfinite(value):
                raise MoetierError(f"the loss of step {number} is {value}; try a lower learning rate")
            after = trained.counters()
            moved = [after[name] - before[name] for name in MOVED]
            before = after
            yield Step(number, value, seconds, experts, *moved)
            if number == settings.steps:
                return
            begin = time.perf_counter()


def _report(
    settings: Settings, steps: list[Step], held_out: float, counters: dict[str, Any], seconds: dict[str, float]
) -> dict[str, Any]:
    """Version 1, bytes and seconds as plain numbers:

    version, settings   of this format; of the run
    loss                first, last: means over `shown` steps at the beginning and at the end of this run; held_out:
                        after it, over samples of all environments that nothing was trained on
    steps               lists, one entry a step: number, loss and what else `Step` has
    per_step            the means of these; and median_seconds
    caches              by name (weights, state, gradients): what `ExpertCache.stats` says, and hit rates by tier
    seconds             make (model, data, files), train
    """
    columns = {name: [getattr(step, name) for step in steps] for name in Step.__dataclass_fields__}
    losses = columns["loss"]
    shown = min(SHOWN, len(losses))
    means = {name: statistics.fmean(columns[name]) for name in list(columns)[2:]}
    return {
        "version": REPORT_VERSION,
        "settings": asdict(settings),
        "loss": {
            "first": statistics.fmean(losses[:shown]),
            "last": statistics.fmean(losses[-shown:]),
            "shown": shown,
            "held_out": held_out,
        },
        "per_step": {**means, "median_seconds": statistics.median(columns["seconds"])},
        "caches": {name: with_hit_rates(stats) for name, stats in counters["caches"].items()},
        "seconds": seconds,
        "steps": columns,
    }


def with_hit_rates(stats: dict[str, Any]) -> dict[str, Any]:
    """A cache's counters, with the share of hits of each tier added."""
    for tier in stats["tiers"]:
        uses = sum(sum(tier[kind]) for kind in ("hits", "lates", "misses"))
        tier["hit_rate"] = sum(tier["hits"]) / uses if uses else 0.0
    return stats
