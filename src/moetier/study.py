"""The co-occurrence study: what eviction by co-occurrence is worth, and when no policy is worth anything.

Four questions, each answered by simulations of a real trace (the embedded demo model's) and of synthetic routing with
the shape of known models. The words are derived from the numbers of the run, so they change if the numbers do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from moetier.policies import POLICIES
from moetier.simulate.config import Link, Result, SimulationConfig, Timing
from moetier.simulate.run import simulate
from moetier.trace import Trace
from moetier.trace.synthetic import zipf_markov

__all__ = ["Finding", "Table", "ebco_study", "to_markdown"]

SMALL_BATCH = ("lru", "ebco", "horizon", "belady")
LARGE_BATCH = ("lru", "lfu", "ebco", "horizon", "belady")
MIXTRAL_RECORD = 3 * 4096 * 14336 * 2  # bytes of an expert of Mixtral-8x7B in bf16
GPU_BYTES_PER_SECOND = 1e12  # what a device reads its own memory with: the math of one token is bound by it
PCIE = Link(gbps=25.0, latency=2e-5, depth=1)  # PCIe 4.0 x16, as measured by most
NOISE = 0.01  # hit rates closer than a point are called equal

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Table:
    """Columns and rows of one result; numbers are hit rates in % unless the column says otherwise."""

    title: str
    columns: list[str]
    rows: list[list[str]]


@dataclass(slots=True)
class Finding:
    """A question, what was simulated, and what the numbers say."""

    question: str
    tables: list[Table] = field(default_factory=list)
    words: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def mixtral_shaped(tokens: int, sequences: int, seed: int) -> Trace:
    """32 layers, 2 of 8 experts, and little skew or memory: what is published of Mixtral's routing."""
    return zipf_markov(
        tokens, 32, 8, 2, sequences=sequences, skew=0.15, topics=8, topic_skew=0.1, persistence=0.08, seed=seed
    )


def fine_grained(tokens: int, sequences: int, seed: int) -> Trace:
    """8 of 256 experts as in DeepSeek-V3, 6 layers of it, with skew and topics."""
    return zipf_markov(tokens, 6, 256, 8, sequences=sequences, skew=0.5, topics=16, topic_skew=0.8, seed=seed)


def ebco_study(
    real: Trace, *, scale: float = 1.0, seed: int = 0, progress: Progress = lambda message: None
) -> list[Finding]:
    """Answer the four questions. `scale` multiplies the tokens of the synthetic traces."""
    progress("1 of 4: co-occurrence against recency, one stream")
    findings = [small_batch(real, mixtral_shaped(max(16, int(1500 * scale)), 8, seed))]
    progress("2 of 4: waiting against computing")
    findings.append(io_wall(mixtral_shaped(max(16, int(400 * scale)), 8, seed)))
    progress("3 of 4: saturation")
    findings.append(saturation(real, mixtral_shaped(max(256, int(128 * 12 * scale)), 128, seed)))
    progress("4 of 4: many decoders, many experts")
    findings.append(many_decoders(fine_grained(max(256, int(128 * 24 * scale)), 128, seed)))
    return findings


def small_batch(real: Trace, synthetic: Trace) -> Finding:
    """EBCO against LRU with one stream, every layer with its own slots (the setting it was proposed for)."""
    finding = Finding("Does evicting by co-occurrence beat LRU for one stream?")
    differences: dict[str, list[float]] = {}
    beside: dict[str, list[float]] = {}
    for name, trace in (("demo model, real routing", real), ("Mixtral-shaped, synthetic routing", synthetic)):
        shares = (0.25, 0.5, 0.75) if trace.num_experts < 16 else (0.2, 0.3, 0.5, 0.7)
        table = Table(f"{name}: hit rate, slots per layer", ["slots per layer", *SMALL_BATCH, "ebco - lru"], [])
        for share in shares:
            per_layer = max(1, round(share * trace.num_experts))
            rates = _rates(trace, SMALL_BATCH, per_layer * trace.layers, batch=1, scope="layer")
            difference = rates["ebco"] - rates["lru"]
            differences.setdefault(name, []).append(difference)
            beside.setdefault(name, []).append(rates["ebco"] - rates["horizon"])
            cells = [f"{100 * rates[policy]:.1f}" for policy in SMALL_BATCH]
            table.rows.append([f"{per_layer} of {trace.num_experts}", *cells, f"{100 * difference:+.1f}"])
        finding.tables.append(table)
    for name, values in differences.items():
        finding.words.append(f"{name}: {_compare('EBCO', 'LRU', values)} {_compare('EBCO', 'horizon', beside[name])}")
    return finding


