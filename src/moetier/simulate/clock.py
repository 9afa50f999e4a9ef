"""The residency core behind a virtual clock."""

from __future__ import annotations

from collections.abc import Sequence

from moetier.access import Access
from moetier.errors import ConfigError
from moetier.residency import Residency
from moetier.simulate.config import Result, SimulationConfig
from moetier.tiers import TierConfig


class Clock:
    """Not there yet."""

    name = "clock"

    def __init__(
        self,
        configs: Sequence[Sequence[TierConfig]],
        layers: int,
        experts: int,
        config: SimulationConfig,
        top_k: int,
    ):
        raise ConfigError("timing, host_slots, predictor, warm_pinning and dirty are not simulated yet")
        self.caches: list[Residency] = []

    def run(self, accesses: Sequence[Access]) -> None:
        """Serve."""

    def report(self, result: Result) -> None:
        """Fill in."""
