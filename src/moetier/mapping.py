"""Which checkpoint tensors feed which expert, by the model's own loading rules.

transformers says how tensors of a checkpoint become parameters: renamings, then converters with operations. The
same rules, applied to one expert's tensors, give that expert's slice. Nothing here knows a model family.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from moetier.errors import CheckpointError, UnsupportedModelError
from moetier.experts import per_expert_parameters
from moetier.record import FIELD_ALIGNMENT, RecordLayout
from moetier.stores.checkpoint import Conversion, Extent, Recipe, Source
from moetier.stores.shards import Shards, TensorEntry

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class ExpertParameter:
    """A parameter that stacks all experts of a layer: [experts, *shape] in the model."""

    name: str  # in the model's state dict
    field: str  # in the experts module
    shape: tuple[int, ...]  # of one expert
    dtype: torch.dtype
    experts: int


@dataclass(frozen=True, slots=True)
class LayerMap:
    """A layer's record layout, how to assemble each expert, and the checkpoint tensors that this uses up."""

    layout: RecordLayout
    recipes: tuple[Recipe, ...]
    tensors: tuple[str, ...]
    is_transposed: bool = False  # the outputs of a matrix are its second dimension


def expert_parameters(
    name: str, module: Any, dtype_of: Callable[[str, torch.dtype], torch.dtype]
) -> list[ExpertParameter]:
    """The stacked parameters of an experts module (on any device, meta included)."""
    found = []
    for field in per_expert_parameters(module):
        parameter = getattr(module, field, None)
        if not isinstance(parameter, torch.nn.Parameter) or parameter.dim() < 2:
            raise UnsupportedModelError(f"{name}: {type(module).__name__} has no stacked parameter {field!r}")
        full = f"{name}.{field}"
        found.append(
            ExpertParameter(
                full, field, tuple(parameter.shape[1:]), dtype_of(full, parameter.dtype), parameter.shape[0]
            )
        )
    return found


