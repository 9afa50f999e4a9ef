"""`moetier predict evaluate` and `moetier predict train`: how well can routing be foretold?"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress
from rich.table import Table

from moetier.cli import options as o
from moetier.cli.console import Console
from moetier.cli.errors import reported
from moetier.cli.files import check_writable, write_text
from moetier.cli.loading import find, import_libraries, load_tokenizer, loaded
from moetier.errors import ConfigError, StoreError
from moetier.predictors import PREDICTORS
from moetier.registry import split_names

if TYPE_CHECKING:
    from moetier.predictors.evaluate import Evaluation

app = typer.Typer(help="Predict which experts come next: evaluate predictors, train one.", no_args_is_help=True)

TraceFile = Annotated[
    str | None,
    typer.Argument(metavar="TRACE", help="A trace file, made by `moetier trace`. Or give --model and --text."),
]
Names = Annotated[str, typer.Option("--predictor", metavar="A,B", help=f"Which ones: {', '.join(PREDICTORS)}.")]
Distances = Annotated[
    str, typer.Option("--distance", metavar="N,N", help="Layers ahead. 0 is the control of next-gate: 100 %.")
]
ModelFlag = Annotated[
    str | None, typer.Option("--model", metavar="MODEL", help="Run this model: a folder, or a hub id (owner/name).")
]
Texts = Annotated[list[str] | None, typer.Option("--text", metavar="FILE", help="A text to run; give several.")]
Json = Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write everything to this file.")]


@app.command("evaluate")
@reported
def evaluate(
    trace: TraceFile = None,
    predictor: Names = "previous-token,layer-transition,mix",
    distance: Distances = "1,2,3",
    model: ModelFlag = None,
    text: Texts = None,
    tokens: Annotated[int, typer.Option(help="Of each text, at most.", metavar="N", min=2)] = 256,
    slots: o.Slots = None,
    threads: o.Threads = None,
    trust_remote_code: o.TrustRemoteCode = False,
    per_layer: Annotated[bool, typer.Option("--per-layer", help="A row for every layer.")] = False,
    json_file: Json = None,
    quiet: o.Quiet = False,
) -> None:
    """Measure how much of what a layer needs was named before.

    The first half of the sequences (or texts) is only observed, the second half is observed and measured, one token at
    a time. Of a single one, the first half of its tokens.
    """
    names, distances = split_names(predictor), parse_distances(distance)
    if not names:
        raise ConfigError(f"--predictor: no predictor is named; choose from: {', '.join(sorted(PREDICTORS))}")
    check_writable(json_file, "--json")
    if (trace is None) == (model is None):
        raise ConfigError("give either a trace file, or --model and --text")
    if (model is None) != (not text):
        raise ConfigError("--model and --text go together")
    console = Console(stderr=True, quiet=quiet)
    if trace is not None:
        evaluation, source = _of_trace(trace, names, distances, console), trace
    else:
        assert model is not None and text is not None
        source = model
        arguments: dict[str, Any] = {"slots": slots, "context": tokens}
        arguments |= {"trust_remote_code": True} if trust_remote_code else {}
        evaluation = _of_model(model, text, tokens, names, distances, console, threads, arguments)
    rows = evaluation.results()
    output = Console()
    (output if output.is_terminal else Console(width=110)).print(table_of(rows, per_layer))
    if json_file is not None:
        report = {"version": 1, "source": source, "texts": text or [], "results": rows}
        write_text(json_file, json.dumps(report, indent=2) + "\n", "--json")


@app.command("train")
@reported
def train(
    predictor: Annotated[str, typer.Argument(metavar="NAME", help="What to train: scoutgate.")],
    trace: Annotated[str, typer.Argument(metavar="TRACE", help="A trace recorded from the model, with its tokens.")],
    model: Annotated[str, typer.Option("--model", metavar="MODEL", help="The model the trace was recorded from.")],
    output: Annotated[str, typer.Option("--output", "-o", metavar="FILE", help="The weights, as safetensors.")],
    epochs: Annotated[int, typer.Option(help="Passes over the trace.", metavar="N", min=1)] = 12,
    seed: Annotated[int, typer.Option(help="Of the first weights and the order.", metavar="N", min=0)] = 0,
    threads: o.Threads = None,
    trust_remote_code: o.TrustRemoteCode = False,
    quiet: o.Quiet = False,
) -> None:
    """Train a predictor from a recorded trace; every tenth text is held out to choose the best epoch."""
    if predictor != "scoutgate":
        raise ConfigError(f"{predictor!r} is not trained; the one that is: scoutgate")
    check_writable(output, "--output")
    console = Console(stderr=True, quiet=quiet)
    from moetier.trace.files import read_trace

    recorded = read_trace(trace)
    if recorded.token_ids is None:
        raise ConfigError(f"{trace}: does not say which tokens it is of; record it again with `moetier trace record`")
    import_libraries(console, False, threads)
    from moetier.predictors.scoutgate import save
    from moetier.predictors.scoutgate_training import train as fit

    arguments: dict[str, Any] = {"slots": 1, "context": 1, "device": "cpu"}
    arguments |= {"trust_remote_code": True} if trust_remote_code else {}
    with loaded(find(model, None, console), console, False, **arguments) as lm:
        embeddings = lm.get_input_embeddings().weight.detach().float().numpy()
    with _progress(console, "training", epochs) as advance:
        losses: list[float] = []

        def told(epoch: int, loss: float) -> None:
            losses.append(loss)
            advance(1)

        weights = fit(recorded, embeddings, epochs=epochs, seed=seed, progress=told)
    save(weights, output)
    best = min(losses)
    console.print(
        f"{output}: trained on {recorded.tokens} tokens; loss on held-out text {best:.4f} (epoch "
        f"{losses.index(best) + 1} of {epochs}). Use it as --predictor 'scoutgate(file={output})'.",
        markup=False,
        soft_wrap=True,
    )


def parse_distances(text: str) -> list[int]:
    """`1,2,3` as numbers. Raises `ConfigError`."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--distance {text}: write numbers of layers, such as 1,2,3") from None


