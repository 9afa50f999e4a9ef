"""From a loaded model without its experts to one that can be trained: run folder, memory, caches, engine, proxies."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import MethodType
from typing import Any

import torch

from moetier.arenas import DeviceArena
from moetier.attach import bind, budgets, open_store, workload_of
from moetier.errors import ConfigError, UnsupportedModelError
from moetier.mapping import LayerMap
from moetier.options import Options
from moetier.plan import parse_size
from moetier.prefetch_binding import OFF
from moetier.record import PAGE, RecordLayout, round_up
from moetier.saving import save_streaming
from moetier.stores.opening import find_packed
from moetier.stores.runfolder import RunFolder
from moetier.stores.scratch import ScratchStore
from moetier.stores.shards import Shards
from moetier.tiered import TieredExperts
from moetier.training.activations import Activations
from moetier.training.ahead import StepAhead
from moetier.training.allocator import give_large_blocks_back
from moetier.training.budget import (
    RESIDENT_FLOAT,
    RESIDENT_HALF,
    Sizes,
    activation_share,
    divide,
    training_plan,
    unused_nbytes,
)
from moetier.training.caches import small_cache, weights_cache
from moetier.training.engine import TrainingEngine
from moetier.training.footprint import (
    beside_device_nbytes,
    device_workspace_nbytes,
    training_workspace_nbytes,
    up_nbytes,
    whole_layers,
)
from moetier.training.gradients import gradient_layout
from moetier.training.optimizers.adam import AdamW
from moetier.training.optimizers.fields import HALF
from moetier.training.outbound import Outbound
from moetier.training.proxy import give_proxies
from moetier.training.routing import CacheAwareRouting
from moetier.training.session import TrainingSession


def attach_training(
    model: Any, modules: list[tuple[str, Any]], maps: list[LayerMap], shards: Shards, options: Options, top_k: int
) -> None:
    """Open the run folder, allocate the arenas, and bind every experts module to its layer.

    On a GPU experts are computed in slots of its memory, and updated in those of host memory. Raises `ConfigError`,
    `StoreError` and `CapacityError` where that cannot be; `UnsupportedModelError` on devices that are no CUDA GPU.
    """
    device = one_device(model)
    assert options.train is not None
    give_large_blocks_back()
    layouts, counts = [m.layout for m in maps], [len(m.recipes) for m in maps]
    packed = find_packed(shards, layouts, options.store)
    workload = workload_of(model, maps, options, top_k, 0, packed)
    sizes = sizes_of(model, layouts, workload.slot_nbytes)
    machine = budgets(options, device)
    if machine.device_nbytes is None:
        working = training_workspace_nbytes(model, modules, options.readers, options.context, top_k, sizes.gradients)
    else:
        sizes = replace(sizes, host=beside_device_nbytes(options.readers, sizes.weights, sizes.gradients))
        working = device_workspace_nbytes(model, modules, options.context, top_k, sizes.weights)
    workload = replace(workload, workspace_nbytes=working)
    ups, asked = up_nbytes(modules, layouts, options.context, top_k), options.activation_memory
    share = activation_share(workload, machine, sizes) if asked is None else parse_size(asked, "activation_memory")
    kept = whole_layers(ups, share)
    planned = replace(workload, workspace_nbytes=working + kept)
    division = divide(planned, machine, sizes, options.slots, options.state_slots, options.gradient_slots)
    plan = training_plan(planned, machine, sizes, division)
    if asked is None:  # and what the slots leave
        kept = whole_layers(ups, kept + unused_nbytes(plan))
        plan = training_plan(replace(workload, workspace_nbytes=working + kept), machine, sizes, division)
    run = open_run(Path(options.train), shards, options, str(getattr(model.config, "_name_or_path", "")))
    opened: list[Any] = [run]
    try:
        base = open_store(packed, shards, maps, options)
        opened.insert(0, base)
        store = run.family("weights", layouts, experts=counts, base=base)
        policy, writeback, slots = policy_of(options), options.writeback, division.device
        weights = weights_cache(
            store, division.weights, counts, top_k, options.readers, policy, writeback, slots, device
        )
        opened[0] = weights
        scratch = ScratchStore(Path(options.train), [gradient_layout(layout) for layout in layouts], counts)
        gradients = small_cache(scratch, division.gradients, counts, options.readers, "zigzag")
        opened.insert(0, gradients)
        proxies = give_proxies([module for _, module in modules], device)
        outbound = Outbound(layouts, device) if isinstance(weights.device, DeviceArena) else None
        engine = TrainingEngine(weights, gradients, proxies, counts, outbound)
        opened[:0] = [outbound] if outbound is not None else []
        session = TrainingSession(
            model, run, engine, division.state_nbytes, division.state_slots, options.readers, options.writeback
        )
    except BaseException:
        for one in opened:
            one.close()
        raise
    tiered = TieredExperts(weights, plan, maps, None)
    tiered.activations = Activations(kept, device)
    tiered.training, tiered.sink, engine.coming = session, engine, tiered.tape.coming
    if (division.device is not None or division.weights < store.records) and options.prefetch != OFF:
        weights.ahead = StepAhead(weights.core, tuple(counts), tiered.tape.coming)
    bind(model, modules, tiered)
    save_streaming(model, shards, maps, changed=engine.settled)
    clear_with(model, engine)
    if options.levers.on:
        try:
            session.routing = CacheAwareRouting(model, options.levers, weights, counts, top_k)
        except BaseException:
            tiered.close()
            raise


def policy_of(options: Options) -> str:
    """The eviction policy of weights: the order of a training step, unless another than the usual was asked for."""
    return "zigzag" if options.policy == Options.__dataclass_fields__["policy"].default else options.policy


def one_device(model: Any) -> torch.device:
    """Where the model computes. Raises `UnsupportedModelError` where it cannot be trained."""
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1:
        raise ConfigError(f"tiered experts need the rest of the model on one device, found {sorted(map(str, devices))}")
    device: torch.device = devices.pop()
    if device.type not in ("cpu", "cuda"):
        raise UnsupportedModelError(
            f"train: experts are trained on a CPU or a CUDA GPU, and the model is on {device}; pass device='cpu'"
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
