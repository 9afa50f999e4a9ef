"""Checks of the numbers that users give to policies."""

from __future__ import annotations

from moetier.errors import ConfigError


def within(name: str, value: float, low: float, high: float) -> float:
    """The value, if it is between two bounds, which are included; else `ConfigError`."""
    if not low <= value <= high:
        raise ConfigError(f"{name} must be between {low:g} and {high:g}, got {value!r}")
    return value


def open_share(name: str, value: float) -> float:
    """The value, if it is between 0 and 1, both excluded; else `ConfigError`."""
    if not 0.0 < value < 1.0:
        raise ConfigError(f"{name} must be greater than 0 and less than 1, got {value!r}")
    return value
