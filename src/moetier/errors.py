"""The errors a user can meet. Each message names the file, key or flag at fault and the way out.

MoetierError
├── ConfigError        a flag or argument that cannot be used (unknown policy, bad size)
├── CapacityError      a budget below the smallest that works; carries that minimum
├── UnsupportedModelError  not an MoE, or a family without the experts interface
├── StaleGraphError    a backward whose experts were updated since its forward
├── ReplayError        an event log whose replay makes other decisions
└── StoreError         the bytes: missing, damaged or unreadable files
    └── CheckpointError    a checkpoint that is malformed or disagrees with its config
"""

from __future__ import annotations


class MoetierError(Exception):
    """Base of every error moetier raises for a cause outside its own code."""


class ConfigError(MoetierError, ValueError):
    """An argument, flag or configuration value that cannot be used."""


class CapacityError(MoetierError):
    """A budget too small to make progress. `minimum_slots` is the smallest number of slots that works."""

    def __init__(self, message: str, minimum_slots: int = 1):
        super().__init__(message)
        self.minimum_slots = minimum_slots


class UnsupportedModelError(MoetierError):
    """The model is not a Mixture-of-Experts model, or its experts cannot be taken out of core."""


class StaleGraphError(MoetierError, RuntimeError):
    """A backward through experts that are not those of its forward any more: they were updated in between."""


class ReplayError(MoetierError):
    """A replayed run departs from the recorded one."""


class StoreError(MoetierError, OSError):
    """Expert bytes could not be read or written."""


class CheckpointError(StoreError):
    """A checkpoint is incomplete, malformed, or disagrees with its configuration."""
