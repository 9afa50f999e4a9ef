"""Routers of a model in training that favour the experts kept in memory, and what that costs.

The rules are those of the lossy levers (`moetier.routing`), with one difference that training needs: a choice depends
on the router's scores and on what changes only when the optimizer steps, which is what experts are kept and how wide
scores range. So the recomputation of a forward under gradient checkpointing chooses what the forward chose, whatever
has moved meanwhile; a run that goes on from a checkpoint chooses what it would have chosen; and no choice depends on
time. Gate weights are the router's own for the experts it is told to choose, and gradients flow through them as ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from moetier.access import ExpertKey
from moetier.cache import ExpertCache
from moetier.errors import ConfigError, UnsupportedModelError
from moetier.interception import Intercepted, Scale
from moetier.levers import Levers
from moetier.routing import choose_again, logits_of, on_host, score_range, shares_of
from moetier.training.balance import Tally
from moetier.training.kept import KeptExperts, quota_of

__all__ = ["CacheAwareRouting"]


class CacheAwareRouting:
    """The levers at work in a model that is trained, in every forward in training mode (`model.train()`).

    `weights` is the cache of the experts' weights, `counts` are the experts of each layer, a token uses `top_k`. Raises
    `UnsupportedModelError`, naming the family, if its routers cannot choose again; `ConfigError` for settings that do
    not fit the model, or where there is no slot to keep an expert in.
    """

    def __init__(self, model: Any, levers: Levers, weights: ExpertCache, counts: Sequence[int], top_k: int):
        levers.check()
        slots = weights.core.configs[0].slots  # where the model computes: on a GPU, of its memory
        if slots < 2:
            raise ConfigError(f"{levers}: experts can be kept in at most half of the slots, and there is 1; give more")
        self.levers, self.kept = levers, KeptExperts(counts, quota_of(slots, counts))
        self.tally = Tally.empty(counts)
        self._model, self._weights, self._slots, self._records = model, weights, slots, sum(counts)
        self._keep = [levers.fit(count, top_k) for count in counts]
        self._pinned: set[ExpertKey] = set()
        self._range = [0.0] * len(counts)  # mean of all tokens, as of the last step
        self._sums = [[0.0, 0] for _ in counts]  # of ranges, and of tokens, this step included
        self._routed = False  # something, since the last step
        self._intercepted = Intercepted(model, self._choose)

    def close(self) -> None:
        """Leave the routers as they were."""
        self._intercepted.close()

    def step(self) -> None:
        """The optimizer is about to step: keep other experts from now on.

        Raises `ConfigError` if no router was asked since the last step.
        """
        if not self._routed:
            raise ConfigError(
                f"{self.levers}: no forward in training mode since the last step, so routing was not changed; call "
                "model.train() before training, or leave the lever out"
            )
        self._routed = False
        self._range = [total / seen if seen else 0.0 for total, seen in self._sums]
        self.kept.turn()
        self._pin()

    def report(self) -> dict[str, Any]:
        """The settings; how many experts are kept; and `Tally.summary` of the forwards of this process."""
        return {
            "levers": str(self.levers),
            **self.levers.to_dict(),
            "kept": len(self.kept.keys()),
            **self.tally.summary(),
        }

    def save(self) -> dict[str, Any]:
        """All that choices depend on, for a checkpoint."""
        return {
            "levers": self.levers.to_dict(),
            "kept": self.kept.to_json(),
            "range": list(self._range),
            "sums": [list(sums) for sums in self._sums],
            "routed": self._routed,
        }

    def load(self, saved: dict[str, Any]) -> None:
        """Go on from what `save` gave. With fewer slots than before, not all that is kept may be pinned."""
        self.kept.load(saved["kept"])
        self._range = [float(value) for value in saved["range"]]
        self._sums = [[float(total), int(seen)] for total, seen in saved["sums"]]
        self._routed = bool(saved["routed"])
        self._pin()

    def _pin(self) -> None:
        """Pin what is kept, as far as pins may go, and load it; where everything has a slot, nothing needs to be."""
        keep = set() if self._slots >= self._records else set(self.kept.keys()[: self._slots // 2])
        self._weights.pin(sorted(keep - self._pinned), instead_of=sorted(self._pinned - keep))
        self._weights.prefetch(sorted(keep - self._pinned), displace=True)
        self._pinned = keep

    def _choose(self, layer: int, ranked: torch.Tensor, own: torch.Tensor, scale: Scale) -> torch.Tensor | None:
        """What the router is to choose in place of `own` [T, K], having ranked all experts [T, E]; None: its own."""
        if not self._model.training:
            return None
        if torch.compiler.is_compiling():
            raise UnsupportedModelError(f"{self.levers}: routers that choose again cannot be compiled; leave it out")
        chosen, scores = on_host(own, ranked)
        z = logits_of(scores, chosen, scale)
        bonus = self.levers.cache_prior * self._range[layer]
        mask = self.kept.mask(layer)
        choice, new = choose_again(self.levers, z, chosen, mask, self._keep[layer], bonus, scale)
        if torch._C._current_graph_task_id() == -1:  # in a backward it is a forward again, which was counted
            self._count(layer, z, chosen, choice, new, scale)
        return torch.from_numpy(choice).to(own) if new.any() else None

    def _count(self, layer: int, z: Any, own: Any, choice: Any, new: Any, scale: Scale) -> None:
        self._routed = True
        sums = self._sums[layer]
        sums[0] += float(score_range(z).sum(dtype=np.float64))
        sums[1] += len(z)
        self.kept.wanted(layer, own)
        self.tally.add(layer, own, choice, new, shares_of(z, scale))