def io_wall(trace: Trace) -> Finding:
    """T_wait against T_compute for Mixtral's records over PCIe, and what perfect overlap could gain."""
    finding = Finding("How much of a step is waiting, and what would perfect overlap gain?")
    expert_seconds = MIXTRAL_RECORD / GPU_BYTES_PER_SECOND
    timing = Timing(MIXTRAL_RECORD, disk_read=PCIE, expert_seconds=expert_seconds, layer_seconds=expert_seconds / 4)
    columns = ["slots per layer", "policy", "T_wait ÷ T_compute", "ms per token", "perfect overlap, ms", "gain, ×"]
    table = Table("Mixtral-shaped: 352 MB per expert over 25 GB/s, math at 1 TB/s", columns, [])
    ratios, gains = [], []
    for per_layer in (2, 4, 6):
        for policy in ("lru", "ebco", "belady"):
            config = SimulationConfig(policy, per_layer * trace.layers, scope="global", batch=1, timing=timing)
            result = simulate(trace, config)
            ratio, now, overlapped = _overlap(result, timing)
            ratios.append(ratio)
            gains.append(now / overlapped)
            cells = [f"{ratio:.1f}", f"{1e3 * now:.0f}", f"{1e3 * overlapped:.0f}", f"{now / overlapped:.2f}"]
            table.rows.append([f"{per_layer} of 8", policy, *cells])
    finding.tables.append(table)
    limit = "The link is the limit: fewer bytes are worth more than better overlap."
    if min(ratios) < 1:
        limit = "Where waiting is shorter than computing, overlap can hide all of it."
    per_miss = MIXTRAL_RECORD / (PCIE.gbps * 1e9) / expert_seconds
    finding.words.append(
        f"One missing expert costs {per_miss:.0f} times the math it is needed for. Waiting took {min(ratios):.1f} to "
        f"{max(ratios):.1f} times the computing; hiding every transfer that can be hidden would gain a factor of "
        f"{min(gains):.2f} to {max(gains):.2f}. {limit}"
    )
    return finding


