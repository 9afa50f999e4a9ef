"""The settings of past steps, as far back as the expert that lags most still needs them.

An expert without tokens is caught up on later, each missed step with that step's own settings: this is where they wait.
Knows steps and settings; knows neither tensors nor which expert lags.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Any, Generic, TypeVar

from moetier.errors import ConfigError
from moetier.training.optimizers.settings import Hyper, Settings

S = TypeVar("S", bound=Settings)


class StepHistory(Generic[S]):
    """Settings of the steps `first` to `last`, equal neighbours kept as one. Steps count from 1, without gaps."""

    def __init__(self) -> None:
        self._begins: list[int] = []  # the first step of each run of equal settings
        self._settings: list[S] = []
        self.last = 0  # the newest step; 0 before the first

    @property
    def first(self) -> int:
        """The oldest step that is still known; `last` + 1 where none is."""
        return self._begins[0] if self._begins else self.last + 1

    def __len__(self) -> int:
        """Steps that are known."""
        return self.last + 1 - self.first

    @property
    def runs(self) -> int:
        """Runs of equal settings: what the history takes, in memory and in a checkpoint."""
        return len(self._begins)

    def append(self, settings: S) -> Hyper:
        """The settings of the next step; gives that step."""
        self.last += 1
        if not self._settings or self._settings[-1] != settings:
            self._begins.append(self.last)
            self._settings.append(settings)
        return Hyper(self.last, self._settings[-1])

    def missed(self, after: int, through: int | None = None) -> list[Hyper]:
        """The steps after step `after`, through `through` (the newest, if None), ascending.

        Raises `ConfigError` for steps that were pruned or have not been.
        """
        through = self.last if through is None else through
        if after >= through:
            return []
        if after + 1 < self.first or through > self.last:
            raise ConfigError(
                f"steps {after + 1} to {through} are asked for, but the history of settings holds "
                f"{self.first} to {self.last}; the checkpoint is of another run, or damaged"
            )
        run = bisect_right(self._begins, after + 1) - 1
        steps: list[Hyper] = []
        for step in range(after + 1, through + 1):
            if run + 1 < len(self._begins) and self._begins[run + 1] <= step:
                run += 1
            steps.append(Hyper(step, self._settings[run]))
        return steps

    def prune(self, oldest: int) -> None:
        """Forget the steps up to `oldest`, which every expert has made."""
        if oldest < self.first:
            return
        run = bisect_right(self._begins, oldest + 1) - 1
        if oldest >= self.last:
            self._begins, self._settings = [], []
        else:
            self._begins = [oldest + 1, *self._begins[run + 1 :]]
            self._settings = self._settings[run:]

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint's manifest. Numbers come back as they were: JSON has a float's shortest exact digits."""
        return {
            "last": self.last,
            "runs": [[begin, settings.to_json()] for begin, settings in zip(self._begins, self._settings, strict=True)],
        }

    @classmethod
    def from_json(cls, template: S, saved: Any) -> StepHistory[S]:
        """What `to_json` gave; `template` are any settings of the same kind. Raises `ConfigError` for anything else."""
        history = cls()
        try:
            last, runs = saved["last"], saved["runs"]
            begins = [int(begin) for begin, _ in runs]
            history._settings = [template.from_json(settings) for _, settings in runs]
            ascending = all(a < b for a, b in zip([0, *begins], [*begins, last + 1], strict=True))
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"the saved history of settings cannot be read: {error!r}") from error
        if not ascending:
            raise ConfigError(f"the saved history of settings is damaged: steps {begins} do not ascend to {last}")
        history.last, history._begins = last, begins
        return history
