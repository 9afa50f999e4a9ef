"""All statistics of a trace in one dictionary, and in words: is this model worth offloading?

The JSON of `moetier trace stats --json`, version 1: `trace` (sizes and info), `skew`, `overlap`, `demand`, `streams`,
`reuse`, `working_set`, `locality` (`srp` by segment length; `caches` with the hit rates of per-layer caches of 1, 2 and
3 times the experts a token uses: `lru`, `sch`, `random`), `co_occurrence`, `verdict`. Rates and shares are from 0 to 1.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moetier.access import Phase
from moetier.errors import ConfigError
from moetier.trace import Trace
from moetier.trace.locality import co_occurrence, layer_cache_hits, sample, segment_cache_hits, segment_routing
from moetier.trace.stats import demand_of, overlap_of, reuse_of, skew_of, union_of_streams, working_set

__all__ = ["STATS_VERSION", "Verdict", "describe", "summarise", "verdict_on"]

STATS_VERSION = 1
LOOKAHEAD = 16  # tokens that SCH sees ahead
SEGMENTS = (4, 16, 64)
RATIOS = (1, 2, 3)  # cache sizes per layer, in experts per token

SATURATED = 0.75  # of a layer's experts needed by one access: no policy can matter
STRONG, WEAK = 0.4, 0.15  # share of the misses of random routing that LRU saves at twice the active experts


@dataclass(frozen=True, slots=True)
class Verdict:
    """`answer` is yes, partly, no or saturated; `sentences` say why and what to do."""

    answer: str
    sentences: list[str]


def describe(trace: Trace) -> dict[str, Any]:
    """Sizes and origin of a trace."""
    prefill = int((trace.phase == Phase.PREFILL).sum())
    return {
        "tokens": trace.tokens,
        "prefill_tokens": prefill,
        "decode_tokens": trace.tokens - prefill,
        "steps": len(np.unique(trace.step)),
        "sequences": len(trace.sequences()),
        "layers": trace.layers,
        "experts": trace.num_experts,
        "top_k": trace.top_k,
        "gate_weights": trace.weights is not None,
        "token_ids": trace.token_ids is not None,
        "info": asdict(trace.info),
    }


def summarise(trace: Trace, tokens: int = 8192, seed: int = 0) -> dict[str, Any]:
    """Every statistic of this package; those of `locality` on a sample of about `tokens` tokens, drawn evenly.

    Raises `ConfigError` for a trace without tokens.
    """
    if not trace.tokens:
        raise ConfigError("the trace has no tokens")
    part = sample(trace, max(1, min(tokens, 160_000_000 // trace.records)))
    result: dict[str, Any] = {
        "version": STATS_VERSION,
        "trace": describe(trace),
        "skew": asdict(skew_of(trace)),
        "overlap": asdict(overlap_of(trace)),
        "demand": asdict(demand_of(trace)),
        "streams": union_of_streams(trace, seed=seed),
        "reuse": asdict(reuse_of(trace)),
        "working_set": working_set(part),
        "locality": {
            "sampled_tokens": part.tokens,
            "srp": {length: segment_routing(part, length) for length in SEGMENTS},
            "caches": [
                _caches(part, ratio) for ratio in RATIOS if ratio == 1 or ratio * trace.top_k < trace.num_experts
            ],
        },
        "co_occurrence": {
            name: None if value is None else asdict(value) for name, value in co_occurrence(part, seed).items()
        },
    }
    return result | {"verdict": asdict(verdict_on(result))}


def _caches(trace: Trace, ratio: int) -> dict[str, float]:
    slots = min(trace.num_experts, ratio * trace.top_k)
    return {
        "ratio": ratio,
        "slots_per_layer": slots,
        "lru": layer_cache_hits(trace, ratio),
        "sch": segment_cache_hits(trace, ratio, LOOKAHEAD),
        "random": slots / trace.num_experts,
    }


def verdict_on(summary: dict[str, Any]) -> Verdict:
    """Is this model worth offloading? From a summary of its trace.

    The measure is what a plain LRU per layer hits with twice the experts a token uses, the size at which most models
    balance hit rate and memory (arXiv 2505.16056), against random routing, which hits slots over experts whatever the
    policy: the share of random routing's misses that it saves.
    """
    trace, demand, caches = summary["trace"], summary["demand"], summary["locality"]["caches"]
    experts, top_k = trace["experts"], trace["top_k"]
    cache = next((cache for cache in caches if cache["ratio"] == 2), caches[-1])
    saved = (cache["lru"] - cache["random"]) / max(1e-9, 1 - cache["random"])
    sentences: list[str] = []
    if demand["share"] >= SATURATED:
        answer = "saturated"
        sentences.append(
            f"Saturated: a step of this trace needs {100 * demand['share']:.0f} % of a layer's {experts} experts on "
            "average, so nearly everything passes through every cache in every step. No policy matters there; what "
            "counts is bandwidth, and the overlap of loading with computing. Fewer tokens per step (a smaller batch) "
            "would change that."
        )
    else:
        measured = (
            f"with {cache['slots_per_layer']} of {experts} experts of every layer in fast memory "
            f"({cache['ratio']:.0f} times the {top_k} that a token uses), plain LRU hits {100 * cache['lru']:.1f} %; "
            f"random routing would give {100 * cache['random']:.1f} %, whatever the policy"
        )
        if saved >= STRONG:
            answer = "yes"
            sentences.append(f"Worth offloading: {measured}. The routing is local; a cache saves most of the loads.")
        elif saved >= WEAK:
            answer = "partly"
            sentences.append(
                f"Worth it in part: {measured}. The routing has some locality; give it more than twice the active "
                "experts, and expect the link to the slower tier to be busy."
            )
        else:
            answer = "no"
            sentences.append(
                f"Hardly worth it: {measured}. The routing looks random from token to token, so the hit rate is about "
                "the share of the experts that is resident; only more memory or a faster link helps."
            )
    if cache["ratio"] < 2:
        sentences.append(
            f"Twice the active experts would be all {experts} of a layer: with so few experts a cache cannot be small "
            "and good."
        )
    touched, records = demand["records_per_token"], trace["experts"] * trace["layers"]
    sentences.append(
        f"One token touches {touched:.0f} of {records} records. A global LRU (or FIFO, ARC, …) with fewer slots than "
        f"{touched:.0f} ({100 * touched / records:.1f} %) hits nothing when decoding, because the layers come in a "
        "loop; use a policy that knows the loop (horizon), or more slots."
    )
    full = next((count for count, share in summary["streams"].items() if share >= SATURATED), None)
    if full is not None and answer != "saturated" and full > 1:
        need = 100 * summary["streams"][full]
        sentences.append(
            f"With {full} concurrent sequences a step needs {need:.0f} % of a layer's experts: from there on no cache "
            "policy helps much."
        )
    return Verdict(answer, sentences)
