"""What must be stated with simulated numbers, and what is known of the trace, in words.

The checklist is that of arXiv 2608.07911: semantics, scope, miss denominator, demand against slots, bytes moved, fit
source of what was fitted, both oracles; and what this simulator adds: noise, ties, prefetch, pins, the virtual machine.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from moetier.plan import format_size
from moetier.simulate.config import Link, Result, SimulationConfig, Timing
from moetier.simulate.run import has_admission
from moetier.simulate.summary import TraceSummary, all_results, is_oracle, percent

__all__ = ["checklist", "trace_facts"]


def trace_facts(summary: TraceSummary) -> list[tuple[str, str]]:
    """What is known of the trace, as pairs of a word and a text."""
    trace, info = summary.trace, summary.trace.info
    prefill = int((trace.phase == 0).sum())
    steps = len(set(trace.step.tolist()))
    facts = [
        ("Model", info.model),
        ("Tokenizer", info.tokenizer),
        ("Source", info.source),
        ("Routing", f"{trace.layers} MoE layers, top {trace.top_k} of {trace.num_experts} experts"),
        ("Tokens", f"{trace.tokens:,} in {len(trace.sequences()):,} sequences, {prefill:,} of them prefill"),
        ("Steps as recorded", f"{steps:,}"),
        ("Gate weights", "recorded" if trace.weights is not None else "not recorded"),
        ("Limit", f"the first {summary.limit:,} tokens" if summary.limit else ""),
        ("Domains", ", ".join(_domains(summary))),
        ("Fingerprint", f"SHA-256 {summary.fingerprint[:16]}…"),
    ]
    facts += [(key, str(value)) for key, value in info.extra.items() if isinstance(value, str | int | float)]
    return [(word, text) for word, text in facts if text]


def _domains(summary: TraceSummary) -> list[str]:
    """Of the sequences that were simulated, where their metadata name one."""
    described, found = summary.trace.info.sequences, dict[str, None]()
    for sequence in summary.trace.sequences():
        if sequence < len(described):
            entry = described[sequence]
            name = entry.get("domain") or entry.get("dataset") or entry.get("category")
            if name:
                found[str(name)] = None
    return list(found)[:12]


def checklist(summary: TraceSummary, record_nbytes: int | None = None) -> list[tuple[str, str]]:
    """What must be stated with these numbers, as pairs of a term and its statement."""
    results = all_results(summary)
    if not results:
        return []
    configs = [result.config for result in results]
    semantics = sorted({config.semantics for config in configs})
    said = [
        ("Semantics", "; ".join(_SEMANTICS[name] for name in semantics)),
        ("Scope", "; ".join(_SCOPES[name] for name in sorted({config.scope for config in configs}))),
        (
            "Miss denominator",
            "needs: one expert of one access, however many tokens of the step want it. A late arrival (already on its "
            "way) is neither a hit nor a miss.",
        ),
        ("Experts needed ÷ slots per layer", _demand(summary)),
        ("Bytes moved", _bytes(configs, record_nbytes)),
        ("Fit source", summary.fit),
        ("Oracles", _oracles(configs, results)),
        ("Seeds and ties", _noise(configs, len(summary.trace.sequences()))),
    ]
    optional = [
        ("Admission", _admission(configs)),
        ("Second tier", _host(configs, results)),
        ("Prefetch", _prefetch(configs, results)),
        ("Warm pinning", _pinning(configs, results)),
        ("Training", "every use dirties its record; what leaves is written back." if configs[0].dirty else ""),
        ("Virtual machine", _machine(configs[0].timing)),
    ]
    return said + [(term, text) for term, text in optional if text]


_SEMANTICS = {
    "atomic": "access-atomic (event-atomic): the experts that a step needs in a layer are classified together against "
    "residency at the access's start, and none of them is evicted before the access ends",
    "sequential": "sequential: every need is an access of its own, so a need may evict another of the same step",
}
_SCOPES = {
    "global": "global: all layers share the slots",
    "layer": "per layer: each layer has slots of its own, the total divided evenly",
}


def _demand(summary: TraceSummary) -> str:
    parts = []
    for panel in summary.panels:
        each = []
        for slots in panel.sizes:
            cell = next(cell for (_, size), cell in panel.cells.items() if size == slots)
            ratio = statistics.fmean(result.demand_ratio for result in cell.results)
            above = statistics.fmean(result.overcommitted for result in cell.results)
            each.append(f"{ratio:.2f} at {percent(panel.share(slots))} (above 1 in {100 * above:.1f} % of accesses)")
        parts.append(f"{panel.title}: {', '.join(each)}")
    return "mean per access. " + "; ".join(parts) + "."


def _bytes(configs: Sequence[SimulationConfig], record_nbytes: int | None) -> str:
    timing = configs[0].timing
    nbytes = record_nbytes or (timing.record_nbytes if timing else None)
    if nbytes is None:
        return "counted in experts per token (the size of an expert was not given), prefetches included."
    return f"an expert is {nbytes:,} bytes ({format_size(nbytes)}); all links together, prefetches included."


def _oracles(configs: Sequence[SimulationConfig], results: Sequence[Result]) -> str:
    names = {config.policy for config in configs}
    texts = []
    if "belady" in names:
        extra = max(result.extra_staging for result in results if result.config.policy == "belady")
        texts.append(
            f"belady: with bypass; a miss whose next use is later than every resident's passes through {extra} staging "
            "slots beside the cache and displaces nothing"
        )
    if "belady-forced" in names:
        texts.append("belady-forced: forced admission; every miss takes a slot, as in the simple causal policies")
    own = sorted(name for name in names if has_admission(name) and not is_oracle(name))
    if own:
        texts.append(f"also with admission of their own, and staging slots beside the cache: {', '.join(own)}")
    return "; ".join(texts) + "." if texts else "none was simulated: no gap can be stated."


def _noise(configs: Sequence[SimulationConfig], sequences: int) -> str:
    seeds = sorted({config.seed for config in configs if config.seed is not None})
    ties = "Ties within a policy fall by rules of its own (recency, else layer and expert number)"
    if not seeds:
        return f"one run, sequences in recorded order: no measure of noise (--seeds gives one). {ties}."
    relabelled = "; experts were renumbered for every seed, so that the spread has the noise of ties in it"
    few = f" The trace has only {sequences} sequences to shuffle: the spread says little." if sequences < 5 else ""
    return (
        f"mean ± standard deviation over {len(seeds)} runs, each with the sequences in another order, one after "
        f"another. {ties}{relabelled if any(config.relabel for config in configs) else ''}.{few}"
    )


def _admission(configs: Sequence[SimulationConfig]) -> str:
    config = configs[0]
    if not config.staging:
        return ""
    return f"{config.admission}, with {config.staging} of the slots for misses that are turned away."


def _host(configs: Sequence[SimulationConfig], results: Sequence[Result]) -> str:
    config = configs[0]
    if config.host_slots is None:
        return ""
    said = f"{config.host_slots} slots below the first tier, policy {config.host_policy or 'of the first tier'}"
    if not config.exclusive:
        return f"{said}; what is in the first is also kept in the second while there is room."
    down = sum(result.demotions for result in results)
    again = sum(result.refills for result in results)
    spares = "–".join(str(n) for n in sorted({min(c.spare for c in configs), max(c.spare for c in configs)}))
    return (
        f"{said}; exclusive: an expert is kept once in the two. Over all runs {down:,} copied down ({spares} victims "
        f"ahead), {again:,} read again instead."
    )


def _prefetch(configs: Sequence[SimulationConfig], results: Sequence[Result]) -> str:
    config = configs[0]
    if config.predictor is None:
        return ""
    total = {name: sum(r.prefetches.get(name, 0) for r in results) for name in ("issued", "useful", "late", "wasted")}
    if config.prefetch_control:
        words = "; ".join(dict.fromkeys(r.prefetch_control["words"] for r in results if r.prefetch_control))
        counts = ", ".join(f"{count:,} {name}" for name, count in total.items())
        return f"{config.predictor}, as the controller decides. Over all runs: {counts}. {words}."
    where = "over victims too" if config.prefetch_displace else "into free slots only"
    return (
        f"{config.predictor}, from a confidence of {config.prefetch_confidence:g}, at most {config.prefetch_limit} an "
        f"access, {where}. Over all runs: " + ", ".join(f"{count:,} {name}" for name, count in total.items()) + "."
    )


def _pinning(configs: Sequence[SimulationConfig], results: Sequence[Result]) -> str:
    config = configs[0]
    if config.warm_pinning is None:
        return ""
    parts = []
    for result in results:
        facts = ", ".join(f"{key.replace('_', ' ')} {_short(value)}" for key, value in result.pinning.items())
        parts.append(f"{result.config.policy} at {result.config.slots} slots: {len(result.pinned)} pinned, {facts}")
    return f"after {config.warm_pinning} accesses of the run itself. " + "; ".join(parts) + "."


def _short(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _machine(timing: Timing | None) -> str:
    if timing is None:
        return ""

    def link(name: str, value: Link) -> str:
        return f"{name} {value.gbps:g} GB/s, {1e3 * value.latency:g} ms latency, {value.depth} at a time"

    links = [link(name.replace("_", " "), getattr(timing, name)) for name in ("disk_read", "disk_write", "h2d", "d2h")]
    return (
        f"{'; '.join(links)}; {1e3 * timing.layer_seconds:g} ms a layer and {1e3 * timing.expert_seconds:g} ms an "
        "expert of computing. Seconds are virtual, no byte was moved."
    )
