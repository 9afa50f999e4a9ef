"""A trace's forwards as training steps: what a cache would be asked if the recorded tokens were trained on."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import replace

from moetier.access import Access, ExpertKey, Part, Phase
from moetier.errors import ConfigError

__all__ = ["GRADIENTS", "STATES", "WEIGHTS", "training_steps"]

# which parts of a step a cache of these sees
WEIGHTS = (Part.SERVE, Part.FORWARD, Part.BACKWARD, Part.UPDATE)
GRADIENTS = (Part.BACKWARD, Part.UPDATE)
STATES = (Part.UPDATE,)


def training_steps(
    accesses: Sequence[Access], parts: Container[Part] = WEIGHTS, accumulate: int = 1, evaluate: int = 0
) -> list[Access]:
    """Every forward of `accesses`, then its backward: the same keys, the last layer first; of both, what is in `parts`.

    After every `accumulate` backwards the records used since are updated, the first layer first. With `evaluate` every
    so many forwards one is for evaluation, without a backward. Raises `ConfigError` for numbers that cannot be.
    """
    if accumulate < 1 or evaluate < 0:
        raise ConfigError(f"accumulate must be at least 1 and evaluate not negative, got {accumulate} and {evaluate}")
    found: list[Access] = []
    used: dict[int, set[ExpertKey]] = {}
    backwards = 0
    for number, step in enumerate(_forwards(accesses), 1):
        if evaluate and number % evaluate == 0:
            found += [replace(access, part=Part.SERVE) for access in step]
            continue
        found += [replace(access, part=Part.FORWARD, phase=Phase.PREFILL) for access in step]
        for access in reversed(step):
            found.append(replace(access, part=Part.BACKWARD, phase=Phase.PREFILL))
            used.setdefault(access.layer, set()).update(access.keys)
        backwards += 1
        if backwards % accumulate == 0:
            for layer in sorted(used):
                keys = tuple(sorted(used[layer]))
                found.append(Access(0, layer, keys, phase=Phase.PREFILL, writes=True, part=Part.UPDATE))
            used.clear()
    return [replace(access, time=time) for time, access in enumerate((a for a in found if a.part in parts), 1)]


def _forwards(accesses: Sequence[Access]) -> list[list[Access]]:
    """Cut where a layer does not come after the one before; accesses to nothing are left out."""
    steps: list[list[Access]] = []
    last = None
    for access in accesses:
        if last is None or access.layer <= last:
            steps.append([])
        last = access.layer
        if access.keys:
            steps[-1].append(access)
    return [step for step in steps if step]
