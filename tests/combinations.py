"""Some of all combinations, so that every few choices meet: `MOETIER_COMBINATIONS=all` runs all of them."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Sequence
from typing import Any

ALL = os.environ.get("MOETIER_COMBINATIONS") == "all"


def covering(*choices: Sequence[Any], strength: int = 3, seed: int = 0) -> list[tuple[Any, ...]]:
    """So many of the product's elements that every `strength` choices of different dimensions occur together.

    A greedy covering array: again and again the combination with most new meetings, of those in an order drawn with
    `seed`. They are in the order of `itertools.product`.
    """
    product = list(itertools.product(*(range(len(of)) for of in choices)))
    if not ALL:
        product = _greedy(product, min(strength, len(choices)), random.Random(seed))
    return [tuple(of[at] for of, at in zip(choices, each, strict=True)) for each in product]


def _greedy(product: list[tuple[int, ...]], strength: int, draw: random.Random) -> list[tuple[int, ...]]:
    def meetings(each: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
        return set(itertools.combinations(enumerate(each), strength))

    left = draw.sample(product, len(product))
    missing = set().union(*map(meetings, product))
    chosen = []
    while missing:
        best = max(left, key=lambda each: len(meetings(each) & missing))
        missing -= meetings(best)
        chosen.append(best)
    return sorted(chosen)


def dealt(first: Sequence[Any], second: Sequence[Any], each: int, always: Sequence[Any] = ()) -> list[tuple[Any, Any]]:
    """Pairs: every one of `first` with all of `always` and with `each` others of `second`, dealt in turn to all."""
    if ALL:
        return list(itertools.product(first, second))
    others = itertools.cycle(one for one in second if one not in always)
    pairs = []
    for one in first:
        dealt_to = {*always, *itertools.islice(others, each)}
        pairs += [(one, other) for other in second if other in dealt_to]
    return pairs
