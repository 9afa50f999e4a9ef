"""The command line: `moetier run`, `moetier plan`, `moetier demo`. One file per command.

Generated text and plans go to standard output, everything else to standard error. Exit codes:

    0    done
    1    the plan does not work (`moetier plan`), or an error of no kind below
    2    a flag or argument that cannot be used             ConfigError
    3    a memory budget below the minimum                  CapacityError
    4    files missing, damaged or unreadable               StoreError, CheckpointError
    5    not an MoE, or a family that is not supported      UnsupportedModelError
    130  interrupted

Nothing here imports torch before a command needs it: `moetier --help` is immediate.
"""

from __future__ import annotations

import typer

from moetier.cli import bench, benchio, demo, evaluate, packing, plan, predict, run, simulate, study, trace, train, tune
from moetier.cli.errors import EXIT_CODES, Program

_EXIT_CODES = "Exit codes: 0 done; 1 the plan does not work, or another error; "
_EXIT_CODES += "; ".join(f"{code} {meaning}" for _, code, meaning in EXIT_CODES) + "; 130 interrupted."

app = typer.Typer(
    name="moetier",
    cls=Program,
    help="Run Mixture-of-Experts models whose experts do not fit in fast memory.",
    epilog=_EXIT_CODES,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)
app.command("run")(run.run)
app.command("plan")(plan.plan)
app.command("demo")(demo.demo)
app.command("eval")(evaluate.evaluate)
app.command("pack")(packing.pack)
app.command("verify")(packing.verify)
app.command("unpack")(packing.unpack)
app.command("simulate")(simulate.simulate)
app.command("tune")(tune.tune)
bench.app.command("io")(benchio.io)
app.add_typer(bench.app, name="bench")
app.add_typer(predict.app, name="predict")
app.add_typer(study.app, name="study")
app.add_typer(trace.app, name="trace")
app.add_typer(train.app, name="train")


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", help="Print the version and exit."),
) -> None:
    if version:
        from moetier import __version__

        print(f"moetier {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


def main() -> None:
    """The console script."""
    app()
