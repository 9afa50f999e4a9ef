"""`moetier train`: language models (`train_lm.py`), and `moetier train synthetic`: the teacher regression.

The JSON (`--json`) is what `moetier.training.synthetic_run.train` reports, version 1.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from typer.core import TyperGroup

from moetier.cli import options as o
from moetier.cli import train_lm
from moetier.cli.console import Console
from moetier.cli.errors import reported_with
from moetier.cli.files import check_writable, write_text
from moetier.cli.loading import import_libraries
from moetier.errors import ConfigError
from moetier.plan import format_size, parse_size
from moetier.policies import check_online

if TYPE_CHECKING:
    from moetier.training.synthetic_run import Step, Trained


class Training(TyperGroup):
    """A group whose command `lm` need not be named: `moetier train MODEL TEXTS` is `moetier train lm MODEL TEXTS`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """What begins with none of the commands is for `lm`."""
        if args and args[0] not in {*self.commands, "--help", "-h"}:
            args = ["lm", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(cls=Training, no_args_is_help=True)
app.command("lm")(train_lm.language_model)

_TASK, _MODEL, _DATA, _LOOP = "Task", "Model", "Order of the data", "Training"
WORDS = (  # it keeps one checkpoint
    (
        re.compile(r"\b(go on from|use) another step\b( \(there are: .*\))?"),
        "begin a new run in another folder with --run",
    ),
)
_MEMORY, _RUN, _OUT = "Experts and memory", "Run folder", "Output"


def _number(help: str, panel: str, least: int = 1) -> Any:
    return typer.Option(metavar="N", min=least, help=help, rich_help_panel=panel)


@app.callback()
def _root() -> None:
    """Train models whose experts do not fit in memory.

    moetier train MODEL TEXTS… --out DIR trains a language model on text files; its options: moetier train lm --help.
    """


@app.command("synthetic")
@reported_with(*WORDS)
def synthetic(
    n_envs: Annotated[int, _number("Environments, each with a teacher of its own.", _TASK)] = 64,
    samples_per_env: Annotated[int, _number("Samples of each environment; an epoch is all of them.", _TASK)] = 256,
    width: Annotated[int, _number("Of inputs and of the model.", _TASK)] = 64,
    n_experts: Annotated[int, _number("Experts of every layer.", _MODEL)] = 256,
    top_k: Annotated[int, _number("Experts that a sample uses in every layer.", _MODEL)] = 2,
    layers: Annotated[int, _number("Layers, each with experts of its own.", _MODEL)] = 1,
    expert_width: Annotated[int, _number("Between the two products of an expert.", _MODEL)] = 128,
    dtype: Annotated[
        str,
        typer.Option(metavar="NAME", help="Of the weights: float32, or bfloat16 with masters.", rich_help_panel=_MODEL),
    ] = "float32",
    sampler: Annotated[
        str,
        typer.Option(metavar="NAME", help="episode (environments stay for a while) or iid.", rich_help_panel=_DATA),
    ] = "episode",
    episode_len: Annotated[int, _number("Steps in which the environments stay.", _DATA)] = 64,
    envs_per_batch: Annotated[int, _number("Environments in a batch.", _DATA)] = 4,
    sort_by_expert: Annotated[
        bool,
        typer.Option(
            "--sort-by-expert", help="Sort the samples of every --episode-len batches.", rich_help_panel=_DATA
        ),
    ] = False,
    steps: Annotated[int, _number("Steps in all, those of the run that goes on included.", _LOOP)] = 200,
    batch_size: Annotated[int, _number("Samples of a step.", _LOOP)] = 64,
    optim: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Of the experts: sgd, momentum, adamw, or another record optimizer.",
            rich_help_panel=_LOOP,
        ),
    ] = "adamw",
    lr: Annotated[float, typer.Option(metavar="X", min=0.0, help="Learning rate.", rich_help_panel=_LOOP)] = 3e-3,
    weight_decay: Annotated[
        float, typer.Option(metavar="X", min=0.0, help="As torch has it.", rich_help_panel=_LOOP)
    ] = 0.0,
    max_grad_norm: Annotated[
        float | None,
        typer.Option(metavar="X", min=0.0, help="Clip all gradients together; 0: do not.", rich_help_panel=_LOOP),
    ] = None,
    idle: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="A step for experts without tokens: dense (a gradient of zero) or skip.",
            rich_help_panel=_LOOP,
        ),
    ] = "dense",
    seed: Annotated[int, _number("Of task, model and order.", _LOOP, 0)] = 0,
    device_slots: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Experts in a first tier above the host's. Default: none.", rich_help_panel=_MEMORY
        ),
    ] = None,
    host_slots: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Experts in host memory, of all layers: slots for weights, and as many for optimizer states and for "
            "gradients. Default: a quarter of the experts.",
            rich_help_panel=_MEMORY,
        ),
    ] = None,
    host_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Host memory for all three, instead of --host-slots.", rich_help_panel=_MEMORY
        ),
    ] = None,
    policy: o.Policy = "zigzag",
    writeback: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="When changed experts are written: evict, periodic or writethrough.",
            rich_help_panel=_MEMORY,
        ),
    ] = "evict",
    prefetch: Annotated[
        bool,
        typer.Option("--prefetch/--no-prefetch", help="Load the next batches' experts ahead.", rich_help_panel=_MEMORY),
    ] = True,
    lookahead: Annotated[int, _number("Batches known ahead, beside the next.", _MEMORY, 0)] = 1,
    readers: o.Readers = o.READERS,
    run: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Folder of the run, which stays. Default: a temporary one.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --run.", rich_help_panel=_RUN)
    ] = False,
    commit_every: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Steps between checkpoints; one more at the end.", rich_help_panel=_RUN),
    ] = None,
    in_memory: Annotated[
        bool,
        typer.Option("--in-memory", help="The control: every expert a parameter of torch.", rich_help_panel=_MEMORY),
    ] = False,
    threads: o.Threads = None,
    json_file: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write everything here.", rich_help_panel=_OUT)
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no table.", rich_help_panel=_OUT)] = False,
) -> None:
    """Train a Mixture of Experts on environments with a teacher each: what locality of data does to training.

    Every environment's samples use experts of their own, so the order of the data decides how many experts a stretch of
    training needs. The loss goes down whatever the memory; with the same settings it is the same, bit for bit.
    """
    check_writable(json_file, "--json")
    check_online(policy)
    if resume and run is None:
        raise ConfigError("--resume needs --run, the folder of the run to go on with")
    if commit_every is not None and run is None:
        raise ConfigError("--commit-every needs --run: a temporary run keeps no checkpoint")
    kept = {"--run": run, "--host-slots": host_slots, "--host-memory": host_memory, "--device-slots": device_slots}
    idle_flags = [flag for flag, given in kept.items() if given is not None]
    if in_memory and idle_flags:
        raise ConfigError(
            f"--in-memory: all experts are parameters of torch, and no run is kept; leave {idle_flags[0]} out"
        )
    if host_slots is not None and host_memory is not None:
        raise ConfigError("--host-slots and --host-memory both say how many experts there is room for; give one")
    budget = None if host_memory is None else parse_size(host_memory, "--host-memory")
    console = Console(stderr=True, quiet=quiet)
    import_libraries(console, False, threads)
    from moetier.training.synthetic_run import InMemory, Settings, train

    settings = Settings(
        n_experts=n_experts,
        n_envs=n_envs,
        top_k=top_k,
        layers=layers,
        width=width,
        expert_width=expert_width,
        samples_per_env=samples_per_env,
        dtype=dtype,
        steps=steps,
        batch_size=batch_size,
        sampler=sampler,
        episode_len=episode_len,
        envs_per_batch=envs_per_batch,
        sort_by_expert=sort_by_expert,
        lookahead=lookahead,
        optim=optim,
        lr=lr,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm or None,
        idle=idle,
        seed=seed,
    )
    settings.check()
    make: Callable[[Settings], Trained]
    if in_memory:
        make = InMemory
    else:
        from moetier.training.synthetic_home import Home, Tiered

        home = Home(
            None if run is None else Path(run).expanduser(),
            resume,
            commit_every,
            device_slots,
            host_slots or max(1, n_experts * layers // 4),
            budget,
            policy,
            writeback,
            prefetch,
            readers,
        )

        def make(given: Settings) -> Trained:
            return Tiered(given, home)

    with _line(console, steps) as tell:
        report = train(settings, make, tell)
    if json_file is not None:
        write_text(json_file, json.dumps(report, indent=2) + "\n", "--json")
    show(report, Console(stderr=True, quiet=quiet, highlight=False))


@contextmanager
def _line(console: Console, steps: int) -> Iterator[Callable[[Step, Trained], None]]:
    """A line that follows the run, while a terminal looks on: loss and rates are means of the last steps."""
    columns = (
        TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
        BarColumn(bar_width=10),
        TextColumn("{task.fields[said]}"),
        TimeRemainingColumn(compact=True),
    )
    recent: deque[Step] = deque(maxlen=20)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=steps, said="")

        def tell(step: Step, trained: Trained) -> None:
            recent.append(step)
            progress.update(task, completed=step.number, said=said_of(recent))

        yield tell


