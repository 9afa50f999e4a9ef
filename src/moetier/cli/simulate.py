"""`moetier simulate`: traces through policies, sizes, scopes and batches; a table, JSON, CSV and an HTML report."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from moetier.cli.console import Console
from moetier.cli.errors import reported
from moetier.cli.files import check_writable, write_text
from moetier.cli.grid import REFILLS, Grid, Machine
from moetier.cli.sweeping import load, plan_for, run
from moetier.errors import ConfigError
from moetier.plan import parse_size
from moetier.policies import ADMISSIONS, POLICIES, find_policy, parse_policy
from moetier.predictors import PREDICTORS
from moetier.simulate.summary import TraceSummary

_SWEEP, _CACHE, _TIME, _RUN, _OUT = "What to compare", "Cache", "Virtual machine", "Running", "Output"
DEFAULT_POLICIES = "horizon,lfru,slru,lfu,lru"
DEFAULT_SLOTS = "10%,20%,30%,50%,70%"


def _option(*names: str, metavar: str, text: str, panel: str, **more: Any) -> Any:
    return typer.Option(*names, metavar=metavar, help=text, rich_help_panel=panel, **more)


def _gbps(text: str) -> Any:
    return _option(metavar="X", text=text, panel=_TIME, min=1e-6)


def _ms(text: str) -> Any:
    return _option(metavar="X", text=text, panel=_TIME, min=0.0)


@reported
def simulate(
    traces: Annotated[list[Path], typer.Argument(help="Traces, see moetier trace.", metavar="TRACE…")],
    policy: Annotated[
        str,
        _option(
            metavar="NAMES",
            text=f"Policies, between commas: {', '.join(POLICIES)}, or package.module:Class; parameters as in "
            "slru(protected=0.5).",
            panel=_SWEEP,
        ),
    ] = DEFAULT_POLICIES,
    slots: Annotated[
        str,
        _option(metavar="N|N%,…", text="Sizes: numbers of slots, or shares of all experts.", panel=_SWEEP),
    ] = DEFAULT_SLOTS,
    scope: Annotated[
        str, _option(metavar="NAME", text="global (all layers share the slots), layer, or both.", panel=_SWEEP)
    ] = "global",
    batch: Annotated[
        str | None,
        _option(metavar="N,…", text="Concurrent sequences. Default: steps as they were recorded.", panel=_SWEEP),
    ] = None,
    semantics: Annotated[
        str,
        _option(
            metavar="NAME",
            text="atomic (a step's experts of a layer at once, none of them evicted meanwhile) or sequential.",
            panel=_SWEEP,
        ),
    ] = "atomic",
    seeds: Annotated[
        int,
        _option(
            metavar="N",
            text="From 2: that many runs, with sequences in random order and experts renumbered, for mean and spread.",
            panel=_SWEEP,
            min=1,
            max=1000,
        ),
    ] = 1,
    limit: Annotated[
        int | None, _option(metavar="TOKENS", text="Only the first tokens of each trace.", panel=_SWEEP, min=1)
    ] = None,
    oracle: Annotated[
        bool, typer.Option("--oracle/--no-oracle", help="Add belady and belady-forced.", rich_help_panel=_SWEEP)
    ] = True,
    fit: Annotated[
        Path | None, _option(metavar="FILE", text="The trace that fitted policies learn from.", panel=_SWEEP)
    ] = None,
    fit_split: Annotated[
        bool,
        typer.Option("--fit-split", help="Fit on every other sequence, report on the others.", rich_help_panel=_SWEEP),
    ] = False,
    admission: Annotated[
        str,
        _option(
            metavar="NAME", text=f"Which misses may displace others: {', '.join(sorted(ADMISSIONS))}.", panel=_CACHE
        ),
    ] = "always",
    staging: Annotated[
        int,
        _option(metavar="N", text="Slots, of --slots, for misses that are turned away.", panel=_CACHE, min=0),
    ] = 0,
    host_slots: Annotated[
        str | None, _option(metavar="N|N%", text="A second tier of this size below the first.", panel=_CACHE)
    ] = None,
    host_policy: Annotated[
        str | None, _option(metavar="NAME", text="Its policy. Default: that of the first tier.", panel=_CACHE)
    ] = None,
    exclusive: Annotated[
        bool | None,
        _option(
            "--exclusive/--inclusive",
            metavar="",
            text="Keep an expert once in two tiers, as a run does, or also below.",
            panel=_CACHE,
        ),
    ] = None,
    spare: Annotated[
        int | None,
        _option(metavar="N", text="Exclusive: next victims copied down ahead. Default: a run's.", panel=_CACHE, min=0),
    ] = None,
    refill: Annotated[
        str | None,
        _option(
            metavar="NAME",
            text=f"Exclusive: read what left again instead of copying down: {', '.join(REFILLS)} (what is faster). "
            "Default: never.",
            panel=_CACHE,
        ),
    ] = None,
    predictor: Annotated[
        str | None, _option(metavar="NAME", text=f"Prefetch with: {', '.join(PREDICTORS)}.", panel=_CACHE)
    ] = None,
    prefetch_confidence: Annotated[
        float | None, _option(metavar="P", text="Prefetch from this probability.", panel=_CACHE, min=0.0, max=1.0)
    ] = None,
    prefetch_limit: Annotated[
        int | None, _option(metavar="N", text="Prefetches per access at most.", panel=_CACHE, min=1)
    ] = None,
    prefetch_displace: Annotated[
        bool,
        typer.Option(
            "--prefetch-displace", help="Prefetch over victims, not only into free slots.", rich_help_panel=_CACHE
        ),
    ] = False,
    prefetch_control: Annotated[
        bool,
        typer.Option(
            "--prefetch-control", help="Prefetch as a run does: in idle time, while it pays.", rich_help_panel=_CACHE
        ),
    ] = False,
    warm_pinning: Annotated[
        int | None,
        _option(metavar="K", text="After K accesses, pin the most used experts of each layer.", panel=_CACHE, min=1),
    ] = None,
    dirty: Annotated[
        bool,
        typer.Option(
            "--dirty", help="Every use changes the expert, as in training; it is written back.", rich_help_panel=_CACHE
        ),
    ] = False,
    record_size: Annotated[
        str | None, _option(metavar="SIZE", text="Bytes of one expert, such as 18MiB.", panel=_TIME)
    ] = None,
    h2d_gbps: Annotated[
        float | None, _gbps("Host to device, GB/s. Any flag of this group but --record-size adds time.")
    ] = None,
    d2h_gbps: Annotated[float | None, _gbps("Device to host, GB/s.")] = None,
    disk_read_gbps: Annotated[float | None, _gbps("Disk reads, GB/s.")] = None,
    disk_write_gbps: Annotated[float | None, _gbps("Disk writes, GB/s.")] = None,
    io_latency_ms: Annotated[float | None, _ms("Latency of a disk read or write.")] = None,
    layer_ms: Annotated[float | None, _ms("Computing of a layer without its experts.")] = None,
    expert_ms: Annotated[float | None, _ms("Computing of one expert of an access.")] = None,
    jobs: Annotated[
        int | None, _option("--jobs", "-j", metavar="N", text="Processes. Default: one per CPU.", panel=_RUN, min=1)
    ] = None,
    resume: Annotated[
        Path | None,
        _option(metavar="FILE", text="Keep results in this file as they come, and go on from it.", panel=_RUN),
    ] = None,
    ray: Annotated[
        str | None,
        _option(metavar="ADDRESS", text="Run on a Ray cluster: auto, host:port, ray://host:port, local.", panel=_RUN),
    ] = None,
    output: Annotated[
        Path | None, _option("--output", "-o", metavar="FILE", text="Write the HTML report.", panel=_OUT)
    ] = None,
    json_file: Annotated[
        Path | None, _option("--json", metavar="FILE", text="Write everything as JSON.", panel=_OUT)
    ] = None,
    csv_file: Annotated[
        Path | None, _option("--csv", metavar="FILE", text="Write one line per run.", panel=_OUT)
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no table.", rich_help_panel=_OUT)] = False,
) -> None:
    """Replay traces through eviction policies, in the residency core that real runs use.

    Hit rates of every policy at every size go to standard output, with the oracles (Belady with bypass and with forced
    admission) and the share of the distance between LRU and Belady that a policy closes. Exit code 1 if a simulation
    failed; the others' results are shown all the same.
    """
    files = ((output, "--output"), (json_file, "--json"), (csv_file, "--csv"))
    for path, flag in files:
        check_writable(None if path is None else str(path), flag)
    if fit is not None and fit_split:
        raise ConfigError("--fit and --fit-split contradict each other; leave one out")
    nbytes = None if record_size is None else parse_size(record_size, "--record-size")
    if nbytes == 0:
        raise ConfigError("--record-size: an expert has at least one byte")
    machine = Machine(
        record_size, h2d_gbps, d2h_gbps, disk_read_gbps, disk_write_gbps, io_latency_ms, layer_ms, expert_ms
    )
    grid = Grid(
        policy, slots, scope, batch, semantics, seeds, oracle, admission, staging, host_slots, host_policy, exclusive,
        spare, refill, predictor, prefetch_confidence, prefetch_limit, prefetch_displace, prefetch_control,
        warm_pinning, dirty, machine,
    )  # fmt: skip
    fits = any(hasattr(find_policy(parse_policy(name)[0]), "fit") for name in _known(grid))
    if fit is not None and not fits:
        raise ConfigError(f"--fit {fit}: no policy of --policy learns beforehand; leave it out, or add static")
    loaded = [load(path, limit) for path in traces]
    other = None if fit is None else load(fit, None)
    plans = [plan_for(path, trace, other, fit, fit_split, grid) for path, trace in zip(traces, loaded, strict=True)]
    executor = None
    if ray is not None:
        from moetier.simulate.ray import ray_workers

        executor = ray_workers(ray, jobs)
    summaries = run(plans, limit, executor, jobs, resume, quiet)
    _write(summaries, nbytes, output, json_file, csv_file)
    if not quiet:
        show(summaries, nbytes)
    if any(summary.failures for summary in summaries):
        raise typer.Exit(1)


def _known(grid: Grid) -> list[str]:
    """The policies that exist; a misspelt one is reported with the trace."""
    return [name for name in grid.policies() if parse_policy(name)[0] in POLICIES or ":" in name]


def _write(
    summaries: list[TraceSummary],
    nbytes: int | None,
    output: Path | None,
    json_file: Path | None,
    csv_file: Path | None,
) -> None:
    from moetier.simulate.html import as_html
    from moetier.simulate.report import as_csv, as_json

    if output is not None:
        command = shlex.join(["moetier", *sys.argv[1:]]) if sys.argv[1:2] == ["simulate"] else ""
        write_text(output, as_html(summaries, nbytes, command), "--output")
    if json_file is not None:
        write_text(json_file, json.dumps(as_json(summaries, nbytes), indent=1) + "\n", "--json")
    if csv_file is not None:
        write_text(csv_file, as_csv(summaries), "--csv")


def show(summaries: list[TraceSummary], nbytes: int | None) -> None:
    """Tables, remarks and the checklist on standard output."""
    from moetier.simulate.checklist import checklist
    from moetier.simulate.report import tables

    console = Console(highlight=False)
    for summary in summaries:
        trace = summary.trace
        console.print(
            f"{summary.name}: {trace.tokens:,} tokens, {len(trace.sequences()):,} sequences, {trace.layers} layers, "
            f"top {trace.top_k} of {trace.num_experts} experts ({trace.records} in all)",
            markup=False,
            soft_wrap=True,
        )
        for table, remarks in tables(summary, nbytes):
            console.print()
            console.print(table)
            for remark in remarks:
                console.print(remark, markup=False, soft_wrap=True)
        console.print()
        for term, text in checklist(summary, nbytes):
            console.print(f"{term}: {text}", markup=False, soft_wrap=True)
