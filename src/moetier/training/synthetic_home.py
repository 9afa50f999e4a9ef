"""Where the experts of a teacher regression live: caches over a run folder, whose first weights are made from the seed.

The assembly that `attach.py` makes for a checkpoint, for a model that has none: nothing is read for an expert that was
never trained, and only what was trained is on the disk.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moetier.access import ExpertKey
from moetier.attach import bind
from moetier.cache import ExpertCache
from moetier.errors import CapacityError, ConfigError
from moetier.hf import NAME
from moetier.plan import Machine, Workload, format_size, make_plan
from moetier.record import PAGE, RecordLayout, round_up
from moetier.stores.runfolder import RunFolder
from moetier.stores.scratch import ScratchStore
from moetier.tiered import TieredExperts
from moetier.training.ahead import StepAhead
from moetier.training.attach import clear_with
from moetier.training.caches import small_cache, weights_cache
from moetier.training.engine import TrainingEngine
from moetier.training.gradients import gradient_layout
from moetier.training.lookahead import CachePrefetch, Lookahead
from moetier.training.optimizer import SGD, AdamW, TieredOptimizer
from moetier.training.optimizers import make_optimizer
from moetier.training.proxy import give_proxies
from moetier.training.session import TrainingSession
from moetier.training.synthetic import SyntheticModel, first_weights
from moetier.training.synthetic_run import DTYPES, Settings

PARTS = ("gate_up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Home:
    """Where experts are kept. Without a `folder` in a temporary one, which is gone afterwards.

    `host_slots` are those of weights, and as many again of optimizer states and of gradients; or as many of each as
    `host_memory` bytes hold. With `device_slots` the weights have a first tier above them, from which is computed as
    with a GPU (a second arena in host memory: this trainer is for the CPU).
    """

    folder: Path | None = None
    resume: bool = False
    commit_every: int | None = None  # steps; with a folder, the end of training is always committed
    device_slots: int | None = None
    host_slots: int | None = 64
    host_memory: int | None = None
    policy: str = "zigzag"
    writeback: str = "evict"
    prefetch: bool = True
    readers: int = 2

    def slots(self, settings: Settings, layout: RecordLayout) -> int:
        """Of each kind of record. Raises `CapacityError` where there is not one."""
        records = settings.layers * settings.n_experts
        if self.host_memory is None:
            return min(records, records if self.host_slots is None else self.host_slots)
        state = make_optimizer(settings.optim).state_layout(layout)
        layouts = [layout, gradient_layout(layout), *([] if state is None else [state])]
        needed = sum(round_up(one.nbytes, PAGE) for one in layouts)
        if self.host_memory < needed:
            raise CapacityError(
                f"host_memory {format_size(self.host_memory)}: an expert's weights, optimizer state and gradients take "
                f"{format_size(needed)}; give at least that",
                minimum_slots=1,
            )
        return min(records, self.host_memory // needed)


class Tiered:
    """A `synthetic_run.Trained` whose experts are tiered."""

    def __init__(self, settings: Settings, home: Home):
        self._home, self._steps = home, settings.steps
        self._rates = {name: getattr(settings, name) for name in ("lr", "weight_decay", "max_grad_norm")}
        self._opened = ExitStack()
        self._resumed = False
        try:
            self._make(settings)
        except BaseException:
            self._opened.close()
            raise

    def _make(self, settings: Settings) -> None:
        home = self._home
        run, self._folder = self._open_run(settings)
        dtype, experts, inner = DTYPES[settings.dtype], settings.n_experts, settings.expert_width
        shapes = {"gate_up_proj": (2 * inner, settings.width), "down_proj": (settings.width, inner)}
        layouts = [RecordLayout.of([(name, dtype, shapes[name]) for name in PARTS])] * settings.layers
        counts = [experts] * settings.layers
        store = run.family("weights", layouts, experts=counts, initial=_first(settings.seed, layouts[0]))
        slots = home.slots(settings, layouts[0])
        self._weights = self._cache(settings, store, counts, slots)
        scratch = ScratchStore(self._folder, [gradient_layout(layout) for layout in layouts], counts)
        self._gradients = small_cache(scratch, slots, counts, home.readers)
        self._opened.callback(self._gradients.close)
        self.model = _without_experts(settings).to(dtype)
        modules = [(f"layers.{number}.experts", layer.experts) for number, layer in enumerate(self.model.moe_layers)]
        engine = TrainingEngine(self._weights, self._gradients, give_proxies([module for _, module in modules]), counts)
        self._session = TrainingSession(self.model, run, engine, 0, slots, home.readers, home.writeback)
        tiered = TieredExperts(self._weights, _plan(settings, slots, store.slot_nbytes), [], None)
        tiered.training, tiered.sink = self._session, engine
        self._engine = engine
        self._check_rates()
        if home.prefetch and (home.device_slots is not None or slots < sum(counts)):
            self._weights.ahead = StepAhead(self._weights.core, tuple(counts), tiered.tape.coming)
        bind(self.model, modules, tiered)
        clear_with(self.model, engine)
        self.optimizer = tiered_optimizer(settings, self.model)
        self.first_step = self._session.step
        if self.first_step >= settings.steps:
            raise ConfigError(f"steps: the run has made {self.first_step} steps already; ask for more than that")

    def _open_run(self, settings: Settings) -> tuple[RunFolder, Path]:
        home, made = self._home, _made(settings)
        name, mark = f"synthetic {json.dumps(made, sort_keys=True)}", _digest(made)
        if home.folder is None:
            folder = Path(tempfile.mkdtemp(prefix="moetier-synthetic-"))
            self._opened.callback(shutil.rmtree, folder, ignore_errors=True)
            run = RunFolder.create(folder, model=name, fingerprint=mark, keep=1)
        elif home.resume:
            if not RunFolder.exists(home.folder):
                raise ConfigError(f"resume: {home.folder} holds no run; leave it out to begin one there")
            run, folder = RunFolder.open(home.folder, keep=1), home.folder
        else:
            if RunFolder.exists(home.folder):
                raise ConfigError(f"{home.folder}: holds a run already; resume it, or give another folder")
            run, folder = RunFolder.create(home.folder, model=name, fingerprint=mark, keep=1), home.folder
        self._opened.callback(run.close)
        if run.head.fingerprint != mark:
            raise ConfigError(f"{folder}: {_difference(run.head.model, made)}; give the same, or another folder")
        return run, folder

    def _check_rates(self) -> None:
        """The optimizer's rates are the checkpoint's. Raises `ConfigError` where others were asked for."""
        run = self._session.run
        before = None if run.step is None else self._session.extra(run.step)
        if before is not None and before != self._rates:
            raise ConfigError(f"{run.folder}: {_differing(before, self._rates)}; give the same, or another folder")

    def _cache(self, settings: Settings, store: Any, counts: list[int], slots: int) -> ExpertCache:
        """One tier in host memory, or two."""
        home = self._home
        above = None if home.device_slots is None else min(home.device_slots, sum(counts))
        cache = weights_cache(store, slots, counts, settings.top_k, home.readers, home.policy, home.writeback, above)
        self._opened.callback(cache.close)
        return cache

    @property
    def prefetches(self) -> CachePrefetch | None:
        """The cache of weights, if it is to be told of the next batches."""
        return CachePrefetch(self._weights) if self._home.prefetch else None

    def caches(self) -> dict[str, ExpertCache]:
        """By what their records are."""
        applied = self._engine.applied
        state = {} if applied is None or applied.state is None else {"state": applied.state}
        return {"weights": self._weights, **state, "gradients": self._gradients}

    def counters(self) -> dict[str, Any]:
        """Bytes from and to home over all caches, and what each cache says."""
        caches = {name: cache.stats() for name, cache in self.caches().items()}

        def total(link: str) -> int:
            return sum(stats["links"][link]["bytes"] for stats in caches.values() if link in stats["links"])

        top = caches["weights"]["tiers"][0]
        hits = sum(top["hits"])
        return {
            "read_bytes": total("disk→host"),
            "written_bytes": total("host→disk"),
            "hits": hits,
            "uses": hits + sum(top["lates"]) + sum(top["misses"]),
            "caches": caches,
        }

    def begin(self, loader: Lookahead) -> None:
        """Go on where the run stopped: optimizer, order of the data, random generators."""
        self._session.resume(loader=loader)

    def stepped(self, step: int, loader: Lookahead) -> None:
        """Commit, if it is time."""
        every = self._home.commit_every
        if every is not None and self._home.folder is not None and step % every == 0 and step < self._steps:
            self._commit(loader)

    def _commit(self, loader: Lookahead) -> None:
        self._session.commit(extra=self._rates, loader=loader)

    def close(self, loader: Lookahead | None) -> None:
        """Commit the end of training, and close everything."""
        try:
            if loader is not None and self._home.folder is not None:
                self._commit(loader)
        finally:
            self.model.moetier.close()
            self._opened.close()


def tiered_optimizer(settings: Settings, model: SyntheticModel) -> TieredOptimizer:
    """The optimizer of the settings: of torch's three for resident weights and experts, of others for the experts."""
    given: dict[str, Any] = {
        "lr": settings.lr,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "idle": settings.idle,
        "fused": True,
    }
    if settings.optim in ("sgd", "momentum"):
        return SGD(model, momentum=0.9 if settings.optim == "momentum" else 0.0, **given)
    return AdamW(model, experts=None if settings.optim == "adamw" else settings.optim, **given)


