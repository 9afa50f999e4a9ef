"""The next layers' own routers, asked early: training-free lookahead.

Needs the loaded model: `bind` it. Imports torch only then.
"""

from __future__ import annotations

from math import exp
from threading import local
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moetier.access import Access, ExpertKey
from moetier.errors import ConfigError
from moetier.predictors.scored import ScoredPredictor, Scores

if TYPE_CHECKING:
    from moetier.predictors.routers import Routers

_STEEPNESS = 8.0  # the same, per span between the best and the last that is looked at
_SLOPE = 4.0  # of a first guess at the probability, per standard deviation of a token's scores; then it is learned


class NextGate(ScoredPredictor):
    """Router of layer l+a on the hidden state that comes to layer l, through the norm of l+a.

    The real router with everything it does (bias, sigmoid or softmax, groups), so at distance 0 it is exact: the
    control. The hidden state is taken before layer l's experts run, so that a prefetch can overlap their math. Experts
    beyond the router's choice are ranked by what the router ranked by; how far an expert is from being chosen gives the
    probability. Around the corner (from the last layers to the first of the next token) it knows nothing of that token.

    After Eliseev and Mazur (2023, arXiv 2312.17238) and its many followers.
    """

    nearest, warmup = 0, 0
    needs = "model"

    def __init__(self, layers: int, experts: int, top_k: int):
        super().__init__(layers, experts, top_k)
        self._routers: Routers | None = None
        self._seen = local()  # per thread: the residual of the access observed last

    def bind(self, model: Any) -> None:
        """Find the routers of a loaded model. Raises `UnsupportedModelError`, naming the family, if they need more than
        their layer's hidden state; `ConfigError` if the model has another shape.
        """
        from moetier.predictors.routers import Routers

        routers = Routers(model)
        if len(routers) != self.layers:
            routers.close()
            raise ConfigError(f"next-gate was made for {self.layers} MoE layers, the model has {len(routers)}")
        self.close()
        self._routers = routers

    def twin(self) -> NextGate:
        """Another one for the same model, for another thread. The first one closes."""
        other = NextGate(self.layers, self.experts, self.top_k)
        other._routers = self._routers
        return other

    def close(self) -> None:
        """Let the model go."""
        if self._routers is not None:
            self._routers.close()
            self._routers = None

    def learn(self, access: Access, used: Scores) -> None:
        """Keep the hidden state that came to this layer."""
        if self._routers is None:
            raise ConfigError("next-gate asks the model's own routers: bind(model) it first")
        residual = self._routers.residual
        if residual is None or residual[0] != access.layer:
            raise ConfigError(
                "next-gate saw no forward of its model before this access; it cannot work on a trace alone"
            )
        self._seen.residual = residual[1]

    def foresee(self, access: Access) -> dict[ExpertKey, float] | None:
        """The next layer's likeliest experts for one token, raw probabilities: a product, `topk`, and little else.

        None where it takes more: several tokens, a router that is not one matrix. Does not learn what its probabilities
        are worth; whoever asks has to. Around the corner it says nothing.
        """
        if self._routers is None or sum(access.tokens) != self.top_k:
            return None
        residual, target = self._routers.residual, access.layer + 1
        if residual is None or residual[0] != access.layer or len(residual[1]) != 1:
            return None
        if target == self.layers:
            return {}
        ranks = self._routers.ranks(target, residual[1])
        if ranks is None:
            return None
        k, keys = self.top_k, self._keys[target]
        best = ranks[0].topk(min(2 * k, ranks.shape[1]))
        values, experts = best.values.tolist(), best.indices.tolist()
        edge = (values[k - 1] + values[min(k, len(values) - 1)]) / 2
        scale = _STEEPNESS / (values[0] - values[-1] + 1e-30)
        return {
            keys[expert]: 1 / (1 + exp(scale * (edge - value))) for expert, value in zip(experts, values, strict=True)
        }

    def scores(self, access: Access, target: int, distance: int) -> Scores:
        """Those that a token would choose before all others; within both, from each token's distance to choosing."""
        if self._routers is None or not hasattr(self._seen, "residual"):
            raise ConfigError("next-gate asks the model's own routers: bind(model) it first")
        if distance:  # the control, at distance 0, asks the modules
            ranks = self._routers.ranks(target, self._seen.residual)
            if ranks is not None:
                one = _guesses(ranks.cpu().numpy(), self.top_k)
                return np.asarray(one[0] if len(one) == 1 else 1 - np.prod(1 - one, axis=0))
        routed = self._routers.route(target, self._seen.residual)
        index = routed.index.cpu().numpy()  # [T, K]
        chosen = np.zeros((len(index), self.experts), dtype=np.bool_)
        np.put_along_axis(chosen, index, True, axis=1)
        if routed.scores is None:
            one = np.where(chosen, 0.9, 0.01)
        else:
            one = _chances(routed.scores.cpu().numpy().astype(np.float64), chosen)
        return np.asarray((chosen.any(axis=0) + 1 - np.prod(1 - one, axis=0)) / 2)


def _guesses(logits: NDArray[np.float32], top_k: int) -> Scores:
    """[T, experts] first guesses from scores of any scale: above one half for the `top_k` best of a token."""
    experts = logits.shape[1]
    if top_k >= experts:
        return np.full(logits.shape, 0.9)
    parted = np.partition(logits, (experts - top_k - 1, experts - top_k), axis=1)
    edge = (parted[:, experts - top_k - 1] + parted[:, experts - top_k]) / 2
    margin = (logits - edge[:, None]) * (_SLOPE / (logits.std(axis=1) + 1e-30))[:, None]
    return np.asarray(1 / (1 + np.exp(-np.clip(margin, -20, 20))), np.float64)


def _chances(ranked: Scores, chosen: np.ndarray[Any, np.dtype[np.bool_]]) -> Scores:
    """[T, E] first guesses: above one half exactly where chosen."""
    possible = np.isfinite(ranked)
    flat = np.where(possible, ranked, np.nan)
    spread = np.nanstd(flat, axis=1, keepdims=True) + 1e-9
    worst = np.where(chosen, ranked, np.inf).min(axis=1, keepdims=True)
    rest = np.where(chosen | ~possible, -np.inf, ranked).max(axis=1, keepdims=True)
    edge = np.where(np.isfinite(rest), (worst + rest) / 2, worst - spread)
    margin = np.where(possible, np.clip((ranked - edge) / spread, -4.9, 4.9), -5.0)
    margin = np.where(chosen, np.maximum(margin, 1e-3), np.minimum(margin, -1e-3))  # ties at the edge
    return np.asarray(1 / (1 + np.exp(-_SLOPE * margin)))
