"""PEFT's adapters on the weights of experts (`target_parameters`), for a model whose experts are tiered and frozen.

PEFT looks for a parameter of that name, takes its shape, dtype and device, and wraps the module; its wrapper changes
the parameter whenever the module runs. Here PEFT is shown parameters that take no memory, and afterwards its wrappers
are made to hand their low-rank factors to the experts module instead (`adapters.py`). An adapter's own weights, its
files and its settings stay PEFT's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from moetier.cache import ExpertCache
from moetier.errors import CapacityError, ConfigError, UnsupportedModelError
from moetier.experts import per_expert_parameters
from moetier.record import Field
from moetier.training.adapters import ACTIVE, MERGED, Factors


@contextmanager
def adaptable_experts(model: Any) -> Iterator[None]:
    """Let PEFT see the weights of a model's tiered experts while it adds or loads an adapter:

        with moetier.adaptable_experts(model):
            model = peft.get_peft_model(model, peft.LoraConfig(target_parameters=["mlp.experts.gate_up_proj"]))

    Also around `PeftModel.from_pretrained`, `load_adapter` and `add_adapter`. Raises `ConfigError` without PEFT and for
    a model of another kind, `UnsupportedModelError` for one that was loaded to train its experts themselves,
    `CapacityError` for a budget below one slot.
    """
    modules = _experts_of(model)
    kind = tiered_wrapper()
    shown: list[tuple[Any, str]] = []
    try:
        for module in modules:
            for name in _matrices(module):
                module.register_parameter(name, torch.nn.Parameter(_stand_in(module, name), requires_grad=False))
                shown.append((module, name))
        yield
    finally:
        for module, name in shown:
            del module._parameters[name]
        own = {id(module) for module in modules}
        for wrapper in list(model.modules()):
            if type(wrapper) is kind.__base__ and id(wrapper.get_base_layer()) in own:
                wrapper.__class__ = kind


def _experts_of(model: Any) -> list[Any]:
    tiered = getattr(model, "moetier", None)
    if tiered is None:
        raise ConfigError("adaptable_experts needs a model that was loaded with moetier.from_pretrained(path, …)")
    if tiered.training is not None:
        raise UnsupportedModelError(
            "the model was loaded to train its experts themselves, and its run folder has no adapters; load it without "
            "train= for adapters on frozen experts"
        )
    if not isinstance(tiered.cache, ExpertCache):
        raise CapacityError("adapters on experts need a slot for a whole expert; give more host_memory")
    if tiered.cache.core.misses is not None:
        raise ConfigError(
            "cpu_experts computes experts from host memory, without adapters; load with cpu_experts='off'"
        )
    return [module for module in model.modules() if "_moetier" in vars(module)]


def _matrices(module: Any) -> list[str]:
    """In the order in which their class registers them: PEFT's wrappers are nested, and their files named, by it."""
    return [name for name in per_expert_parameters(module) if len(_field(module, name).shape) == 2]


def _field(module: Any, name: str) -> Field:
    tiered, layer = module._moetier
    found: Field = next(field for field in tiered.cache.store.layout(layer).fields if field.name == name)
    return found


def _stand_in(module: Any, name: str) -> torch.Tensor:
    """Zeros in the shape of all experts of a layer, [E, …], in the memory of one element."""
    tiered, layer = module._moetier
    field, device = _field(module, name), (tiered.cache.device or tiered.cache.host).device
    return torch.zeros((), dtype=field.dtype, device=device).expand(len(tiered.layers[layer].recipes), *field.shape)


@cache
def tiered_wrapper() -> Any:
    """PEFT's wrapper of a parameter, for one that is a field of tiered experts. Raises `ConfigError` without PEFT."""
    try:
        from peft.tuners.lora.layer import ParamWrapper
    except ImportError as error:
        raise ConfigError(f"adapters on experts need the package peft (0.21 or newer): {error}") from error
    if not hasattr(ParamWrapper, "get_delta_factors"):
        raise ConfigError("adapters on experts need peft 0.21 or newer; pip install -U peft")

    class TieredParamWrapper(ParamWrapper):  # type: ignore[misc]
        """Hands its factors to the experts module that it wraps."""

        def get_param(self) -> Any:
            """What stands for the parameter: its shape, dtype and device."""
            return _stand_in(self.get_base_layer(), self.parameter_name)

        @contextmanager
        def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
            active = _place(self.get_base_layer(), ACTIVE)
            names = [name for name in active_adapters or () if name in self.lora_A]
            active[self.parameter_name] = [self._factors(name) for name in names]
            try:
                yield
            finally:
                del active[self.parameter_name]

        def _factors(self, name: str) -> Factors:
            lhs, rhs, scale = self.get_delta_factors(name)
            return Factors(self.parameter_name, lhs, rhs, float(scale))

        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
            """Keep the factors with the experts, as they are now; `save_pretrained` writes them into the weights."""
            from peft.tuners.tuners_utils import check_adapters_to_merge

            merged = _place(self.get_base_layer(), MERGED).setdefault(self.parameter_name, [])
            for name in check_adapters_to_merge(self, adapter_names):
                if name not in self.lora_A:
                    continue
                of = self._factors(name)
                lhs, rhs = of.lhs.detach().clone(), of.rhs.detach().clone()
                if safe_merge and not (lhs.isfinite().all() and rhs.isfinite().all()):
                    raise ValueError(f"adapter {name} has weights that are not finite")
                merged.append(Factors(of.field, lhs, rhs, of.scale))
                self.merged_adapters.append(name)

        def unmerge(self) -> None:
            """Drop what was merged."""
            merged = _place(self.get_base_layer(), MERGED).get(self.parameter_name, [])
            del merged[len(merged) - len(self.merged_adapters) :]
            self.merged_adapters.clear()

    return TieredParamWrapper


def _place(module: Any, name: str) -> dict[str, list[Factors]]:
    """A module's dictionary of factors, not known to torch."""
    if name not in vars(module):
        object.__setattr__(module, name, {})
    found: dict[str, list[Factors]] = vars(module)[name]
    return found
