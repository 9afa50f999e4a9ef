"""The settings of the lossy levers: what they refuse, and how they are written."""

from __future__ import annotations

from typing import Any

import pytest

from moetier import ConfigError
from moetier.levers import Levers


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"cache_prior": 1.1}, "cache_prior: must be a number between 0 and 1, got 1.1"),
        ({"cache_prior": -0.1}, "cache_prior: must be"),
        ({"cache_prior": float("nan")}, "cache_prior: must be"),
        ({"cache_prior": "0.3"}, "cache_prior: must be"),
        ({"cache_prior": True}, "cache_prior: must be"),
        ({"drop_misses": 1.5}, "drop_misses: must be"),
        ({"max_mass": 0.0}, "max_mass: must be above 0"),
        ({"max_mass": 2.0}, "max_mass: must be"),
        ({"max_rank": 0}, "max_rank: must be a whole number, at least 1, got 0"),
        ({"max_rank": 4.0}, "max_rank: must be a whole number"),
        ({"keep_top": -1, "cache_prior": 0.1}, "keep_top: must be a whole number, at least 0"),
        ({"keep_top": 1}, "keep_top: does nothing without"),
        ({"keep_top": 1, "drop_misses": 0.5}, "keep_top: does nothing without"),
        ({"cache_prior": 0.1, "max_rank": 4}, "cannot be combined with max_rank"),
        ({"cache_prior": 0.1, "max_mass": 0.4}, "cannot be combined with max_mass"),
    ],
)
def test_what_is_refused(settings: dict[str, Any], says: str) -> None:
    from moetier.hf import TieredExpertsConfig
    from moetier.options import Options

    for refuse in (Levers(**settings).check, Options(**settings).check, lambda: TieredExpertsConfig(**settings)):
        with pytest.raises(ConfigError, match=says):
            refuse()


def test_off_and_on() -> None:
    assert not Levers().on and str(Levers()) == "exact" == str(Levers(cache_prior=0, drop_misses=0))
    assert Levers(drop_misses=0.1).on and not Levers(drop_misses=0.1).rechooses
    for levers in (Levers(cache_prior=0.1), Levers(max_rank=4), Levers(max_mass=0.5)):
        assert levers.on and levers.rechooses


@pytest.mark.parametrize(
    "levers",
    [
        Levers(),
        Levers(cache_prior=0.3, keep_top=0),
        Levers(max_rank=12, max_mass=0.75, keep_top=2),
        Levers(drop_misses=0.5, cache_prior=1),
    ],
)
def test_written_and_read_again(levers: Levers) -> None:
    assert Levers.parse(str(levers)) == levers
    assert Levers.parse(str(levers).replace("_", "-").replace(",", " , ")) == levers


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "'' is no lever; write name=value of: cache_prior, keep_top"),
        ("cache_prior", "is no lever"),
        ("speed=2", "'speed=2' is no lever"),
        ("max_rank=many", "max_rank: 'many' is not a number"),
        ("max_rank=1.5", "max_rank: '1.5' is not a number"),
        ("cache_prior=0.1,cache_prior=0.2", "cache_prior is given twice"),
        ("cache_prior=3", "between 0 and 1"),
    ],
)
def test_what_cannot_be_read(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Levers.parse(text)


def test_fitting_a_model() -> None:
    assert [Levers(cache_prior=0.1).fit(experts, 4) for experts in (4, 8, 9, 128)] == [1, 1, 2, 2]
    assert Levers(cache_prior=0.1).fit(64, 1) == 1
    assert Levers(cache_prior=0.1, keep_top=0).fit(64, 4) == 0
    with pytest.raises(ConfigError, match="keep_top: this model chooses 4 experts per token, got 5"):
        Levers(cache_prior=0.1, keep_top=5).fit(64, 4)
    for rank in (3, 65):
        with pytest.raises(ConfigError, match=f"between 4 .changes nothing. and 64, got {rank}"):
            Levers(max_rank=rank).fit(64, 4)