def said_of(recent: Sequence[Step]) -> str:
    """Some steps in one line: means, all of them of a step."""
    count = len(recent)
    seconds, loss, read, written, hits, uses = (
        sum(getattr(step, name) for step in recent)
        for name in ("seconds", "loss", "read_bytes", "written_bytes", "hits", "uses")
    )
    said = [f"loss {loss / count:.4f}", f"{1e3 * seconds / count:.1f} ms"]
    if uses:
        said.append(f"hits {100 * hits / uses:.0f} %")
        said.append(f"read {format_size(read / count)}, written {format_size(written / count)}")
    return " · ".join(said)


def show(report: dict[str, Any], console: Console) -> None:
    """The table at the end."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, justify="right")
    table.add_column()
    loss, each, settings = report["loss"], report["per_step"], report["settings"]
    count = len(report["steps"]["loss"])
    shown = f"mean of the last {loss['shown']} steps; {loss['first']:.4f} in the first {loss['shown']}"
    table.add_row("loss", f"{loss['last']:.4f}", shown)
    table.add_row("held-out loss", f"{loss['held_out']:.4f}", "at the end, over all environments")
    table.add_row(
        "step", f"{1e3 * each['median_seconds']:.1f} ms", f"median of {count}; mean {1e3 * each['seconds']:.1f} ms"
    )
    total = settings["layers"] * settings["n_experts"]
    table.add_row("experts used", f"{each['experts']:.1f}", f"a step, of {total}; sampler {settings['sampler']}")
    for name, stats in report["caches"].items():
        for number, tier in enumerate(stats["tiers"]):
            hits, lates, misses = (sum(tier[kind]) for kind in ("hits", "lates", "misses"))
            which = f", tier {number}" if len(stats["tiers"]) > 1 else ""
            said = f"{tier['slots']} slots; {hits} hits, {lates} late, {misses} misses, {tier['write_backs']} written"
            table.add_row(f"{name}{which}", f"{100 * tier['hit_rate']:.1f} %", said)
    if report["caches"]:
        table.add_row("read", format_size(each["read_bytes"]), "a step, from the run folder and the scratch file")
        table.add_row("written", format_size(each["written_bytes"]), "a step")
    table.add_row("in all", f"{report['seconds']['train']:.2f} s", f"after {report['seconds']['make']:.2f} s of making")
    console.print(table)
