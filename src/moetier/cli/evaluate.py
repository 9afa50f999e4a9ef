"""`moetier eval`: perplexity of a model on your texts, and what the lossy levers would change."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress
from rich.table import Table

from moetier.cli import options as o
from moetier.cli.console import Console
from moetier.cli.errors import reported, say
from moetier.cli.files import check_writable, write_text
from moetier.cli.loading import check_device, find, import_libraries, load_tokenizer, loaded, unused_on_cpu
from moetier.cli.report import home_of
from moetier.errors import ConfigError, StoreError
from moetier.levers import Levers
from moetier.plan import format_size

if TYPE_CHECKING:
    from moetier.evaluation import Outcome

REPORT_VERSION = 1

Texts = Annotated[list[str], typer.Option("--text", metavar="FILE", help="A text in UTF-8; give several.")]
Tries = Annotated[
    list[str] | None,
    typer.Option(
        "--try",
        metavar="NAME=X,…",
        help=f"A setting of the lossy levers, such as cache_prior=0.3; give several. Names: "
        f"{', '.join(Levers().to_dict())}.",
    ),
]
Json = Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write everything to this file.")]


@reported
def evaluate(
    model: o.Model,
    text: Texts,
    tries: Tries = None,
    tokens: Annotated[int, typer.Option(help="Of each text, at most.", metavar="N", min=2)] = 512,
    window: Annotated[
        int, typer.Option(help="Tokens that are run in one go; then the model starts afresh.", metavar="N", min=2)
    ] = 512,
    device_memory: o.DeviceMemory = None,
    host_memory: o.HostMemory = None,
    slots: o.Slots = None,
    policy: o.Policy = "horizon",
    admission: o.Admission = "decode-only",
    readers: o.Readers = o.READERS,
    io: o.IO = "auto",
    store: o.Store = None,
    cpu_experts: o.CPUExperts = "off",
    device: o.Device = None,
    dtype: o.Dtype = "auto",
    threads: o.Threads = None,
    split: o.SplitBy = "auto",
    revision: o.Revision = None,
    trust_remote_code: o.TrustRemoteCode = False,
    json_file: Json = None,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Measure the perplexity of texts, exactly and with lossy levers, next to tokens/s and the bytes read.

    The texts are decoded token by token, as in generation. The first row is the exact model; every row starts with an
    empty expert cache. With --cpu-experts other than off the exact row is not repeatable to the last bit.
    """
    if dtype not in o.DTYPES:
        raise ConfigError(f"--dtype {dtype}: choose one of {', '.join(o.DTYPES)}")
    settings = [_setting(said) for said in tries or []]
    check_writable(json_file, "--json")
    contents = [read_text(file) for file in text]
    console = Console(stderr=True, quiet=quiet)
    import_libraries(console, verbose, threads)
    check_device(device)
    from moetier.evaluation import evaluate as run
    from moetier.evaluation import windows_of
    from moetier.options import Options

    tiering = Options(
        device_memory=device_memory,
        host_memory=host_memory,
        slots=slots,
        policy=policy,
        admission=admission,
        prefetch="off",  # what is resident decides what a lever does, and must not depend on time
        context=window,
        readers=readers,
        io=io,  # type: ignore[arg-type]
        split=split,  # type: ignore[arg-type]
        store=store,
        cpu_experts=cpu_experts,
    )
    tiering.check()
    for message in [] if quiet else unused_on_cpu(device, tiering):
        say("warning", message)
    folder = find(model, revision, console)
    tokenizer = load_tokenizer(folder, trust_remote_code)
    windows = windows_of([tokenizer(content)["input_ids"] for content in contents], tokens, window)
    arguments: dict[str, Any] = {name: getattr(tiering, name) for name in Options.__dataclass_fields__}
    arguments |= {"device": device, "dtype": dtype} | ({"trust_remote_code": True} if trust_remote_code else {})

    plans: list[Any] = []
    homes: list[dict[str, str]] = []

    @contextmanager
    def load(levers: Levers) -> Iterator[Any]:
        with loaded(folder, Console(quiet=True), verbose, **(arguments | levers.to_dict())) as lm:
            longest = getattr(lm.config.get_text_config(), "max_position_embeddings", None)
            if not plans and longest is not None and window > longest and not quiet:
                say("warning", f"windows of {window} tokens, but the model is made for {longest}; see --window")
            plans.append(lm.moetier.plan)
            homes.append(home_of(lm))
            yield lm

    total = sum(map(len, windows)) * (1 + len(settings))
    outcomes: list[Outcome] = []
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("tokens", total=total)
        for outcome in run(load, windows, settings, lambda count: progress.advance(task, count)):
            outcomes.append(outcome)
            progress.update(task, description=f"tokens ({len(outcomes)} of {1 + len(settings)} settings done)")
    plan = plans[0]
    output = Console()
    (output if output.is_terminal else Console(width=120)).print(
        table_of(outcomes, f"{plan.slots} of {plan.workload.records} experts in the fastest tier")
    )
    if json_file is not None:
        report = {
            "version": REPORT_VERSION,
            "model": model,
            "texts": text,
            "windows": len(windows),
            "experts": plan.workload.records,
            "slots": plan.slots,
            "store": homes[0],
            "results": [outcome.to_dict() for outcome in outcomes],
        }
        write_text(json_file, json.dumps(report, indent=2) + "\n", "--json")


def _setting(text: str) -> Levers:
    try:
        return Levers.parse(text)
    except ConfigError as error:
        raise ConfigError(f"--try {text}: {error}") from None


def read_text(file: str) -> str:
    """A text file. Raises `StoreError`."""
    try:
        return Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise StoreError(f"--text {file}: not a text in UTF-8") from None
    except OSError as error:
        raise StoreError(f"--text {file}: cannot be read: {error.strerror or error}") from None


def table_of(outcomes: list[Outcome], memory: str) -> Table:
    """The runs as a table; the first is the exact one."""
    exact = outcomes[0]
    table = Table(
        title=f"{exact.predicted} predicted tokens, {memory}",
        title_justify="left",
        caption="KL: mean over tokens of KL(exact ‖ this), in nats. same top: tokens with the exact model's likeliest "
        "next token. routing: choices of the routers that were left as they were. read: from disk, per token.",
        caption_justify="left",
    )
    table.add_column("levers", overflow="fold")
    for name in ("perplexity", "KL", "same top", "routing", "dropped", "hits", "read", "tokens/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for outcome in outcomes:
        read = outcome.nbytes.get("disk→host", 0) / outcome.tokens
        table.add_row(
            str(outcome.levers),
            f"{outcome.perplexity:.3f}",
            f"{outcome.kl:.4f}",
            *(f"{100 * share:.1f} %" for share in (outcome.agreement, outcome.overlap, outcome.dropped)),
            f"{100 * outcome.hit_rate:.1f} %",
            format_size(int(read)),
            f"{outcome.tokens / outcome.seconds:.2f}",
        )
    return table
