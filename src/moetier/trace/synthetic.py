"""Synthetic routing with a known structure: popularity and locality (`zipf_markov`), environments (`environments`).

Routing drawn at random, every expert alike, is no benchmark: every policy then hits slots over records and nothing can
be learned from it. `uniform_control` makes it under that name; the other generators refuse parameters that amount to
it. A result on any trace of this file is a result on a model of routing, not on a model's routing.

Every generator is a deterministic function of its arguments and the release of numpy.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moetier.access import Phase
from moetier.errors import ConfigError
from moetier.trace import Trace, TraceInfo

__all__ = ["SAMPLERS", "Sampler", "environments", "uniform_control", "zipf_markov"]

Sampler = Literal["iid", "episode"]
SAMPLERS: tuple[Sampler, ...] = ("iid", "episode")


def zipf_markov(
    tokens: int,
    layers: int,
    experts: int,
    top_k: int,
    *,
    sequences: int = 8,
    prompt: int = 0,
    skew: float = 0.5,
    topics: int = 16,
    topic_skew: float = 1.0,
    stay: float = 0.98,
    persistence: float = 0.4,
    seed: int = 0,
) -> Trace:
    """Zipf popularity per layer, topics that change as a sticky Markov chain, and memory from token to token.

    The score of expert e at layer l under topic z is `-skew * ln(rank at l) - topic_skew * ln(rank at l under z)` plus
    Gumbel noise, with random ranks; the `top_k` best scores are chosen, so that with `top_k` 1 and no `topic_skew`
    popularity is exactly Zipf with exponent `skew`. `stay` is the chance that the next token keeps the topic, and
    `persistence` the chance that the noise of an expert at a layer is kept from the token before: that alone makes
    consecutive tokens alike. Gate weights are the softmax of the chosen scores, in float16.

    `tokens` are cut into `sequences` of equal length, each beginning afresh; the first `prompt` tokens of each are one
    prefill. Raises `ConfigError` for numbers that make no trace, or none with structure.
    """
    _check_shape(tokens, layers, experts, top_k)
    _check_range("skew", skew, 0, 10)
    _check_range("topic_skew", topic_skew, 0, 10)
    _check_range("stay", stay, 0, 1)
    _check_range("persistence", persistence, 0, 0.999)
    _check_range("topics", topics, 1, 1_000_000)
    _check_range("sequences", sequences, 1, max(1, tokens))
    _check_range("prompt", prompt, 0, tokens)
    if skew == 0 and persistence == 0 and (topic_skew == 0 or (stay <= 1 / topics and topics > 1)):
        raise ConfigError("without skew, topics that stay, and persistence, routing is uniform; see uniform_control")
    rng = np.random.default_rng(seed)
    begins = _begins(tokens, sequences)
    topic = _sticky(rng, begins, topics, stay)
    ranks: NDArray[np.float32] = -np.log(np.arange(1, experts + 1, dtype=np.float32))
    chosen = np.empty((tokens, layers, top_k), dtype=np.int16)
    weights = np.empty(chosen.shape, dtype=np.float32)
    for layer in range(layers):
        popularity = np.float32(skew) * rng.permutation(ranks)
        taste = np.float32(topic_skew) * rng.permuted(np.tile(ranks, (topics, 1)), axis=1)
        scores = (popularity + taste)[topic] + _persistent_noise(rng, begins, experts, persistence)
        chosen[:, layer], weights[:, layer] = _best(scores, top_k)
    parameters = {"skew": skew, "topics": topics, "topic_skew": topic_skew, "stay": stay, "persistence": persistence}
    return _in_sequences(chosen, weights, experts, begins, prompt, _info("zipf_markov", parameters, seed))


def environments(
    steps: int,
    layers: int,
    experts: int,
    top_k: int,
    *,
    sampler: Sampler = "episode",
    episode: int = 64,
    envs: int = 8,
    batch: int = 1,
    envs_per_batch: int = 1,
    preferred: int | None = None,
    affinity: float = 0.9,
    seed: int = 0,
) -> Trace:
    """Batches whose tokens come from environments, each with preferred experts of its own.

    Each of `envs` environments prefers, per layer, `preferred` random experts (default: twice `top_k`, at most half):
    a token of it draws its `top_k` experts without replacement, with the share `affinity` of the probability on the
    preferred ones and the rest on the others. A step has `batch` tokens, one of each concurrent sequence.

    - `episode`: `envs_per_batch` environments are drawn and serve `episode` steps, the batch spread over them; then new
      sequences begin with others. Long episodes of one environment are what caches like; many environments per batch
      make the union of a step large.
    - `iid`: every token of every step draws its environment anew, as shuffled training data do. It keeps the
      correlation between a token's layers and none between steps: the control for `episode`. `episode` and
      `envs_per_batch` do not apply.

    Raises `ConfigError` for numbers that make no trace, or none with structure.
    """
    _check_shape(steps, layers, experts, top_k)
    if sampler not in SAMPLERS:
        raise ConfigError(f"sampler: {sampler!r} is unknown; choose one of {', '.join(SAMPLERS)}")
    _check_range("episode", episode, 1, 1_000_000_000)
    _check_range("envs", envs, 1, 1_000_000)
    _check_range("batch", batch, 1, 1_000_000)
    _check_range("envs_per_batch", envs_per_batch, 1, min(envs, batch))
    liked = min(2 * top_k, max(1, experts // 2)) if preferred is None else preferred
    _check_range("preferred", liked, 1, experts)
    _check_range("affinity", affinity, 0, 1)
    if liked == experts or affinity <= liked / experts:
        raise ConfigError(
            f"affinity {affinity} on {liked} of {experts} experts prefers nothing: routing is uniform; "
            "see uniform_control"
        )
    rng = np.random.default_rng(seed)
    env, sequence = _choose(rng, steps, sampler, episode, envs, batch, envs_per_batch)
    tokens = steps * batch
    chosen = np.empty((tokens, layers, top_k), dtype=np.int16)
    weights = np.empty(chosen.shape, dtype=np.float32)
    others = (1 - affinity) / (experts - liked)
    row = np.full(experts, np.log(max(others, 1e-30)), dtype=np.float32)
    row[:liked] = np.log(affinity / liked)
    for layer in range(layers):
        taste = rng.permuted(np.tile(row, (envs, 1)), axis=1)
        noise = _gumbel(rng, (tokens, experts))
        chosen[:, layer], weights[:, layer] = _best(taste[env] + noise, top_k)
    parameters: dict[str, Any] = {"sampler": sampler, "envs": envs, "batch": batch, "preferred": liked}
    parameters |= {"affinity": affinity}
    if sampler == "episode":
        parameters |= {"episode": episode, "envs_per_batch": envs_per_batch}
    return Trace(
        experts=chosen,
        num_experts=experts,
        sequence=sequence,
        step=np.repeat(np.arange(steps, dtype=np.int64), batch),
        phase=np.full(tokens, Phase.DECODE, dtype=np.uint8),
        weights=weights,
        info=_info("environments", parameters, seed),
    )


def uniform_control(tokens: int, layers: int, experts: int, top_k: int, *, sequences: int = 1, seed: int = 0) -> Trace:
    """Every expert alike, every token by itself: a control for measurements, never a benchmark."""
    _check_shape(tokens, layers, experts, top_k)
    _check_range("sequences", sequences, 1, max(1, tokens))
    rng = np.random.default_rng(seed)
    chosen = np.empty((tokens, layers, top_k), dtype=np.int16)
    weights = np.empty(chosen.shape, dtype=np.float32)
    for layer in range(layers):
        chosen[:, layer], weights[:, layer] = _best(_gumbel(rng, (tokens, experts)), top_k)
    info = _info("CONTROL, not a benchmark: uniform_control", {}, seed)
    return _in_sequences(chosen, weights, experts, _begins(tokens, sequences), 0, info)


def _check_shape(tokens: int, layers: int, experts: int, top_k: int) -> None:
    _check_range("tokens", tokens, 1, 10**12)
    _check_range("layers", layers, 1, 100_000)
    _check_range("experts", experts, 1, 32_768)
    _check_range("top_k", top_k, 1, experts)


def _check_range(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise ConfigError(f"{name}: must be from {least:g} to {most:g}, got {value}")


def _info(name: str, parameters: dict[str, Any], seed: int) -> TraceInfo:
    return TraceInfo(source=f"generated by {name}", extra={"parameters": parameters, "seed": seed})


def _begins(tokens: int, sequences: int) -> NDArray[np.bool_]:
    """Marks the first token of each of `sequences` parts of equal length."""
    begins = np.zeros(tokens, dtype=np.bool_)
    begins[np.arange(sequences) * tokens // sequences] = True
    return begins


def _sticky(rng: np.random.Generator, begins: NDArray[np.bool_], states: int, stay: float) -> NDArray[np.int64]:
    """A Markov chain that keeps its state with probability `stay`, else takes another; anew where a sequence begins."""
    tokens = len(begins)
    moves = begins | (rng.random(tokens) >= stay)
    if states == 1:
        return np.zeros(tokens, dtype=np.int64)
    hops = np.where(begins, rng.integers(0, states, tokens), rng.integers(1, states, tokens)) * moves
    total = np.cumsum(hops)
    before = np.maximum.accumulate(np.where(begins, total - hops, 0))  # what earlier sequences added
    return (total - before) % states


def _gumbel(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Standard Gumbel noise: the k largest of log p + noise are a draw of k from p without replacement."""
    exponential = rng.standard_exponential(shape, dtype=np.float32)
    return -np.log(np.maximum(exponential, 1e-30))


