"""The residency core under random calls: invariants after every step, and bytes modelled as version numbers.

The model is a strict mover: a copy reads its source when it starts and the source must not change until the copy ends;
a target is garbage from start to end, and stays so if the copy fails. Whoever leases a record, or copies it, must find
its newest version. So a slot reused too early, a stale home or a lost update all show at once.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from moetier.access import Access, ExpertKey, Phase
from moetier.errors import CapacityError
from moetier.eventlog import Recorder, replay
from moetier.policies import ADMISSIONS, POLICIES
from moetier.residency import Residency
from moetier.tiers import Copy, Place, State, Ticket, TierConfig

LAYERS, EXPERTS = 3, 4
KEYS = [ExpertKey(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]
GARBAGE = None

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
        assert self.read(copy.source, copy.key) == content, f"the source of {copy} changed under it"
        if ok:
            self.write(copy.target, copy.key, content)
        self.core.completed(copy_id, ok)

    def use(self, key: ExpertKey) -> None:
        content = self.slots.get(self.core.place(key))
        assert content == (key, self.newest[key]), f"a lease on {key} shows {content}, newest is {self.newest[key]}"

    def update(self, key: ExpertKey) -> None:
        self.newest[key] += 1
        self.slots[self.core.place(key)] = (key, self.newest[key])


def tier_configs(top: bool) -> st.SearchStrategy[TierConfig]:
    def build(slots: int, staging: int, policy: str, admission: str, floor: int) -> TierConfig:
        return TierConfig(slots, policy, admission, min(staging, slots - 1), floor)

    return st.builds(
        build,
        st.sampled_from([1, 2, 3, 4, 6, 16] if top else [1, 2, 3, 5, 8, 16]),
        st.sampled_from([0, 0, 1, 2, 3]),
        st.sampled_from(sorted(POLICIES)),
        st.sampled_from(sorted(ADMISSIONS)),
        st.sampled_from([0, 0, 1, 2]),
    )


class CoreMachine(RuleBasedStateMachine):
    """Several live accesses over one to three tiers; copies end in any order, some fail."""

    def __init__(self) -> None:
        super().__init__()
        self.time = 0
        self.live: list[Ticket] = []
        self.held: list[tuple[Ticket, ExpertKey]] = []  # popped from ready, not released
        self.digests: list[int] = []

    @initialize(top=tier_configs(True), lower=st.lists(tier_configs(False), max_size=2))
    def build(self, top: TierConfig, lower: list[TierConfig]) -> None:
        self.core = Recorder(Residency([top, *lower], LAYERS, EXPERTS))
        self.memory = Memory(self.core)

    # -- rules --------------------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.live) < 3)
    @rule(layer=st.integers(0, LAYERS - 1), experts=st.sets(st.integers(0, EXPERTS - 1)), phase=st.sampled_from(Phase))
    def acquire(self, layer: int, experts: set[int], phase: Phase) -> None:
        self.time += 1
        access = Access(self.time, layer, tuple(ExpertKey(layer, expert) for expert in sorted(experts)), phase=phase)
        needed_here = {key for key in access.keys if key in self.core.residents()}
        ticket = self.core.acquire(access)
        assert needed_here <= ticket.leased, "a resident that the access needs was not leased"
        self.digests.append(self.core.digest())
        if not ticket.done:
            self.live.append(ticket)

    @precondition(lambda self: any(ticket.ready for ticket in self.live))
    @rule(data=st.data())
    def use(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from([ticket for ticket in self.live if ticket.ready]))
        key = ticket.ready.popleft()
        self.memory.use(key)
        self.held.append((ticket, key))

    @precondition(lambda self: self.held)
    @rule(data=st.data(), dirty=st.booleans())
    def release(self, data: st.DataObject, dirty: bool) -> None:
        ticket, key = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.memory.use(key)
        if dirty:
            if any(other == key for _, other in self.held):
                return self._give_back(ticket, key, False)  # two users must not both change a record
            self.memory.update(key)
        self._give_back(ticket, key, dirty)

    def _give_back(self, ticket: Ticket, key: ExpertKey, dirty: bool) -> None:
        self.core.release(ticket, key, dirty)
        if ticket.done:
            self.live.remove(ticket)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self._abort(data.draw(st.sampled_from(self.live)))

    def _abort(self, ticket: Ticket) -> None:
        self.core.abort(ticket)
        self.live.remove(ticket)
        self.held = [(other, key) for other, key in self.held if other is not ticket]

    @rule()
    def start(self) -> None:
        self.memory.start()

    @precondition(lambda self: self.memory.flights)
    @rule(data=st.data(), ok=st.sampled_from([True, True, True, False]))
    def complete(self, data: st.DataObject, ok: bool) -> None:
        self.memory.end(data.draw(st.sampled_from(sorted(self.memory.flights))), ok)

    @rule(key=st.sampled_from(KEYS), displace=st.booleans())
    def prefetch(self, key: ExpertKey, displace: bool) -> None:
        before = self.core.residents()
        accepted = self.core.prefetch(key, displace)
        assert displace or before <= self.core.residents(), "a prefetch displaced something"
        assert not (accepted and key in before)

    @rule(key=st.sampled_from(KEYS))
    def cancel(self, key: ExpertKey) -> None:
        self.core.cancel(key)

    @rule(key=st.sampled_from(KEYS))
    def pin(self, key: ExpertKey) -> None:
        try:
            self.core.pin(key)
        except CapacityError as error:
            assert error.minimum_slots > self.core.configs[0].slots

    @rule(key=st.sampled_from(KEYS))
    def unpin(self, key: ExpertKey) -> None:
        self.core.unpin(key)

    # -- what must hold -----------------------------------------------------------------------------------------------

    @invariant()
    def consistent(self) -> None:
        if hasattr(self, "core"):
            self.core.check()
            for tier in self.core.core._tiers:
                for key, entry in tier.entries.items():
                    if entry.state is State.READY:
                        assert self.memory.slots[entry.place] == (key, self.memory.newest[key]), f"old bytes of {key}"

    def drain(self) -> None:
        """Serve everybody; must end whatever state the core is in."""
        for _ in range(1000):
            self.memory.start()
            for copy_id in sorted(self.memory.flights):
                self.memory.end(copy_id, True)
            for ticket, key in self.held:
                self._give_back(ticket, key, False)
            self.held.clear()
            for ticket in list(self.live):
                while ticket.ready:
                    key = ticket.ready.popleft()
                    self.memory.use(key)
                    self._give_back(ticket, key, False)
                if ticket.failed is not None:
                    self._abort(ticket)
            if not self.live and not self.core.busy:
                return
        raise AssertionError(f"no progress: {len(self.live)} accesses are not served")

    def teardown(self) -> None:
        if not hasattr(self, "core"):
            return
        self.drain()
        self.consistent()
        assert not self.core.tickets and all(not tier.transients for tier in self.core.core._tiers)
        for key in KEYS:
            dirty = any(e.dirty for tier in self.core.core._tiers for k, e in tier.entries.items() if k == key)
            assert dirty or self.memory.home[key] == (key, self.memory.newest[key]), f"an update of {key} was lost"
        counts = self.core.counters()["prefetches"]
        unused = sum(entry.prefetched for entry in self.core.core._top.entries.values())
        assert counts["issued"] == counts["useful"] + counts["wasted"] + unused
        self.serve_everything()
        again = replay(self.core.log)
        assert again.digest() == self.core.digest()
        again.check()

    def serve_everything(self) -> None:
        """Whatever happened before, every record can still be had, and is the newest."""
        for layer in range(LAYERS):
            self.acquire_all(layer)
        self.consistent()

    def acquire_all(self, layer: int) -> None:
        self.time += 1
        ticket = self.core.acquire(
            Access(self.time, layer, tuple(key for key in KEYS if key.layer == layer), phase=Phase.PREFILL)
        )
        self.live.append(ticket)
        self.drain()


CoreMachine.TestCase.settings = settings(
    max_examples=120,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.timeout(60)
class TestCoreMachine(CoreMachine.TestCase):
    """Picked up by pytest; `settings` above keep it short and repeatable."""
