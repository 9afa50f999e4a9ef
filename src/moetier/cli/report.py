"""What a run did: as a table for people, as JSON for programs.

The JSON (`--stats-json`), version 1; bytes and seconds are plain numbers, lists are per MoE layer:

    version            of this format: a key that changes its meaning raises it
    moetier, model     version of the library; folder or hub id
    speed              prompt_tokens, new_tokens, first_token_seconds (mean over generations),
                       prefill_tokens_per_second, decode_tokens_per_second (0 where there is nothing to divide)
    store              where the experts were read from: kind (packed, checkpoint), path
    plan               status, experts, layers, experts_per_token, recommended_slots, context,
                       host_bytes, device_bytes (totals of the run), host_budget_bytes, device_budget_bytes (or null),
                       tiers: [name, slots, bytes]
    tiers              per tier, fastest first: slots, policy, hits, lates, misses (per layer), hit_rate, evictions,
                       write_backs, staged
    links              per link: bytes, copies, busy_seconds (summed over its threads), union_seconds (any is busy),
                       bytes_per_busy_second, bytes_per_second (of union_seconds), depth (mean requests while busy)
    seconds            load, generate; of generate: wait (nothing to compute, an expert on its way), exposed (of it: a
                       link was busy), compute (the experts' math), decide (residency core and queues), io (any link
                       busy)
    phases             prefill and decode, over the model's forwards: steps, tokens, the seconds run, wait, exposed,
                       compute, decide, io, links (union of each), floor (run, with these transfers perfectly hidden);
                       achieved_overlap, attainable_overlap, attainable_overlap_on_demand (shares of io, null where
                       nothing moved); bound and bound_words. docs/timeline.md has the formulas
    chunks             only where no expert fits a slot: buffers, buffer_bytes, slices_per_expert (at most)
    levers             only with a lossy lever on: its settings, and of the decoding steps the (token, expert) pairs
                       that the routers chose, those of them changed, and those dropped
    prefetches         what `moetier.prefetch_engine.Prefetching.report` says; with --prefetch off, and where every
                       expert has a slot, only issued, useful, late and wasted, all 0
    pinning            only with --pin-after or --profile: what `moetier.pinning.WarmPinning.report` says

Whatever else `model.moetier.stats()` counts is passed on under its own name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.table import Table

from moetier import __version__
from moetier.access import Phase
from moetier.cli.console import Console
from moetier.levers import Levers
from moetier.plan import Plan, format_size

STATS_VERSION = 1


def report(model: Any, name: str, speed: dict[str, float], load: float, generate: float) -> dict[str, Any]:
    """Everything that the table and the statistics file show; `load` and `generate` are seconds."""
    stats = model.moetier.stats()
    for tier in stats["tiers"]:
        accesses = sum(sum(tier[kind]) for kind in ("hits", "lates", "misses"))
        tier["hit_rate"] = sum(tier["hits"]) / accesses if accesses else 0.0
    for link in stats["links"].values():
        link["bytes_per_busy_second"] = link["bytes"] / link["busy_seconds"] if link["busy_seconds"] else 0.0
        link["bytes_per_second"] = link["bytes"] / link["union_seconds"] if link["union_seconds"] else 0.0
        link["depth"] = link["busy_seconds"] / link["union_seconds"] if link["union_seconds"] else 0.0
    for phase in Phase:
        stats["phases"][phase.name.lower()]["bound_words"] = model.moetier.overlap(phase).words()
    stats["seconds"] = {"load": load, "generate": generate, **stats["seconds"]}
    head = {"version": STATS_VERSION, "moetier": __version__, "model": name}
    return {**head, "store": home_of(model), "speed": speed, "plan": _plan(model.moetier.plan), **stats}


def home_of(model: Any) -> dict[str, str]:
    """Where the experts are read from."""
    store = model.moetier.cache.store
    return {"kind": store.kind, "path": str(store.folder)}


def _plan(plan: Plan) -> dict[str, Any]:
    return {
        "status": str(plan.status),
        "experts": plan.workload.records,
        "layers": plan.workload.layers,
        "experts_per_token": plan.workload.top_k,
        "recommended_slots": plan.recommended_slots,
        "context": plan.workload.context,
        "host_bytes": plan.host_total_nbytes,
        "device_bytes": plan.device_total_nbytes,
        "host_budget_bytes": plan.machine.host_nbytes,
        "device_budget_bytes": plan.machine.device_nbytes,
        "tiers": [{"name": tier.name, "slots": tier.slots, "bytes": tier.nbytes} for tier in plan.tiers],
    }


def show(result: dict[str, Any], console: Console) -> None:
    """The table at the end of a run."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, justify="right")
    table.add_column()
    speed, seconds, plan = result["speed"], result["seconds"], result["plan"]
    table.add_row("decode", f"{speed['decode_tokens_per_second']:.2f} tokens/s", f"{speed['new_tokens']} tokens")
    table.add_row("prefill", f"{speed['prefill_tokens_per_second']:.2f} tokens/s", f"{speed['prompt_tokens']} tokens")
    table.add_row("first token", f"{speed['first_token_seconds']:.2f} s", f"after {seconds['load']:.1f} s of loading")
    if "chunks" in result:
        table.add_row(*_chunks_row(result["chunks"], result["tiers"][0]))
    for tier, planned in [] if "chunks" in result else zip(result["tiers"], plan["tiers"], strict=True):
        hits, lates, misses = (sum(tier[kind]) for kind in ("hits", "lates", "misses"))
        table.add_row(
            f"{planned['name']} hit rate",
            f"{100 * tier['hit_rate']:.1f} %",
            f"{hits} hits, {lates} late, {misses} misses",
        )
        table.add_row(
            f"{planned['name']} slots",
            str(planned["slots"]),
            f"of {plan['experts']} experts, {format_size(planned['bytes'])}; policy {tier['policy']}, "
            f"{tier['evictions']} evictions",
        )
    if "levers" in result:
        table.add_row(*_levers_row(result["levers"]))
    if "controller" in result["prefetches"]:
        table.add_row(*_prefetch_row(result["prefetches"]))
    if "pinning" in result:
        table.add_row(*_pinning_row(result["pinning"]))
    for name, link in result["links"].items():
        what = "slices" if "chunks" in result else "experts"
        rate = f"{link['copies']} {what}, {link['bytes_per_second'] / 1e9:.2f} GB/s while busy"
        table.add_row(name, format_size(link["bytes"]), f"{rate}, {link['depth']:.1f} requests at a time")
    table.add_row("experts from", result["store"]["kind"], result["store"]["path"])
    for row in _overlap_rows(result["phases"]):
        table.add_row(*row)
    table.add_row("in all", f"{seconds['generate']:.2f} s", f"{seconds['wait']:.2f} s of it waiting")
    for place in ("host", "device"):
        total, budget = plan[f"{place}_bytes"], plan[f"{place}_budget_bytes"]
        if total and budget is not None:
            table.add_row(f"{place} memory", format_size(total), f"planned, of {format_size(budget)}")
    console.print(table)


