"""Profiles: how often a model used each expert. Saved after one run, they tell the next one what to keep.

A `Profile` counts; it knows neither slots nor policies. What is done with one is in `pinning` and `forecast`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moetier.access import Access
from moetier.errors import ConfigError
from moetier.files import whole_file

if TYPE_CHECKING:
    from moetier.trace import Trace

FORMAT = "moetier profile"
VERSION = 1


@dataclass
class Profile:
    """Counts per layer and expert.

    `uses` [L, E] is the number of accesses that needed an expert, `mass` [L, E] the sum of the gate weights of its
    tokens (zeros where they were unknown), `accesses` [L] the accesses of each layer, `tokens` the tokens of all of
    them (counted at layer 0). `model` and `fingerprint` say whose routing this is, `source` what it was made from
    (a trace file, a live run), `texts` the texts behind it, where known.
    """

    layers: int
    experts: int
    model: str = ""
    fingerprint: str = ""
    source: str = ""
    texts: list[str] = field(default_factory=list)
    tokens: int = 0
    uses: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 0), np.int64))
    mass: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))
    accesses: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    def __post_init__(self) -> None:
        """Start at zero where no counts are given; refuse counts of another shape."""
        if self.layers < 1 or self.experts < 1:
            raise ConfigError(f"profile: at least 1 layer and 1 expert, got {self.layers} and {self.experts}")
        shape = (self.layers, self.experts)
        self.uses = self.uses if self.uses.size else np.zeros(shape, np.int64)
        self.mass = self.mass if self.mass.size else np.zeros(shape)
        self.accesses = self.accesses if self.accesses.size else np.zeros(self.layers, np.int64)
        if self.uses.shape != shape or self.mass.shape != shape or self.accesses.shape != shape[:1]:
            raise ConfigError(f"profile: the counts are not those of {self.layers} layers x {self.experts} experts")

    def add(self, access: Access) -> None:
        """Count one access."""
        layer = access.layer
        experts = [key.expert for key in access.keys]
        self.uses[layer, experts] += 1
        if access.mass:
            self.mass[layer, experts] += access.mass
        self.accesses[layer] += 1
        if layer == 0 and access.tokens:  # every token is routed to several experts: the busiest bounds them below
            self.tokens += max(access.tokens)

    @classmethod
    def from_accesses(cls, accesses: Iterable[Access], layers: int, experts: int, source: str = "") -> Profile:
        """Count accesses; tokens are a lower bound where several run in one access."""
        profile = cls(layers, experts, source=source)
        for access in accesses:
            profile.add(access)
        return profile

    @classmethod
    def from_trace(cls, trace: Trace, source: str = "") -> Profile:
        """Count a trace's accesses, as its steps were recorded."""
        profile = cls.from_accesses(trace.accesses(), trace.layers, trace.num_experts, source or trace.info.source)
        profile.tokens = trace.tokens
        profile.model = trace.info.model
        profile.fingerprint = str(trace.info.extra.get("fingerprint", ""))
        names = (str(sequence.get("name", "")) for sequence in trace.info.sequences)
        profile.texts = [name for name in names if name]
        return profile

    def top(self, layer: int, count: int) -> list[int]:
        """The experts of a layer that were used most (ties: by gate mass, then the lower number); unused ones never."""
        order = np.lexsort((np.arange(self.experts), -self.mass[layer], -self.uses[layer]))
        return [int(expert) for expert in order[:count] if self.uses[layer, expert]]

    def probabilities(self) -> NDArray[np.float64]:
        """Share of a layer's accesses that needed each expert, [L, E]; zeros for a layer without any."""
        shares: NDArray[np.float64] = self.uses / np.maximum(self.accesses, 1)[:, None]
        return shares

    def require(self, layers: int, experts: int, path: str | os.PathLike[str] = "the profile") -> None:
        """Raise `ConfigError` naming `path` unless this is a profile of that shape."""
        if (self.layers, self.experts) != (layers, experts):
            raise ConfigError(
                f"{path}: a profile of {self.layers} layers x {self.experts} experts, but the model has {layers} x "
                f"{experts}; record one with this model (--save-profile)"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON, whole or not at all. Raises `ConfigError` naming the file where that is not possible."""
        head = {"format": FORMAT, "version": VERSION}
        about = {name: getattr(self, name) for name in ("layers", "experts", "model", "fingerprint", "source", "texts")}
        counts = {"tokens": int(self.tokens), "accesses": self.accesses.tolist(), "uses": self.uses.tolist()}
        mass = {"mass": np.round(self.mass, 6).tolist()}
        with whole_file(path) as draft:
            draft.write_text(json.dumps(head | about | counts | mass, separators=(",", ":")) + "\n", "utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Profile:
        """Read a saved profile. Raises `ConfigError`, naming the file, for one that is damaged or something else."""
        try:
            record = json.loads(Path(path).read_text("utf-8"))
        except OSError as error:
            raise ConfigError(f"{path}: the profile cannot be read: {error.strerror or error}") from error
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise ConfigError(f"{path}: not a profile of moetier")
        if record.get("version") != VERSION:
            raise ConfigError(f"{path}: profile version {record.get('version')!r}; this moetier reads {VERSION}")
        try:
            return cls._parse(record)
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            raise ConfigError(f"{path}: a damaged profile ({reason}); record it anew") from error

    @classmethod
    def _parse(cls, record: dict[str, Any]) -> Profile:
        for name, kind in (("layers", int), ("experts", int), ("tokens", int), ("texts", list)):
            if not isinstance(record[name], kind) or isinstance(record[name], bool):
                raise ValueError(f"{name} is {record[name]!r}")
        uses, accesses = (np.asarray(record[name]) for name in ("uses", "accesses"))
        mass = np.asarray(record["mass"], dtype=np.float64)
        for name, counts in (("uses", uses), ("accesses", accesses)):
            if counts.dtype.kind not in "iu" or (counts < 0).any():
                raise ValueError(f"{name} are not counts")
        if not np.isfinite(mass).all() or not (uses.size and accesses.size and mass.size):
            raise ValueError("counts are missing")
        return cls(
            record["layers"],
            record["experts"],
            model=str(record["model"]),
            fingerprint=str(record["fingerprint"]),
            source=str(record["source"]),
            texts=[str(text) for text in record["texts"]],
            tokens=record["tokens"],
            uses=uses.astype(np.int64),
            mass=mass,
            accesses=accesses.astype(np.int64),
        )
