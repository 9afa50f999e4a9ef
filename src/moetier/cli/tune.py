"""`moetier tune`: fit the weights of the `horizon` policy to recorded routing, and say what that gains."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from moetier.cli.console import Console
from moetier.cli.errors import reported
from moetier.cli.files import check_writable
from moetier.errors import ConfigError


@reported
def tune(
    traces: Annotated[
        list[str], typer.Argument(help="Trace files (Parquet), of one or several models.", metavar="TRACE…")
    ],
    output: Annotated[str, typer.Option("--output", "-o", help="Write the weights here (JSON).", metavar="FILE")],
    batch: Annotated[str, typer.Option(help="Concurrent streams to fit for, such as 1,8.", metavar="N[,N]")] = "1",
    slots: Annotated[
        str, typer.Option(help="Sizes to report hit rates at: shares of all experts.", metavar="N%[,N%]")
    ] = "20%,30%,50%",
    whole: Annotated[
        bool, typer.Option("--whole", help="Fit on every sequence; then nothing is held out to report on.")
    ] = False,
    share: Annotated[
        float, typer.Option(help="Share of the examples to fit on.", metavar="X", min=0.001, max=1.0)
    ] = 0.1,
) -> None:
    """Fit the weights of the `horizon` policy to recorded routing.

    Fits on every other sequence and reports on the sequences between: log-loss and hit rates, beside the shipped
    weights and LRU. Use the result as `--policy 'horizon(weights=FILE)'`.
    """
    check_writable(output, "--output")
    from moetier.plan import parse_slots
    from moetier.policies.horizon import WEIGHTS
    from moetier.simulate.config import SimulationConfig
    from moetier.simulate.run import simulate
    from moetier.trace.files import read_trace
    from moetier.tuning import collect, fit, log_loss

    batches = _numbers(batch)
    status, console = Console(stderr=True), Console()
    examples, held_out = [], []
    with status.status("reading") as shown:
        for path in traces:
            trace = read_trace(path)
            fitted, rest = (trace, trace.first(0)) if whole else trace.split()
            if not fitted.tokens:
                raise ConfigError(f"{path}: the trace has too few tokens to fit on")
            for streams in batches:
                shown.update(f"examples of {path}, streams: {streams}")
                examples.append(collect(fitted.accesses(streams), trace.layers, trace.num_experts, share))
            held_out.append((path, rest))
        shown.update("fitting")
        weights = fit(examples)
        weights.save(output)
        for path, trace in held_out:
            if not trace.tokens:
                continue
            for streams in batches:
                shown.update(f"held-out sequences of {path}, streams: {streams}")
                some = collect(trace.accesses(streams), trace.layers, trace.num_experts, share)
                table = Table(title=f"{path}, held out, streams: {streams}; hit rates by slots", title_justify="left")
                table.add_column("")
                for text in slots.split(","):
                    table.add_column(text.strip(), justify="right")
                table.add_column("log-loss, next", justify="right")
                table.add_column("later", justify="right")
                for name, policy, model in (
                    ("lru", "lru", None),
                    ("horizon, shipped", "horizon", WEIGHTS),
                    ("horizon, fitted", f"horizon(weights={output})", weights),
                ):
                    cells = []
                    for text in slots.split(","):
                        config = SimulationConfig(policy, parse_slots(text, trace.records), batch=streams)
                        cells.append(f"{100 * simulate(trace, config).hit_rate:.1f} %")
                    losses = ("", "") if model is None else (f"{loss:.4f}" for loss in log_loss(model, some))
                    table.add_row(name, *cells, *losses)
                console.print(table)
    console.print(f"weights written to {output}; use them as --policy 'horizon(weights={output})'")
    if whole:
        console.print("fitted on every sequence: nothing was held out to report on")


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--batch {text!r}: write numbers of streams such as 1,8") from None
    if min(numbers) < 1:
        raise ConfigError(f"--batch {text!r}: at least 1 stream is needed")
    return numbers
