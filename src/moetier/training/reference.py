"""The in-memory reference: ordinary parameters and autograd, with the arithmetic and orders of tiered experts.

Importing this registers the experts implementation `moetier_reference`, for models that transformers loads whole:

    import moetier.training.reference
    model = AutoModelForCausalLM.from_pretrained(path, experts_implementation="moetier_reference")

Its outputs and gradients are what tiered experts give, bit for bit, however few slots they have. Orders that are fixed
here and there: rows are sorted by expert, a token's rows add up in the order of its top-k in both directions, and the
gradients of a norm behind the experts add up from the last expert to the first.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moetier.experts import Routing, per_expert_parameters
from moetier.training.arithmetic import weighted_rows

NAME = "moetier_reference"


def reference_experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Experts of a module that has its stacked parameters: [T, H] → [T, H], recorded by autograd like any other."""
    tokens, top_k = top_k_index.shape
    routing = Routing(top_k_index, top_k_weights)
    if not routing.tokens:
        return torch.zeros_like(hidden_states)
    repeated = hidden_states.unsqueeze(1).expand(tokens, top_k, hidden_states.size(-1)).flatten(0, 1)
    rows = repeated[routing.order].split_with_sizes(routing.tokens)
    gates = routing.weights.split_with_sizes(routing.tokens)
    stacked = {name: getattr(self, name).unbind(0) for name in per_expert_parameters(self)}
    results = [
        weighted_rows(self, x, {name: experts[expert] for name, experts in stacked.items()}, g)
        for expert, x, g in zip(routing.number, rows, gates, strict=True)
    ]
    return routing.combine(hidden_states, torch.cat(results))


def use_reference(model: Any) -> Any:
    """Let a model in memory compute by the reference, where its class takes no `experts_implementation`; the model."""
    for module in model.modules():
        if hasattr(module, "has_post_expert_norm") and hasattr(module, "is_transposed"):
            module.config._experts_implementation_internal = NAME
    return model


ALL_EXPERTS_FUNCTIONS.register(NAME, reference_experts_forward)
