"""The model of the teacher regression: a Mixture of Experts whose gate looks at the environment alone.

An ordinary transformers model with the experts interface, and nothing else of moetier in it: it trains in memory with
any experts implementation, or with its experts tiered. All weights follow from the config's seed; an expert's from
(seed, layer, expert), so that a home of experts nobody has trained yet needs no file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation
from transformers.utils import ModelOutput

from moetier.access import ExpertKey
from moetier.errors import ConfigError

__all__ = ["SyntheticConfig", "SyntheticModel", "expert_ranks"]


class SyntheticConfig(PretrainedConfig):  # type: ignore[misc]
    """Sizes of a `SyntheticModel`, named as transformers names them; `num_experts` are those of every layer."""

    model_type = "moetier_synthetic"

    def __init__(
        self,
        num_experts: int = 64,
        num_experts_per_tok: int = 2,
        num_hidden_layers: int = 1,
        hidden_size: int = 64,
        intermediate_size: int = 128,
        num_environments: int = 64,
        num_outputs: int = 8,
        hidden_act: str = "silu",
        seed: int = 0,
        **kwargs: Any,
    ):
        self.num_experts, self.num_experts_per_tok = num_experts, num_experts_per_tok
        self.num_hidden_layers = num_hidden_layers
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.num_environments, self.num_outputs = num_environments, num_outputs
        self.hidden_act, self.seed = hidden_act, seed
        super().__init__(**kwargs)

    def check(self) -> None:
        """Raise `ConfigError` for sizes that make no model."""
        sizes = ("num_experts", "num_experts_per_tok", "num_hidden_layers", "hidden_size", "intermediate_size")
        for name in (*sizes, "num_environments", "num_outputs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: must be at least 1, got {getattr(self, name)}")
        if self.num_experts_per_tok > self.num_experts:
            raise ConfigError(
                f"num_experts_per_tok: {self.num_experts_per_tok} of {self.num_experts} experts cannot be chosen"
            )


@use_experts_implementation
class SyntheticExperts(nn.Module):
    """Gated MLPs, stacked: W_down · (act(W_gate · x) * (W_up · x)), [T, H] → [T, H]."""

    def __init__(self, config: SyntheticConfig):
        super().__init__()
        experts, width, inner = config.num_experts, config.hidden_size, config.intermediate_size
        self.num_experts = experts
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, width))
        self.down_proj = nn.Parameter(torch.empty(experts, width, inner))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Expert by expert: transformers' `eager` implementation. `index` and `weights` are [T, K]."""
        result = torch.zeros_like(hidden_states)
        for expert in torch.unique(index).tolist():
            tokens, position = torch.where(index == expert)
            gate, up = nn.functional.linear(hidden_states[tokens], self.gate_up_proj[expert]).chunk(2, dim=-1)
            out = nn.functional.linear(self.act_fn(gate) * up, self.down_proj[expert])
            result.index_add_(0, tokens, (out * weights[tokens, position, None]).to(result.dtype))
        return result


