"""From a loaded model without its experts to one that is served: plan, store, arenas, cache, and what watches them."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch

from moetier.arenas import DeviceArena, HostArena
from moetier.cache import ExpertCache
from moetier.calibration import serve_in_place
from moetier.chunks import SliceCache, open_slices
from moetier.crew import make_crew
from moetier.errors import CapacityError, ConfigError
from moetier.eventlog import Recorder
from moetier.machine import default_device_nbytes, default_host_nbytes
from moetier.mapping import LayerMap
from moetier.options import Options
from moetier.pinning import WarmPinning, load_profile
from moetier.plan import Machine, Plan, Status, Workload, make_plan, parse_size, parse_slots
from moetier.policies import find_policy, parse_policy
from moetier.prefetch_binding import AUTO, OFF, attach_prefetching
from moetier.profile import Profile
from moetier.record import FIELD_ALIGNMENT
from moetier.residency import Residency
from moetier.routing import Lever
from moetier.saving import save_streaming
from moetier.sizing import record_nbytes, slice_nbytes, workspace_nbytes
from moetier.split_trial import SplitTrial
from moetier.stores.checkpoint import CheckpointStore, slot_nbytes
from moetier.stores.opening import find_packed
from moetier.stores.packed import PackedStore
from moetier.stores.packed_index import PackedIndex
from moetier.stores.shards import Shards
from moetier.tiered import TieredExperts
from moetier.tiers import configure_all
from moetier.training.adapters import merged_store
from moetier.training.ahead import StepAhead


def attach_cache(
    model: Any,
    modules: list[tuple[str, Any]],
    maps: list[LayerMap],
    shards: Shards,
    options: Options,
    top_k: int,
    kv: int,
) -> None:
    """Allocate the arenas by the plan, and bind every experts module to its layer."""
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1:
        raise ConfigError(f"tiered experts need the rest of the model on one device, found {sorted(map(str, devices))}")
    device = devices.pop()
    packed = find_packed(shards, [m.layout for m in maps], options.store)
    plan = plan_for(model, maps, options, device, top_k, kv, packed)
    if plan.status is Status.BUDGET_EXHAUSTED:
        raise CapacityError(plan.advice, minimum_slots=1)
    store = open_store(packed, shards, maps, options)
    cache: ExpertCache | SliceCache
    try:
        if plan.chunks is not None:
            cache, recorder = slice_cache(store, [module for _, module in modules], plan, options), None
        else:
            cache, recorder = build_cache(store, plan, options, device)
    except BaseException:
        store.close()
        raise
    try:
        watch_uses(cache, plan, options, shards, str(getattr(model.config, "_name_or_path", "")))
        calibration = None
        if isinstance(cache, ExpertCache):
            calibration = serve_in_place(cache, options.cpu_experts, modules[0][1], top_k)
            attach_prefetching(model, cache, options.prefetch, top_k)
        crew = None
        readers_at_work = plan.chunks is None and plan.slots < plan.workload.records
        if device.type == "cpu" and readers_at_work:  # without them, nobody is in torch's way
            crew = make_crew(options.split, [m.layout for m in maps], modules[0][1].is_transposed)
    except BaseException:
        cache.close()
        raise
    policy = find_policy(parse_policy(options.policy)[0])
    tiered = TieredExperts(cache, plan, maps, recorder, getattr(policy, "needs_mass", False) or options.record_profile)
    tiered.calibration, tiered.crew = calibration, crew
    if isinstance(cache, ExpertCache) and options.prefetch != OFF and plan.slots < plan.workload.records:
        cache.ahead = StepAhead(cache.core, tuple(len(m.recipes) for m in maps), tiered.tape.coming)
    if crew is not None and options.split == "auto":
        tiered.trial = SplitTrial()
    bind(model, modules, tiered)
    save_streaming(model, shards, maps, partial(merged_store, store, [module for _, module in modules]))
    if options.levers.on:
        try:
            tiered.lever = Lever(model, options.levers)
        except BaseException:
            cache.close()
            raise


def open_store(
    packed: PackedIndex | None, shards: Shards, maps: list[LayerMap], options: Options
) -> CheckpointStore | PackedStore:
    """Home of the experts: the packed store, if there is one, else the checkpoint."""
    if packed is not None:
        return PackedStore(packed, options.io)
    return CheckpointStore(shards, [m.layout for m in maps], [m.recipes for m in maps], options.io)


def bind(model: Any, modules: list[tuple[str, Any]], tiered: TieredExperts) -> None:
    """Tell the model and its experts modules where their experts are."""
    for layer, (_, module) in enumerate(modules):
        object.__setattr__(module, "_moetier", (tiered, layer))
    object.__setattr__(model, "moetier", tiered)
    model.register_forward_pre_hook(tiered.observe_forward, with_kwargs=True)
    model.register_forward_hook(tiered.after_forward, always_call=True)


def watch_uses(cache: ExpertCache | SliceCache, plan: Plan, options: Options, shards: Shards, name: str) -> None:
    """Pin experts and count their uses as the options say. Raises `ConfigError` for a profile of another model."""
    pins = options.pin_after is not None or options.profile is not None
    if not (pins or options.record_profile):
        return
    layers, experts, fingerprint = cache.store.layers, cache.store.experts, shards.fingerprint()
    if pins and isinstance(cache, ExpertCache):
        known = None if options.profile is None else load_profile(options.profile, layers, experts, fingerprint)
        cache.pinning = WarmPinning(
            cache.core, layers, experts, plan.slots, plan.workload.top_k, options.pin_after, known
        )
    if options.record_profile:
        cache.profile = Profile(layers, experts, model=name, fingerprint=fingerprint, source="a live run")


def plan_for(
    model: Any,
    maps: list[LayerMap],
    options: Options,
    device: torch.device,
    top_k: int,
    kv: int,
    packed: PackedIndex | None = None,
) -> Plan:
    """The plan for a model whose experts are detached (its other weights may be on the meta device)."""
    workload = workload_of(model, maps, options, top_k, kv, packed)
    slots = None if options.slots is None else parse_slots(options.slots, workload.records)
    return make_plan(workload, budgets(options, device), slots)


def workload_of(
    model: Any, maps: list[LayerMap], options: Options, top_k: int, kv: int, packed: PackedIndex | None = None
) -> Workload:
    """What a model needs whose experts are detached."""
    slot = packed.slot_nbytes if packed else slot_nbytes([m.layout for m in maps], [m.recipes for m in maps])
    records = sum(len(m.recipes) for m in maps)
    strided = any(m.is_transposed for m in maps)
    return Workload(
        layers=len(maps),
        records=records,
        top_k=top_k,
        record_nbytes=record_nbytes(maps),
        slot_nbytes=slot,
        resident_nbytes=resident_nbytes(model),
        kv_nbytes=kv,
        context=options.context,
        workspace_nbytes=workspace_nbytes(model, options.readers, options.context, top_k, strided),
        slice_nbytes=slice_nbytes(maps, packed is not None),
        slices_reread=strided,
    )


def own_resident_weights(model: Any) -> None:
    """Copy the weights that stay in memory out of the mapped files they were loaded from.

    Mapped weights are page cache: under memory pressure the kernel drops them, and a file that changes under them kills
    the process. A copy keeps its address modulo a cache line, because float32 products can depend on that.
    """
    for tensor in {id(t): t for t in (*model.parameters(), *model.buffers())}.values():
        if tensor.device.type != "cpu" or not tensor.is_contiguous() or tensor.nbytes == 0:
            continue
        room = torch.empty(tensor.nbytes + FIELD_ALIGNMENT, dtype=torch.uint8)
        shift = (tensor.data_ptr() - room.data_ptr()) % FIELD_ALIGNMENT
        copy = room[shift : shift + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        tensor.data = copy.copy_(tensor.data)


def resident_nbytes(model: Any) -> int:
    """Bytes of all weights and buffers that stay in memory, shared ones counted once."""
    return sum({id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}.values())


def budgets(options: Options, device: torch.device) -> Machine:
    """The options' memory budgets, or what the machine can spare."""
    host = default_host_nbytes() if options.host_memory is None else parse_size(options.host_memory, "host_memory")
    if device.type == "cpu":
        return Machine(host)
    if options.device_memory is None:
        return Machine(host, default_device_nbytes(device))
    return Machine(host, parse_size(options.device_memory, "device_memory"))


