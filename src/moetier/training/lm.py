"""The loop of `moetier train`: a causal language model on blocks of tokens, and what is measured in it.

The model is any that was loaded to be trained (docs/training.md). A step depends on its number, the model and the
optimizer only; so a run that is stopped and goes on has the bits of one that never stopped. Prints nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moetier.cache import ExpertCache
from moetier.errors import ConfigError, MoetierError, UnsupportedModelError
from moetier.registry import parse_name
from moetier.training.balance import NUMBERS
from moetier.training.lm_settings import Batches, Settings
from moetier.training.optimizer import SGD, AdamW, TieredOptimizer, session_of
from moetier.training.session import TrainingSession
from moetier.training.texts import Blocks

FORMAT = "moetier train, version 1"  # of what a checkpoint's `extra` holds
COUNTED = ("read_bytes", "written_bytes", "hits", "uses")


@dataclass(frozen=True, slots=True)
class Step:
    """What a step was. Bytes are from and to home, of all kinds of records; uses are of experts' weights."""

    number: int
    loss: float  # mean over the tokens, before the step
    lr: float
    grad_norm: float | None  # before clipping; None without
    tokens: int
    seconds: float
    read_bytes: int
    written_bytes: int
    hits: int
    uses: int
    dirty_bytes: int  # in memory, newer than at home, at the end of the step
    routing: dict[str, float] | None = None  # by `balance.NUMBERS`, what favouring experts did; None where none are


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The loss on texts that are not trained on, after a step."""

    step: int
    loss: float

    @property
    def perplexity(self) -> float:
        """exp of the loss; infinite where a float cannot hold it."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


class LanguageModelTraining:
    """One model, its optimizer and its data, at some step of its run.

    Goes on by itself from the step of the run folder that the model was loaded with. Raises `ConfigError` where that
    was begun with other settings or other texts.
    """

    def __init__(self, model: Any, settings: Settings, data: Blocks):
        settings.check()
        self.model, self.settings, self._data = model, settings, data
        self._batches = Batches(len(data), settings.batch_size, settings.seed)
        self._session: TrainingSession = session_of(model)
        self._check_run()
        prepare(model, settings)
        torch.manual_seed(settings.seed)  # of dropout, if there is any; a run that goes on has its own state back
        self.optimizer = optimizer_of(model, settings)
        self.optimizer.resume()

    @property
    def step(self) -> int:
        """Steps made so far, those of earlier runs included."""
        return self._session.step

    @property
    def committed(self) -> int | None:
        """The last step that the run folder has."""
        return self._session.run.step

    def _check_run(self) -> None:
        run = self._session.run
        if run.step is None:
            return
        said = self._session.run.extra(run.step)["extra"]
        if not isinstance(said, dict) or said.get("format") != FORMAT:
            raise ConfigError(
                f"{run.folder}: the run was not made by moetier train; go on with the loop that made it, or give "
                "another folder"
            )
        self.settings.check_same(said["settings"], str(run.folder))
        if said["texts"] != self._data.digest:
            raise ConfigError(
                f"{run.folder}: the texts have changed since the run began, or their order, or the tokenizer; give "
                "the same, or another folder"
            )

    def steps(self) -> Iterator[Step]:
        """Make the steps that are left; each is done when it is yielded.

        Raises `MoetierError` where the loss is no number any more, `StoreError` where experts cannot be read or
        written. The last checkpoint stays as it is.
        """
        while self.step < self.settings.steps:
            before = self.counters()  # here: what evaluations and checkpoints move is not a step's
            routing = self._session.routing
            tally = None if routing is None else routing.tally.copy()
            begin = time.perf_counter()
            loss, lr = self._step(self.step + 1)
            seconds = time.perf_counter() - begin
            after = self.counters()
            read, written, hits, uses = (after[name] - before[name] for name in COUNTED)
            tokens = self.settings.accumulation * self.settings.batch_size * self.settings.sequence_length
            norm, dirty = self.optimizer.grad_norm, after["dirty_bytes"]
            bent = None
            if routing is not None and tally is not None:
                summary = routing.tally.since(tally).summary()
                bent = {name: float(summary[name]) for name in NUMBERS}
            yield Step(self.step, loss, lr, norm, tokens, seconds, read, written, hits, uses, dirty, bent)

    def _step(self, number: int) -> tuple[float, float]:
        count, lr = self.settings.accumulation, self.settings.lr_of(number)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        extra = {} if self.settings.aux_loss is None else {"output_router_logits": True}
        total = 0.0
        self.model.train()
        with torch.enable_grad():
            for batch in range((number - 1) * count, number * count):
                ids = self._ids(self._data, self._batches[batch])
                loss = self.model(input_ids=ids, labels=ids, use_cache=False, **extra).loss
                total += loss.item()
                if not math.isfinite(total):
                    raise MoetierError(
                        f"the loss of step {number} is {total}; the run stays at step {self.committed or 0}; try a "
                        "lower learning rate, or more steps of warm-up"
                    )
                (loss / count).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total / count, lr

    def commit(self) -> int:
        """Make a checkpoint of the run as it is; returns its step."""
        extra = {"format": FORMAT, "settings": self.settings.to_dict(), "texts": self._data.digest}
        return self._session.commit(extra=extra)

    @torch.no_grad()
    def evaluate(self, blocks: Blocks, go_on: Callable[[], bool] = lambda: True) -> Evaluation | None:
        """The mean loss on other blocks, without auxiliary loss; None if `go_on` said no in between.

        Changes nothing of the training, not even its last bits.
        """
        self.model.eval()
        extra = {"output_router_logits": False} if getattr(self.model.config, "output_router_logits", False) else {}
        total = 0.0
        for begin in range(0, len(blocks), self.settings.batch_size):
            if not go_on():
                return None
            ids = self._ids(blocks, slice(begin, begin + self.settings.batch_size))
            total += self.model(input_ids=ids, labels=ids, use_cache=False, **extra).loss.item() * len(ids)
        return Evaluation(self.step, total / len(blocks))

    def _ids(self, blocks: Blocks, which: Any) -> torch.Tensor:
        return torch.from_numpy(blocks.tokens[which].astype(np.int64)).to(self.model.device)

    # -- what is measured ----------------------------------------------------------------------------------------------

    def routing(self) -> dict[str, Any] | None:
        """What favouring experts in memory did so far, in this process; None where none are."""
        routing = self._session.routing
        return None if routing is None else routing.report()

    def caches(self) -> dict[str, ExpertCache]:
        """By what their records are."""
        engine = self._session.engine
        state = None if engine.applied is None else engine.applied.state
        found = {"weights": engine.weights, "state": state, "gradients": engine.gradients.cache}
        return {name: cache for name, cache in found.items() if cache is not None}

    def counters(self) -> dict[str, Any]:
        """Cumulative, but for `dirty_bytes`; `caches` is what each of `ExpertCache.stats` says."""
        caches = {name: cache.stats() for name, cache in self.caches().items()}
        links = [stats["links"] for stats in caches.values()]
        top = caches["weights"]["tiers"][0]
        return {
            "read_bytes": sum(link["disk→host"]["bytes"] for link in links if "disk→host" in link),
            "written_bytes": sum(link["host→disk"]["bytes"] for link in links if "host→disk" in link),
            "hits": sum(top["hits"]),
            "uses": sum(sum(top[kind]) for kind in ("hits", "lates", "misses")),
            "dirty_bytes": sum(caches[name]["writebacks"]["dirty_bytes"] for name in caches if name != "gradients"),
            "caches": caches,
        }


