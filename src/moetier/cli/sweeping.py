"""What `moetier simulate` runs: a plan for every trace, and the sweeps over them under one progress bar."""

from __future__ import annotations

from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from moetier.cli.console import Console
from moetier.cli.errors import say
from moetier.cli.grid import Grid
from moetier.errors import ConfigError
from moetier.policies import find_policy, parse_policy
from moetier.simulate.config import Result, SimulationConfig
from moetier.simulate.journal import fingerprint
from moetier.simulate.summary import TraceSummary, panels
from moetier.simulate.sweep import Failure, WorkersFactory, name_of, sweep
from moetier.trace import Trace


class Plan:
    """One trace and what is to be simulated over it."""

    def __init__(self, name: str, trace: Trace, fit: Trace | None, fit_words: str, configs: list[SimulationConfig]):
        self.name, self.trace, self.fit, self.fit_words, self.configs = name, trace, fit, fit_words, configs


def load(path: Path, limit: int | None) -> Trace:
    """A trace, or its first tokens. Raises `ConfigError` for one without any."""
    from moetier.trace.files import read_trace

    trace = read_trace(path)
    trace = trace if limit is None else trace.first(limit)
    if not trace.tokens:
        raise ConfigError(f"{path}: the trace has no tokens")
    return trace


def plan_for(path: Path, trace: Trace, other: Trace | None, fit: Path | None, split: bool, grid: Grid) -> Plan:
    """The grid over a trace. Policies that are fitted learn from `other` (of the file `fit`), or from half of it."""
    words = "nothing was fitted on a trace beforehand"
    if split:
        other, trace = trace.split()
        words = (
            f"fitted on every other sequence of {path.name} ({other.tokens:,} tokens), reported on the others "
            f"({trace.tokens:,} tokens)"
        )
        if not (other.tokens and trace.tokens):
            raise ConfigError(f"--fit-split: {path} is too short to be split")
    elif other is not None:
        words = f"fitted on {fit} ({other.tokens:,} tokens)"
        if fingerprint(other) == fingerprint(trace):
            say(
                "warning", f"--fit {fit}: fitted and reported on the same routing; use --fit-split for an honest number"
            )
            words += ", the very routing that is reported on: not held out"
    learners = [name for name in grid.policies() if _learns(name)]
    if learners:
        words = f"{', '.join(learners)}: {words}"
    constants = "; horizon uses the constants that moetier ships" if "horizon" in grid.policies() else ""
    configs = grid.configs(trace, fitted=other is not None)
    return Plan(path.name, trace, other if learners else None, f"{words}{constants}.", configs)


def _learns(policy: str) -> bool:
    try:
        return hasattr(find_policy(parse_policy(policy)[0]), "fit")
    except ConfigError:  # told, with the flag's name, when the configurations are made
        return False


def run(
    plans: list[Plan],
    limit: int | None,
    executor: WorkersFactory | None,
    jobs: int | None,
    resume: Path | None,
    quiet: bool,
) -> list[TraceSummary]:
    """Sweep every trace, under one progress bar."""
    console = Console(stderr=True, quiet=quiet)
    columns = (
        TextColumn("simulating"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left:"),
        TimeRemainingColumn(), TextColumn("{task.description}"),
    )  # fmt: skip
    summaries = []
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=sum(len(plan.configs) for plan in plans))

        def done(config: SimulationConfig) -> None:
            progress.update(task, advance=1, description=name_of(config).replace("[", "\\["))

        for plan in plans:
            failures: list[Failure] = []

            def failed(failure: Failure, failures: list[Failure] = failures) -> None:
                failures.append(failure)
                done(failure.config)
                say("error", f"{name_of(failure.config)}: {failure.message}")

            def finished(result: Result) -> None:
                done(result.config)

            try:
                results = sweep(
                    plan.trace, plan.configs, plan.fit, jobs, resume, finished, on_failure=failed, executor=executor
                )
            except KeyboardInterrupt:
                if resume is not None:
                    say("note", f"what was finished is in {resume}; the same command goes on from there")
                raise
            summaries.append(
                TraceSummary(
                    plan.name,
                    plan.trace,
                    fingerprint(plan.trace),
                    panels(results, plan.trace),
                    plan.fit_words,
                    failures,
                    limit,
                )
            )
    return summaries
