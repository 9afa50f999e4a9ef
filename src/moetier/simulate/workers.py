"""Where the jobs of a sweep run: in this process, or in processes of this machine. (`ray` has a cluster's.)

A worker has the traces, makes the accesses of a (batch, order) once and keeps them for the next jobs. It knows nothing
of the order of jobs, nor of files.
"""

from __future__ import annotations

import contextlib
import gc
import signal
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import NamedTuple, Protocol

from moetier.access import Access
from moetier.errors import ConfigError, MoetierError
from moetier.simulate.config import Result, SimulationConfig
from moetier.simulate.run import simulate_accesses
from moetier.trace import Trace

__all__ = ["Failure", "Group", "Here", "Outcome", "Processes", "Simulator", "Workers", "group_of"]

Group = tuple[int | None, int | None, bool]


def group_of(config: SimulationConfig) -> Group:
    """Configurations that share their accesses: batch, order, relabelling."""
    return config.batch, config.seed, config.relabel


@dataclass(frozen=True, slots=True)
class Failure:
    """A configuration that could not be simulated, and why; `details` is a traceback where it was not the user's."""

    config: SimulationConfig
    message: str
    details: str = ""


class Outcome(NamedTuple):
    """What came of a worker's job."""

    worker: int
    result: Result | Failure


class Workers(Protocol):
    """Some workers, each of which does one job at a time."""

    count: int

    def start(self, worker: int, config: SimulationConfig) -> None:
        """Give an idle worker a job."""

    def finished(self) -> list[Outcome]:
        """Wait until some jobs are done."""

    def stop(self) -> None:
        """End all workers, busy ones too."""


class Simulator:
    """One worker's half: simulate configurations over one trace, keeping the accesses of the last group.

    Raises `ConfigError` if the trace to fit on is of another shape.
    """

    def __init__(self, trace: Trace, fit: Trace | None = None):
        self._trace, self._fit = trace, fit
        self._group: Group | None = None
        self._accesses: list[Access] = []
        self._fitted: list[Access] | None = None

    def run(self, config: SimulationConfig) -> Result | Failure:
        """A result, or why there is none; never raises but for an interrupt."""
        try:
            self._prepare(config)
            return simulate_accesses(
                self._accesses,
                self._trace.layers,
                self._trace.num_experts,
                config,
                fit=self._fitted,
                tokens=self._trace.tokens,
                top_k=self._trace.top_k,
            )
        except MoetierError as error:
            return Failure(config, str(error))
        except Exception as error:  # of a third party's policy, or a bug: the other jobs go on
            return Failure(config, f"{type(error).__name__}: {error}", traceback.format_exc())

    def _prepare(self, config: SimulationConfig) -> None:
        if self._group == group_of(config):
            return
        self._group, self._accesses, self._fitted = None, [], None  # both generations at once would not fit
        trace, fit = self._trace, self._fit
        if config.seed is not None:
            trace = trace.shuffled(config.seed)
        if config.relabel:
            seed = config.seed or 0
            trace, fit = trace.relabelled(seed), None if fit is None else fit.relabelled(seed)
        with _without_gc():
            self._accesses = trace.accesses(config.batch)
            self._fitted = None if fit is None else fit.accesses(config.batch)
        self._group = group_of(config)


@contextlib.contextmanager
def _without_gc() -> Iterator[None]:
    """Millions of accesses are made and none is garbage: the collector would walk them again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Here:
    """No processes: jobs run in `finished`, one after the other."""

    count = 1

    def __init__(self, trace: Trace, fit: Trace | None = None):
        self._simulator = Simulator(trace, fit)
        self._waiting: list[SimulationConfig] = []

    def start(self, worker: int, config: SimulationConfig) -> None:
        """Keep the job for `finished`."""
        self._waiting.append(config)

    def finished(self) -> list[Outcome]:
        """Do it."""
        return [Outcome(0, self._simulator.run(self._waiting.pop()))]

    def stop(self) -> None:
        """Nothing to end."""


class Processes:
    """Processes of this machine, started afresh (spawned), each with its copy of the traces.

    A script that starts them needs the usual `if __name__ == "__main__":`. Raises `ConfigError` when one dies.
    """

    def __init__(self, count: int, trace: Trace, fit: Trace | None = None):
        self.count = count
        context = get_context("spawn")
        self._processes: list[BaseProcess] = []
        self._ends: list[Connection] = []
        try:
            for number in range(count):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs,), name=f"sweep-{number}", daemon=True)
                process.start()
                theirs.close()
                self._processes.append(process)
                self._ends.append(ours)
            for worker in range(count):
                self._send(worker, (trace, fit))
        except BaseException:
            self.stop()
            raise

    def start(self, worker: int, config: SimulationConfig) -> None:
        """Send the job."""
        self._send(worker, config)

    def _send(self, worker: int, message: object) -> None:
        try:
            self._ends[worker].send(message)
        except (BrokenPipeError, ConnectionResetError):
            raise self._died(worker) from None

    def finished(self) -> list[Outcome]:
        """Wait for answers."""
        outcomes = []
        for end in connection.wait(self._ends):
            worker = self._ends.index(end)  # type: ignore[arg-type]
            try:
                outcomes.append(Outcome(worker, self._ends[worker].recv()))
            except (EOFError, ConnectionResetError):
                raise self._died(worker) from None
        return outcomes

    def _died(self, worker: int) -> ConfigError:
        process = self._processes[worker]
        process.join(5)
        code = process.exitcode
        why = "it was killed, probably for want of memory" if code == -signal.SIGKILL else f"exit code {code}"
        return ConfigError(f"processes: a worker process died ({why}); try fewer processes, or fewer tokens")

    def stop(self) -> None:
        """Terminate them."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join()
        for end in self._ends:
            end.close()


def _serve(end: Connection) -> None:
    """A worker process: traces first, then jobs until the pipe is closed. Ctrl-C is for the parent, which ends us."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        trace, fit = end.recv()
        simulator = Simulator(trace, fit)
        while True:
            end.send(simulator.run(end.recv()))
