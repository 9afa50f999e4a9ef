"""The residency core under random calls: invariants after every step, and bytes modelled as version numbers.

The model is a strict mover: a copy reads its source when it starts and the source must not change until the copy ends;
a target is garbage from start to end, and stays so if the copy fails. Whoever leases a record, or copies it, must find
its newest version. So a slot reused too early, a stale home or a lost update all show at once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from moetier.access import Access, ExpertKey, Part, Phase
from moetier.errors import CapacityError
from moetier.eventlog import Recorder, replay
from moetier.misses import Miss
from moetier.policies import ADMISSIONS
from moetier.residency import Residency
from moetier.tiers import HOMEWARD, Copy, Entry, Kind, Place, State, Ticket, TierConfig
from prepared import ONLINE

LAYERS, EXPERTS = 3, 4
KEYS = [ExpertKey(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]
GARBAGE = None
WRITE_BACK = ["evict", "writethrough", "periodic(every=3)", "periodic(share=0.3)"]

Content = tuple[ExpertKey, int] | None


class Memory:
    """Slots and home hold versions; copies in flight move them."""

    def __init__(self, core: Residency | Recorder):
        self.core = core
        self.home_tier = len(core.configs)
        self.home: dict[ExpertKey, Content] = {key: (key, 0) for key in KEYS}
        self.slots: dict[Place, Content] = {}
        self.newest = dict.fromkeys(KEYS, 0)
        self.flights: dict[int, tuple[Copy, Content]] = {}
        self.torn: set[int] = set()

    def read(self, place: Place, key: ExpertKey) -> Content:
        return self.home[key] if place.tier == self.home_tier else self.slots.get(place)

    def write(self, place: Place, key: ExpertKey, content: Content) -> None:
        if place.tier == self.home_tier:
            self.home[key] = content
        else:
            self.slots[place] = content

    def start(self) -> None:
        """Take the orders; everything starts at once."""
        for copy in self.core.take():
            content = self.read(copy.source, copy.key)
            assert content == (copy.key, self.newest[copy.key]), f"{copy} reads {content}"
            for other, _ in self.flights.values():
                if copy.target.tier < self.home_tier:
                    assert copy.target not in (other.source, other.target), f"{copy} overruns {other}"
                assert copy.source.tier == self.home_tier or copy.source != other.target
            self.write(copy.target, copy.key, GARBAGE)
            self.flights[copy.id] = (copy, content)

    def end(self, copy_id: int, ok: bool) -> None:
        copy, content = self.flights.pop(copy_id)
        unchanged = self.read(copy.source, copy.key) == content
        assert unchanged or (copy_id in self.torn and copy.kind not in HOMEWARD), (
            f"the source of {copy} changed under it"
        )
        if ok and copy_id not in self.torn:
            self.write(copy.target, copy.key, content)
        self.core.completed(copy_id, ok)

    def use(self, key: ExpertKey, ticket: Ticket) -> None:
        content = self.slots.get(self.core.place(key, ticket))
        assert content == (key, self.newest[key]), f"a lease on {key} shows {content}, newest is {self.newest[key]}"

    def update(self, key: ExpertKey, ticket: Ticket) -> None:
        self.newest[key] += 1
        place = self.core.place(key, ticket)
        self.slots[place] = (key, self.newest[key])
        for copy_id, (copy, _) in self.flights.items():
            if copy.source == place:  # read while it was changed: half old, half new
                self.torn.add(copy_id)


class AtWhim:
    """A miss policy that chooses now these, now those."""

    def split(self, access: Access, misses: Sequence[Miss]) -> Collection[ExpertKey]:
        whim = access.time * 7919 % 16
        return [miss.key for miss in misses if whim == 15 or whim >> miss.key.expert % 4 & 1]


class Run:
    """A core, its memory, and several users; the calls below are what happens to them."""

    def __init__(
        self, tiers: list[TierConfig], in_place: bool = False, writeback: str = "evict", limit: int | None = None
    ):
        misses = AtWhim() if in_place and len(tiers) > 1 else None
        self.core = Recorder(Residency(tiers, LAYERS, EXPERTS, misses, writeback, limit))
        self.memory = Memory(self.core)
        self.time = 0
        self.live: list[Ticket] = []
        self.held: list[tuple[Ticket, ExpertKey]] = []  # popped from ready, not released

    def acquire(
        self, layer: int, experts: Iterable[int], phase: Phase, writes: bool = True, part: Part = Part.SERVE
    ) -> None:
        self.time += 1
        keys = tuple(ExpertKey(layer, expert) for expert in sorted(experts))
        access = Access(self.time, layer, keys, phase=phase, writes=writes, part=part)
        below = self.core.core.updates_below and part is Part.UPDATE
        needed_here = {key for key in access.keys if key in self.core.residents(1 if below else 0)}
        ticket = self.core.acquire(access)
        assert needed_here <= ticket.leased, "a resident that the access needs was not leased"
        if not ticket.done:
            self.live.append(ticket)

    def use(self, ticket: Ticket) -> None:
        key = ticket.ready.popleft()
        self.memory.use(key, ticket)
        self.held.append((ticket, key))

    def release(self, index: int, dirty: bool, saved: bool = False) -> None:
        ticket, key = self.held.pop(index)
        self.memory.use(key, ticket)
        dirty = dirty and all(other != key for _, other in self.held)  # two users must not both change a record
        dirty = dirty and ticket.access.writes
        dirty = dirty and (not self.core.core.updates_below or key in ticket.in_place)
        saved = dirty and saved
        if dirty:
            self.memory.update(key, ticket)
        if saved:
            self.memory.home[key] = (key, self.memory.newest[key])
        self.core.release(ticket, key, dirty and not saved, saved)
        if ticket.done:
            self.live.remove(ticket)

    def abort(self, ticket: Ticket) -> None:
        self.core.abort(ticket)
        self.live.remove(ticket)
        self.held = [(other, key) for other, key in self.held if other is not ticket]

    def prefetch(self, key: ExpertKey, displace: bool, staged: bool) -> None:
        before = self.core.residents()
        core = self.core.core
        ahead = {Part.FORWARD: 1, Part.BACKWARD: -1}.get(core._last.part)

        def kept(key: ExpertKey, entry: Entry) -> bool:
            if entry.leases or ahead is None:
                return bool(entry.leases) or entry.round == core._round
            return entry.prefetched or key.layer == core._last.layer + ahead  # the pass has done with the others

        new = {key for key, entry in core._top.entries.items() if kept(key, entry)}
        accepted = self.core.prefetch(key, displace, staged)
        after = self.core.residents()
        assert (displace and not staged) or before <= after, "a prefetch displaced something"
        assert before & new <= after, "a prefetch displaced what is live or just loaded"
        assert not (accepted and key in before)
        assert not staged or not accepted or core._top.entries[key].transient

    def withdraw(self, random: Random) -> None:
        """What a mover does with the copies that nobody wants: it may have begun them, or not."""
        obsolete = [copy_id for copy_id in dict.fromkeys(self.core.obsolete) if copy_id in self.memory.flights]
        self.core.obsolete.clear()
        for copy_id in obsolete:
            if random.random() < 0.7:
                del self.memory.flights[copy_id]
                self.core.cancelled(copy_id)

    def clean(self, key: ExpertKey) -> None:
        before = {copy.id for copy in self.core.core._orders.copies.values()}
        accepted = self.core.clean(key)
        new = [copy for copy in self.core.core._orders.copies.values() if copy.id not in before]
        assert [(copy.key, copy.kind) for copy in new] == [(key, Kind.CLEAN)] * accepted

    def flush(self) -> None:
        """Everything dirty goes home and stays, as soon as nobody who may change it holds it."""
        self.drain()
        dirty, residents = set(self.core.writing.dirty), self.core.residents()
        self.core.flush()
        self.drain()
        assert not self.core.writing.flushing and not self.core.writing.dirty, "a flush left something"
        assert residents <= self.core.residents(), "a flush evicted something"
        assert all(self.memory.home[key] == (key, self.memory.newest[key]) for key in dirty)

    def pin(self, key: ExpertKey) -> None:
        try:
            self.core.pin(key)
        except CapacityError as error:
            assert error.minimum_slots > self.core.configs[0].slots

    def check(self) -> None:
        self.core.check()
        for tier in self.core.core._tiers:
            for key, entry in tier.entries.items():
                if entry.state is State.READY:
                    assert self.memory.slots[entry.place] == (key, self.memory.newest[key]), f"old bytes of {key}"

    def drain(self) -> None:
        """Serve everybody; must end whatever state the core is in."""
        for _ in range(200):
            self.memory.start()
            for copy_id in sorted(self.memory.flights):
                self.memory.end(copy_id, True)
            while self.held:
                self.release(0, False)
            for ticket in list(self.live):
                while ticket.ready:
                    self.use(ticket)
                    self.release(0, False)
                if ticket.failed is not None:
                    self.abort(ticket)
            if not self.live and not self.core.busy:
                return
        raise AssertionError(f"no progress: {len(self.live)} accesses are not served")

    def finish(self) -> None:
        """Nothing hangs, nothing is lost, every record can still be had, and a replay decides the same."""
        self.drain()
        self.check()
        staged = {key for key, entry in self.core.core._top.entries.items() if entry.transient}
        for key in staged:
            assert not self.core.cancel(key), "its bytes are there"
        assert not self.core.tickets and all(not tier.transients for tier in self.core.core._tiers)
        tiers = self.core.core._tiers
        top = tiers[0].entries
        for key in KEYS:
            dirty = any(key in tier.entries and tier.entries[key].dirty for tier in tiers)
            assert dirty or self.memory.home[key] == (key, self.memory.newest[key]), f"an update of {key} was lost"
        self.flush()
        counts = self.core.counters()["prefetches"]
        assert counts["issued"] == counts["useful"] + counts["wasted"] + sum(e.prefetched for e in top.values())
        for layer in range(LAYERS):
            self.acquire(layer, range(EXPERTS), Phase.PREFILL)
            self.drain()
            self.check()
        again = replay(self.core.log)
        again.check()
        assert again.digest() == self.core.digest() and again.residents() == self.core.residents()


def tier_configs(top: bool) -> st.SearchStrategy[TierConfig]:
    return st.builds(
        lambda slots, staging, *rest: TierConfig(slots, rest[0], rest[1], min(staging, slots - 1), rest[2]),
        st.sampled_from([1, 2, 3, 4, 6, 16] if top else [1, 2, 3, 5, 8, 16]),
        st.sampled_from([0, 0, 1, 2, 3]),
        st.sampled_from(ONLINE),
        st.sampled_from(sorted(ADMISSIONS)),
        st.sampled_from([0, 0, 1, 2]),
    )


class CoreMachine(RuleBasedStateMachine):
    """Several live accesses over one to three tiers; copies end in any order, some fail."""

    @initialize(
        top=tier_configs(True),
        lower=st.lists(tier_configs(False), max_size=2),
        in_place=st.booleans(),
        second=st.sampled_from(
            [{}, {"updates": True}, {"exclusive": True, "spare": 2}, {"exclusive": True, "refill": True}]
        ),
        writeback=st.sampled_from(WRITE_BACK),
        limit=st.sampled_from([None, None, 1, 3]),
    )
    def build(
        self,
        top: TierConfig,
        lower: list[TierConfig],
        in_place: bool,
        second: dict[str, Any],
        writeback: str,
        limit: int | None,
    ) -> None:
        if lower:
            lower[0] = replace(lower[0], **second)
        self.run = Run([top, *lower], in_place, writeback, limit)

    @precondition(lambda self: len(self.run.live) < 3)
    @rule(
        layer=st.integers(0, LAYERS - 1),
        experts=st.sets(st.integers(0, EXPERTS - 1)),
        phase=st.sampled_from(Phase),
        writes=st.booleans(),
        part=st.sampled_from(Part),
    )
    def acquire(self, layer: int, experts: set[int], phase: Phase, writes: bool, part: Part) -> None:
        self.run.acquire(layer, experts, phase, writes, part)

    @precondition(lambda self: any(ticket.ready for ticket in self.run.live))
    @rule(data=st.data())
    def use(self, data: st.DataObject) -> None:
        self.run.use(data.draw(st.sampled_from([ticket for ticket in self.run.live if ticket.ready])))

    @precondition(lambda self: self.run.held)
    @rule(data=st.data(), dirty=st.booleans(), saved=st.sampled_from([False, False, True]))
    def release(self, data: st.DataObject, dirty: bool, saved: bool) -> None:
        self.run.release(data.draw(st.integers(0, len(self.run.held) - 1)), dirty, saved)

    @precondition(lambda self: self.run.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.run.abort(data.draw(st.sampled_from(self.run.live)))

    @rule()
    def start(self) -> None:
        self.run.memory.start()

    @precondition(lambda self: self.run.memory.flights)
    @rule(data=st.data(), ok=st.sampled_from([True, True, True, False]))
    def complete(self, data: st.DataObject, ok: bool) -> None:
        self.run.memory.end(data.draw(st.sampled_from(sorted(self.run.memory.flights))), ok)

    @rule(key=st.sampled_from(KEYS), displace=st.booleans(), staged=st.booleans())
    def prefetch(self, key: ExpertKey, displace: bool, staged: bool) -> None:
        self.run.prefetch(key, displace, staged)

    @rule(key=st.sampled_from(KEYS), seed=st.integers(0, 3))
    def cancel(self, key: ExpertKey, seed: int) -> None:
        self.run.core.cancel(key)
        self.run.withdraw(Random(seed))

    @rule(key=st.sampled_from(KEYS))
    def clean(self, key: ExpertKey) -> None:
        self.run.clean(key)

    @rule()
    def flush(self) -> None:
        self.run.core.flush()

    @rule(key=st.sampled_from(KEYS))
    def pin(self, key: ExpertKey) -> None:
        self.run.pin(key)

    @rule(key=st.sampled_from(KEYS))
    def unpin(self, key: ExpertKey) -> None:
        self.run.core.unpin(key)

    @invariant()
    def consistent(self) -> None:
        if hasattr(self, "run"):
            self.run.check()

    def teardown(self) -> None:
        if hasattr(self, "run"):
            self.run.finish()


CoreMachine.TestCase.settings = settings(
    max_examples=80, stateful_step_count=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


@pytest.mark.timeout(60)
class TestCoreMachine(CoreMachine.TestCase):
    """Hypothesis shrinks what it finds here to a few calls; the test below goes through far more of them."""


def random_tiers(random: Random) -> list[TierConfig]:
    tiers = []
    for _ in range(random.choice([1, 1, 2, 2, 3])):
        slots = random.choice([1, 2, 3, 4, 6, 16])
        staging = random.choice([0, 0, 1, 2])
        policy, admission = random.choice(ONLINE), random.choice(sorted(ADMISSIONS))
        tiers.append(TierConfig(slots, policy, admission, min(staging, slots - 1), random.choice([0, 0, 1, 2])))
    if len(tiers) > 1 and random.random() < 0.6:
        tiers[1] = replace(tiers[1], exclusive=True, spare=random.choice([0, 1, 2, 8]), refill=random.random() < 0.2)
    elif len(tiers) > 1:
        tiers[1] = replace(tiers[1], updates=random.random() < 0.7)
    return tiers


def random_step(run: Run, random: Random) -> None:
    key = random.choice(KEYS)
    kind = random.choices(
        [
            "acquire",
            "use",
            "release",
            "start",
            "complete",
            "abort",
            "prefetch",
            "cancel",
            "pin",
            "unpin",
            "clean",
            "flush",
        ],
        [10, 20, 20, 14, 24, 1, 6, 4, 2, 2, 3, 1],
    )[0]
    ready = [ticket for ticket in run.live if ticket.ready]
    if kind == "acquire" and len(run.live) < 3:
        layer = key.layer if random.random() < 0.5 else run.time % LAYERS
        experts = random.sample(range(EXPERTS), random.randint(1, EXPERTS))
        part = random.choice(list(Part)) if random.random() < 0.5 else Part.SERVE
        if run.core.core.updates_below and random.random() < 0.4:
            part = Part.UPDATE
        run.acquire(layer, experts, random.choice(list(Phase)), random.random() < 0.6, part)
    elif kind == "use" and ready:
        run.use(random.choice(ready))
    elif kind == "release" and run.held:
        run.release(random.randrange(len(run.held)), random.random() < 0.4, random.random() < 0.15)
    elif kind == "start":
        run.memory.start()
    elif kind == "complete" and run.memory.flights:
        run.memory.end(random.choice(sorted(run.memory.flights)), random.random() < 0.88)
    elif kind == "abort" and run.live:
        run.abort(random.choice(run.live))
    elif kind == "prefetch":
        run.prefetch(key, random.random() < 0.5, random.random() < 0.4)
    elif kind == "cancel":
        run.core.cancel(key)
        if random.random() < 0.8:
            run.withdraw(random)
    elif kind == "pin":
        run.pin(key)
    elif kind == "unpin":
        run.core.unpin(key)
    elif kind == "clean":
        run.clean(key)
    elif kind == "flush":
        run.core.flush()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("block", range(8))
def test_random_interleavings(block: int) -> None:
    """Also proves the replay: `finish` compares digests."""
    for seed in range(40 * block, 40 * block + 40):
        random = Random(seed)
        limit = random.choice([None, None, 1, 3])
        run = Run(random_tiers(random), in_place=seed % 2 == 1, writeback=random.choice(WRITE_BACK), limit=limit)
        try:
            for _ in range(100):
                random_step(run, random)
                run.check()
            run.finish()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, {run.core.configs}: {error}") from error
