"""The chance that an expert is wanted when its layer returns: what it is estimated from, and the weights of that.

Features are computed here and nowhere else, for `policies/horizon.py` and for `tuning.py` alike.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moetier.errors import ConfigError

HALF_LIVES = (2.0, 8.0, 32.0, 128.0)  # of the activity averages, in visits of the layer
FEATURES = ("activity_2", "activity_8", "activity_32", "activity_128", "frequency", "recalled", "recalled_later", "one")
LATER = 3  # visits after the next one that count as later
MEMORY = 256  # passes through the model that can be recalled
FADE = 0.85  # per layer, of what counts as the present when it is compared with the past
SHARPNESS = 14.0  # a pass that resembles the present by 0.1 more weighs exp(1.4) times as much
ENOUGH = 0.45  # resemblance from which one pass outweighs the frequency
FRESHNESS = 0.998  # what a pass weighs beside one that is one pass younger
EDGE = 1e-3  # chances are cut off here before their logit is taken


@dataclass(frozen=True, slots=True)
class HazardWeights:
    """Two logistic models over `FEATURES`, in their order.

    `next`: wanted at the next visit of its layer. `later`: wanted at a later visit, given that not at any before.
    """

    next: tuple[float, ...]
    later: tuple[float, ...]

    def save(self, path: str | PathLike[str]) -> None:
        """Write as JSON."""
        Path(path).write_text(json.dumps({"features": FEATURES, **asdict(self)}, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> HazardWeights:
        """Read what `save` wrote. Raises `ConfigError` for anything else."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            rows = [tuple(float(weight) for weight in data[name]) for name in ("next", "later")]
            fits = tuple(data["features"]) == FEATURES
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}: not a file of hazard weights ({type(error).__name__}: {error})") from error
        if not fits or any(len(row) != len(FEATURES) or not all(map(math.isfinite, row)) for row in rows):
            raise ConfigError(f"{path}: hazard weights must be {len(FEATURES)} finite numbers each, for {FEATURES}")
        return cls(*rows)


class History:
    """The routing so far, as features of every expert.

    Beside averages of its activity, an expert is known by what is recalled: a token that is routed like an earlier
    one, layer after layer, is likely to be the same in a similar place, and what followed then is likely to follow
    now. So the last `MEMORY` passes are compared with the present, and their successors are averaged, weighed by
    exp(resemblance): attention, with sets of experts as queries and keys.

    A pass ends when a layer comes that is not behind the last one. Memory: layers x experts x 2 x `MEMORY` float32
    (6 MiB for 48 x 64, 48 MiB for 48 x 512), linear in experts.
    """

    def __init__(self, layers: int, experts: int):
        self._experts = experts
        gain = [1.0 - 0.5 ** (1.0 / half_life) for half_life in HALF_LIVES]
        self._keep = np.array([*(1.0 - share for share in gain), 1.0], np.float32)[:, None]
        self._gain = np.array([*gain, 1.0], np.float32)[:, None]
        self._activity = np.zeros((layers, len(HALF_LIVES) + 1, experts), np.float32)  # averages, and the sum
        self._visits = [0] * layers
        self._share = [0.0] * layers  # of the experts that the last visit wanted
        # columns are passes; what is older than `MEMORY` passes is dropped `MEMORY` columns at a time
        self._wanted = np.zeros((layers, experts, 2 * MEMORY), np.float32)
        self._size = np.ones((layers, 2 * MEMORY), np.float32)  # experts wanted
        self._layer, self._column = 0, 0  # of the present
        self._columns = [0] * layers  # of the last visits
        # `SHARPNESS` times how much the pass of each age resembles the present; the youngest is always the last
        self._resemblance = np.zeros(MEMORY, np.float32)
        self._resemblances = np.zeros((layers, MEMORY), np.float32)  # at the last visits
        self._impact = np.full(experts, (1.0 - FADE) * SHARPNESS, np.float32)
        age = np.arange(MEMORY, 0, -1)
        self._offset = (age * math.log(FRESHNESS) - SHARPNESS * ENOUGH).astype(np.float32)
        self._weight = np.zeros(LATER + MEMORY, np.float32)  # scratch; the first ones stay zero
        self._ones = np.ones(MEMORY, np.float32)

    def observe(self, layer: int, experts: list[int]) -> None:
        """One visit of a layer, which wanted these experts."""
        if layer <= self._layer:
            self._next_pass()
        column, wanted, activity, size = self._column, self._wanted[layer], self._activity[layer], len(experts)
        chosen = np.array(experts)
        use = np.zeros(self._experts, np.float32)
        use[chosen] = 1.0
        if not self._visits[layer]:  # averages start at an even share
            activity[:-1] = size / self._experts
        activity *= self._keep
        activity += self._gain * use
        self._layer, self._columns[layer] = layer, column
        self._visits[layer] += 1
        self._share[layer] = size / self._experts
        wanted[chosen, column] = 1.0
        resemblance = self._resemblance
        if column:
            first = max(0, column - MEMORY)
            alike = self._impact[:size] @ wanted[chosen, first:column]
            alike /= np.maximum(self._size[layer, first:column], size)  # by both sizes: a prefill overlaps everything
            resemblance *= FADE
            resemblance[first - column :] += alike
        self._size[layer, column] = size
        self._resemblances[layer] = resemblance

    def features(self, layer: int) -> NDArray[np.float32]:
        """What `FEATURES` names, for every expert of a layer, as of the layer's last visit; chances are logits."""
        last, averages = self._columns[layer], len(HALF_LIVES)
        found = np.empty((len(FEATURES), self._experts), np.float32)
        found[: averages + 1] = self._activity[layer]
        frequency, recalled, recalled_later = found[averages : averages + 3]
        frequency += self._share[layer]
        frequency /= self._visits[layer] + 1
        size = min(last, MEMORY)
        if size:
            weight = self._weight[: LATER + size]  # by pass; what came next is one column on, what came later is more
            ones, successors = self._ones[:size], self._wanted[layer, :, last + 1 - size : last + 1]
            now = weight[LATER:]
            np.add(self._resemblances[layer, -size:], self._offset[-size:], out=now)
            np.exp(now, out=now)
            np.matmul(successors, now, out=recalled)
            recalled += frequency
            recalled /= float(ones @ now) + 1.0
            now = weight[2:-1] + weight[1:-2]
            now += weight[:-LATER]
            np.matmul(successors, now, out=recalled_later)
            recalled_later += frequency * LATER
            recalled_later /= float(ones @ now) + LATER  # a mean of `LATER` visits: both sums are so much larger
        else:
            recalled[:] = recalled_later[:] = frequency
        chances = found[:-1]
        np.maximum(chances, EDGE, out=chances)
        np.minimum(chances, 1.0 - EDGE, out=chances)
        chances /= 1.0 - chances
        np.log(chances, out=chances)
        found[-1] = 1.0
        return found

    def _next_pass(self) -> None:
        self._column += 1
        if self._column == 2 * MEMORY:
            self._column = MEMORY
            self._columns = [max(0, column - MEMORY) for column in self._columns]
            for columns in (self._wanted, self._size):
                columns[..., :MEMORY] = columns[..., MEMORY:]
            self._wanted[..., MEMORY:] = 0.0
            self._size[..., MEMORY:] = 1.0
