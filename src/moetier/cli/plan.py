"""`moetier plan`: what a model needs and what a budget gives, without loading a weight."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from moetier.cli import options as o
from moetier.cli.errors import reported
from moetier.plan import Status, format_size

if TYPE_CHECKING:
    from moetier.plan import Plan


@reported
def plan(
    model: o.Model,
    device_memory: o.DeviceMemory = None,
    host_memory: o.HostMemory = None,
    slots: o.Slots = None,
    context: o.Context = 4096,
    readers: o.Readers = 4,
    device: o.Device = None,
    revision: o.Revision = None,
    trust_remote_code: o.TrustRemoteCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print the memory plan of a model. Exit code 1 if the model cannot run with the budget."""
    from moetier.cli.generating import quiet_transformers

    quiet_transformers(quiet=True)
    import torch

    from moetier.hf import Options
    from moetier.loading import inspect, resolve

    options = Options(
        device_memory=device_memory, host_memory=host_memory, slots=slots, context=context, readers=readers
    )
    options.check()
    folder = resolve(model, **({"revision": revision} if revision else {}))
    extra: dict[str, Any] = {"trust_remote_code": True} if trust_remote_code else {}
    result = inspect(folder, options, torch.device(device) if device else None, **extra)
    if as_json:
        print(json.dumps(asdict(result), indent=2))
    else:
        show(result)
    if result.status not in (Status.OK, Status.BELOW_RECOMMENDED):
        raise typer.Exit(1)


def show(plan: Plan) -> None:
    """The plan as a table on standard output."""
    work, machine = plan.workload, plan.machine
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("weights that are not experts", format_size(work.resident_nbytes))
    table.add_row("cache of the context", format_size(work.kv_nbytes), f"{work.context} tokens")
    table.add_row("working memory", format_size(work.workspace_nbytes), "activations, read buffers")
    table.add_row(
        "experts",
        format_size(work.records * work.record_nbytes),
        f"{work.records} of {format_size(work.record_nbytes)} in {work.layers} layers, {work.top_k} per token",
    )
    table.add_row("a slot", format_size(work.slot_nbytes), "an expert, rounded as the arena allocates it")
    for tier in plan.tiers:
        share = 100 * tier.slots / work.records
        table.add_row(
            f"{tier.name} tier", format_size(tier.nbytes), f"{tier.slots} slots, {share:.0f} % of the experts"
        )
    table.add_row("recommended", f"{plan.recommended_slots} slots", "twice the experts that a token uses")
    if machine.device_nbytes is not None:
        table.add_row(
            "device memory", format_size(plan.device_total_nbytes), f"of {format_size(machine.device_nbytes)}"
        )
    table.add_row("host memory", format_size(plan.host_total_nbytes), f"of {format_size(machine.host_nbytes)}")
    table.add_row("status", str(plan.status), plan.advice)
    Console(width=None, soft_wrap=True).print(table)
