"""Record the residency core's inputs during a run, and replay them without bytes: same decisions, same digest.

The log holds every input call in the order the core saw it, completions included, and the digest after each access.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moetier.access import Access, ExpertKey, Phase
from moetier.errors import ConfigError, ReplayError
from moetier.residency import Residency
from moetier.tiers import Copy, Entry, Place, Ticket, TierConfig

FORMAT = "moetier-events"
VERSION = 1


@dataclass(slots=True)
class EventLog:
    """How the core was built, and its input calls: lists of a name and plain arguments."""

    tiers: tuple[TierConfig, ...]
    layers: int
    experts: int
    events: list[list[Any]] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write as JSON lines: a header, then one event a line."""
        header = {
            "format": FORMAT,
            "version": VERSION,
            "layers": self.layers,
            "experts": self.experts,
            "tiers": [asdict(tier) for tier in self.tiers],
        }
        with open(path, "w", encoding="utf-8") as file:
            for line in (header, *self.events):
                file.write(json.dumps(line, separators=(",", ":")) + "\n")

    @classmethod
    def load(cls, path: Path) -> EventLog:
        """Read a log; raises `ConfigError` naming the file and line of what is not one."""
        number = 1
        try:
            with open(path, encoding="utf-8") as file:
                header = json.loads(file.readline())
                if header["format"] != FORMAT or header["version"] != VERSION:
                    raise ConfigError(f"{path}: not a version {VERSION} event log of moetier")
                tiers = tuple(TierConfig(**tier) for tier in header["tiers"])
                log = cls(tiers, header["layers"], header["experts"])
                for number, line in enumerate(file, 2):
                    event = json.loads(line)
                    if not isinstance(event, list) or not event or event[0] not in _APPLY:
                        raise ConfigError(f"{path}, line {number}: not an event; record the log again")
                    log.events.append(event)
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{path}, line {number}: cannot be read as an event log: {error}") from error
        return log


class Recorder:
    """A residency core that writes down what it is told. Same methods; nothing is recorded elsewhere."""

    def __init__(self, core: Residency):
        self.core = core
        self.log = EventLog(core.configs, core.layers, core.experts)
        self._note = self.log.events.append

    def acquire(self, access: Access) -> Ticket:
        """See `Residency.acquire`."""
        ticket = self.core.acquire(access)
        experts = [key.expert for key in access.keys]
        fields = [access.time, access.layer, experts, list(access.tokens), int(access.phase), access.sequence]
        self._note(["acquire", *fields, self.core.digest()])
        return ticket

    def release(self, ticket: Ticket, key: ExpertKey, dirty: bool = False) -> None:
        """See `Residency.release`."""
        self._note(["release", ticket.number, *key, dirty])
        self.core.release(ticket, key, dirty)

    def abort(self, ticket: Ticket) -> None:
        """See `Residency.abort`."""
        self._note(["abort", ticket.number])
        self.core.abort(ticket)

    def completed(self, copy_id: int, ok: bool = True) -> None:
        """See `Residency.completed`."""
        self._note(["completed", copy_id, ok])
        self.core.completed(copy_id, ok)

    def take(self) -> list[Copy]:
        """See `Residency.take`."""
        self._note(["take"])
        return self.core.take()

    def prefetch(self, key: ExpertKey, displace: bool = False) -> bool:
        """See `Residency.prefetch`."""
        self._note(["prefetch", *key, displace])
        return self.core.prefetch(key, displace)

    def cancel(self, key: ExpertKey) -> bool:
        """See `Residency.cancel`."""
        self._note(["cancel", *key])
        return self.core.cancel(key)

    def pin(self, key: ExpertKey) -> None:
        """See `Residency.pin`."""
        self.core.pin(key)
        self._note(["pin", *key])

    def unpin(self, key: ExpertKey) -> None:
        """See `Residency.unpin`."""
        self._note(["unpin", *key])
        self.core.unpin(key)

    def place(self, key: ExpertKey) -> Place:
        """See `Residency.place`."""
        return self.core.place(key)

    def residents(self, tier: int = 0) -> set[ExpertKey]:
        """See `Residency.residents`."""
        return self.core.residents(tier)

    def counters(self) -> dict[str, object]:
        """See `Residency.counters`."""
        return self.core.counters()

    def digest(self) -> int:
        """See `Residency.digest`."""
        return self.core.digest()

    def check(self) -> None:
        """See `Residency.check`."""
        self.core.check()

    @property
    def busy(self) -> bool:
        """See `Residency.busy`."""
        return self.core.busy

    @property
    def configs(self) -> tuple[TierConfig, ...]:
        """See `Residency.configs`."""
        return self.core.configs

    @property
    def promoted(self) -> list[int]:
        """See `Residency.promoted`."""
        return self.core.promoted

    @property
    def tickets(self) -> list[Ticket]:
        """See `Residency.tickets`."""
        return self.core.tickets

    def __iter__(self) -> Iterator[tuple[int, Entry]]:
        return iter(self.core)


def replay(log: EventLog) -> Residency:
    """Feed a log to a new core. Raises `ReplayError` naming the first access that decides otherwise."""
    core = Residency(log.tiers, log.layers, log.experts)
    tickets: dict[int, Ticket] = {}
    for event in log.events:
        _APPLY[event[0]](core, tickets, *event[1:])
    return core


def _acquire(
    core: Residency,
    tickets: dict[int, Ticket],
    time: int,
    layer: int,
    experts: list[int],
    tokens: list[int],
    phase: int,
    sequence: int,
    digest: int,
) -> None:
    keys = tuple(ExpertKey(layer, expert) for expert in experts)
    ticket = core.acquire(Access(time, layer, keys, tuple(tokens), Phase(phase), sequence))
    tickets[ticket.number] = ticket
    if core.digest() != digest:
        raise ReplayError(f"access {time} (layer {layer}) decided otherwise than in the recorded run")


def _release(core: Residency, tickets: dict[int, Ticket], ticket: int, layer: int, expert: int, dirty: bool) -> None:
    core.release(tickets[ticket], ExpertKey(layer, expert), dirty)


_APPLY: dict[str, Any] = {
    "acquire": _acquire,
    "release": _release,
    "abort": lambda core, tickets, ticket: core.abort(tickets[ticket]),
    "completed": lambda core, tickets, copy_id, ok: core.completed(copy_id, ok),
    "take": lambda core, tickets: core.take(),
    "prefetch": lambda core, tickets, layer, expert, displace: core.prefetch(ExpertKey(layer, expert), displace),
    "cancel": lambda core, tickets, layer, expert: core.cancel(ExpertKey(layer, expert)),
    "pin": lambda core, tickets, layer, expert: core.pin(ExpertKey(layer, expert)),
    "unpin": lambda core, tickets, layer, expert: core.unpin(ExpertKey(layer, expert)),
}