def slice_cache(store: CheckpointStore | PackedStore, modules: list[Any], plan: Plan, options: Options) -> SliceCache:
    """Buffers for slices by a plan without slots. Raises `ConfigError` for options that need a cache."""
    assert plan.chunks is not None
    asked = {
        "pin_after": options.pin_after,
        "profile": options.profile,
        "record_events": options.record_events or None,
        "cpu_experts": None if options.cpu_experts == "off" else options.cpu_experts,
        "prefetch": None if options.prefetch in (AUTO, OFF) else options.prefetch,
        "lossy levers": options.levers if options.levers.on else None,
    }
    for name, value in asked.items():
        if value is not None:
            raise ConfigError(f"{name}: not without a slot; {plan.advice}")
    cache = open_slices(store, modules, plan.chunks, options.readers)
    warnings.warn(plan.advice, RuntimeWarning, stacklevel=2)
    return cache


def build_cache(
    store: CheckpointStore | PackedStore, plan: Plan, options: Options, device: torch.device
) -> tuple[ExpertCache, Recorder | None]:
    """Arenas, residency core and cache for a plan."""
    on_gpu = device.type != "cpu"
    top_k, layers = plan.workload.top_k, plan.workload.layers
    sizes = [tier.slots for tier in plan.tiers]
    configs = configure_all(sizes, store.records, layers, top_k, options.policy, options.admission)
    core = Residency(configs, store.layers, store.experts)
    recorder = Recorder(core) if options.record_events else None
    host = HostArena(plan.tiers[-1].slots, store.slot_nbytes, page_locked=on_gpu)
    arena = DeviceArena(plan.tiers[0].slots, store.slot_nbytes, device) if on_gpu else None
    return ExpertCache(store, recorder or core, host, arena, options.readers), recorder