def _persistent_noise(
    rng: np.random.Generator, begins: NDArray[np.bool_], experts: int, persistence: float
) -> NDArray[np.float32]:
    """Gumbel noise [tokens, experts] of which each number is kept from the token before with this probability."""
    noise = _gumbel(rng, (len(begins), experts))
    if persistence == 0:
        return noise
    fresh = begins[:, None] | (rng.random(noise.shape, dtype=np.float32) >= persistence)
    rows = np.where(fresh, np.arange(len(begins), dtype=np.int32)[:, None], 0)
    np.maximum.accumulate(rows, axis=0, out=rows)
    return np.take_along_axis(noise, rows, axis=0)


def _best(scores: NDArray[np.float32], top_k: int) -> tuple[NDArray[np.int16], NDArray[np.float32]]:
    """The columns of the largest scores of each row, largest first, and the softmax of these scores in float16."""
    columns = np.argpartition(scores, -top_k, axis=1)[:, -top_k:]
    best = np.take_along_axis(scores, columns, axis=1)
    order = np.argsort(-best, axis=1, kind="stable")
    best = np.take_along_axis(best, order, axis=1)
    weights = np.exp(best - best[:, :1])
    weights /= weights.sum(axis=1, keepdims=True)
    chosen = np.take_along_axis(columns, order, axis=1).astype(np.int16)
    return chosen, weights.astype(np.float16).astype(np.float32)


