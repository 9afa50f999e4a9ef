"""The opt-in lossy levers: what each one is set to. Knows nothing of models, tensors or caches.

All of them are off by default. Every lever trades the model's own output for fewer bytes read; `docs/lossy.md` has the
prices, measured, and `moetier eval` measures them on your model and text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from moetier.errors import ConfigError

__all__ = ["Levers"]

_SHARES = ("cache_prior", "max_mass", "drop_misses")  # numbers between 0 and 1


@dataclass(frozen=True, slots=True)
class Levers:
    """How far routing may bend towards the experts that are in the fastest tier. Used while decoding, not in a prefill;
    and in training, where it is towards those that are kept there on purpose (docs/training.md).

    Choosing again, in one of two forms:

    - `cache_prior`, λ in [0, 1]: add λ times the layer's mean range of router scores to the scores of resident experts,
      then choose the top-k (Cache-Prior, arXiv 2412.00099);
    - `max_rank`, M: choose residents among the router's M best experts first, then by the router's order (as colibri
      does); `max_mass`, P in (0, 1], narrows these to the best experts that together have the probability P.

    Both always keep the router's `keep_top` best (by default 1 where a layer has 8 experts or fewer, else 2).

    `drop_misses`, F in [0, 1]: an expert that is not resident, and whose share of the gate weights stays below F / k
    for every token that chose it, is not loaded and adds nothing; the others' weights stay what they are. A token's
    best expert is never dropped (after BigMoe's drop-cold; HOBBIT, arXiv 2411.01433, skips by summed weights instead).
    """

    cache_prior: float = 0.0
    keep_top: int | None = None
    max_rank: int | None = None
    max_mass: float | None = None
    drop_misses: float = 0.0

    @property
    def rechooses(self) -> bool:
        """Whether routers are made to choose again."""
        return self.cache_prior > 0 or self.max_rank is not None or self.max_mass is not None

    @property
    def on(self) -> bool:
        """Whether any lever is; otherwise outputs are the model's own, bit for bit."""
        return self.rechooses or self.drop_misses > 0

    def __str__(self) -> str:
        if not self.on:
            return "exact"
        off = Levers().to_dict()
        said = {name: value for name, value in self.to_dict().items() if value != off[name]}
        return ",".join(f"{name}={value:g}" if name in _SHARES else f"{name}={value}" for name, value in said.items())

    def to_dict(self) -> dict[str, float | int | None]:
        """All settings by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def check(self) -> None:
        """Raise `ConfigError` for what can be known to be wrong without a model."""
        for name in _SHARES:
            if name != "max_mass" or self.max_mass is not None:
                _check_share(name, getattr(self, name))
        if self.max_mass == 0:
            raise ConfigError("max_mass: must be above 0; leave it out to set no bound")
        for name, least in (("keep_top", 0), ("max_rank", 1)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ConfigError(f"{name}: must be a whole number, at least {least}, got {value!r}")
        windowed = "max_rank" if self.max_rank is not None else "max_mass"
        if self.cache_prior > 0 and (self.max_rank is not None or self.max_mass is not None):
            raise ConfigError(f"cache_prior: cannot be combined with {windowed}: they are two ways to choose again")
        if self.keep_top is not None and not self.rechooses:
            raise ConfigError("keep_top: does nothing without cache_prior, max_rank or max_mass; set one of them")

    def fit(self, experts: int, top_k: int) -> int:
        """How many best experts to keep in a layer of this shape. Raises `ConfigError` if a setting does not fit."""
        if self.max_rank is not None and not top_k <= self.max_rank <= experts:
            raise ConfigError(
                f"max_rank: this model chooses {top_k} of {experts} experts, so it must be between {top_k} (changes "
                f"nothing) and {experts}, got {self.max_rank}"
            )
        if self.keep_top is None:
            return min(top_k, 1 if experts <= 8 else 2)
        if self.keep_top > top_k:
            raise ConfigError(f"keep_top: this model chooses {top_k} experts per token, got {self.keep_top}")
        return self.keep_top

    @classmethod
    def parse(cls, text: str) -> Levers:
        """Read `cache_prior=0.3,keep_top=1`; `exact` is all levers off. Raises `ConfigError`."""
        kinds = {field.name: int if "int" in str(field.type) else float for field in fields(cls)}
        values: dict[str, float | int] = {}
        for part in [] if text.strip() == "exact" else text.split(","):
            name, equals, value = (piece.strip() for piece in part.partition("="))
            name = name.removeprefix("--").replace("-", "_")
            if not equals or name not in kinds:
                raise ConfigError(f"{part.strip()!r} is no lever; write name=value of: {', '.join(kinds)}")
            if name in values:
                raise ConfigError(f"{name} is given twice")
            try:
                values[name] = kinds[name](value)
            except ValueError:
                raise ConfigError(f"{name}: {value!r} is not a number of its kind") from None
        levers = cls(**values)  # type: ignore[arg-type]
        levers.check()
        return levers


def _check_share(name: str, value: object) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not 0 <= value <= 1:  # type: ignore[arg-type, operator]
        raise ConfigError(f"{name}: must be a number between 0 and 1, got {value!r}")
