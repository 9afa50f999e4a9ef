"""Record and replay: the log of one run's inputs to the residency core, and the core rebuilt from it without any bytes.

The core is a deterministic function of its inputs, so the same calls in the same order give the same decisions. The
digest after every access proves it. A run that does not record pays nothing: `Recorder` wraps the core.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from moetier.access import Access, ExpertKey, Part, Phase
from moetier.errors import ConfigError, MoetierError, ReplayError
from moetier.misses import Miss, MissPolicy
from moetier.residency import Residency
from moetier.tiers import Copy, Ticket, TierConfig

FORMAT = "moetier event log"
VERSION = 5
READS = (3, 4, 5)

Event = tuple[Any, ...]  # the name of a call and its arguments; tickets by number


@dataclass
class EventLog:
    """What a core was built from, and every call that can change its decisions, in order."""

    tiers: tuple[TierConfig, ...]
    layers: int
    experts: int
    events: list[Event] = field(default_factory=list)
    writeback: str = "evict"
    dirty_limit: int | None = None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON lines: a header, then one line per call."""
        header = {
            "format": FORMAT,
            "version": VERSION,
            "tiers": [asdict(tier) for tier in self.tiers],
            "layers": self.layers,
            "experts": self.experts,
            "writeback": self.writeback,
            "dirty_limit": self.dirty_limit,
            "events": len(self.events),
        }
        with open(path, "w", encoding="utf-8") as file:
            for record in (header, *self.events):
                file.write(json.dumps(record, separators=(",", ":")) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> EventLog:
        """Read a saved log. Raises `ConfigError`, naming file and line, for one that is damaged or something else."""
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise ConfigError(f"{path}: the event log cannot be read: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}, line 1: not an event log of moetier") from error
        log, count = _parse_header(f"{path}, line 1", lines[0] if lines else "")
        for number, line in enumerate(lines[1:], 2):
            try:
                log.events.append(_parse_event(json.loads(line), log.layers, log.experts))
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise ConfigError(f"{path}, line {number}: not an event: {error}") from error
        if len(log.events) != count:
            where = f"{path}, line {len(lines)}"
            raise ConfigError(f"{where}: the log ends after {len(log.events)} events, its header says {count}")
        return log


def _parse_header(where: str, line: str) -> tuple[EventLog, int]:
    try:
        header = json.loads(line)
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ConfigError(f"{where}: not an event log of moetier")
    if header.get("version") not in READS:
        known = ", ".join(map(str, READS))
        raise ConfigError(f"{where}: event log version {header.get('version')!r}; this moetier reads {known}")
    try:
        layers, experts, count = (_number(header[name]) for name in ("layers", "experts", "events"))
        tiers = tuple(TierConfig(**tier) for tier in header["tiers"])
        for tier in tiers:
            _check(tier.slots, tier.staging, tier.floor, tier.spare)
            _flag(tier.exclusive)
            _flag(tier.refill)
            _flag(tier.updates)
            if not (isinstance(tier.policy, str) and isinstance(tier.admission, str)):
                raise ValueError("policies are given by name")
        writeback, limit = "evict", None  # before version 4
        if header["version"] > 3:
            writeback, limit = header["writeback"], header["dirty_limit"]
            if not isinstance(writeback, str):
                raise ValueError("write-back policies are given by name")
            if limit is not None:
                _check(limit)
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{where}: a damaged header: {error!r}") from error
    return EventLog(tiers, layers, experts, writeback=writeback, dirty_limit=limit), count


def _number(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{value!r} is not a whole number")
    return value


def _natural(value: object) -> int:
    if _number(value) < 0:
        raise ValueError(f"{value!r} is negative")
    return _number(value)


def _check(*values: object) -> None:
    for value in values:
        _natural(value)


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{value!r} is not true or false")
    return value


def _key(value: object, layers: int, experts: int) -> ExpertKey:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"{value!r} is not a layer and an expert")
    layer, expert = _natural(value[0]), _natural(value[1])
    if layer >= layers or expert >= experts:
        raise ValueError(f"expert {expert} of layer {layer} does not exist")
    return ExpertKey(layer, expert)


def _parse_event(record: object, layers: int, experts: int) -> Event:
    if not isinstance(record, list) or not record or record[0] not in _PARSERS:
        raise ValueError("unknown call")
    name, *arguments = record
    parsers = _PARSERS[name]
    if name == "release" and len(arguments) == 3:  # before version 4
        arguments.append(False)
    if len(arguments) != len(parsers):
        raise ValueError(f"{name} has {len(parsers)} arguments, not {len(arguments)}")
    return (name, *(parse(value, layers, experts) for parse, value in zip(parsers, arguments, strict=True)))


def _access(value: object, layers: int, experts: int) -> list[Any]:
    if isinstance(value, list) and len(value) == 7:  # before version 4, when any access could change records
        value = [*value, True, int(Part.SERVE)]
    if not isinstance(value, list) or len(value) != 9:
        raise ValueError("an access has nine fields")
    time, layer, numbers, tokens, phase, sequence, mass, writes, part = value
    if not all(isinstance(items, list) for items in (numbers, tokens, mass)):
        raise ValueError("experts, tokens and mass are lists")
    if mass and (len(mass) != len(numbers) or not all(isinstance(item, float) and isfinite(item) for item in mass)):
        raise ValueError("mass is one finite number for each expert, or empty")
    for number in numbers:
        _key([layer, number], layers, experts)
    if _natural(layer) >= layers:
        raise ValueError(f"there is no layer {layer}")
    if len(set(numbers)) != len(numbers):
        raise ValueError("an expert is given twice")
    _check(*tokens)
    step = [_flag(writes), int(Part(part))]
    return [_number(time), layer, numbers, tokens, int(Phase(phase)), _number(sequence), mass, *step]


def _experts(value: object, layers: int, experts: int) -> list[int]:
    if not isinstance(value, list):
        raise ValueError(f"{value!r} is not a list of experts")
    for number in value:
        _key([0, number], layers, experts)
    return value


def _plain(parse: Callable[[object], object]) -> Callable[[object, int, int], object]:
    return lambda value, layers, experts: parse(value)


_COUNT, _BOOL = _plain(_number), _plain(_flag)
_PARSERS: dict[str, Sequence[Callable[[object, int, int], object]]] = {
    "acquire": (_access, _COUNT, _COUNT, _experts),  # the access, the ticket's number, the digest, served in place
    "release": (_COUNT, _key, _BOOL, _BOOL),  # the ticket's number, the key, whether it is dirty, or saved
    "abort": (_COUNT,),
    "completed": (_COUNT, _BOOL),
    "take": (),
    "prefetch": (_key, _BOOL, _BOOL),  # the key, whether it displaces, whether it is staged
    "cancel": (_key,),
    "cancelled": (_COUNT,),
    "clean": (_key,),
    "flush": (),
    "pin": (_key,),
    "unpin": (_key,),
}


class Recorder:
    """A residency core that remembers what it was told: the same calls as `Residency`, and `log`."""

    def __init__(self, core: Residency):
        self.core = core
        writing = self.writing = core.writing
        self.log = EventLog(core.configs, core.layers, core.experts, writeback=writing.name, dirty_limit=writing.limit)
        self._note = self.log.events.append
        self.configs, self.layers, self.experts = core.configs, core.layers, core.experts
        self.promoted, self.obsolete = core.promoted, core.obsolete  # the core only appends, the caller clears
        self.place, self.residents, self.counters = core.place, core.residents, core.counters
        self.digest, self.check, self.holds = core.digest, core.check, core.holds
        self.holding = core.holding

    def acquire(self, access: Access) -> Ticket:
        """See `Residency.acquire`."""
        ticket = self.core.acquire(access)
        experts = [key.expert for key in access.keys]
        fields = [access.time, access.layer, experts, list(access.tokens), int(access.phase), access.sequence]
        fields += [list(access.mass), access.writes, int(access.part)]
        in_place = sorted(key.expert for key in ticket.in_place)
        self._note(("acquire", fields, ticket.number, self.core.digest(), in_place))
        return ticket

    def release(self, ticket: Ticket, key: ExpertKey, dirty: bool = False, saved: bool = False) -> None:
        """See `Residency.release`."""
        self._note(("release", ticket.number, key, dirty, saved))
        self.core.release(ticket, key, dirty, saved)

    def abort(self, ticket: Ticket) -> None:
        """See `Residency.abort`."""
        self._note(("abort", ticket.number))
        self.core.abort(ticket)

    def completed(self, copy_id: int, ok: bool = True) -> None:
        """See `Residency.completed`."""
        self._note(("completed", copy_id, ok))
        self.core.completed(copy_id, ok)

    def take(self) -> list[Copy]:
        """See `Residency.take`. Logged because what was taken cannot be cancelled."""
        orders = self.core.take()
        if orders:
            self._note(("take",))
        return orders

    def prefetch(self, key: ExpertKey, displace: bool = False, staged: bool = False) -> bool:
        """See `Residency.prefetch`."""
        self._note(("prefetch", key, displace, staged))
        return self.core.prefetch(key, displace, staged)

    def cancel(self, key: ExpertKey) -> bool:
        """See `Residency.cancel`."""
        self._note(("cancel", key))
        return self.core.cancel(key)

    def cancelled(self, copy_id: int) -> None:
        """See `Residency.cancelled`."""
        self._note(("cancelled", copy_id))
        self.core.cancelled(copy_id)

    def clean(self, key: ExpertKey) -> bool:
        """See `Residency.clean`."""
        self._note(("clean", key))
        return self.core.clean(key)

    def flush(self) -> None:
        """See `Residency.flush`."""
        self._note(("flush",))
        self.core.flush()

    def pin(self, key: ExpertKey) -> None:
        """See `Residency.pin`."""
        self.core.pin(key)  # a refusal changes nothing
        self._note(("pin", key))

    def unpin(self, key: ExpertKey) -> None:
        """See `Residency.unpin`."""
        self._note(("unpin", key))
        self.core.unpin(key)

    @property
    def misses(self) -> MissPolicy | None:
        """As `Residency.misses`."""
        return self.core.misses

    @property
    def busy(self) -> bool:
        """See `Residency.busy`."""
        return self.core.busy

    @property
    def tickets(self) -> list[Ticket]:
        """See `Residency.tickets`."""
        return self.core.tickets


class _Recorded:
    """A `MissPolicy` that chooses what was chosen: a cost model measures its machine, so its answers are inputs."""

    experts: Collection[int] = ()

    def split(self, access: Access, misses: Sequence[Miss]) -> Collection[ExpertKey]:
        return [miss.key for miss in misses if miss.key.expert in self.experts]


def replay(log: EventLog, prepare: Callable[[Residency], None] | None = None) -> Residency:
    """Build the core anew and feed it the log.

    `prepare` gets the new core before the first call: to fit a policy, to show it the future, to attach witnesses.
    Raises `ReplayError`, naming the first access after which the digest is not the recorded one, or the first call that
    cannot be made.
    """
    core = Residency(log.tiers, log.layers, log.experts, None, log.writeback, log.dirty_limit)
    recorded = _Recorded()
    if prepare is not None:
        prepare(core)
    tickets: dict[int, Ticket] = {}
    served = 0
    for number, (name, *arguments) in enumerate(log.events, 1):
        if name == "acquire":
            (time, layer, experts, tokens, phase, sequence, mass, *step), ticket_number, digest, in_place = arguments
            keys = tuple(ExpertKey(layer, expert) for expert in experts)
            writes, part = step
            access = Access(time, layer, keys, tuple(tokens), Phase(phase), sequence, tuple(mass), writes, Part(part))
            if in_place and len(log.tiers) < 2:
                raise ReplayError(f"event {number}: served in place, where there is no second tier")
            recorded.experts = set(in_place)
            core.misses = recorded if in_place else None
            tickets[ticket_number] = core.acquire(access)
            served += 1
            if core.digest() != digest:
                raise ReplayError(f"event {number}: decisions differ at access {served} (time {time}, layer {layer})")
            continue
        try:
            if name in ("release", "abort"):
                arguments[0] = ticket = tickets[arguments[0]]
                if name == "release":
                    ticket.ready.remove(arguments[1])
            getattr(core, name)(*arguments)
        except (KeyError, ValueError, MoetierError) as error:
            raise ReplayError(f"event {number}, after access {served}: {name} cannot be made: {error!r}") from error
    return core
