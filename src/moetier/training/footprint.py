"""What a training step keeps in memory beside weights: activations from forward to backward, and what comes and goes.

Measured on the model itself: a forward of a few tokens without experts, in which autograd says what it saves. Bytes
grow with the tokens of a batch, whatever sequences they are in: an attention that keeps its probabilities takes more.
Gradient checkpointing, which is switched on later if at all, takes less.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch

from moetier.experts import up_name
from moetier.record import PAGE, RecordLayout, round_up
from moetier.sizing import BASE_WORKSPACE, READER_NBYTES
from moetier.training.outbound import DEPTH, outbound_nbytes

SHORT, LONG = 16, 48  # tokens of the two forwards
LAYER_COPIES = 16  # hidden states that a decoder layer saves, where it cannot be measured
ROW_COPIES = 3  # of the rows of all experts of a layer at once: gathered, results, in token order
LOSS_COPIES = 2  # of the logits in float32 at once, beside what is saved of them: gradients of the loss


def training_workspace_nbytes(
    model: Any, modules: list[tuple[str, Any]], threads: int, context: int, top_k: int, record_nbytes: int
) -> int:
    """Working memory of a training step of `context` tokens on the CPU: the stated constant, buffers, activations.

    `threads` read, as many write. `record_nbytes` is the fp32 gradient of an expert, of which two are on their way.
    """
    activations = activations_nbytes(model, modules, context, top_k)
    return BASE_WORKSPACE + 2 * threads * READER_NBYTES + 2 * record_nbytes + activations


def beside_device_nbytes(threads: int, slot_nbytes: int, record_nbytes: int) -> int:
    """The part of it that stays on the host where the model is on a GPU: without activations, with page-locked buffers.

    `slot_nbytes` is that of an expert's weights, whose dtype its gradient has on its way; in fp32 it takes
    `record_nbytes`.
    """
    return BASE_WORKSPACE + 2 * threads * READER_NBYTES + record_nbytes + outbound_nbytes(slot_nbytes)


def device_workspace_nbytes(
    model: Any, modules: list[tuple[str, Any]], context: int, top_k: int, slot_nbytes: int
) -> int:
    """Working memory of a training step on a GPU: activations, and gradients until they are copied to the host."""
    return BASE_WORKSPACE + (DEPTH + 1) * slot_nbytes + activations_nbytes(model, modules, context, top_k)


def up_nbytes(modules: list[tuple[str, Any]], layouts: list[RecordLayout], context: int, top_k: int) -> list[int]:
    """Bytes of what every layer's up projections give for `context` tokens: as much as keeping them saves computing.

    0 where backward needs all of an expert again, because of a norm behind it.
    """
    found = []
    for (_, module), layout in zip(modules, layouts, strict=True):
        field = next(field for field in layout.fields if field.name == up_name(module))
        outputs = field.shape[1 if module.is_transposed else 0]
        nbytes = 0 if module.has_post_expert_norm else context * top_k * outputs * field.dtype.itemsize
        found.append(round_up(nbytes, PAGE))
    return found


def whole_layers(layers: list[int], nbytes: int) -> int:
    """The bytes of as many of the first layers as fit."""
    return max(total for total in accumulate(layers, initial=0) if total <= max(0, nbytes))


def activations_nbytes(model: Any, modules: list[tuple[str, Any]], context: int, top_k: int) -> int:
    """What `context` tokens take from forward to backward.

    Where all that is saved is in memory, either the loss or a layer's experts are at work.
    """
    config = model.config.get_text_config()
    itemsize: int = next(model.parameters()).dtype.itemsize
    rows = ROW_COPIES * top_k * int(config.hidden_size) * itemsize
    loss = LOSS_COPIES * int(getattr(config, "vocab_size", 0)) * 4
    per_token = saved_per_token(model, modules) + max(rows, loss)
    return int(context * per_token)


def saved_per_token(model: Any, modules: list[tuple[str, Any]]) -> float:
    """Bytes that autograd saves for backward, a token of a batch. `modules` are the experts, which do not run."""
    try:
        short, long = (_saved_nbytes(model, modules, tokens) for tokens in (SHORT, LONG))
    except Exception:  # a model that wants other inputs than tokens and labels: estimate instead
        config = model.config.get_text_config()
        itemsize: int = next(model.parameters()).dtype.itemsize
        return float(LAYER_COPIES * int(config.num_hidden_layers) * int(config.hidden_size) * itemsize)
    return max(0.0, (long - short) / (LONG - SHORT))


def _saved_nbytes(model: Any, modules: list[tuple[str, Any]], tokens: int) -> int:
    """Bytes of all that a forward of so many tokens saves, weights apart; shared memory counted once."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return tensor

    ids = torch.zeros(1, tokens, dtype=torch.long, device=next(model.parameters()).device)
    saving = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with _without_experts(modules), torch.enable_grad(), saving:
        model(input_ids=ids, labels=ids, use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())


@contextmanager
def _without_experts(modules: list[tuple[str, Any]]) -> Iterator[None]:
    """Experts that keep for backward what tiered ones keep, and compute nothing."""

    def forward(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, *_: Any) -> torch.Tensor:
        result: torch.Tensor = _Stand.apply(hidden, index, weights)  # type: ignore[no-untyped-call]
        return result

    for _, module in modules:
        module.forward = forward
    try:
        yield
    finally:
        for _, module in modules:
            del module.forward


class _Stand(torch.autograd.Function):
    """In the experts' place."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Saves what they save."""
        ctx.save_for_backward(hidden, index, weights)
        return torch.zeros_like(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Never called."""
        raise AssertionError("a measurement has no backward")
