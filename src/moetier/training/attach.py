"""From a loaded model without its experts to one that can be trained: run folder, memory, caches, engine, proxies."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import MethodType
from typing import Any

import torch

from moetier.arenas import HostArena
from moetier.attach import bind, budgets, open_store, workload_of
from moetier.cache import ExpertCache
from moetier.errors import ConfigError, UnsupportedModelError
from moetier.mapping import LayerMap
from moetier.options import Options
from moetier.plan import make_plan
from moetier.prefetch_binding import OFF
from moetier.record import PAGE, RecordLayout, round_up
from moetier.residency import Residency
from moetier.saving import save_streaming
from moetier.stores.opening import find_packed
from moetier.stores.runfolder import RunFolder
from moetier.stores.scratch import ScratchStore
from moetier.stores.shards import Shards
from moetier.tiered import TieredExperts
from moetier.tiers import configure
from moetier.training.ahead import StepAhead
from moetier.training.allocator import give_large_blocks_back
from moetier.training.budget import RESIDENT_FLOAT, RESIDENT_HALF, Sizes, as_planned, divide
from moetier.training.caches import small_cache
from moetier.training.engine import TrainingEngine
from moetier.training.footprint import training_workspace_nbytes
from moetier.training.gradients import gradient_layout
from moetier.training.optimizers.adam import AdamW
from moetier.training.optimizers.fields import HALF
from moetier.training.proxy import give_proxies
from moetier.training.session import TrainingSession


def attach_training(
    model: Any, modules: list[tuple[str, Any]], maps: list[LayerMap], shards: Shards, options: Options, top_k: int
) -> None:
    """Open the run folder, allocate the arenas, and bind every experts module to its layer.

    Raises `ConfigError`, `StoreError` and `CapacityError` where that cannot be; `UnsupportedModelError` on a GPU.
    """
    device = one_device(model)
    assert options.train is not None
    give_large_blocks_back()
    layouts, counts = [m.layout for m in maps], [len(m.recipes) for m in maps]
    packed = find_packed(shards, layouts, options.store)
    workload = workload_of(model, maps, options, top_k, 0, packed)
    sizes = sizes_of(model, layouts, workload.slot_nbytes)
    working = training_workspace_nbytes(model, modules, options.readers, options.context, top_k, sizes.gradients)
    workload = replace(workload, workspace_nbytes=working)
    machine = budgets(options, device)
    division = divide(workload, machine, sizes, options.slots, options.state_slots, options.gradient_slots)
    plan = make_plan(as_planned(workload, sizes, division), machine, division.weights)
    run = open_run(Path(options.train), shards, options, str(getattr(model.config, "_name_or_path", "")))
    opened: list[Any] = [run]
    try:
        base = open_store(packed, shards, maps, options)
        opened.insert(0, base)
        store = run.family("weights", layouts, experts=counts, base=base)
        config = configure(division.weights, store.records, len(counts), top_k, policy_of(options), "always")
        core = Residency([config], len(counts), max(counts), writeback=options.writeback)
        weights = ExpertCache(store, core, HostArena(division.weights, store.slot_nbytes), readers=options.readers)
        opened[0] = weights
        scratch = ScratchStore(Path(options.train), [gradient_layout(layout) for layout in layouts], counts)
        gradients = small_cache(scratch, division.gradients, counts, options.readers, "zigzag")
        opened.insert(0, gradients)
        proxies = give_proxies([module for _, module in modules])
        engine = TrainingEngine(weights, gradients, proxies, counts)
        session = TrainingSession(
            model, run, engine, division.state_nbytes, division.state_slots, options.readers, options.writeback
        )
    except BaseException:
        for one in opened:
            one.close()
        raise
    tiered = TieredExperts(weights, plan, maps, None)
    tiered.training, tiered.sink, engine.coming = session, engine, tiered.tape.coming
    if division.weights < store.records and options.prefetch != OFF:
        weights.ahead = StepAhead(core, tuple(counts), tiered.tape.coming)
    bind(model, modules, tiered)
    save_streaming(model, shards, maps, changed=engine.settled)
    clear_with(model, engine)


def policy_of(options: Options) -> str:
    """The eviction policy of weights: the order of a training step, unless another than the usual was asked for."""
    return "zigzag" if options.policy == Options.__dataclass_fields__["policy"].default else options.policy


def one_device(model: Any) -> torch.device:
    """Where the model computes. Raises `UnsupportedModelError` where it cannot be trained."""
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1:
        raise ConfigError(f"tiered experts need the rest of the model on one device, found {sorted(map(str, devices))}")
    device: torch.device = devices.pop()
    if device.type != "cpu":
        raise UnsupportedModelError(
            f"train: experts are trained on the CPU so far, and the model is on {device}; pass device='cpu'"
        )
    return device


def sizes_of(model: Any, layouts: list[RecordLayout], slot_nbytes: int) -> Sizes:
    """Bytes of the slots of each kind, where the optimizer is AdamW."""
    states = [AdamW().state_layout(layout) for layout in layouts]
    state = max(round_up(layout.nbytes, PAGE) for layout in states if layout is not None)
    gradients = max(round_up(gradient_layout(layout).nbytes, PAGE) for layout in layouts)
    half = next(model.parameters()).dtype in HALF
    return Sizes(slot_nbytes, state, gradients, RESIDENT_HALF if half else RESIDENT_FLOAT)


def open_run(folder: Path, shards: Shards, options: Options, name: str) -> RunFolder:
    """The run to go on with, or a new one."""
    fingerprint, witness = shards.fingerprint(), shards.witness()
    if RunFolder.exists(folder):
        return RunFolder.open(
            folder,
            step=options.train_step,
            fingerprint=fingerprint,
            witness=witness,
            keep=options.keep,
            io=options.io,
        )
    if options.train_step is not None:
        raise ConfigError(f"train_step: {folder} holds no run yet; leave it out to begin one")
    return RunFolder.create(
        folder, model=name, fingerprint=fingerprint, witness=witness, keep=options.keep, io=options.io
    )


def clear_with(model: Any, engine: TrainingEngine) -> None:
    """`model.zero_grad()` forgets the gradients of the experts too."""
    plain = type(model).zero_grad

    def zero_grad(self: Any, set_to_none: bool = True) -> None:
        plain(self, set_to_none)
        engine.clear()

    object.__setattr__(model, "zero_grad", MethodType(zero_grad, model))
