"""Train a ScoutGate from a recorded trace: minutes on a CPU. Needs torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetier.errors import ConfigError
from moetier.predictors.scoutgate import ScoutGateWeights, context_windows
from moetier.trace import Trace

__all__ = ["train"]


def train(
    trace: Trace,
    embeddings: NDArray[np.float32],
    *,
    window: int = 8,
    projection: int = 128,
    width: int = 128,
    epochs: int = 12,
    batch: int = 256,
    rate: float = 3e-3,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> ScoutGateWeights:
    """Fit on all tokens of a trace that has `token_ids`; `embeddings` [V, width] are the model's, and stay as they are.

    Every tenth sequence (or the last tenth of a single one) is held out: the weights of the best epoch there are kept.
    `progress` is told (epoch, held-out loss). The same arguments on the same machine give the same weights. Raises
    `ConfigError` for a trace without tokens, or tokens the embeddings do not have.
    """
    import torch
    from torch import nn

    if trace.token_ids is None:
        raise ConfigError("the trace does not say which tokens it is of; record it again with this version of moetier")
    if trace.tokens < 20:
        raise ConfigError(f"a trace of {trace.tokens} tokens is too short to train on")
    if not 0 <= int(trace.token_ids.min()) <= int(trace.token_ids.max()) < len(embeddings):
        raise ConfigError(f"the trace has tokens that the model, with {len(embeddings)}, does not know")
    windows, held = _examples(trace, window)
    generator = torch.Generator().manual_seed(seed)
    net = _net(nn, torch, trace, embeddings.shape[1], window, projection, width, generator)
    table = torch.from_numpy(np.ascontiguousarray(embeddings, dtype=np.float32))
    table = torch.cat((table / table.std().clamp(min=1e-6), torch.zeros(1, table.shape[1])))  # the last row: no token
    inputs, chosen = torch.from_numpy(windows), torch.from_numpy(trace.experts.astype(np.int64))
    learn, check = torch.from_numpy(np.flatnonzero(~held)), torch.from_numpy(np.flatnonzero(held))

    def loss_of(rows: Any) -> Any:
        goals = torch.zeros(len(rows), trace.layers, trace.num_experts + 1)
        goals.scatter_(2, chosen[rows] % (trace.num_experts + 1), 1.0)  # what fills up goes to a column of its own
        return nn.functional.binary_cross_entropy_with_logits(_logits(net, table, inputs[rows]), goals[..., :-1])

    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=0.01)
    steps = epochs * (-(-len(learn) // batch))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))
    best, kept = float("inf"), None
    with torch.enable_grad():
        for epoch in range(epochs):
            for rows in torch.split(learn[torch.randperm(len(learn), generator=generator)], batch):
                optimizer.zero_grad()
                loss_of(rows).backward()
                optimizer.step()
                schedule.step()
            with torch.no_grad():
                value = sum(float(loss_of(rows)) * len(rows) for rows in torch.split(check, batch)) / len(check)
            if value < best:
                best, kept = value, {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}
            if progress is not None:
                progress(epoch + 1, value)
    if kept is None:
        raise ConfigError("training did not converge; lower the rate")
    net.load_state_dict(kept)
    return _frozen(net, table[:-1], {"held_out_loss": best, "trace": trace.info.source, "model": trace.info.model})


def _examples(trace: Trace, window: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Windows of token ids [T, window], and which tokens are held out."""
    ids = trace.token_ids
    assert ids is not None
    windows = np.empty((trace.tokens, window), dtype=np.int64)
    sequences = trace.sequences()
    for sequence in sequences:
        rows = np.flatnonzero(trace.sequence == sequence)
        windows[rows] = context_windows(ids[rows].astype(np.int64), window)
    if len(sequences) < 2:
        held = np.arange(trace.tokens) >= trace.tokens * 9 // 10
    else:
        held = np.isin(trace.sequence, sequences[:: max(2, min(10, len(sequences)))])
    return windows, held


def _net(nn: Any, torch: Any, trace: Trace, inner: int, window: int, projection: int, width: int, rng: Any) -> Any:
    layers, experts = trace.layers, trace.num_experts

    def draw(*shape: int, scale: float) -> Any:
        return nn.Parameter(torch.randn(*shape, generator=rng) * scale)

    frequency = np.stack([np.bincount(row[row >= 0], minlength=experts) for row in trace.experts.transpose(1, 0, 2)])
    rates = np.clip(frequency / trace.tokens, 1e-4, 1 - 1e-4)
    net = nn.Module()
    net.project = draw(inner, projection, scale=inner**-0.5)
    net.gain, net.shift = nn.Parameter(torch.ones(projection)), nn.Parameter(torch.zeros(projection))
    net.context = draw(window, projection, width, scale=(window * projection) ** -0.5)
    net.layer = draw(layers, width, scale=0.1)
    net.expert = draw(layers, experts, width, scale=width**-0.5)
    net.bias = nn.Parameter(torch.from_numpy(np.log(rates / (1 - rates)).astype(np.float32)))
    return net


def _projected(net: Any, embedded: Any) -> Any:
    """LN(e W_proj), [..., projection]."""
    from torch.nn.functional import layer_norm

    return layer_norm(embedded @ net.project, net.gain.shape, net.gain, net.shift)


def _logits(net: Any, table: Any, windows: Any) -> Any:
    """[T, L, E] for windows [T, M]; no token counts as nothing."""
    projected = _projected(net, table[windows]) * (windows >= 0)[..., None]
    tower = projected.flatten(1) @ net.context.flatten(0, 1)  # [T, D]
    towers = tower[:, None] + net.layer  # [T, L, D]
    return (towers.transpose(0, 1) @ net.expert.transpose(1, 2)).transpose(0, 1) + net.bias


def _frozen(net: Any, table: Any, info: dict[str, Any]) -> ScoutGateWeights:
    import torch

    with torch.no_grad():
        tokens = _projected(net, table).to(torch.float16).numpy()
    return ScoutGateWeights(
        tokens=tokens,
        **{name: getattr(net, name).detach().numpy() for name in ("context", "layer", "expert", "bias")},
        info=info,
    )
