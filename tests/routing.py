"""Small traces for the tests of predictors."""

from __future__ import annotations

import numpy as np

from moetier.access import Access
from moetier.trace import Trace

LAYERS, EXPERTS, TOP_K = 3, 6, 2


def random_trace(seed: int, tokens: int = 60, sequences: int = 3, planted: bool = False) -> Trace:
    """Skewed routing with memory; `planted` makes every layer and token id say what the next layer uses."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 20, tokens).astype(np.int32)
    experts = np.empty((tokens, LAYERS, TOP_K), dtype=np.int16)
    for token in range(tokens):
        for layer in range(LAYERS):
            weights = rng.random(EXPERTS) ** 2 + (np.arange(EXPERTS) == token // 7 % EXPERTS)
            experts[token, layer] = rng.choice(EXPERTS, TOP_K, replace=False, p=weights / weights.sum())
        if planted:
            experts[token] = [
                [(ids[token] + layer) % EXPERTS, (ids[token] + layer + 1) % EXPERTS] for layer in range(3)
            ]
    sequence = np.sort(np.arange(tokens) % sequences).astype(np.int32)
    return Trace(experts, EXPERTS, sequence, np.arange(tokens), np.ones(tokens, np.uint8), token_ids=ids)


def union_trace(seed: int) -> list[Access]:
    """Accesses of several tokens each: two sequences side by side."""
    trace = random_trace(seed, 30, sequences=2)
    return trace.accesses(batch=2)