COLUMNS = (
    ("@k", "recall_k", "of the experts a layer needs, those among the k likeliest (k: as many as it needs)"),
    ("@2k", "recall_2k", "among the 2k likeliest"),
    ("whole", "whole_2k", "layers with all of theirs among 2k"),
    ("new@2k", "fresh_recall_2k", "@2k of what the layer did not use for the token before: a cache may lack these"),
    ("precise", "sure_precision", "of the experts given a probability of 0.5 or more, those that were needed"),
    ("reach", "sure_recall", "of the experts needed, those given 0.5 or more"),
    ("error", "calibration_error", "mean distance between probability and frequency"),
)


def table_of(rows: list[dict[str, Any]], per_layer: bool) -> Table:
    """The results as a table, in percent."""
    legend = "; ".join(f"{title}: {meaning}" for title, _, meaning in COLUMNS)
    table = Table(
        title="Layers reached within the token's pass, in %" if not per_layer else "By target layer, in %",
        title_justify="left",
        caption=f"{legend}.",
        caption_justify="left",
    )
    table.add_column("predictor", overflow="fold")
    for name in ("ahead", *(["layer"] if per_layer else []), *(title for title, _, _ in COLUMNS)):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        for layer, part in enumerate(row["layers"]) if per_layer else [(None, row)]:
            values = ["–" if part[key] is None else f"{100 * part[key]:.1f}" for _, key, _ in COLUMNS]
            table.add_row(row["predictor"], str(row["distance"]), *([] if layer is None else [str(layer)]), *values)
    return table


def _of_trace(path: str, names: list[str], distances: list[int], console: Console) -> Evaluation:
    from moetier.predictors.evaluate import evaluate_trace
    from moetier.trace.files import read_trace

    trace = read_trace(path)
    with _progress(console, "tokens", trace.tokens) as advance:
        return evaluate_trace(trace, names, distances, advance)


def _of_model(
    model: str,
    files: list[str],
    tokens: int,
    names: list[str],
    distances: list[int],
    console: Console,
    threads: int | None,
    arguments: dict[str, Any],
) -> Evaluation:
    contents = [_read(file) for file in files]
    import_libraries(console, False, threads)
    from moetier.predictors.live import evaluate_model

    folder = find(model, None, console)
    tokenizer = load_tokenizer(folder, bool(arguments.get("trust_remote_code")))
    texts = [(file, tokenizer(text)["input_ids"][:tokens]) for file, text in zip(files, contents, strict=True)]
    with (
        loaded(folder, console, False, **arguments) as lm,
        _progress(console, "tokens", sum(len(ids) for _, ids in texts)) as advance,
    ):
        return evaluate_model(lm, texts, names, distances, advance)


def _read(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise StoreError(f"--text {file}: not a text in UTF-8") from None
    except OSError as error:
        raise StoreError(f"--text {file}: cannot be read: {error.strerror or error}") from None


@contextmanager
def _progress(console: Console, label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar while a terminal looks on."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(label, total=total)
        yield lambda count: progress.advance(task, count)
