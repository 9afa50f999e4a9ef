"""What favouring some experts does to the load of all, counted next to what the routers would have done by themselves.

Counts add up and can be subtracted, so that a step's, a log line's and a whole run's numbers come from the same books.
Knows no model and no torch.

Shapes: T tokens, E experts, K experts per token; L layers, with the most experts of any layer as the last dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["NUMBERS", "Tally"]

NUMBERS = ("changed_tokens", "changed_experts", "mass_given_up", "cv", "cv_own", "balance_loss", "balance_loss_own")
"""What `Tally.summary` says of a layer, and of all of them."""


@dataclass
class Tally:
    """Sums over tokens, by layer; `experts` are those of each layer. Each token counts once in every layer."""

    experts: NDArray[np.int64]  # [L]
    own: NDArray[np.int64]  # [L, E] tokens that the routers would have given each expert
    given: NDArray[np.int64]  # [L, E] tokens that it was given
    mass: NDArray[np.float64]  # [L, E] the routers' probabilities
    tokens: NDArray[np.int64]  # [L]
    changed: NDArray[np.int64]  # [L] tokens whose set of experts is another
    new: NDArray[np.int64]  # [L] (token, expert) pairs that are new
    lost: NDArray[np.float64]  # [L] probability of what was chosen, less than that of the routers' own choices

    @classmethod
    def empty(cls, counts: Sequence[int]) -> Tally:
        """Of layers with so many experts each, before the first token."""
        layers, whole = len(counts), (len(counts), max(counts))
        return cls(
            experts=np.array(counts, np.int64),
            own=np.zeros(whole, np.int64),
            given=np.zeros(whole, np.int64),
            mass=np.zeros(whole),
            tokens=np.zeros(layers, np.int64),
            changed=np.zeros(layers, np.int64),
            new=np.zeros(layers, np.int64),
            lost=np.zeros(layers),
        )

    def add(
        self,
        layer: int,
        own: NDArray[np.int64],
        given: NDArray[np.int64],
        new: NDArray[np.int64],
        shares: NDArray[np.float64],
    ) -> None:
        """A layer's tokens: the router's own choice and that which was made, [T, K]; how many of it are new, [T]; the
        router's probabilities, [T, E].
        """
        count = shares.shape[1]
        self.own[layer, :count] += np.bincount(own.reshape(-1), minlength=count)
        self.given[layer, :count] += np.bincount(given.reshape(-1), minlength=count)
        self.mass[layer, :count] += shares.sum(axis=0)
        self.tokens[layer] += len(own)
        self.changed[layer] += int((new > 0).sum())
        self.new[layer] += int(new.sum())
        rows = new > 0  # the others gave up nothing, not even to rounding
        before, after = (np.take_along_axis(shares[rows], index[rows], axis=1).sum() for index in (own, given))
        self.lost[layer] += before - after

    def copy(self) -> Tally:
        """As it is now."""
        return Tally(*(getattr(self, field.name).copy() for field in fields(self)))

    def since(self, before: Tally) -> Tally:
        """What was added since `before` was copied from this."""
        names = [field.name for field in fields(self)][1:]
        return Tally(self.experts, *(getattr(self, name) - getattr(before, name) for name in names))

    def summary(self) -> dict[str, Any]:
        """`NUMBERS` of all layers, and as lists under `layers`; all of them 0 where there were no tokens.

        changed_tokens      share of tokens (of every layer) whose set of experts is another than the router's
        changed_experts     share of (token, expert) pairs that are new
        mass_given_up       of a token's probability, what its own choice had more than the one that was made; mean
        cv, cv_own          coefficient of variation of the experts' numbers of tokens: standard deviation ÷ mean, over
                            all experts of a layer; as given, and as the routers would have had it. 0 is even
        balance_loss, …_own the load-balancing loss of Switch Transformers (arXiv 2101.03961) without its weight:
                            E · Σ f · P, f an expert's share of the (token, expert) pairs, P its mean probability. 1 is
                            even, E is everything on one expert

        Of all layers: shares and probability of all tokens; of `cv` and `balance_loss` the mean over layers.
        """
        tokens = np.maximum(self.tokens, 1)
        pairs = np.maximum(self.given.sum(axis=1), 1)
        layers = {
            "changed_tokens": self.changed / tokens,
            "changed_experts": self.new / pairs,
            "mass_given_up": self.lost / tokens,
            "cv": self._variation(self.given),
            "cv_own": self._variation(self.own),
            "balance_loss": self._balance(self.given),
            "balance_loss_own": self._balance(self.own),
        }
        total = {name: float(values.mean()) for name, values in layers.items()}
        total["changed_tokens"] = float(self.changed.sum() / max(1, self.tokens.sum()))
        total["changed_experts"] = float(self.new.sum() / max(1, self.given.sum()))
        total["mass_given_up"] = float(self.lost.sum() / max(1, self.tokens.sum()))
        return {
            "tokens": int(self.tokens.max(initial=0)),
            **total,
            "layers": {name: values.tolist() for name, values in layers.items()},
        }

    def _variation(self, load: NDArray[np.int64]) -> NDArray[np.float64]:
        mean = load.sum(axis=1) / self.experts
        there = np.arange(load.shape[1]) < self.experts[:, None]
        deviation = np.sqrt((np.where(there, load - mean[:, None], 0.0) ** 2).sum(axis=1) / self.experts)
        result: NDArray[np.float64] = deviation / np.where(mean > 0, mean, 1.0)
        return result

    def _balance(self, load: NDArray[np.int64]) -> NDArray[np.float64]:
        share = load / np.maximum(load.sum(axis=1, keepdims=True), 1)
        probability = self.mass / np.maximum(self.tokens, 1)[:, None]
        result: NDArray[np.float64] = self.experts * (share * probability).sum(axis=1)
        return result
