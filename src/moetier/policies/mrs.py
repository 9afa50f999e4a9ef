"""MRS, minus recent score: evict the lowest average of router scores (HybriMoE, arXiv 2504.05897)."""

from __future__ import annotations

from collections.abc import Iterator

from moetier.access import Access, ExpertKey
from moetier.policies.decay import Decayed
from moetier.policies.parameters import open_share
from moetier.policies.ranking import Ranked


class MRS(Ranked):
    """S <- alpha s + (1 - alpha) S at every visit of the layer; lowest first. `alpha` is the weight of what is new.

    s is the expert's share of the access's gate mass; where that is unknown, its share of the tokens routed (with one
    token, 1/k). Experts that are not used decay. The method adds the scores of the router's top p = 2k; a runtime
    knows those of the k that it selected, so exactly these are added.
    """

    def __init__(self, layers: int, experts: int, slots: int, alpha: float = 0.5):
        super().__init__(layers, experts, slots)
        self._alpha = open_share("alpha", alpha)
        self._average = Decayed(layers, experts, 1.0 - alpha)

    def on_access(self, access: Access) -> None:
        """One visit of the layer."""
        keys, values, base = access.keys, self._average.values, access.layer * self._experts
        scores = access.mass or access.tokens or (1,) * len(keys)
        unit = self._alpha * self._average.visit(access.layer) / (sum(scores) or 1.0)
        for key, score in zip(keys, scores, strict=True):
            values[base + key[1]] += unit * score

    def victims(self, access: Access) -> Iterator[ExpertKey]:
        """Lowest average first."""
        ids = self._residents.ids()
        scores = self._average.view.take(ids)
        scores *= self._average.scales.take(self._layer_of.take(ids))
        return self._residents.ascending(scores)
