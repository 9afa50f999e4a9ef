"""Predictors, by name: which experts will be wanted soon. A new predictor is one new file and one line in `PREDICTORS`.

A predictor only estimates; whether a prefetch is worth its bytes is decided by `moetier.prefetch`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

from moetier.access import Access, ExpertKey

__all__ = ["PREDICTORS", "Prediction", "Predictor"]


class Prediction(NamedTuple):
    """`key` will be wanted `due` accesses from now (1: by the next access), with this probability."""

    key: ExpertKey
    probability: float
    due: int


class Predictor(Protocol):
    """Constructed as `Predictor(layers, experts, top_k, **parameters)`."""

    def observe(self, access: Access, hidden: Any = None) -> None:
        """An access was served; `hidden` is the hidden state that its router saw, [tokens, width], where known."""

    def predict(self, access: Access, distance: int = 1) -> Iterable[Prediction]:
        """After `access`: the experts of the layer `distance` accesses ahead (layers come in a cycle), likeliest first."""


PREDICTORS: dict[str, Callable[..., Predictor]] = {}
