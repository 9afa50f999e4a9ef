"""What the lossy levers cost and save on a text: perplexity, distance to the exact model, bytes and time.

The text is run as in generation, one token at a time with the decoding cache, so that the levers and the expert cache
do what they would do there. The exact run comes first and leaves its logits in a temporary file; memory stays bounded
whatever the length of the text. Every run begins with a model loaded anew: an empty cache, a policy that knows nothing.
"""

from __future__ import annotations

import inspect
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch

from moetier.errors import CheckpointError, ConfigError, StoreError, UnsupportedModelError
from moetier.levers import Levers
from moetier.routing import Lever

__all__ = ["Outcome", "Reading", "evaluate", "try_on", "windows_of"]

Load = Callable[[Levers], AbstractContextManager[Any]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run over the text. All means are over the predicted tokens."""

    levers: Levers
    tokens: int  # run through the model
    predicted: int  # all but the first of every window
    nll: float  # mean of -ln p(next token)
    kl: float  # mean of KL(exact ‖ this), in nats
    agreement: float  # share of tokens whose likeliest next token is the exact model's
    seconds: float  # of the forward passes
    nbytes: dict[str, int]  # moved per link
    hit_rate: float  # of the fastest tier, over what was demanded of it
    overlap: float  # share of (token, expert) pairs that are the router's own choice and were served
    dropped: float  # share of pairs that were not served at all

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood."""
        return math.exp(self.nll)

    def to_dict(self) -> dict[str, Any]:
        """As plain data, with rates."""
        return {
            "levers": self.levers.to_dict(),
            "tokens": self.tokens,
            "predicted": self.predicted,
            "nll": self.nll,
            "perplexity": self.perplexity,
            "kl": self.kl,
            "agreement": self.agreement,
            "tokens_per_second": self.tokens / self.seconds,
            "bytes_per_token": {name: nbytes / self.tokens for name, nbytes in self.nbytes.items()},
            "hit_rate": self.hit_rate,
            "overlap": self.overlap,
            "dropped": self.dropped,
        }


def windows_of(texts: Sequence[Sequence[int]], tokens: int | None, window: int) -> list[list[int]]:
    """The texts' token ids, at most `tokens` of each, cut into windows: each is run with a decoding cache of its own.

    A rest of one token predicts nothing and is left out. Raises `ConfigError` if nothing is left.
    """
    cut = [list(ids[:tokens]) for ids in texts]
    windows = [ids[begin : begin + window] for ids in cut for begin in range(0, len(ids), window)]
    windows = [ids for ids in windows if len(ids) > 1]
    if not windows:
        raise ConfigError("--text: at least one text with 2 tokens or more is needed")
    return windows


def evaluate(
    load: Load,
    windows: Sequence[Sequence[int]],
    settings: Sequence[Levers],
    progress: Callable[[int], None] | None = None,
) -> Iterator[Outcome]:
    """Run the windows with the levers off, then with each of `settings`, and yield what came out.

    `load` gives the tiered model with these levers, as a context that closes it. Before anything is run, raises
    `ConfigError` where a setting does not fit the model, `UnsupportedModelError` where it cannot be bound.
    """
    with _Reference() as reference:
        for levers in (Levers(), *settings):
            with load(levers) as model:
                if not reference.recorded:
                    try_on(model, settings)
                reading = Reading(model, levers, windows)
                reference.rewind()
                for ids in windows:
                    reading.begin()
                    for position, number in enumerate(ids):
                        logits = reading.step(number)
                        if position + 1 < len(ids):
                            reading.judge(reference.compare(logits), logits, ids[position + 1])
                        if progress is not None:
                            progress(1)
                reference.recorded = True
                yield reading.outcome()


def try_on(model: Any, settings: Sequence[Levers]) -> None:
    """A setting that cannot be used is told before minutes are spent on those before it. Raises `ConfigError`."""
    for levers in settings:
        try:
            Lever(model, levers).close()
        except ConfigError as error:
            raise ConfigError(f"--try {levers}: {error}") from None


class Reading:
    """One model that reads the windows, token by token, and what was found meanwhile.

    `model` has been loaded with `levers`. Raises `CheckpointError` where the windows hold tokens that it does not know.
    """

    def __init__(self, model: Any, levers: Levers, windows: Sequence[Sequence[int]]):
        highest, known = max(map(max, windows)), model.get_input_embeddings().weight.shape[0]
        if highest >= known:
            raise CheckpointError(
                f"the tokenizer gives token {highest} but the model knows {known} tokens: their files do not belong "
                "together"
            )
        self.seconds = 0.0  # of the forward passes
        self._model, self._levers = model, levers
        parameters = inspect.signature(model.forward).parameters
        self._extra = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        self._past: Any = None
        self._nll = self._kl = 0.0
        self._agreed = self._predicted = self._tokens = 0

    def begin(self) -> None:
        """A new window: nothing is remembered of the text; the expert cache stays as it is."""
        self._past = None

    def step(self, number: int) -> torch.Tensor:
        """Read a token; the logits of the next one [vocabulary], on the CPU."""
        begin = time.perf_counter()
        with torch.no_grad():
            step = torch.tensor([[number]], device=self._model.device)
            outputs = self._model(input_ids=step, past_key_values=self._past, use_cache=True, **self._extra)
        self._past, logits = outputs.past_key_values, outputs.logits[0, -1].cpu()
        self.seconds += time.perf_counter() - begin
        self._tokens += 1
        if self._past is None:
            raise UnsupportedModelError(
                f"{type(self._model).__name__} keeps no decoding cache; it cannot be run by token"
            )
        return cast(torch.Tensor, logits)

    def judge(self, exact: torch.Tensor, logits: torch.Tensor, following: int) -> None:
        """Count a prediction: the exact model's logits, this one's [vocabulary], and the token that followed."""
        found = logits.double().log_softmax(dim=-1)
        self._nll -= float(found[following])
        self._kl += divergence(exact.double().log_softmax(dim=-1), found)
        self._agreed += int(exact.argmax()) == int(logits.argmax())
        self._predicted += 1

    def outcome(self) -> Outcome:
        """What has been found; the model must still be open."""
        stats = self._model.moetier.stats()
        top = stats["tiers"][0]
        demanded = sum(sum(top[kind]) for kind in ("hits", "lates", "misses"))
        pairs = stats.get("levers", {"choices": 0, "changed": 0, "dropped": 0})
        choices = max(1, pairs["choices"])
        return Outcome(
            levers=self._levers,
            tokens=self._tokens,
            predicted=self._predicted,
            nll=self._nll / self._predicted,
            kl=self._kl / self._predicted,
            agreement=self._agreed / self._predicted,
            seconds=self.seconds,
            nbytes={name: link["bytes"] for name, link in stats["links"].items()},
            hit_rate=sum(top["hits"]) / max(1, demanded),
            overlap=1 - (pairs["changed"] + pairs["dropped"]) / choices,  # what is new is resident, so never dropped
            dropped=pairs["dropped"] / choices,
        )


def divergence(exact: torch.Tensor, other: torch.Tensor) -> float:
    """KL(exact ‖ other) in nats, of two vectors of log-probabilities; never below 0, which rounding could give."""
    difference = torch.where(exact == other, torch.zeros_like(exact), exact - other)  # also where both are -inf
    weight = exact.exp()
    return max(0.0, float(torch.where(weight > 0, weight * difference, weight).sum()))


class _Reference:
    """The exact model's logits, token after token, in a temporary file of their own dtype: written once, then read."""

    def __init__(self) -> None:
        self.recorded = False
        self._file: IO[bytes] | None = None

    def __enter__(self) -> _Reference:
        try:
            self._file = tempfile.TemporaryFile(prefix="moetier-eval-")
        except OSError as error:
            raise self._failed(error) from error
        return self

    def __exit__(self, *error: object) -> None:
        assert self._file is not None
        self._file.close()

    def rewind(self) -> None:
        """Back to the first token."""
        assert self._file is not None
        self._file.seek(0)

    def compare(self, logits: torch.Tensor) -> torch.Tensor:
        """The exact model's logits for this token; in the exact run, these."""
        assert self._file is not None
        raw = logits.contiguous().view(torch.uint8).numpy()
        try:
            if not self.recorded:
                self._file.write(raw.data)
                return logits
            read = bytearray(self._file.read(raw.nbytes))
        except OSError as error:
            raise self._failed(error) from error
        return torch.frombuffer(read, dtype=logits.dtype)

    def _failed(self, error: OSError) -> StoreError:
        place = Path(tempfile.gettempdir())
        return StoreError(
            f"{place}: the exact model's logits cannot be kept there ({error.strerror or error}); set TMPDIR to a "
            "folder with more room, or evaluate fewer --tokens"
        )
