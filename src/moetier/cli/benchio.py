"""`moetier bench io`: what the disk, the memory and the link to a GPU give.

The JSON (`--json`), version 1: path, files, bytes (to read from), seconds, neighbours (cores that other programs kept
busy meanwhile); disk: a list of size and depth of the requests, mode (direct, buffered), bytes_per_second,
core_seconds_per_gb (both null where there was no time), samples, cached (share of pages that were in memory before;
null: unknown); no_direct (why direct reads were left out, or null); best (size, depth, mode, bytes_per_second,
core_seconds_per_gb); engine (the same, of the settings with the engine's own request size);
memory_copy_bytes_per_second; gpu (name, bytes, host_to_device and device_to_host per second) or null.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress
from rich.table import Table

from moetier.cli.console import Console
from moetier.cli.errors import reported, say
from moetier.cli.files import check_writable, write_text
from moetier.plan import format_size, parse_size
from moetier.threads import CoreWatch

if TYPE_CHECKING:
    from moetier.iobench import Reading

JSON_VERSION = 1


@reported
def io(
    path: Annotated[
        Path, typer.Argument(metavar="[PATH]", help="A model folder, a store, or any file or folder on that disk.")
    ] = Path(),
    seconds: Annotated[float, typer.Option(metavar="X", min=0.1, max=3600.0, help="Time for the disk.")] = 60.0,
    write_size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Read a temporary file of this size, written to PATH and removed after."),
    ] = None,
    json_file: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write all figures to this file.")
    ] = None,
) -> None:
    """Measure the disk at all request sizes and depths, direct and buffered; memory; and the link to a GPU.

    Reads only; the page cache of the files it reads is dropped.
    """
    from moetier.iobench import find_files, temporary_file

    path = path.expanduser()
    check_writable(json_file, "--json")
    size = None if write_size is None else parse_size(write_size, "--write-size")
    console = Console(stderr=True)
    with ExitStack() as stack:
        if size is None:
            files = find_files(path)
        else:
            with console.status(f"writing a temporary file of {format_size(size)}"):
                files = [stack.enter_context(temporary_file(path, size))]
        result = measure(files, seconds, console)
    result = {"version": JSON_VERSION, "path": str(path), **result}
    show(result)
    if json_file is not None:
        write_text(json_file, json.dumps(result, indent=2) + "\n", "--json")


def measure(files: list[Path], seconds: float, console: Console) -> dict[str, Any]:
    """All figures, as the JSON has them."""
    from moetier.iobench import DiskBench, best, measure_gpu, measure_memory, warm
    from moetier.stores.checkpoint import SEGMENT_NBYTES

    watch = CoreWatch()
    with DiskBench(files) as bench, Progress(console=console, transient=True) as progress:
        task = progress.add_task("reading the disk", total=None)
        readings = bench.run(
            seconds, lambda done, total: progress.update(task, completed=min(done, total), total=total)
        )
        nbytes, no_direct = bench.nbytes, bench.no_direct
    neighbours = watch.neighbours()
    found = best(readings)
    engine = best([reading for reading in readings if reading.setting.size == SEGMENT_NBYTES])
    with console.status("copying memory"):
        memory = measure_memory()
    with console.status("looking for a GPU"):
        gpu = measure_gpu()
    hot, unknown = warm(readings)
    if hot:
        say("warning", f"the page cache could not be dropped for {hot} buffered settings; they are not cold")
    if unknown:
        say("warning", f"whether the page cache was dropped is not known for {unknown} buffered settings")
    if neighbours >= 0.5:
        say("warning", f"other programs kept {neighbours:.1f} cores busy meanwhile; measure again on a quiet machine")
    return {
        "files": len(files),
        "bytes": nbytes,
        "seconds": seconds,
        "neighbours": neighbours,
        "disk": [_row(reading) for reading in readings],
        "no_direct": no_direct,
        "best": None if found is None else _row(found),
        "engine": None if engine is None else _row(engine),
        "memory_copy_bytes_per_second": memory,
        "gpu": gpu,
    }


def _row(reading: Reading) -> dict[str, Any]:
    setting, measured = reading.setting, bool(reading.samples)
    return {
        "size": setting.size,
        "depth": setting.depth,
        "mode": setting.mode,
        "bytes_per_second": reading.bytes_per_second if measured else None,
        "core_seconds_per_gb": reading.core_seconds_per_gb if measured else None,
        "samples": len(reading.samples),
        "cached": reading.cached if measured else None,
    }


def show(result: dict[str, Any]) -> None:
    """The tables, on standard output."""
    console = Console()
    rows = {(row["mode"], row["size"], row["depth"]): row for row in result["disk"]}
    sizes, depths = (sorted({row[name] for row in result["disk"]}) for name in ("size", "depth"))
    for mode in ("direct", "buffered"):
        if not any(row["mode"] == mode for row in result["disk"]):
            continue
        table = Table(box=None, padding=(0, 2, 0, 0), title=f"{mode}: GB/s (core-seconds per GB)", title_justify="left")
        table.add_column("request", justify="right")
        for depth in depths:
            table.add_column(f"{depth} at a time", justify="right")
        for size in sizes:
            table.add_row(format_size(size), *(_cell(rows[mode, size, depth]) for depth in depths))
        console.print(table)
        console.print()
    lines = [f"read from {result['files']} files, {format_size(result['bytes'])}, {result['seconds']:g} s"]
    if result["no_direct"]:
        lines.append(f"direct reads left out: {result['no_direct']}")
    missing = sum(row["bytes_per_second"] is None for row in result["disk"])
    if missing:
        lines.append(f"{missing} of {len(result['disk'])} settings had no time; give more --seconds")
    for name in ("best", "engine"):
        if result[name] is not None:
            lines.append(_told(name, result[name]))
    lines.append(f"memory to memory, one thread: {result['memory_copy_bytes_per_second'] / 1e9:.2f} GB/s")
    gpu = result["gpu"]
    if gpu is None:
        lines.append("GPU: none found, so its link was not measured")
    else:
        rates = (gpu["host_to_device"] / 1e9, gpu["device_to_host"] / 1e9)
        lines.append(f"{gpu['name']}, page-locked: {rates[0]:.1f} GB/s to it, {rates[1]:.1f} GB/s from it")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _told(name: str, row: dict[str, Any]) -> str:
    """A setting in words; of the engine's own, also how to ask for it."""
    text = f"{format_size(row['size'])} requests, {row['depth']} at a time, {row['mode']}: "
    text += f"{row['bytes_per_second'] / 1e9:.2f} GB/s, {row['core_seconds_per_gb']:.2f} core-seconds per GB"
    if name == "best":
        return f"best: {text}"
    return f"moetier's own: {text} (--readers {row['depth']} --io {row['mode']})"


def _cell(row: dict[str, Any]) -> str:
    if row["bytes_per_second"] is None:
        return "·"
    return f"{row['bytes_per_second'] / 1e9:.2f} ({row['core_seconds_per_gb']:.2f})"