def saturation(real: Trace, synthetic: Trace) -> Finding:
    """How large the active set is as the batch grows, and whether policies differ there."""
    finding = Finding("When does the batch need everything, so that no policy matters?")
    for name, trace, batches in (
        ("Mixtral-shaped, 4 of 8 slots per layer", synthetic, (1, 4, 16, 64, 128)),
        ("demo model, half of the slots", real, (1, 4, 8, 16)),
    ):
        table = Table(name, ["batch", "active experts", *LARGE_BATCH, "spread of online policies, points"], [])
        saturated = None
        for batch in batches:
            results = _results(trace, LARGE_BATCH, trace.records // 2, batch=batch, scope="layer")
            active = sum(results["lru"].needs) / max(1, results["lru"].accesses)
            rates = {policy: result.hit_rate for policy, result in results.items()}
            online = [rates[policy] for policy in LARGE_BATCH if policy != "belady"]
            spread = max(online) - min(online)
            if saturated is None and active > 0.97 * trace.num_experts:
                saturated = batch
            cells = [f"{100 * rates[policy]:.1f}" for policy in LARGE_BATCH]
            table.rows.append([str(batch), f"{active:.1f} of {trace.num_experts}", *cells, f"{100 * spread:.1f}"])
        finding.tables.append(table)
        if saturated is None:
            finding.words.append(f"{name}: the active set never covers a layer at these batches.")
        else:
            finding.words.append(
                f"{name}: from a batch of {saturated} a step needs (nearly) every expert of a layer. What is not "
                "resident has to be moved whatever the policy keeps; differences come from bypassing and from the "
                "order of eviction, not from knowing the experts."
            )
    return finding


def many_decoders(trace: Trace) -> Finding:
    """128 concurrent decoders over 256 fine-grained experts."""
    finding = Finding("128 decoders over 256 fine-grained experts: does eviction matter again?")
    batch = 128
    table = Table("8 of 256 experts, 128 streams, global slots", ["resident", "active experts", *LARGE_BATCH], [])
    gaps = []
    for share in (0.5, 0.7, 0.85):
        results = _results(trace, LARGE_BATCH, round(share * trace.records), batch=batch, scope="global")
        active = sum(results["lru"].needs) / max(1, results["lru"].accesses)
        rates = {policy: result.hit_rate for policy, result in results.items()}
        gaps.append(rates["horizon"] - rates["lru"])
        cells = [f"{100 * rates[policy]:.1f}" for policy in LARGE_BATCH]
        table.rows.append([f"{share:.0%}", f"{active:.0f} of {trace.num_experts}", *cells])
    finding.tables.append(table)
    best = max(gaps)
    if best > NOISE:
        finding.words.append(
            f"A step leaves part of every layer unused, so what is kept matters: horizon is up to {100 * best:.0f} "
            "points above LRU, which meets the layers in a loop and keeps the wrong end of it."
        )
    else:
        finding.words.append("Policies are within a point of each other here: eviction does not matter on this trace.")
    return finding


def to_markdown(findings: Sequence[Finding]) -> str:
    """The study as Markdown: questions, tables, words."""
    lines: list[str] = []
    for number, finding in enumerate(findings, 1):
        lines += [f"### {number}. {finding.question}", ""]
        for table in finding.tables:
            lines += [f"{table.title}:", ""]
            lines.append("| " + " | ".join(table.columns) + " |")
            lines.append("| --- |" + " ---: |" * (len(table.columns) - 1))
            lines += ["| " + " | ".join(row) + " |" for row in table.rows]
            lines.append("")
        lines += [f"{words}\n" for words in finding.words]
    return "\n".join(lines)


def _results(trace: Trace, policies: Sequence[str], slots: int, *, batch: int, scope: Any) -> dict[str, Result]:
    assert set(policies) <= set(POLICIES)
    return {policy: simulate(trace, SimulationConfig(policy, slots, scope=scope, batch=batch)) for policy in policies}


def _rates(trace: Trace, policies: Sequence[str], slots: int, *, batch: int, scope: Any) -> dict[str, float]:
    return {
        policy: result.hit_rate for policy, result in _results(trace, policies, slots, batch=batch, scope=scope).items()
    }


def _overlap(result: Result, timing: Timing) -> tuple[float, float, float]:
    """T_wait ÷ T_compute, seconds per token now, and with perfect overlap: the longer of link and math."""
    compute, total = result.seconds["compute"], result.seconds["total"]
    link = result.bytes_moved["disk_read"] / (timing.disk_read.gbps * 1e9)
    return (total - compute) / compute, total / result.tokens, max(compute, link) / result.tokens


def _compare(name: str, other: str, differences: Sequence[float]) -> str:
    low, high = min(differences), max(differences)
    span = f"{100 * low:+.1f} to {100 * high:+.1f} points"
    if low > NOISE:
        return f"{name} is above {other} at every size ({span})."
    if high < -NOISE:
        return f"{name} is below {other} at every size ({span})."
    if max(abs(low), abs(high)) <= NOISE:
        return f"{name} and {other} are within a point of each other ({span}): it makes no difference."
    if low >= -NOISE or high <= NOISE:
        side = "above" if high > NOISE else "below"
        return f"{name} is {side} {other} at some sizes and within a point of it at the others ({span})."
    return f"{name} is above {other} at some sizes and below it at others ({span})."
