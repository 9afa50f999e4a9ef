"""Routers that are one matrix: one product in place of norm, router and ranking.

Most routers rank experts by a linear map of the normed hidden state (softmax and sigmoid keep that order), and an RMS
norm only scales a token's state and its channels. Folding the norm's weight into the router's leaves one product of
[experts, width] with the raw state, a tenth of the time of calling the modules. Whether a router is like that is found
out by asking both the same; others are left to the modules. Scores are only for prediction: ranks, not gate weights.
"""

from __future__ import annotations

import torch

_AGREEMENT = 0.9  # share of a probe's choices that must be the same; what is missing are near ties


def folded(
    router: torch.nn.Module, norm: torch.nn.Module | None, probe: torch.Tensor, index: torch.Tensor
) -> torch.Tensor | None:
    """[experts, width] float32 such that its product with a state ranks experts as the router does, or None.

    `probe` [T, width] are states, `index` [T, K] what the router chooses for them.
    """
    weights = [p for p in router.parameters() if p.dim() == 2 and p.shape[1] == probe.shape[1]]
    if len(weights) != 1:
        return None
    biases = [
        one for one in (*router.parameters(), *router.buffers()) if one.dim() == 1 and len(one) == len(weights[0])
    ]
    if any(bool(bias.any()) for bias in biases):
        return None
    matrix = weights[0].detach().float()
    if norm is not None:
        scale = _channels(norm, probe)
        if scale is None:
            return None
        matrix = matrix * scale
    chosen = (probe.detach().float() @ matrix.t()).topk(index.shape[1], dim=-1).indices
    same = (chosen[:, :, None] == index[:, None, :]).any(dim=-1).float().mean()
    return matrix.contiguous() if float(same) >= _AGREEMENT else None


def _channels(norm: torch.nn.Module, probe: torch.Tensor) -> torch.Tensor | None:
    """[width] factors of a norm that otherwise only scales each token; None if it does more."""
    ones = torch.ones_like(probe[:1])
    scale: torch.Tensor = norm(ones.reshape(1, 1, -1)).detach().float().reshape(-1)
    if not bool(torch.isfinite(scale).all()) or not bool(scale.any()):
        return None
    return scale