def _in_sequences(
    experts: NDArray[np.int16],
    weights: NDArray[np.float32],
    num_experts: int,
    begins: NDArray[np.bool_],
    prompt: int,
    info: TraceInfo,
) -> Trace:
    """A trace of one sequence after the other; the first `prompt` tokens of each run in one step."""
    position = np.arange(len(begins)) - np.maximum.accumulate(np.where(begins, np.arange(len(begins)), 0))
    is_prompt = position < prompt
    return Trace(
        experts=experts,
        num_experts=num_experts,
        sequence=(np.cumsum(begins) - 1).astype(np.int32),
        step=np.cumsum(begins | ~is_prompt).astype(np.int64) - 1,
        phase=np.where(is_prompt, Phase.PREFILL, Phase.DECODE).astype(np.uint8),
        weights=weights,
        info=info,
    )


def _choose(
    rng: np.random.Generator, steps: int, sampler: Sampler, episode: int, envs: int, batch: int, envs_per_batch: int
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Environment and sequence of every token, [steps * batch]."""
    lanes = np.tile(np.arange(batch, dtype=np.int32), steps)
    if sampler == "iid":
        return rng.integers(0, envs, steps * batch), lanes
    episodes = -(-steps // episode)
    active = np.argsort(rng.random((episodes, envs)), axis=1)[:, :envs_per_batch]
    number = np.repeat(np.arange(steps) // episode, batch)
    return active[number, lanes % envs_per_batch], (number * batch + lanes).astype(np.int32)
