"""`moetier pack`, `verify` and `unpack`: make a packed store, check it, and make the checkpoint again from it.

What was done goes to standard output, progress to standard error. Each damage that `verify` finds is a line on standard
output, and its exit code is 4 then.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from moetier.cli import options as o
from moetier.cli.console import Console
from moetier.cli.errors import reported, say
from moetier.cli.loading import find, import_libraries
from moetier.errors import ConfigError, StoreError
from moetier.plan import format_size

if TYPE_CHECKING:
    from moetier.loading import CheckedFolder
    from moetier.packing import Checkpoint

_Store = Annotated[str, typer.Argument(help="The folder of a packed store.", metavar="STORE")]


@reported
def pack(
    model: o.Model,
    out: Annotated[
        str | None,
        typer.Argument(
            help="The folder to make. Default: MODEL.moetier beside the model's folder, where it is found by itself.",
            metavar="OUT",
        ),
    ] = None,
    dtype: o.Dtype = "auto",
    profile: Annotated[
        str | None,
        typer.Option(help="Lay out together the experts that this saved profile says are used most.", metavar="FILE"),
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Throw away the store, or unfinished pack, that OUT holds.")
    ] = False,
    revision: o.Revision = None,
    trust_remote_code: o.TrustRemoteCode = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Make a packed store: each expert one contiguous record that is read straight into its slot.

    An interrupted pack goes on when the same command runs again. The store works without MODEL: give it as the model,
    or make the original files again with `moetier unpack`.
    """
    if dtype not in o.DTYPES:
        raise ConfigError(f"--dtype {dtype}: choose one of {', '.join(o.DTYPES)}")
    console = Console(stderr=True, quiet=quiet)
    import_libraries(console, verbose, None)
    from moetier.packing import pack as make
    from moetier.pinning import load_profile
    from moetier.stores.opening import beside

    folder = find(model, revision, console)
    if out is None and not Path(model).expanduser().is_dir():
        raise ConfigError(f"{model}: comes from the hub; give OUT, the folder for its store")
    checkpoint = _map(folder, dtype, trust_remote_code, verbose, console)
    counts = [len(m.recipes) for m in checkpoint.maps]
    known = load_profile(profile, len(counts), max(counts), checkpoint.shards.fingerprint()) if profile else None
    target = beside(folder.path) if out is None else Path(out).expanduser()
    begin = time.perf_counter()
    with _bar(console, "packing") as progress:
        packed = make(checkpoint, target, profile=known, again=replace, progress=progress)
    index = packed.index
    nbytes = sum(size for _, size in index.files)
    if packed.was_there:
        print(f"{target}: holds this store already ({sum(counts)} experts, {format_size(nbytes)})")
    else:
        went_on = f"; {format_size(packed.resumed_nbytes)} were there already" if packed.resumed_nbytes else ""
        print(
            f"{target}: {sum(counts)} experts in {len(counts)} layers, {format_size(nbytes)}, in "
            f"{time.perf_counter() - begin:.1f} s{went_on}"
        )
    if index.lossy and not quiet:
        say("warning", f"the checkpoint cannot be made again from this store: {index.lossy}; keep {folder}")


@reported
def verify(
    store: Annotated[
        str, typer.Argument(help="The folder of a packed store, or of a run (--out of moetier train).", metavar="STORE")
    ],
    model: Annotated[
        str | None,
        typer.Argument(help="Compare the records with this checkpoint too.", metavar="MODEL"),
    ] = None,
    trust_remote_code: o.TrustRemoteCode = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Read a whole packed store, or a training run, and compare it with its checksums; names every damaged record."""
    console = Console(stderr=True, quiet=quiet)
    import_libraries(console, verbose, None)
    from moetier.stores.runfolder import RunFolder

    inside = Path(store, "run").expanduser()
    if RunFolder.exists(inside) and not RunFolder.exists(inside.parent):
        store = str(Path(store, "run"))  # what was named is --out of moetier train
    if RunFolder.exists(Path(store).expanduser()):
        if model is not None:
            raise ConfigError(
                f"MODEL: {store} is a training run, whose experts differ from a checkpoint's; leave it out"
            )
        _verify_run(store, console)
        return
    from moetier.packing.verify import total_nbytes
    from moetier.packing.verify import verify as examine
    from moetier.stores.checkpoint import CheckpointStore
    from moetier.stores.packed_index import PackedIndex

    index = PackedIndex.load(Path(store).expanduser())
    against = None
    if model is not None:
        folder = find(model, None, console)
        checkpoint = _map(folder, index.dtype, trust_remote_code, verbose, console)
        if [m.layout for m in checkpoint.maps] != list(index.layouts):
            raise StoreError(f"{store}: its records are not those of {model}: other shapes or dtypes")
        against = CheckpointStore(
            checkpoint.shards, [m.layout for m in checkpoint.maps], [m.recipes for m in checkpoint.maps]
        )
    found = 0
    try:
        with _bar(console, "verifying") as progress:
            for damage in examine(index, against, progress=progress):
                found += 1
                console.file.flush()
                print(damage, flush=True)
    finally:
        if against is not None:
            against.close()
    if found:
        raise StoreError(
            f"{store}: {found} damaged; pack the model again (moetier pack MODEL {store} --replace), or restore a copy"
        )
    same = "" if model is None else f", and the same as in {model}"
    print(f"{store}: whole: {len(index.placed())} experts, {format_size(total_nbytes(index))} read{same}")


def _verify_run(folder: str, console: Console) -> None:
    from moetier.stores.runfolder import RunFolder

    found, read = 0, 0
    with RunFolder.open(Path(folder).expanduser(), write=False) as run, _bar(console, "verifying") as progress:

        def advance(done: int, total: int) -> None:
            nonlocal read
            read = done
            progress(done, total)

        for damage in run.verify(progress=advance):
            found += 1
            console.file.flush()
            print(damage, flush=True)
        steps = ", ".join(map(str, run.steps())) or "none yet"
    if found:
        raise StoreError(f"{folder}: {found} damaged; go on from a step that is not named, or restore a copy")
    print(f"{folder}: whole: steps {steps}; {format_size(read)} of experts read")


@reported
def unpack(
    store: _Store,
    out: Annotated[str, typer.Argument(help="A new or empty folder for the checkpoint.", metavar="OUT")],
    quiet: o.Quiet = False,
) -> None:
    """Make the checkpoint again from which a store was packed: the same files, byte for byte."""
    console = Console(stderr=True, quiet=quiet)
    import_libraries(console, False, None)
    from moetier.packing.unpack import unpack as restore
    from moetier.stores.packed_index import PackedIndex

    index = PackedIndex.load(Path(store).expanduser())
    with _bar(console, "unpacking") as progress:
        files = restore(index, Path(out).expanduser(), progress=progress)
    nbytes = sum(path.stat().st_size for path in files)
    print(f"{out}: {len(files)} files, {format_size(nbytes)}, as they were packed")


def _map(folder: CheckedFolder, dtype: str, trust_remote_code: bool, verbose: bool, console: Console) -> Checkpoint:
    from moetier.packing import Checkpoint

    extra: dict[str, Any] = {"trust_remote_code": True} if trust_remote_code else {}
    with console.status("mapping experts"), warnings.catch_warnings():
        if not verbose:
            warnings.simplefilter("ignore")
        return Checkpoint.open(folder, dtype, **extra)


@contextmanager
def _bar(console: Console, label: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar over bytes; what it gives is told of those done and of all."""
    columns = (TextColumn(label), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    silent = console.quiet or not console.is_terminal
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=silent) as progress:
        task = progress.add_task(label, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