def _made(settings: Settings) -> dict[str, Any]:
    """All that a run's experts and resident weights begin as. The order of the data has its own check."""
    names = ("n_experts", "n_envs", "top_k", "layers", "width", "expert_width", "samples_per_env", "dtype", "seed")
    return {name: getattr(settings, name) for name in names}


def _digest(made: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()


def _difference(model: str, made: dict[str, Any]) -> str:
    """What a run was begun with, where it is not `made`."""
    kind, _, described = model.partition(" ")
    if kind != "synthetic":
        return f"the run trains {model or 'another model'}, not the synthetic one"
    return _differing(json.loads(described), made)


def _differing(before: dict[str, Any], made: dict[str, Any]) -> str:
    differing = [f"{name} {before.get(name)}, not {made[name]}" for name in made if before.get(name) != made[name]]
    return f"the run was begun with {', '.join(differing)}"


def _first(seed: int, layout: RecordLayout) -> Callable[[ExpertKey, memoryview], None]:
    """Makes the weights that an expert begins with."""

    def initial(key: ExpertKey, into: memoryview) -> None:
        record = torch.frombuffer(into, dtype=torch.uint8)
        record.zero_()  # what is between the fields too
        first_weights(seed, key, layout.views(record[: layout.nbytes]))

    return initial


def _without_experts(settings: Settings) -> SyntheticModel:
    """The model with nothing where its experts were; they are never allocated."""
    with torch.device("meta"):
        model = SyntheticModel(settings.config())
    for layer in model.moe_layers:
        for name in PARTS:
            del layer.experts._parameters[name]
    model.config._experts_implementation_internal = NAME
    model.to_empty(device="cpu")
    return model.reset()


def _plan(settings: Settings, slots: int, slot_nbytes: int) -> Any:
    """What `model.moetier.plan` says: the slots as they were asked for."""
    records = settings.layers * settings.n_experts
    workload = Workload(
        layers=settings.layers,
        records=records,
        top_k=settings.top_k,
        record_nbytes=slot_nbytes,
        slot_nbytes=slot_nbytes,
        resident_nbytes=0,
        kv_nbytes=0,
        context=1,
        workspace_nbytes=0,
    )
    return make_plan(workload, Machine(slots * slot_nbytes), slots)
