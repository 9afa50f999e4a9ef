"""Many configurations over one trace: in parallel, in a good order, resumable.

Knows nothing of what is in a result. Where the jobs run is `workers`' (or `ray`'s) affair, the file is `journal`'s.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence

from moetier.errors import ConfigError, MoetierError
from moetier.policies import parse_policy
from moetier.simulate.config import Result, SimulationConfig
from moetier.simulate.journal import Journal, fingerprint, job_key
from moetier.simulate.workers import Failure, Group, Here, Processes, Workers, group_of
from moetier.trace import Trace

__all__ = ["Failure", "SweepError", "WorkersFactory", "name_of", "sweep"]

WorkersFactory = Callable[[Trace, Trace | None, int], Workers]  # trace, trace to fit on, number of jobs


class SweepError(MoetierError):
    """Some configurations failed; `failures` says which and why, `results` are those of the others."""

    def __init__(self, failures: Sequence[Failure], results: Sequence[Result]):
        self.failures, self.results = list(failures), list(results)
        first = f"{name_of(failures[0].config)}: {failures[0].message}"
        more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
        super().__init__(f"{len(failures)} of {len(failures) + len(results)} simulations failed: {first}{more}")


def name_of(config: SimulationConfig) -> str:
    """What a person calls a configuration: `lru, 77 slots, scope global, batch 4, seed 0`."""
    parts = [config.policy, f"{config.slots} slots", f"scope {config.scope}"]
    parts += [f"batch {config.batch}"] if config.batch is not None else []
    parts += [f"seed {config.seed}"] if config.seed is not None else []
    return ", ".join(parts)


def sweep(
    trace: Trace | str | os.PathLike[str],
    configs: Sequence[SimulationConfig],
    fit: Trace | None = None,
    processes: int | None = None,
    resume: str | os.PathLike[str] | None = None,
    on_result: Callable[[Result], None] | None = None,
    on_failure: Callable[[Failure], None] | None = None,
    executor: WorkersFactory | None = None,
) -> list[Result]:
    """Simulate every configuration over a trace (or trace file); results in the order of `configs`.

    `processes`: how many at a time; by default one per CPU this process may use, and 1 means no other process. With
    `resume`, a JSONL file, results are kept as they come and found again by a later call. `executor` makes workers of
    another kind. `on_result` hears of each result as it comes, found ones too.

    A failing configuration does not stop the others. It is left out of the list if `on_failure` is given; else
    `SweepError` is raised at the end, with the others' results. Raises `ConfigError` for an unusable trace or file.
    """
    if processes is not None and processes < 1:
        raise ConfigError(f"processes: at least 1 is needed, got {processes}")
    if not isinstance(trace, Trace):
        from moetier.trace.files import read_trace

        trace = read_trace(trace)
    if fit is not None and (fit.layers, fit.num_experts) != (trace.layers, trace.num_experts):
        raise ConfigError(
            f"the trace to fit on has {fit.layers} layers of {fit.num_experts} experts, the other "
            f"{trace.layers} of {trace.num_experts}; both must come from one model"
        )
    traces = fingerprint(trace) + ("" if fit is None else fingerprint(fit))
    keys = {config: job_key(config, traces) for config in configs}
    failures: dict[str, Failure] = {}
    with contextlib.ExitStack() as stack:
        journal = None if resume is None else stack.enter_context(Journal(resume))
        found = {} if journal is None else journal.results
        done = {keys[config]: found[keys[config]] for config in keys if keys[config] in found}
        for result in done.values():
            if on_result is not None:
                on_result(result)
        todo = [config for config in keys if keys[config] not in done]
        if todo:
            queue = Queue(todo, list(found.values()), trace)
            workers = _workers(trace, fit, len(todo), processes, executor)
            stack.callback(workers.stop)
            for outcome in _outcomes(workers, queue):
                if isinstance(outcome, Failure):
                    failures[keys[outcome.config]] = outcome
                    if on_failure is not None:
                        on_failure(outcome)
                    continue
                done[keys[outcome.config]] = outcome
                if journal is not None:
                    journal.add(keys[outcome.config], outcome)
                if on_result is not None:
                    on_result(outcome)
    results = [done[keys[config]] for config in configs if keys[config] in done]
    if failures and on_failure is None:
        raise SweepError(list(failures.values()), results)
    return results


def _workers(
    trace: Trace, fit: Trace | None, jobs: int, processes: int | None, executor: WorkersFactory | None
) -> Workers:
    if executor is not None:
        return executor(trace, fit, jobs)
    count = min(jobs, processes or len(os.sched_getaffinity(0)))
    return Here(trace, fit) if count == 1 else Processes(count, trace, fit)


def _outcomes(workers: Workers, queue: Queue) -> Iterator[Result | Failure]:
    """Keep every worker busy; yields what comes back."""
    idle, busy = list(range(workers.count)), 0
    while queue or busy:
        while idle and queue:
            worker = idle.pop()
            workers.start(worker, queue.take(worker))
            busy += 1
        for worker, outcome in workers.finished():
            busy -= 1
            idle.append(worker)
            if isinstance(outcome, Result):
                queue.learn(outcome)
            yield outcome


class Queue:
    """Jobs in a good order: a worker stays with accesses that it has; of those, the longest job first.

    How long a job takes is known from the policy's finished ones; policies of which nothing is known come first.
    """

    def __init__(self, jobs: Sequence[SimulationConfig], known: Sequence[Result], trace: Trace):
        self._groups: dict[Group, list[SimulationConfig]] = {}
        self._at: dict[int, Group] = {}
        self._pace: dict[str, float] = {}
        self._records = trace.records
        for job in jobs:
            self._groups.setdefault(group_of(job), []).append(job)
        for result in known:
            self.learn(result)

    def __bool__(self) -> bool:
        return bool(self._groups)

    def learn(self, result: Result) -> None:
        """Seconds per miss-weighted access of the policy."""
        self._pace[_kind(result.config)] = result.wall_seconds / max(1e-9, self._weight(result.config))

    def take(self, worker: int) -> SimulationConfig:
        """The next job of a worker."""
        group = self._at.get(worker)
        if group not in self._groups:
            busy = list(self._at.values())  # a group that nobody has yet, or else the one with most left
            group = max(self._groups, key=lambda name: (-busy.count(name), len(self._groups[name])))
        jobs = self._groups[group]
        job = max(jobs, key=self._cost)
        jobs.remove(job)
        if not jobs:
            del self._groups[group]
        self._at[worker] = group
        return job

    def _cost(self, job: SimulationConfig) -> tuple[bool, float]:
        pace = self._pace.get(_kind(job))
        return pace is None, self._weight(job) * (pace or 1.0)

    def _weight(self, job: SimulationConfig) -> float:
        """Misses cost more than hits, and fewer slots mean more of them."""
        return 1.5 - min(1.0, job.slots / self._records)


def _kind(config: SimulationConfig) -> str:
    """Jobs of like pace."""
    with contextlib.suppress(ConfigError):
        return f"{parse_policy(config.policy)[0]} {config.batch} {config.scope} {config.semantics}"
    return config.policy
