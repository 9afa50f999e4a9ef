"""`moetier study`: experiments of the field, reproducible by one command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from moetier.cli.console import Console
from moetier.cli.errors import reported
from moetier.cli.files import check_writable, write_text

app = typer.Typer(help="Reproduce a study of the field.", no_args_is_help=True)

ROUTING = Path(__file__).parent.parent / "demo_model" / "routing.parquet"


@app.callback()
def _root() -> None:
    """Keep `moetier study NAME` a group, whatever the number of studies."""


@app.command("ebco")
@reported
def ebco(
    trace: Annotated[
        Path | None,
        typer.Argument(help="A recorded trace. Default: the demo model's, on held-out text.", metavar="TRACE"),
    ] = None,
    scale: Annotated[
        float, typer.Option(help="Tokens of the synthetic traces, times this.", metavar="X", min=0.05, max=100.0)
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the synthetic traces.", metavar="N", min=0)] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the findings here.", metavar="FILE")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write them as Markdown here.", metavar="FILE")] = None,
) -> None:
    """Is evicting by co-occurrence (EBCO) worth it, and when is no policy worth anything?

    Redoes four findings on real routing and on synthetic routing with the shape of Mixtral and of DeepSeek-V3.
    """
    for path, flag in ((json_file, "--json"), (markdown, "--markdown")):
        check_writable(None if path is None else str(path), flag)
    from moetier.study import ebco_study, to_markdown
    from moetier.trace.files import read_trace

    status = Console(stderr=True)
    real = read_trace(trace or ROUTING)
    with status.status("simulating") as shown:
        findings = ebco_study(real, scale=scale, seed=seed, progress=lambda message: shown.update(message))
    console = Console()
    for number, finding in enumerate(findings, 1):
        console.print(f"\n[bold]{number}. {finding.question}[/bold]")
        for table in finding.tables:
            shown_table = Table(title=table.title, title_justify="left")
            for index, column in enumerate(table.columns):
                shown_table.add_column(column, justify="left" if index == 0 else "right")
            for row in table.rows:
                shown_table.add_row(*row)
            console.print(shown_table)
        for words in finding.words:
            console.print(words)
    if json_file is not None:
        write_text(json_file, json.dumps([finding.to_dict() for finding in findings], indent=1) + "\n", "--json")
    if markdown is not None:
        write_text(markdown, to_markdown(findings), "--markdown")