class CheckpointMap:
    """The checkpoint's tensors sorted by the parameter they feed."""

    def __init__(self, model: Any, shards: Shards):
        self._shards = shards
        mapping = get_model_conversion_mapping(model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._converter_of = {pattern: c for c in converters for pattern in c.source_patterns}
        self._feeds: dict[str, dict[str | None, list[str]]] = {}
        state = model.state_dict()
        for key in sorted(shards.tensors, key=dot_natural_key):
            renamed, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
            if renamed not in state and key in state:  # the same second chance that the loader gives
                renamed, pattern = rename_source_key(key, [], [], model.base_model_prefix, state)
            self._feeds.setdefault(renamed, {}).setdefault(pattern, []).append(key)

    def layer(self, parameters: list[ExpertParameter]) -> LayerMap:
        """How to assemble the experts of one layer. Raises `CheckpointError` for what is missing or does not fit."""
        sources = {parameter.field: self._sources(parameter) for parameter in parameters}
        # the order in the file becomes the order in the record, so that a whole expert can be one contiguous read
        ordered = sorted(parameters, key=lambda p: self._position(sources[p.field][0]))
        layout = RecordLayout.of([(p.field, p.dtype, p.shape) for p in ordered])
        offsets = {field.name: field.offset for field in layout.fields}
        alignment = max(self._alignment(parameter) for parameter in parameters)
        recipes = []
        for expert in range(parameters[0].experts):
            extents: list[Extent] = []
            conversions: list[Conversion] = []
            for parameter in ordered:
                feed = sources[parameter.field][expert]
                if self._is_plain(parameter, feed):
                    target = offsets[parameter.field]
                    for source in feed:
                        e = source.extent
                        extents.append(Extent(e.file, e.offset, e.nbytes, target))
                        target += e.nbytes
                else:
                    casts = self._is_plain(parameter, feed, any_dtype=True)
                    conversions.append(Conversion(parameter.field, tuple(feed), self._converter(parameter), casts))
            recipes.append(Recipe(tuple(extents), tuple(conversions), alignment))
        names = {key for p in parameters for keys in self._feeds[p.name].values() for key in keys}
        return LayerMap(layout, tuple(recipes), tuple(sorted(names, key=dot_natural_key)))

    def _sources(self, parameter: ExpertParameter) -> list[list[Source]]:
        """Per expert: the tensors, or slices of tensors, that become its slice of the parameter."""
        feeds = self._feeds.get(parameter.name)
        if not feeds:
            raise CheckpointError(
                f"{self._shards.files[0].parent}: no tensor for {parameter.name!r}; the checkpoint is incomplete or "
                "its config.json belongs to another model"
            )
        pattern = next(iter(feeds))
        if pattern is not None:
            converter = self._converter_of[pattern]
            if len(converter.target_patterns) > 1:
                raise UnsupportedModelError(
                    f"{parameter.name}: its checkpoint tensors feed several parameters at once "
                    f"({', '.join(converter.target_patterns)}), which moetier cannot take apart expert by expert yet"
                )
            patterns = [p for p in converter.source_patterns if p in feeds]
            if len(patterns) < len(converter.source_patterns):
                absent = next(p for p in converter.source_patterns if p not in feeds)
                raise CheckpointError(f"{self._shards.files[0].parent}: no tensor {absent!r} for {parameter.name!r}")
        else:
            patterns = [pattern]
        per_expert: list[list[Source]] = [[] for _ in range(parameter.experts)]
        for name in patterns:
            keys = feeds[name]
            if len(keys) == 1 and "*" not in (name or ""):
                slices = self._slices(self._shards.tensors[keys[0]], name, parameter)
            else:
                slices = [self._whole(self._shards.tensors[key], name) for key in keys]
                if len(slices) != parameter.experts:
                    raise CheckpointError(
                        f"{self._file(keys[0])}: {len(slices)} tensors match {name!r} for {parameter.name!r}, but the "
                        f"config says {parameter.experts} experts{_gap(keys)}; download the checkpoint again"
                    )
            for expert, source in enumerate(slices):
                per_expert[expert].append(source)
        self._check(parameter, per_expert, feeds[patterns[0]][0])
        return per_expert

    def _whole(self, entry: TensorEntry, pattern: str | None) -> Source:
        extent = Extent(entry.file, entry.offset, entry.nbytes, 0)
        return Source(pattern or "", self._dtype(entry), entry.shape, extent)

    def _slices(self, entry: TensorEntry, pattern: str | None, parameter: ExpertParameter) -> list[Source]:
        if not entry.shape or entry.shape[0] != parameter.experts:
            raise CheckpointError(
                f"{self._file(entry.name)}: {entry.name!r} has shape {list(entry.shape)}, but the config says "
                f"{parameter.experts} experts; the checkpoint and its config.json do not belong together"
            )
        size = entry.nbytes // entry.shape[0]
        dtype, shape = self._dtype(entry), (1, *entry.shape[1:])
        return [
            Source(pattern or "", dtype, shape, Extent(entry.file, entry.offset + expert * size, size, 0))
            for expert in range(parameter.experts)
        ]

    def _check(self, parameter: ExpertParameter, per_expert: list[list[Source]], key: str) -> None:
        """The loader's operations, run without data, must give the shape that the model has."""
        for feed in {tuple((s.pattern, s.dtype, s.shape) for s in feed) for feed in per_expert}:
            inputs: dict[str, list[torch.Tensor]] = {}
            for pattern, dtype, shape in feed:
                inputs.setdefault(pattern, []).append(torch.empty(shape, dtype=dtype, device="meta"))
            try:
                shape = tuple(self._converter(parameter)(inputs).shape)
            except (RuntimeError, ValueError, IndexError, TypeError) as error:
                raise CheckpointError(
                    f"{self._file(key)}: {key!r} cannot become {parameter.name!r}: {error}"
                ) from error
            if shape != parameter.shape:
                raise CheckpointError(
                    f"{self._file(key)}: {key!r} gives {parameter.name!r} the shape {list(shape)} per expert, but the "
                    f"config asks for {list(parameter.shape)}; they do not belong together"
                )

    def _operations(self, parameter: ExpertParameter) -> list[Any]:
        pattern = next(iter(self._feeds[parameter.name]))
        return [] if pattern is None else list(self._converter_of[pattern].operations)

    def _alignment(self, parameter: ExpertParameter) -> int:
        """What the loader's own tensor would be aligned to.

        In float32 the last bit of a product of one row can depend on whether the weights start on 16 bytes. A tensor
        that the loader assembles is aligned; one that it maps lies as the file has it, and so does a record here.
        """
        return FIELD_ALIGNMENT if parameter.dtype == torch.float32 and self._operations(parameter) else 8

    def _is_plain(self, parameter: ExpertParameter, feed: list[Source], any_dtype: bool = False) -> bool:
        """Whether the expert's bytes (with `any_dtype`: numbers) are the sources' one behind the other."""
        if any(source.dtype != (feed[0].dtype if any_dtype else parameter.dtype) for source in feed):
            return False
        for operation in self._operations(parameter):
            if isinstance(operation, MergeModulelist) and operation.dim == 0:
                continue  # stacks experts: nothing to do for one
            if isinstance(operation, Concatenate) and operation.dim == 1:
                continue  # first dimension of the expert's slice: bytes one behind the other
            if getattr(operation, "check_dims", False) and feed[0].shape[-len(parameter.shape) :] == parameter.shape:
                continue  # a transposition for older files only
            return False
        return True

    def _converter(self, parameter: ExpertParameter) -> Callable[[dict[str, list[torch.Tensor]]], torch.Tensor]:
        """The loader's operations as a function of one expert's tensors, giving its slice without the experts' dim."""
        operations = self._operations(parameter)
        pattern = next(iter(self._feeds[parameter.name]))
        converter = None if pattern is None else self._converter_of[pattern]
        expected = SimpleNamespace(shape=torch.Size((1, *parameter.shape)))
        shim = SimpleNamespace(get_parameter=lambda name: expected)

        def run(inputs: dict[str, list[torch.Tensor]]) -> torch.Tensor:
            tensors: Mapping[str, Any] = inputs
            for operation in operations:
                assert converter is not None
                tensors = operation.convert(
                    dict(tensors),
                    source_patterns=converter.source_patterns,
                    target_patterns=converter.target_patterns,
                    full_layer_name=parameter.name,
                    model=shim,
                    config=None,
                    missing_keys=None,
                )
            result = next(iter(tensors.values()))
            result = result[0] if isinstance(result, list) else result
            expert: torch.Tensor = result[0] if result.dim() == len(parameter.shape) + 1 else result
            return expert

        return run

    def _dtype(self, entry: TensorEntry) -> torch.dtype:
        if entry.dtype not in DTYPES:
            raise CheckpointError(
                f"{self._file(entry.name)}: {entry.name!r} has dtype {entry.dtype}; experts may be "
                f"{', '.join(DTYPES)} (quantised checkpoints are not supported yet)"
            )
        return DTYPES[entry.dtype]

    def _file(self, key: str) -> str:
        return str(self._shards.files[self._shards.tensors[key].file])

    def _position(self, feed: list[Source]) -> tuple[int, int]:
        return min((source.extent.file, source.extent.offset) for source in feed)


def _gap(keys: Iterable[str]) -> str:
    """The first expert number that is missing from names like `…experts.12.up_proj.weight`, for an error message."""
    numbers = [[int(n) for n in re.findall(r"\.(\d+)\.", key)] for key in keys]
    varying = [column for column in zip(*numbers, strict=False) if len(set(column)) > 1]
    if not varying:
        return ""
    present = set(varying[-1])
    missing = next((n for n in range(max(present) + 2) if n not in present), None)
    return f" (expert {missing} is missing)"