def prepare(model: Any, settings: Settings) -> None:
    """Checkpointing and auxiliary loss. Raises `UnsupportedModelError` for a model that has not what is asked for."""
    if model.dtype == torch.float16:
        raise ConfigError("dtype: the model is float16, whose gradients overflow without loss scaling; give bfloat16")
    if settings.gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise UnsupportedModelError(f"gradient_checkpointing: {type(model).__name__} has none; leave it out")
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if settings.aux_loss is not None:
        if not hasattr(model, "router_aux_loss_coef"):
            raise UnsupportedModelError(f"aux_loss: {type(model).__name__} has no load-balancing loss; leave it out")
        model.router_aux_loss_coef = settings.aux_loss  # not in its config, which is exported


def optimizer_of(model: Any, settings: Settings) -> TieredOptimizer:
    """The optimizer of the settings; norms and biases outside of experts do not decay.

    Resident weights have SGD where the experts have SGD or momentum, and AdamW else.
    """
    plain = [p for name, p in model.named_parameters() if p.requires_grad and (p.ndim == 1 or name.endswith(".bias"))]
    apart = {id(p) for p in plain}
    groups = [
        {"params": [p for p in model.parameters() if p.requires_grad and id(p) not in apart]},
        {"params": plain, "weight_decay": 0.0},
    ]
    given: dict[str, Any] = {
        "lr": settings.lr,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm or None,
        "idle": settings.idle,
    }
    name, parameters = parse_name("optimizer", settings.optim)
    if name in ("sgd", "momentum"):
        momentum = 0.9 if name == "momentum" else 0.0
        return SGD(model, groups, momentum=momentum, experts=settings.optim if parameters else None, **given)
    return AdamW(model, groups, experts=None if settings.optim == "adamw" else settings.optim, **given)