class SyntheticLayer(nn.Module):
    """x + experts(norm(x)), the experts chosen by the environment."""

    def __init__(self, config: SyntheticConfig):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.gate = nn.Embedding(config.num_environments, config.num_experts)  # a row of logits an environment
        self.norm = nn.RMSNorm(config.hidden_size, eps=1e-6)
        self.experts = SyntheticExperts(config)

    def choose(self, environment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Experts and their weights, both [B, K]: softmax over the logits of the K best."""
        logits, index = self.gate(environment).topk(self.top_k, dim=-1)
        return index, logits.softmax(dim=-1)

    def forward(self, hidden: torch.Tensor, environment: torch.Tensor) -> torch.Tensor:
        """[B, H] → [B, H]."""
        index, weights = self.choose(environment)
        result: torch.Tensor = hidden + self.experts(self.norm(hidden), index, weights)
        return result


@dataclass
class SyntheticOutput(ModelOutput):  # type: ignore[misc]
    """`loss` is the mean squared error, where a target was given; `logits` [B, outputs] the model's answer."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None


class SyntheticModel(PreTrainedModel):  # type: ignore[misc]
    """Inputs [B, H] and environments [B] to outputs [B, outputs]."""

    config_class = SyntheticConfig
    main_input_name = "inputs"
    base_model_prefix = ""
    _can_compile_fullgraph = False

    def __init__(self, config: SyntheticConfig):
        config.check()
        super().__init__(config)
        self.layers = nn.ModuleList(SyntheticLayer(config) for _ in range(config.num_hidden_layers))
        self.head = nn.Linear(config.hidden_size, config.num_outputs)
        self.post_init()

    @property
    def moe_layers(self) -> list[SyntheticLayer]:
        """The layers in the order of a forward."""
        return [layer for layer in self.layers if isinstance(layer, SyntheticLayer)]

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing by module: `reset` knows the layers' numbers."""

    def reset(self) -> SyntheticModel:
        """Set the weights to those of the config's seed; experts that are detached, or on meta, are left out."""
        seed = self.config.seed
        with torch.no_grad():
            for number, layer in enumerate(self.moe_layers):
                generator = torch.Generator().manual_seed(_mixed(seed, number, -1))
                layer.gate.weight.copy_(torch.randn(layer.gate.weight.shape, generator=generator))
                layer.norm.weight.fill_(1.0)
                experts = layer.experts
                if "gate_up_proj" in experts._parameters and not experts.gate_up_proj.is_meta:
                    for expert in range(experts.num_experts):
                        fields = {name: getattr(experts, name)[expert] for name in ("gate_up_proj", "down_proj")}
                        first_weights(seed, ExpertKey(number, expert), fields)
            generator = torch.Generator().manual_seed(_mixed(seed, len(self.layers), -1))
            std = self.config.hidden_size**-0.5
            self.head.weight.copy_(std * torch.randn(self.head.weight.shape, generator=generator))
            self.head.bias.zero_()
        return self

    def forward(
        self, inputs: torch.Tensor, environment: torch.Tensor, target: torch.Tensor | None = None, **kwargs: Any
    ) -> SyntheticOutput:
        """Answers, and their mean squared error if there is a `target` [B, outputs]."""
        hidden = inputs.to(self.head.weight.dtype)
        for layer in self.layers:
            hidden = layer(hidden, environment)
        logits = self.head(hidden)
        loss = None if target is None else nn.functional.mse_loss(logits.float(), target.float())
        return SyntheticOutput(loss, logits)

    @torch.no_grad()
    def expert_keys(self, environment: torch.Tensor) -> list[ExpertKey]:
        """The experts that samples of these environments use with the gates of now, in the order of a forward."""
        found: list[ExpertKey] = []
        own = torch.unique(environment)
        for number, layer in enumerate(self.moe_layers):
            index, _ = layer.choose(own.to(layer.gate.weight.device))
            found += [ExpertKey(number, expert) for expert in torch.unique(index).tolist()]
        return found

    def hint(self, batch: dict[str, torch.Tensor]) -> list[ExpertKey]:
        """`expert_keys` of a batch, for `Lookahead`: certain for the next one, and until a gate changes its mind."""
        return self.expert_keys(batch["environment"])


def first_weights(seed: int, key: ExpertKey, fields: dict[str, torch.Tensor]) -> None:
    """Fill an expert's weights, in place: normal, of variance 1 / inputs; made in float32, whatever the dtype."""
    generator = torch.Generator().manual_seed(_mixed(seed, *key))
    with torch.no_grad():
        for name in ("gate_up_proj", "down_proj"):
            field = fields[name]
            field.copy_(field.shape[-1] ** -0.5 * torch.randn(field.shape, generator=generator))


def _mixed(seed: int, layer: int, expert: int) -> int:
    """A seed of their own for each of the three (splitmix64, Steele et al. 2014)."""
    mixed = (seed * 0x9E3779B97F4A7C15 + (layer << 32) + expert + 1) & (1 << 64) - 1
    mixed = ((mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9) & (1 << 64) - 1
    mixed = ((mixed ^ mixed >> 27) * 0x94D049BB133111EB) & (1 << 64) - 1
    return (mixed ^ mixed >> 31) >> 1


def expert_ranks(model: SyntheticModel, environments: Sequence[int] | torch.Tensor) -> torch.Tensor:
    """For every sample, its environment's place among all, sorted by the experts they use; [N], for `sort_keys`."""
    count = model.config.num_environments
    chosen = [model.expert_keys(torch.tensor([environment])) for environment in range(count)]
    ranks = torch.empty(count, dtype=torch.int64)
    ranks[torch.tensor(sorted(range(count), key=lambda environment: (chosen[environment], environment)))] = (
        torch.arange(count)
    )
    return ranks[torch.as_tensor(environments)]
