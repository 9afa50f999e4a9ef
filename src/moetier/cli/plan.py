"""`moetier plan`: what a model needs and what a budget gives, without loading a weight.

The JSON (`--json`), version 1: `model`, `status`, `advice`, `slots` (of the fastest tier), `recommended_slots`,
`workload`, `machine`, `tiers` and `chunks` (null where there are slots) with the fields of `moetier.plan`,
`expert_bytes` (all experts: raw, and in_slots as an arena would take them), `host_total_nbytes`, `device_total_nbytes`;
with --trace or --profile also `forecast`, see `moetier.cli.forecasting`; with --measure also `calibration`, see
`moetier.cli.costs`.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.table import Table

from moetier.cli import options as o
from moetier.cli.console import Console
from moetier.cli.costs import measure_costs, show_costs
from moetier.cli.errors import reported, with_flags
from moetier.cli.forecasting import Asked, make_forecast, show_forecast
from moetier.cli.loading import check_device, find, import_libraries
from moetier.errors import ConfigError
from moetier.plan import Plan, Status, format_size

PLAN_VERSION = 1
_FORECAST = "Forecast"


@reported
def plan(
    model: o.Model,
    device_memory: o.DeviceMemory = None,
    host_memory: o.HostMemory = None,
    slots: o.Slots = None,
    context: o.Context = 4096,
    readers: o.Readers = o.READERS,
    policy: o.Policy = "horizon",
    store: o.Store = None,
    trace: Annotated[
        str | None,
        typer.Option(help="Predict from this recorded routing.", metavar="FILE", rich_help_panel=_FORECAST),
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(help="Predict from this saved profile.", metavar="FILE", rich_help_panel=_FORECAST),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="Load the model and measure what experts cost; with a routing: tokens per second.",
            rich_help_panel=_FORECAST,
        ),
    ] = False,
    budgets: Annotated[
        str | None,
        typer.Option(
            help="Slots to predict for. Default: 25%,50%,75%,100%.", metavar="N|N%,…", rich_help_panel=_FORECAST
        ),
    ] = None,
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Also run the model at every budget.", rich_help_panel=_FORECAST),
    ] = False,
    threads: o.Threads = None,
    device: o.Device = None,
    revision: o.Revision = None,
    trust_remote_code: o.TrustRemoteCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.", rich_help_panel="Output")] = False,
    verbose: o.Verbose = False,
) -> None:
    """Print what a model needs and what a budget gives; no weight is loaded.

    With --trace it predicts how fast the model decodes at several budgets. --measure loads the model: it prints what an
    expert costs on the CPU, on the link and on the device, and gives the prediction in seconds.

    With --device-memory it plans for a GPU, also one that this machine does not have. Exit code 1 if the model cannot
    run with the budget.
    """
    asked = Asked(trace, profile, measure, compare, budgets, verbose)
    wanted = asked.check()
    console = Console(stderr=True)
    import_libraries(console, verbose, threads)
    if device is None and device_memory is not None:
        device = "cuda"
    check_device(device, must_exist=device_memory is None)
    if device == "cpu" and device_memory is not None:
        raise ConfigError("--device cpu and --device-memory contradict each other; leave one out")
    import torch

    from moetier.loading import inspect
    from moetier.options import Options

    options = Options(
        device_memory=device_memory,
        host_memory=host_memory,
        slots=slots,
        policy=policy,
        context=context,
        readers=readers,
        store=store,
    )
    options.check()
    folder = find(model, revision, console)
    extra: dict[str, Any] = {"trust_remote_code": True} if trust_remote_code else {}
    with console.status("computing shapes"), warnings.catch_warnings():
        if not verbose:
            warnings.simplefilter("ignore")
        result = inspect(folder, options, torch.device(device) if device else None, **extra)
    works = result.status in (Status.OK, Status.BELOW_RECOMMENDED, Status.CHUNKED)
    found = calibration = None
    if wanted and result.chunks is not None:
        raise ConfigError(f"there is nothing to forecast: {result.advice}")
    if wanted and works:
        arguments = extra | ({"device": device} if device else {})
        found = make_forecast(asked, result, folder, options, arguments, console)
        calibration = found.pop("calibration", None)
    elif measure and works:
        arguments = extra | ({"device": device} if device else {})
        calibration = measure_costs(result, folder, options, arguments, verbose, console)
    if as_json:
        more = {"forecast": found, "calibration": calibration}
        more = {name: value for name, value in more.items() if value is not None}
        print(json.dumps(as_dict(result, model) | more, indent=2))
    else:
        show(result, model)
        if calibration is not None:
            show_costs(calibration, result.workload.top_k, Console(highlight=False))
        if found is not None:
            show_forecast(found, Console(highlight=False))
    if not works:
        raise typer.Exit(1)


def as_dict(plan: Plan, model: str) -> dict[str, Any]:
    """The plan as JSON takes it."""
    work = plan.workload
    expert_bytes = {"raw": work.records * work.record_nbytes, "in_slots": work.records * work.slot_nbytes}
    head = {"version": PLAN_VERSION, "model": model, "slots": plan.slots, "expert_bytes": expert_bytes}
    return head | asdict(plan)


def show(plan: Plan, model: str) -> None:
    """The plan as a table on standard output."""
    work, machine = plan.workload, plan.machine
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, justify="right")
    table.add_column()
    table.add_row("weights that are not experts", format_size(work.resident_nbytes), "always in memory")
    table.add_row("decoding cache", format_size(work.kv_nbytes), f"for {work.context} tokens of context")
    table.add_row("workspace", format_size(work.workspace_nbytes), "activations, read buffers")
    table.add_row(
        "an expert",
        format_size(work.record_nbytes),
        f"{work.record_nbytes} bytes, {work.slot_nbytes} in a slot",
    )
    table.add_row(
        "all experts",
        format_size(work.records * work.record_nbytes),
        f"{work.records} in {work.layers} layers, {work.top_k} per token and layer; "
        f"{format_size(work.records * work.slot_nbytes)} in slots",
    )
    if plan.chunks is not None:
        size = format_size(plan.chunks.nbytes)
        table.add_row(
            "host tier", f"{plan.chunks.buffers} buffers", f"of {size}, for slices; no slots, nothing is cached"
        )
    for tier in plan.tiers if plan.chunks is None else ():
        share = 100 * tier.slots / work.records
        table.add_row(
            f"{tier.name} tier", f"{tier.slots} slots", f"{format_size(tier.nbytes)}, {share:.0f} % of the experts"
        )
    table.add_row("recommended", f"{plan.recommended_slots} slots", "or more in the fastest tier")
    if machine.device_nbytes is not None:
        table.add_row(
            "device memory", format_size(plan.device_total_nbytes), f"of {format_size(machine.device_nbytes)}"
        )
    table.add_row("host memory", format_size(plan.host_total_nbytes), f"of {format_size(machine.host_nbytes)}")
    console = Console(highlight=False)
    console.print(f"Memory plan of {model}", markup=False, soft_wrap=True)
    console.print(table)
    advice = f": {plan.advice}" if plan.advice else ""
    console.print(f"{plan.status}{with_flags(advice)}", markup=False, soft_wrap=True)
