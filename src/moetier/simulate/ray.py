"""The workers of a sweep on a Ray cluster: one actor per CPU, the traces in Ray's object store. Extra `ray`.

    results = sweep(trace, configs, executor=ray_workers("auto"))

The nodes need moetier of the same version (and any third party's policy) in their Python.
"""

from __future__ import annotations

import os
from typing import Any

from moetier.errors import ConfigError
from moetier.simulate.config import SimulationConfig
from moetier.simulate.sweep import WorkersFactory
from moetier.simulate.workers import Failure, Outcome, Simulator, Workers
from moetier.trace import Trace

__all__ = ["RayWorkers", "ray_workers"]


def ray_workers(address: str, processes: int | None = None) -> WorkersFactory:
    """For `sweep(executor=...)`. `address` as Ray takes it: `auto`, `host:6379`, `ray://host:10001`, or `local`, which
    starts a cluster on this machine for the sweep. `processes` limits the actors; else there is one per CPU.

    Raises `ConfigError` if Ray is not installed.
    """
    ray = _ray()

    def make(trace: Trace, fit: Trace | None, jobs: int) -> Workers:
        return RayWorkers(ray, address, processes, trace, fit, jobs)

    return make


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise ConfigError("ray: Ray is not installed; install it with: pip install 'moetier[ray]'") from None
    return ray


class RayWorkers:
    """Actors on a cluster. Raises `ConfigError` if the cluster cannot be reached, or loses an actor."""

    def __init__(
        self, ray: Any, address: str, processes: int | None, trace: Trace, fit: Trace | None, jobs: int
    ) -> None:
        self._ray = ray
        self._owned = not ray.is_initialized()  # else the caller's connection is used and left
        if self._owned:
            if address == "local":
                os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster of ours reports to nobody
            try:
                ray.init(address=address, num_cpus=processes if address == "local" else None, log_to_driver=False)
            except (ConnectionError, ValueError, RuntimeError) as error:
                reason = " ".join(str(error).split())[:200]
                raise ConfigError(f"ray: no cluster at {address!r}: {reason}") from None
        cpus = int(ray.cluster_resources().get("CPU", 1))
        self.count = max(1, min(jobs, processes or cpus))
        if self.count > cpus:
            self.stop()
            raise ConfigError(f"processes: the cluster at {address!r} has {cpus} CPUs, {self.count} were asked for")
        shared = (ray.put(trace), ray.put(fit))  # once, not once per actor
        kind = ray.remote(num_cpus=1)(Simulator)
        self._actors = [kind.remote(*shared) for _ in range(self.count)]
        self._jobs: dict[Any, tuple[int, SimulationConfig]] = {}

    def start(self, worker: int, config: SimulationConfig) -> None:
        """Call the actor."""
        self._jobs[self._actors[worker].run.remote(config)] = worker, config

    def finished(self) -> list[Outcome]:
        """Wait for answers."""
        ready, _ = self._ray.wait(list(self._jobs), num_returns=1)
        outcomes = []
        for reference in ready:
            worker, config = self._jobs.pop(reference)
            try:
                outcomes.append(Outcome(worker, self._ray.get(reference)))
            except self._ray.exceptions.RayActorError as error:
                raise ConfigError(f"ray: a worker of the cluster died: {str(error).splitlines()[0]}") from None
            except self._ray.exceptions.RayTaskError as error:  # what the node could not even read
                outcomes.append(Outcome(worker, Failure(config, f"on the cluster: {error.cause!r}", str(error))))
        return outcomes

    def stop(self) -> None:
        """End the actors, and the connection if it is ours."""
        for actor in getattr(self, "_actors", ()):
            self._ray.kill(actor)
        if self._owned:
            self._ray.shutdown()