def _overlap_rows(phases: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Where the time of a token went, how much of the transfers was hidden, and what bounds the run."""
    decoded = phases["decode"]["steps"] > 0
    phase = phases["decode" if decoded else "prefill"]
    if not phase["steps"]:
        return
    each, unit = 1e3 / phase["steps"], "a token" if decoded else "a prefill"

    def milliseconds(name: str) -> str:
        return f"{each * phase[name]:.2f} ms"

    def percent(share: float) -> str:
        return f"{100 * share:.0f} %"

    rest = max(0.0, phase["run"] - phase["wait"] - phase["compute"] - phase["decide"])
    handover = each * max(0.0, phase["wait"] - phase["exposed"])
    yield "T_wait", milliseconds("wait"), f"{unit}, nothing to compute; {handover:.2f} ms of it no link is busy"
    yield "T_compute", milliseconds("compute"), f"{unit}, the experts' math; {each * rest:.2f} ms the rest of the model"
    yield "decisions", milliseconds("decide"), f"{unit}, residency core and queues"
    yield "T_io", milliseconds("io"), f"{unit}, a link is busy"
    if phase["achieved_overlap"] is not None:
        yield (
            "I/O hidden",
            percent(phase["achieved_overlap"]),
            f"{percent(phase['attainable_overlap'])} could be: {milliseconds('floor')}, not {milliseconds('run')}",
        )
    yield "bound by", phase["bound"], phase["bound_words"].partition(": ")[2] or phase["bound_words"]


def _chunks_row(chunks: dict[str, Any], tier: dict[str, Any]) -> tuple[str, str, str]:
    """How experts were streamed where there was no slot."""
    text = f"of {format_size(chunks['buffer_bytes'])}; {sum(tier['misses'])} uses of experts, each read anew in up to "
    return "buffers", str(chunks["buffers"]), text + f"{chunks['slices_per_expert']} slices: nothing is cached"


def _levers_row(levers: dict[str, Any]) -> tuple[str, str, str]:
    """What the lossy levers did to the routers' choices."""
    choices = max(1, levers["choices"])
    settings = Levers(**{name: levers[name] for name in Levers().to_dict()})
    said = f"{levers['changed']} changed, {levers['dropped']} dropped by {settings}: not the exact model"
    return "routing kept", f"{100 - 100 * (levers['changed'] + levers['dropped']) / choices:.1f} %", said


def _prefetch_row(prefetches: dict[str, Any]) -> tuple[str, str, str]:
    """What prefetching did, and what its controller made of it."""
    text = f"{prefetches['useful']} useful ({prefetches['late']} late), {prefetches['wasted']} wasted; "
    text += prefetches["controller"]["words"] if prefetches["error"] is None else f"ended by {prefetches['error']}"
    return f"prefetch {prefetches['predictor']}", f"{prefetches['issued']} experts", text


def _pinning_row(pinning: dict[str, Any]) -> tuple[str, str, str]:
    """What pinning did: the pins, and the hit rates before, with, without (the guard's estimate) and after them."""

    def percent(name: str) -> str:
        rate = pinning["hit_rates"][name]
        return "none" if rate is None else f"{100 * rate:.1f} %"

    state = {"off": "nothing to pin: every expert fits, or there is 1 slot", "warming": "not yet"}.get(pinning["state"])
    if state is not None:
        return "pinned", "0 experts", state
    text = f"hit rate {percent('before')} before, {percent('pinned')} with pins"
    if pinning["guarded"]:
        text += f", where it would be {percent('without')} without"
    if pinning["state"] == "dropped":
        text += f"; dropped after {pinning['dropped_after']} accesses, {percent('dropped')} since"
    return "pinned", f"{len(pinning['pinned'])} experts", text
