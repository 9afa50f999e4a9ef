"""Predictors, by name: which experts will be wanted soon. A new predictor is one new file and one line in `PREDICTORS`.

A predictor only estimates; whether a prefetch is worth its bytes is decided by `moetier.prefetch`. `docs/predictors.md`
says what each one is worth, measured.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

from moetier.access import Access, ExpertKey
from moetier.registry import build

__all__ = ["PREDICTORS", "Prediction", "Predictor", "make_predictor"]


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
        """After `access`: experts of the layer `distance` accesses ahead (layers come in a cycle), likeliest first."""


PREDICTORS: dict[str, str] = {
    "activation-matrix": "moetier.predictors.activation_matrix:ActivationMatrix",
    "layer-transition": "moetier.predictors.layer_transition:LayerTransition",
    "mix": "moetier.predictors.mix:Mix",
    "next-gate": "moetier.predictors.next_gate:NextGate",
    "previous-token": "moetier.predictors.previous_token:PreviousToken",
    "scoutgate": "moetier.predictors.scoutgate:ScoutGate",
}


def make_predictor(text: str, layers: int, experts: int, top_k: int) -> Predictor:
    """Build a predictor by registry name, or a third party's by `"package.module:Class"`.

    Parameters follow in parentheses, as for policies: `"layer-transition(half_life=500)"`. Raises `ConfigError` for a
    name that is neither, and for parameters that the predictor does not have.
    """
    predictor: Predictor = build("predictor", text, PREDICTORS, layers, experts, top_k)
    return predictor
