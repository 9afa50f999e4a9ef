"""The transformers hook: load any MoE checkpoint without its experts, and serve them from the cache.

Two doors lead in. `moetier.from_pretrained(path, ...)` checks the checkpoint and loads it; plain
`AutoModelForCausalLM.from_pretrained(path, quantization_config=TieredExpertsConfig(...))` does the same through the
quantizer interface of transformers. What comes back is the ordinary model: only its experts modules have lost their
stacked parameters and compute through the `moetier` experts implementation.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers.core_model_loading import build_glob_alternation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from moetier.attach import attach_cache, own_resident_weights
from moetier.errors import ConfigError, UnsupportedModelError
from moetier.experts import per_expert_parameters
from moetier.mapping import CheckpointMap, LayerMap, expert_parameters
from moetier.options import Options
from moetier.sizing import kv_nbytes, top_k_of
from moetier.stores.opening import shards_of
from moetier.stores.packed_index import PADDING
from moetier.stores.shards import Shards
from moetier.threads import CoreWatch

NAME = "moetier"


@register_quantization_config(NAME)
class TieredExpertsConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """Ask `from_pretrained` of transformers to keep a model's experts out of core; takes the fields of `Options`."""

    def __init__(self, **options: Any):
        options.pop("quant_method", None)
        self.quant_method = NAME
        if isinstance(options.get("train"), os.PathLike):
            options["train"] = os.fspath(options["train"])
        try:
            self.options = Options(**options)
        except TypeError as error:
            known = ", ".join(Options.__dataclass_fields__)
            raise ConfigError(f"TieredExpertsConfig: {error}; known options: {known}") from None
        self.options.check()
        self.shards: Shards | None = None  # what the caller has read of the checkpoint already

    def to_dict(self) -> dict[str, Any]:
        """The options as a plain dictionary."""
        return {"quant_method": NAME, **asdict(self.options)}


def moetier_experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The experts implementation that transformers calls: `self` is an experts module bound to its layer."""
    if hidden_states.is_meta:  # sizing runs the model without data
        return torch.empty_like(hidden_states)
    if getattr(self, "_is_expert_parallel", False):
        raise UnsupportedModelError("expert parallelism and tiered experts cannot be combined")
    run = _outside_graphs if torch.compiler.is_compiling() else _run
    return run(self, hidden_states, top_k_index, top_k_weights)


def _run(module: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    tiered, layer = module._moetier
    result: torch.Tensor = tiered.forward(layer, module, hidden, index, weights)
    return result


# torch.compile compiles what is around the experts: what happens in here follows residency, no graph could
_outside_graphs = torch.compiler.disable(_run)  # type: ignore[no-untyped-call]


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
        self._known_shards = quantization_config.shards
        self._cores = CoreWatch()
        self._modules: list[tuple[str, Any]] = []
        self._maps: list[LayerMap] = []
        self._kv_nbytes = 0

    @property
    def is_trainable(self) -> bool:
        """What stays in memory can be trained; the experts are frozen unless somebody trains them (`Sink`)."""
        return True

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Saved as an ordinary checkpoint."""
        return True

    def _process_model_before_weight_loading(
        self, model: Any, dtype: Any = None, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> Any:
        if not checkpoint_files or not all(str(file).endswith(".safetensors") for file in checkpoint_files):
            raise ConfigError("moetier reads safetensors checkpoints only; pass the folder or hub id of one")
        self._modules = find_experts(model)
        self._shards = shards_of([Path(file) for file in checkpoint_files], self._known_shards)
        self._maps, self._top_k = map_experts(model, self._modules, self._shards, dtype)
        detach_experts(model, self._modules)
        if self.options.train is None:  # training keeps no decoding cache
            self._kv_nbytes = kv_nbytes(model, self.options.context)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        own_resident_weights(model)
        if self.options.train is None:
            attach_cache(model, self._modules, self._maps, self._shards, self.options, self._top_k, self._kv_nbytes)
        else:
            from moetier.training.attach import attach_training

            attach_training(model, self._modules, self._maps, self._shards, self.options, self._top_k)
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
