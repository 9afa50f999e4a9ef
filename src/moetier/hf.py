"""The transformers hook: load any MoE checkpoint without its experts, and serve them from the cache.

Two doors lead in. `moetier.from_pretrained(path, ...)` checks the checkpoint and loads it; plain
`AutoModelForCausalLM.from_pretrained(path, quantization_config=TieredExpertsConfig(...))` does the same through the
quantizer interface of transformers. What comes back is the ordinary model: only its experts modules have lost their
stacked parameters and compute through the `moetier` experts implementation.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from transformers.core_model_loading import build_glob_alternation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from moetier.access import Access, Phase
from moetier.arenas import DeviceArena, HostArena
from moetier.cache import ExpertCache
from moetier.calibration import Calibration, serve_in_place
from moetier.chunks import SliceCache, forward_in_slices, open_slices
from moetier.crew import MAX_ROWS, Crew, OneThread, Split, make_crew
from moetier.errors import CapacityError, ConfigError, UnsupportedModelError
from moetier.eventlog import EventLog, Recorder
from moetier.experts import Routing, forward_from_leases, keys_of, per_expert_parameters
from moetier.inplace import InPlace
from moetier.levers import Levers
from moetier.machine import default_device_nbytes, default_host_nbytes
from moetier.mapping import CheckpointMap, LayerMap, expert_parameters
from moetier.misses import CPU_EXPERTS
from moetier.overlap import Overlap, StepClock
from moetier.pinning import WarmPinning, load_profile
from moetier.plan import Machine, Plan, Status, Workload, make_plan, parse_size, parse_slots
from moetier.policies import check_online, find_policy, make_admission, parse_policy
from moetier.prefetch_binding import AUTO, OFF, attach_prefetching, check_prefetch
from moetier.profile import Profile
from moetier.record import FIELD_ALIGNMENT
from moetier.registry import find
from moetier.residency import Residency
from moetier.routing import Lever
from moetier.saving import save_streaming
from moetier.sizing import kv_nbytes, record_nbytes, slice_nbytes, top_k_of, workspace_nbytes
from moetier.stores.checkpoint import CheckpointStore, IOMode, slot_nbytes
from moetier.stores.opening import find_packed, shards_of
from moetier.stores.packed import PackedStore
from moetier.stores.packed_index import PADDING, PackedIndex
from moetier.stores.shards import Shards
from moetier.threads import Cores, CoreWatch, oversubscribed, reader_cores
from moetier.tiers import configure
from moetier.timeline import LIMIT, Timeline, recorded

NAME = "moetier"

Watch = Callable[[int, torch.Tensor, torch.Tensor, Phase], None]  # layer, experts [T, K], gate weights [T, K], phase


@dataclass(frozen=True, slots=True)
class Options:
    """How to tier a model's experts. Sizes are bytes or text such as "8GiB"; None means what the machine can spare.

    `slots` (a number, or a share of all experts such as "25%") overrides the size of the fastest tier. Policies are
    names from `moetier.POLICIES`. `readers` are threads that read the disk; `io` is auto, direct or buffered.
    `split` is how torch's CPU threads share a small step: by "experts" (needs dtypes and shapes whose products do not
    depend on the number of threads), by "products" (torch's own way), or "auto": experts where that is exact.
    `pin_after` accesses, or at once with a saved `profile` (a file), the experts used most are pinned;
    `record_profile` counts uses for `model.moetier.profile()`. `store` is the folder of a packed store to read the
    experts from, or "none"; by default the one beside the checkpoint, if there is one (docs/packed-store.md).
    `prefetch` is auto, off, or the name of a predictor from `moetier.PREDICTORS`; where it does not pay it turns itself
    off. With a GPU, `cpu_experts` says which missing experts the CPU computes where they are: off, auto (as measured at
    load), always; other than off, outputs depend on timing in their last bits (docs/gpu.md). `cache_prior`, `keep_top`,
    `max_rank`, `max_mass` and `drop_misses` are the lossy levers, off by default: see `moetier.levers.Levers`.
    """

    device_memory: str | int | None = None
    host_memory: str | int | None = None
    slots: str | int | None = None
    policy: str = "horizon"
    admission: str = "decode-only"
    context: int = 4096
    readers: int = 4
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
        for name in ("device_memory", "host_memory"):
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


@register_quantization_config(NAME)
class TieredExpertsConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """Ask `from_pretrained` of transformers to keep a model's experts out of core; takes the fields of `Options`."""

    def __init__(self, **options: Any):
        options.pop("quant_method", None)
        self.quant_method = NAME
        try:
            self.options = Options(**options)
        except TypeError as error:
            known = ", ".join(Options.__dataclass_fields__)
            raise ConfigError(f"TieredExpertsConfig: {error}; known options: {known}") from None
        self.options.check()

    def to_dict(self) -> dict[str, Any]:
        """The options as a plain dictionary."""
        return {"quant_method": NAME, **asdict(self.options)}


class TieredExperts:
    """A model's tiered experts: the cache, the plan it follows, and where each experts module gets its records.

    Reachable as `model.moetier`.
    """

    def __init__(
        self,
        cache: ExpertCache | SliceCache,
        plan: Plan,
        layers: list[LayerMap],
        recorder: Recorder | None,
        needs_mass: bool = False,
    ):
        self.cache, self.plan, self.layers = cache, plan, layers
        self.watch: Watch | None = None  # told of every layer's routing, before its experts run
        self.lever: Lever | None = None  # what may bend the routing; None: outputs are the model's own
        self.calibration: Calibration | None = None  # what the choice of experts for the CPU rests on
        self.crew: Crew | None = None  # shares small steps on the CPU
        self._one_thread = OneThread()
        self._small = False  # the step that runs
        self._recorder = recorder
        self._needs_mass = needs_mass
        self._clock = 0
        self._phase = Phase.DECODE
        self._steps = StepClock(cache.clocks)
        self._texts = 0  # begun so far
        self._sequence = 0

    def forward(
        self, layer: int, module: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """One access: [T, H] hidden states through the experts that `index` [T, K] names."""
        arena = self.cache.device or self.cache.host
        if hidden.device != arena.device:
            raise ConfigError(
                f"the model computes on {hidden.device} but its experts are tiered on {arena.device}; "
                "choose the device when loading (device_map), not afterwards"
            )
        if self.watch is not None:
            self.watch(layer, index, weights, self._phase)
        if self.lever is not None:
            index, weights = self.lever.drop(layer, index, weights)
        routing = Routing(index, weights, self._needs_mass)
        keys, tokens = keys_of(layer, routing)
        self._clock += 1
        access = Access(self._clock, layer, keys, tokens, self._phase, self._sequence, routing.mass)
        if isinstance(self.cache, SliceCache):
            return forward_in_slices(module, hidden, routing, self.cache.slices(access))
        in_place = InPlace(module, hidden, routing, self.cache.device) if self.cache.core.misses is not None else None
        crew = self.crew if self._small else None
        return forward_from_leases(module, hidden, routing, self.cache.batches(access), crew, in_place)

    @property
    def phase(self) -> Phase:
        """Of the step that the model is in."""
        return self._phase

    def observe_forward(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the model: a step of more than one token per sequence is a prefill.

        A step with nothing in the decoding cache begins a new text (or several, if it has several rows).
        """
        given = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1])  # any of them may be None
        tokens = next((tokens for tokens in given if isinstance(tokens, torch.Tensor)), None)
        if tokens is not None and tokens.dim() > 1:
            self._phase = Phase.PREFILL if tokens.shape[1] > 1 else Phase.DECODE
            if begins_text(kwargs.get("past_key_values"), self._phase):
                self._texts += 1
            self._sequence = max(0, self._texts - 1) if tokens.shape[0] == 1 else 0
            self._steps.begin(self._phase, tokens.shape[0] * tokens.shape[1])
            shared = self.crew is not None and torch.get_num_threads() > 1
            self._small = shared and tokens.shape[0] * tokens.shape[1] <= MAX_ROWS
            if self._small:
                self._one_thread.enter()

    def after_forward(self, module: Any, args: Any, output: Any = None) -> None:
        """Forward hook of the model, called also when the forward failed, then without an output."""
        self._one_thread.leave()
        step = None if output is None else self._steps.end()
        if step is not None and self.cache.probe is not None:
            self.cache.probe.stepped(*step)

    def overlap(self, phase: Phase = Phase.DECODE) -> Overlap:
        """T_wait, T_compute, T_io of all forwards of a phase so far, and how much of the transfers was hidden."""
        cache = self.cache
        names = tuple(link.name for link in cache.mover.links)
        on_gpu = cache.device is not None and cache.device.device.type != "cpu"
        return Overlap(self._steps.clocks[phase], names, on_gpu)

    def oversubscribed(self, watch: CoreWatch | None = None) -> str | None:
        """Why torch has too many compute threads for the cores that are free, in one line; None if all is well.

        `watch` has seen what other programs do; without one, they are watched for a moment.
        """
        compute = torch.get_num_threads()
        if compute == 1 or (self.cache.device or self.cache.host).device.type != "cpu":
            return None
        readers = reader_cores(bool(getattr(self.cache.store, "direct", False)))
        return oversubscribed(compute, readers, Cores.now(watch))

    def timeline(self, path: str | Path | None = None, limit: int = LIMIT) -> AbstractContextManager[Timeline]:
        """`with model.moetier.timeline("run.json"):` records what runs within, for ui.perfetto.dev (docs/timeline.md).

        The file is written when the block ends, also by an exception. The last `limit` events of every thread are kept.
        Raises `ConfigError` for a file that cannot be written, or while another timeline is being recorded.
        """
        return recorded(self.cache, path, limit)

    def stats(self) -> dict[str, Any]:
        """Hits, lates and misses per tier and layer; bytes and time per link; seconds in all; times per phase."""
        phases = {
            phase.name.lower(): {
                "steps": self._steps.steps[phase],
                "tokens": self._steps.tokens[phase],
                **self.overlap(phase).summary(),
            }
            for phase in Phase
        }
        stats = {**self.cache.stats(), "phases": phases}
        return stats if self.lever is None else {**stats, "levers": self.lever.report()}

    def events(self) -> EventLog:
        """The log of the core's inputs so far, for replay; needs the option `record_events=True`."""
        if self._recorder is None:
            raise ConfigError("events were not recorded; load the model with record_events=True")
        return self._recorder.log

    def profile(self) -> Profile:
        """How often each expert was used so far; needs the option `record_profile=True`."""
        if self.cache.profile is None:
            raise ConfigError("no profile was recorded; load the model with record_profile=True")
        return self.cache.profile

    def close(self) -> None:
        """Stop the threads and close the files. The model cannot run afterwards."""
        self.cache.close()
        if self.crew is not None:
            self.crew.close()


def begins_text(past: Any, phase: Phase) -> bool:
    """Whether a step has no tokens before it; `past` is its decoding cache.

    Without a cache that counts tokens (a model may have none, or one for states only) every prefill begins a text.
    """
    try:
        return int(past.get_seq_length()) == 0
    except (AttributeError, ValueError):
        return phase is Phase.PREFILL


def moetier_experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The experts implementation that transformers calls: `self` is an experts module bound to its layer."""
    if hidden_states.is_meta:  # sizing runs the model without data
        return torch.empty_like(hidden_states)
    if getattr(self, "_is_expert_parallel", False):
        raise UnsupportedModelError("expert parallelism and tiered experts cannot be combined")
    run = _ForwardOnly.apply if torch.is_grad_enabled() else _forward
    result: torch.Tensor = run(self, hidden_states, top_k_index, top_k_weights)
    return result


def _forward(module: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    tiered, layer = module._moetier
    result: torch.Tensor = tiered.forward(layer, module, hidden, index, weights)
    return result


class _ForwardOnly(torch.autograd.Function):
    """Keeps slot views out of the autograd graph: a slot may hold another expert by the time backward would read it."""

    @staticmethod
    def forward(
        ctx: Any, module: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """The tiered forward, without a graph."""
        return _forward(module, hidden, index, weights)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        """Refused: there is no evict-safe backward yet."""
        raise UnsupportedModelError(
            "backward through tiered experts is not supported yet; run the model under torch.no_grad(), "
            "or load it without moetier to train it"
        )


ALL_EXPERTS_FUNCTIONS.register(NAME, moetier_experts_forward)


def find_experts(model: Any) -> list[tuple[str, Any]]:
    """The experts modules in the order a forward visits them. Raises `UnsupportedModelError` if there are none."""
    found = [
        (name, module)
        for name, module in model.named_modules()
        if all(hasattr(module, flag) for flag in ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm"))
        and hasattr(type(module).forward, "__wrapped__")
    ]
    if found:
        return found
    kind = type(model).__name__
    lookalikes = sorted({type(m).__name__ for _, m in model.named_modules() if "expert" in type(m).__name__.lower()})
    text_config = model.config.get_text_config()
    counts = [n for n in vars(text_config) if re.search(r"num_(local_)?experts$|n_routed_experts|moe_num_experts", n)]
    if lookalikes or counts:
        raise UnsupportedModelError(
            f"{kind} ({model.config.model_type}) has experts ({', '.join(lookalikes or counts)}) that do not use the "
            "experts interface of transformers, so they cannot be taken out of core; see docs/families.md"
        )
    raise UnsupportedModelError(
        f"{kind} ({model.config.model_type}) is not a Mixture-of-Experts model; load it with transformers directly"
    )


@register_quantizer(NAME)
class TieredExpertsQuantizer(HfQuantizer):  # type: ignore[misc]
    """The door into `from_pretrained`: drops the experts while the model has no data, binds the cache afterwards.

    It quantises nothing, and removes its traces: the loaded model is not marked as quantised.
    """

    requires_calibration = False

    def __init__(self, quantization_config: TieredExpertsConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.options = quantization_config.options
        self._cores = CoreWatch()
        self._modules: list[tuple[str, Any]] = []
        self._maps: list[LayerMap] = []

    @property
    def is_trainable(self) -> bool:
        """Tiered experts are frozen."""
        return False

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Saved as an ordinary checkpoint."""
        return True

    def _process_model_before_weight_loading(
        self, model: Any, dtype: Any = None, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> Any:
        if not checkpoint_files or not all(str(file).endswith(".safetensors") for file in checkpoint_files):
            raise ConfigError("moetier reads safetensors checkpoints only; pass the folder or hub id of one")
        self._modules = find_experts(model)
        self._shards = shards_of([Path(file) for file in checkpoint_files])
        self._maps, self._top_k = map_experts(model, self._modules, self._shards, dtype)
        detach_experts(model, self._modules)
        self._kv_nbytes = kv_nbytes(model, self.options.context)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        own_resident_weights(model)
        attach_cache(model, self._modules, self._maps, self._shards, self.options, self._top_k, self._kv_nbytes)
        told = model.moetier.oversubscribed(self._cores)
        if told is not None:
            warnings.warn(told, RuntimeWarning, stacklevel=2)
        self.remove_quantization_config(model)
        for module in model.modules():
            if hasattr(getattr(module, "config", None), "_is_quantized"):
                del module.config._is_quantized
        return model


def map_experts(model: Any, modules: list[tuple[str, Any]], shards: Shards, dtype: Any) -> tuple[list[LayerMap], int]:
    """Per experts module, where its experts' bytes are; and the experts a token uses."""
    dtype_of = _dtype_plan(model, dtype)
    checkpoint = CheckpointMap(model, shards)
    maps = [
        replace(checkpoint.layer(expert_parameters(name, module, dtype_of)), is_transposed=module.is_transposed)
        for name, module in modules
    ]
    return maps, top_k_of(model, modules)


def _dtype_plan(model: Any, dtype: Any) -> Callable[[str, torch.dtype], torch.dtype]:
    """The dtype that loading gives a parameter: the model's own, unless a module is kept in another."""
    plan = model._get_dtype_plan(dtype) if dtype is not None else {}
    if not plan:
        return lambda name, own: own
    pattern, glob_of, _ = build_glob_alternation(list(plan))

    def dtype_of(name: str, own: torch.dtype) -> torch.dtype:
        match = pattern.search(name)
        return plan[glob_of[match.lastgroup]] if match is not None else own

    return dtype_of


def detach_experts(model: Any, modules: list[tuple[str, Any]]) -> None:
    """Take the stacked parameters away, before anything is allocated for them."""
    unexpected = set(model._keys_to_ignore_on_load_unexpected or ()) | {rf"^{re.escape(PADDING)}\."}
    for name, module in modules:
        for field in per_expert_parameters(module):
            del module._parameters[field]
            unexpected.add(rf"^{re.escape(name)}\.{re.escape(field)}$")
        module._is_hf_initialized = True
        module.config._experts_implementation_internal = NAME
    model.config._experts_implementation_internal = NAME
    model._keys_to_ignore_on_load_unexpected = unexpected


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
    store: CheckpointStore | PackedStore
    if packed is not None:
        store = PackedStore(packed, options.io)
    else:
        store = CheckpointStore(shards, [m.layout for m in maps], [m.recipes for m in maps], options.io)
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
    except BaseException:
        cache.close()
        raise
    policy = find_policy(parse_policy(options.policy)[0])
    tiered = TieredExperts(cache, plan, maps, recorder, getattr(policy, "needs_mass", False) or options.record_profile)
    tiered.calibration = calibration
    for layer, (_, module) in enumerate(modules):
        object.__setattr__(module, "_moetier", (tiered, layer))
    object.__setattr__(model, "moetier", tiered)
    readers_at_work = plan.chunks is None and plan.slots < plan.workload.records
    if device.type == "cpu" and readers_at_work:  # without them, nobody is in torch's way
        tiered.crew = make_crew(options.split, [m.layout for m in maps], modules[0][1].is_transposed)
    model.register_forward_pre_hook(tiered.observe_forward, with_kwargs=True)
    model.register_forward_hook(tiered.after_forward, always_call=True)
    save_streaming(model, shards, maps)
    if options.levers.on:
        try:
            tiered.lever = Lever(model, options.levers)
        except BaseException:
            cache.close()
            raise


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
    slot = packed.slot_nbytes if packed else slot_nbytes([m.layout for m in maps], [m.recipes for m in maps])
    records = sum(len(m.recipes) for m in maps)
    workload = Workload(
        layers=len(maps),
        records=records,
        top_k=top_k,
        record_nbytes=record_nbytes(maps),
        slot_nbytes=slot,
        resident_nbytes=resident_nbytes(model),
        kv_nbytes=kv,
        context=options.context,
        workspace_nbytes=workspace_nbytes(model, options.readers, options.context, top_k),
        slice_nbytes=slice_nbytes(maps, packed is not None),
        slices_reread=any(m.is_transposed for m in maps),
    )
    slots = None if options.slots is None else parse_slots(options.slots, records)
    return make_plan(workload, budgets(options, device), slots)


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
    configs = [
        configure(tier.slots, store.records, layers, top_k, options.policy, options.admission) for tier in plan.tiers
    ]
    if len(configs) > 1:  # together the tiers hold what each alone could not
        configs[1] = replace(configs[1], exclusive=True, spare=min(top_k, configs[0].slots // 8))
    core = Residency(configs, store.layers, store.experts)
    recorder = Recorder(core) if options.record_events else None
    host = HostArena(plan.tiers[-1].slots, store.slot_nbytes, page_locked=on_gpu)
    arena = DeviceArena(plan.tiers[0].slots, store.slot_nbytes, device) if on_gpu else None
    return ExpertCache(store, recorder or core, host, arena, options.readers), recorder
