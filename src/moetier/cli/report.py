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
    links              per link: bytes, copies, busy_seconds (summed over its threads), bytes_per_busy_second
    seconds            load, generate; of generate: wait (nothing to compute, an expert on its way), compute (the
                       experts' math), decide (residency core and queues)
    chunks             only where no expert fits a slot: buffers, buffer_bytes, slices_per_expert (at most)
    pinning            only with --pin-after or --profile: what `moetier.pinning.WarmPinning.report` says

Whatever else `model.moetier.stats()` counts is passed on under its own name.
"""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from moetier import __version__
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
    stats["seconds"] = {"load": load, "generate": generate, **stats["seconds"]}
    head = {"version": STATS_VERSION, "moetier": __version__, "model": name}
    store = model.moetier.cache.store
    home = {"kind": store.kind, "path": str(store.folder)}
    return {**head, "store": home, "speed": speed, "plan": _plan(model.moetier.plan), **stats}


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
    if "pinning" in result:
        table.add_row(*_pinning_row(result["pinning"]))
    for name, link in result["links"].items():
        what = "slices" if "chunks" in result else "experts"
        rate = f"{link['copies']} {what}, {link['bytes_per_busy_second'] / 1e9:.2f} GB/s per busy thread"
        table.add_row(name, format_size(link["bytes"]), rate)
    table.add_row("experts from", result["store"]["kind"], result["store"]["path"])
    table.add_row("T_wait", f"{seconds['wait']:.2f} s", "nothing to compute, an expert on its way")
    table.add_row("T_compute", f"{seconds['compute']:.2f} s", "the experts' math")
    table.add_row("decisions", f"{seconds['decide']:.2f} s", "residency core and queues")
    table.add_row("in all", f"{seconds['generate']:.2f} s", "the rest is attention and sampling")
    for place in ("host", "device"):
        total, budget = plan[f"{place}_bytes"], plan[f"{place}_budget_bytes"]
        if total and budget is not None:
            table.add_row(f"{place} memory", format_size(total), f"planned, of {format_size(budget)}")
    console.print(table)


def _chunks_row(chunks: dict[str, Any], tier: dict[str, Any]) -> tuple[str, str, str]:
    """How experts were streamed where there was no slot."""
    text = f"of {format_size(chunks['buffer_bytes'])}; {sum(tier['misses'])} uses of experts, each read anew in up to "
    return "buffers", str(chunks["buffers"]), text + f"{chunks['slices_per_expert']} slices: nothing is cached"


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
