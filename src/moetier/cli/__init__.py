"""The command line: `moetier run`, `moetier plan`, `moetier demo`. One file per command.

Text goes to standard output, everything else to standard error. Exit codes:

    0   done
    1   the plan says that the model cannot run with this budget
    2   a flag or argument that cannot be used
    3   a memory budget below the minimum
    4   files: a checkpoint that is missing, damaged or unreadable
    5   a model that cannot be run: not an MoE, or a family that is not supported
    130 interrupted
"""

from __future__ import annotations

import typer

from moetier.cli import demo, plan, run
from moetier.cli.errors import EXIT_CODES

_EPILOG = "Exit codes: 0 done, 1 the plan does not work, " + ", ".join(
    f"{code} {meaning}" for _, code, meaning in EXIT_CODES
)

app = typer.Typer(
    name="moetier",
    help="Run Mixture-of-Experts models whose experts do not fit in fast memory.",
    epilog=_EPILOG + ", 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("run")(run.run)
app.command("plan")(plan.plan)
app.command("demo")(demo.demo)


@app.callback(invoke_without_command=True)
def _root(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        from moetier import __version__

        print(f"moetier {__version__}")
        raise typer.Exit


def main() -> None:
    """The console script."""
    app()
