"""`moetier bench cache`: a stress test of the cache alone, with real bytes or on a virtual clock.

The JSON (`--json`) is what `moetier.stress` reports, version 1.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from moetier.cli import options as o
from moetier.cli.console import Console
from moetier.cli.errors import reported
from moetier.errors import ConfigError
from moetier.plan import format_size, parse_size
from moetier.policies import check_online
from moetier.writeback import make_writeback

app = typer.Typer(help="Measure parts of moetier without a model.", no_args_is_help=True)

_WORK, _MACHINE, _VIRTUAL = "Work", "Real bytes", "Virtual clock"


def _gbps(name: str, default: float) -> Any:
    return typer.Option(name, metavar="X", min=0.001, rich_help_panel=_VIRTUAL, help=f"GB/s. Default: {default:g}.")


@app.callback()
def _root() -> None:
    """Measure parts of moetier without a model."""


@app.command("cache")
@reported
def cache(
    store: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Move real bytes: records in files of this folder, which is made and kept. Without it: virtual time.",
            rich_help_panel=_MACHINE,
        ),
    ] = None,
    readers: o.Readers = o.READERS,
    experts: Annotated[int, typer.Option(metavar="N", min=1, help="Records.", rich_help_panel=_WORK)] = 2048,
    layers: Annotated[
        int, typer.Option(metavar="N", min=1, help="Layers they are spread over.", rich_help_panel=_WORK)
    ] = 1,
    device_slots: Annotated[
        int, typer.Option(metavar="N", min=1, help="Slots of the first tier.", rich_help_panel=_WORK)
    ] = 16,
    host_slots: Annotated[
        int, typer.Option(metavar="N", min=1, help="Slots of the second tier.", rich_help_panel=_WORK)
    ] = 64,
    policy: o.Policy = "horizon",
    steps: Annotated[
        int, typer.Option(metavar="N", min=1, help="Accesses to every layer.", rich_help_panel=_WORK)
    ] = 1000,
    experts_per_step: Annotated[
        int, typer.Option(metavar="N", min=1, help="Experts that an access needs, at most.", rich_help_panel=_WORK)
    ] = 8,
    sampler: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="episode (environments stay for a while) or iid (drawn anew every step).",
            rich_help_panel=_WORK,
        ),
    ] = "episode",
    episode_len: Annotated[
        int, typer.Option(metavar="N", min=1, help="Steps of an episode.", rich_help_panel=_WORK)
    ] = 64,
    envs: Annotated[
        int, typer.Option(metavar="N", min=1, help="Environments, each with experts of its own.", rich_help_panel=_WORK)
    ] = 64,
    envs_per_batch: Annotated[
        int, typer.Option(metavar="N", min=1, help="Environments in a step.", rich_help_panel=_WORK)
    ] = 1,
    record_size: Annotated[str, typer.Option(metavar="SIZE", help="Of a record.", rich_help_panel=_WORK)] = "256KiB",
    dirty_share: Annotated[
        float,
        typer.Option(
            metavar="X", min=0.0, max=1.0, help="Share of uses that change the record.", rich_help_panel=_WORK
        ),
    ] = 0.1,
    writeback: Annotated[
        str,
        typer.Option(
            metavar="POLICY",
            help="When changed records are written: evict (for their slot), periodic, periodic(every=N,share=X), "
            "writethrough.",
            rich_help_panel=_WORK,
        ),
    ] = "evict",
    dirty_limit: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Changed records at a time, at most.", rich_help_panel=_WORK),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Of the sampler.", rich_help_panel=_WORK)] = 0,
    h2d_gbps: Annotated[float | None, _gbps("--h2d-gbps", 12)] = None,
    d2h_gbps: Annotated[float | None, _gbps("--d2h-gbps", 12)] = None,
    disk_read_gbps: Annotated[float | None, _gbps("--disk-read-gbps", 2)] = None,
    disk_write_gbps: Annotated[float | None, _gbps("--disk-write-gbps", 1)] = None,
    io_latency_ms: Annotated[
        float | None,
        typer.Option(metavar="X", min=0.0, help="Of every disk request. Default: 0.1.", rich_help_panel=_VIRTUAL),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.", rich_help_panel="Output")] = False,
) -> None:
    """Stress the cache alone: many records, few slots, changes and write-backs.

    With --store it moves real bytes and checks every byte at the end; exit code 1 if one is not what it should be.
    """
    from moetier.stress import Stress, run_real, run_virtual

    if sampler not in ("episode", "iid"):
        raise ConfigError(f"--sampler {sampler}: choose episode or iid")
    stress = Stress(
        experts=experts,
        layers=layers,
        device_slots=device_slots,
        host_slots=host_slots,
        steps=steps,
        per_step=experts_per_step,
        sampler=sampler,  # type: ignore[arg-type]
        episode=episode_len,
        envs=envs,
        envs_per_batch=envs_per_batch,
        record_nbytes=parse_size(record_size, "--record-size"),
        policy=policy,
        dirty_share=dirty_share,
        writeback=writeback,
        dirty_limit=dirty_limit,
        seed=seed,
    )
    virtual = {
        "--h2d-gbps": h2d_gbps,
        "--d2h-gbps": d2h_gbps,
        "--disk-read-gbps": disk_read_gbps,
        "--disk-write-gbps": disk_write_gbps,
        "--io-latency-ms": io_latency_ms,
    }
    stress.accesses()  # a wrong number is told before anything is written
    check_online(policy)
    make_writeback(writeback, device_slots)
    console = Console(stderr=True)
    if store is None:
        result = run_virtual(stress, _timing(stress.record_nbytes, virtual, readers))
    else:
        given = [flag for flag, value in virtual.items() if value is not None]
        if given:
            raise ConfigError(f"{', '.join(given)}: of the virtual clock; with --store the machine is what it is")
        from moetier.stores.synthetic import SyntheticStore

        nbytes = format_size(experts * stress.record_nbytes)
        with console.status(f"making or checking {experts} records, {nbytes}, in {store}"):
            files = SyntheticStore(Path(store).expanduser(), layers, experts // layers, stress.record_nbytes)
        with console.status(f"{steps} steps"):
            result = run_real(stress, files, readers)
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        show(result)


def _timing(record_nbytes: int, given: dict[str, float | None], readers: int) -> Any:
    from moetier.simulate.config import Link, Timing

    def value(flag: str, default: float) -> float:
        found = given[flag]
        return default if found is None else found

    latency = value("--io-latency-ms", 0.1) / 1e3
    return Timing(
        record_nbytes,
        disk_read=Link(value("--disk-read-gbps", 2.0), latency, readers),
        disk_write=Link(value("--disk-write-gbps", 1.0), latency, 2),
        h2d=Link(value("--h2d-gbps", 12.0), 1e-5),
        d2h=Link(value("--d2h-gbps", 12.0), 1e-5),
    )


def show(result: dict[str, Any]) -> None:
    """The report as tables on standard output."""
    config, counters, seconds = result["config"], result["counters"], result["seconds"]
    console = Console(highlight=False)
    console.print(
        f"{config['experts']} records of {format_size(config['record_nbytes'])}, {config['device_slots']} device and "
        f"{config['host_slots']} host slots, policy {config['policy']}; {config['steps']} steps of up to "
        f"{config['per_step']} experts, sampler {config['sampler']}",
        markup=False,
        soft_wrap=True,
    )
    where = result["device"] if result["mode"] == "real bytes" else "no byte is moved"
    console.print(f"{result['mode']}: {where}", markup=False, soft_wrap=True)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("tier", "hits", "late", "misses", "hit rate"):
        table.add_column(name, justify="left" if name == "tier" else "right")
    for name in ("device", "host"):
        counts = [str(counters[f"{name}_{kind}"]) for kind in ("hits", "lates", "misses")]
        table.add_row(name, *counts, f"{100 * result['hit_rates'][name]:.1f} %")
    console.print(table)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("operation", "count", "bytes", "total s", "mean ms", "p50 ms", "p99 ms"):
        table.add_column(name, justify="left" if name == "operation" else "right")
    for name, timer in result["timers"].items():
        times = [f"{1e3 * timer[key]:.3f}" for key in ("mean", "p50", "p99")]
        nbytes = format_size(result["bytes"][name])
        table.add_row(name, str(timer["count"]), nbytes, f"{timer['total']:.3f}", *times)
    console.print(table)
    changes = f", {result['check']['changes']} changes" if result["check"] else ""
    console.print(
        f"{result['needs']} uses{changes}, {counters['write_backs']} write-backs, {counters['cleaned']} cleaned "
        f"({config['writeback']}), in {seconds['total']:.2f} s: {result['uses_per_second']:.0f} uses/s, "
        f"{seconds['wait']:.2f} s of it waiting",
        markup=False,
        soft_wrap=True,
    )
    if result["check"]:
        check = result["check"]
        console.print(
            f"every byte is the newest version: {check['through_the_cache']} records through the cache, "
            f"{check['on_disk']} on disk; the files stay in {result['store']}",
            markup=False,
            soft_wrap=True,
        )
