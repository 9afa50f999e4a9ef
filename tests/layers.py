"""Experts without a model around them: a tiered twin and an in-memory one, over a store in memory that can be slow."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import use_experts_implementation

import moetier.hf  # registers "moetier"
from moetier import ExpertKey, Residency, TierConfig
from moetier.access import Access
from moetier.arenas import HostArena
from moetier.cache import ExpertCache
from moetier.experts import per_expert_parameters
from moetier.record import RecordLayout, round_up
from moetier.tiered import TieredExperts
from moetier.training import reference
from moetier.training.activations import Activations
from moetier.training.sink import Add, Batches, Gradients, Take

LAYERS = 2
IMPLEMENTATIONS = {"reference": reference.NAME, "tiered": moetier.hf.NAME}


@dataclass(frozen=True)
class Kind:
    """What `use_experts_implementation` can say of a family."""

    name: str
    has_gate: bool = True
    has_bias: bool = False
    is_transposed: bool = False
    has_post_expert_norm: bool = False
    clamps: bool = False  # a gate of its own
    hidden: int = 16
    inner: int = 32  # whole vectors: an activation over several experts at once has no scalar rest
    experts: int = 6

    def module(self, dtype: torch.dtype, implementation: str) -> Any:
        """An experts module with random stacked parameters."""
        kind = self

        class Experts(nn.Module):
            def __init__(self, config: Any):
                super().__init__()
                up, wide = ("gate_up_proj", 2 * kind.inner) if kind.has_gate else ("up_proj", kind.inner)
                shapes = {up: (wide, kind.hidden), "down_proj": (kind.hidden, kind.inner)}
                for name, (outputs, inputs) in shapes.items():
                    shape = (inputs, outputs) if kind.is_transposed else (outputs, inputs)
                    setattr(self, name, nn.Parameter(torch.randn(kind.experts, *shape, dtype=dtype) * inputs**-0.5))
                    if kind.has_bias:
                        setattr(
                            self, f"{name}_bias", nn.Parameter(torch.randn(kind.experts, outputs, dtype=dtype) * 0.3)
                        )
                self.num_experts, self.act_fn = kind.experts, nn.SiLU() if kind.has_gate else nn.GELU()
                if kind.has_post_expert_norm:
                    self.post_expert_norm = nn.RMSNorm(kind.hidden, eps=1e-5, dtype=dtype)
                    nn.init.normal_(self.post_expert_norm.weight, 1.0, 0.2)

            if kind.clamps:

                def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
                    gate, up = gate_up[..., ::2], gate_up[..., 1::2]
                    gate, up = gate.clamp(max=0.7), up.clamp(min=-0.7, max=0.7)
                    return (up + 1) * gate * torch.sigmoid(gate * 1.7)

            def forward(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
                raise NotImplementedError  # an implementation stands in

        flags = {name: getattr(self, name) for name in ("has_gate", "has_bias", "is_transposed")}
        made = use_experts_implementation(Experts, has_post_expert_norm=self.has_post_expert_norm, **flags)
        config = SimpleNamespace(_experts_implementation=IMPLEMENTATIONS.get(implementation, implementation))
        return made(config)


KINDS = [
    Kind("default"),
    Kind("bias, transposed, own gate", has_bias=True, is_transposed=True, clamps=True),
    Kind("bias", has_bias=True),
    Kind("transposed", is_transposed=True),
    Kind("no gate", has_gate=False),
    Kind("no gate, bias", has_gate=False, has_bias=True),
    Kind("norm behind each expert", has_post_expert_norm=True),
    Kind("norm, bias, transposed", has_bias=True, is_transposed=True, has_post_expert_norm=True),
]


class MemoryStore:
    """Records in memory; `delay` is the longest that a read takes, in seconds."""

    def __init__(self, modules: Sequence[Any], delay: float = 0.0, seed: int = 0):
        self.layers, self.experts = len(modules), int(modules[0].num_experts)
        names = per_expert_parameters(modules[0])
        shapes = [(name, getattr(modules[0], name).dtype, tuple(getattr(modules[0], name).shape[1:])) for name in names]
        self._layout = RecordLayout.of(shapes)
        self.records = {}
        for layer, module in enumerate(modules):
            for expert in range(self.experts):
                record = torch.zeros(self._layout.nbytes, dtype=torch.uint8)
                for name, view in self._layout.views(record).items():
                    view.copy_(getattr(module, name).detach()[expert])
                self.records[ExpertKey(layer, expert)] = record
        self.slot_nbytes = round_up(self._layout.nbytes, 4096)
        self.delay, self.reads = delay, 0
        self._random = random.Random(seed)

    def fields(self, key: ExpertKey) -> dict[str, torch.Tensor]:
        return self._layout.views(self.records[key])

    def layout(self, layer: int) -> RecordLayout:
        return self._layout

    def phase(self, key: ExpertKey) -> int:
        return 0

    def segments(self, key: ExpertKey) -> int:
        return 1

    def read(self, key: ExpertKey, segment: int, into: memoryview) -> int:
        if self.delay:
            time.sleep(self._random.random() * self.delay)
        data = self.records[key].numpy().tobytes()
        into[: len(data)] = data
        self.reads += 1
        return len(data)

    def close(self) -> None:
        pass


@dataclass
class DictSink:
    """Gradients in memory, summed in the order in which they come."""

    layers: set[int] = field(default_factory=lambda: set(range(1000)))
    gradients: dict[ExpertKey, Gradients] = field(default_factory=dict)
    versions: dict[ExpertKey, int] = field(default_factory=dict)
    events: list[tuple[str, Access]] = field(default_factory=list)

    def trains(self, layer: int) -> bool:
        return layer in self.layers

    def version(self, key: ExpertKey) -> int:
        return self.versions.get(key, 0)

    def fresh(self, access: Access, lease: Take) -> Batches:
        self.events.append(("forward", access))
        return lease(access, None)

    @contextmanager
    def collect(self, access: Access) -> Iterator[Add]:
        self.events.append(("backward", access))
        coming = set(access.keys)

        def add(key: ExpertKey, gradients: Gradients) -> None:
            coming.remove(key)
            known = self.gradients.setdefault(key, {})
            for name, gradient in gradients.items():
                known[name] = known[name] + gradient if name in known else gradient

        yield add
        assert not coming


class Twins:
    """The same layers of experts, tiered and in memory."""

    def __init__(
        self,
        kind: Kind,
        dtype: torch.dtype = torch.float32,
        slots: int = 2,
        delay: float = 0.0,
        seed: int = 0,
        activations: int = 0,
    ):
        """`activations` are bytes that forward may keep for backward."""
        self.kind = kind
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.plain = [kind.module(dtype, "reference") for _ in range(LAYERS)]
        self.store = MemoryStore(self.plain, delay, seed)
        core = Residency([TierConfig(slots, "lru")], LAYERS, kind.experts)
        self.cache = ExpertCache(self.store, core, HostArena(slots, self.store.slot_nbytes), readers=3)
        plan: Any = None
        self.hub = TieredExperts(self.cache, plan, [], None)
        self.hub.activations = Activations(activations, torch.device("cpu"))
        self.sink = self.hub.sink = DictSink()
        self.tiered = []
        for layer, plain in enumerate(self.plain):
            module = kind.module(dtype, "tiered")
            module.load_state_dict(plain.state_dict())
            for name in per_expert_parameters(module):
                del module._parameters[name]
            object.__setattr__(module, "_moetier", (self.hub, layer))
            self.tiered.append(module)

    def close(self) -> None:
        self.cache.core.check()
        self.cache.close()

    def evict(self, layer: int = 0) -> None:
        """Fill the slots with the experts of the other layer."""
        keys = tuple(ExpertKey(1 - layer, expert) for expert in range(self.kind.experts))
        for _ in self.cache.stream(Access(0, 1 - layer, keys)):
            pass
        assert not any(self.cache.holding([ExpertKey(layer, key.expert) for key in keys]))


def routed(kind: Kind, tokens: int = 9, top_k: int = 3, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """Hidden states [T, H], expert indices and gate weights [T, K]."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, kind.hidden, generator=generator, dtype=dtype)
    index = torch.rand(tokens, kind.experts, generator=generator).argsort(dim=-1)[:, :top_k]
    weights = torch.rand(tokens, top_k, generator=generator, dtype=dtype) + 0.1
    return hidden, index, weights / weights.sum(dim=-1, keepdim=True)
