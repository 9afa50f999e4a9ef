"""The virtual clock: times that can be worked out by hand, and what must hold for any machine."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetier import ConfigError
from moetier.access import Access, ExpertKey
from moetier.predictors import Prediction
from moetier.simulate.config import Link, Result, SimulationConfig, Timing
from moetier.simulate.links import VirtualMover
from moetier.simulate.run import simulate_accesses
from moetier.tiers import Copy, Kind, Place
from test_simulate import EXPERTS, LAYERS, make_accesses

LINK = Link(1e-6, latency=0.25)  # 1000 bytes take 1 s


def accesses_to(*needs: tuple[int, list[int]], tokens: int = 1) -> list[Access]:
    return [
        Access(time, layer, tuple(ExpertKey(layer, expert) for expert in experts), (tokens,) * len(experts))
        for time, (layer, experts) in enumerate(needs, 1)
    ]


def run(accesses: list[Access], timing: Timing, slots: int, layers: int = 2, **options: Any) -> Result:
    return simulate_accesses(accesses, layers, 4, SimulationConfig("lru", slots, timing=timing, **options))


# -- by hand ----------------------------------------------------------------------------------------------------------


def test_three_accesses() -> None:
    """Residents compute while misses load; each miss computes as it lands."""
    timing = Timing(1000, LINK, layer_seconds=0.5, expert_seconds=0.125, token_seconds=0.0625, step_seconds=1.0)
    accesses = accesses_to((0, [0, 1]), (1, [0]), (0, [1, 2]), tokens=1)
    accesses[0] = Access(1, 0, accesses[0].keys, (1, 3))
    result = run(accesses, timing, slots=2)
    # 0.0 step 1.0 layer 1.5 | load 0 till 2.75, compute till 2.875 | load 1 till 4.0, compute 3 tokens till 4.25
    # layer 4.75 | load till 6.0, compute till 6.125
    # step 7.125 layer 7.625 | compute the hit till 7.75, load till 8.875, compute till 9.0
    assert result.hits == [1, 0] and result.misses == [3, 1] and result.steps == 2
    assert result.seconds["total"] == 9.0
    assert result.seconds["compute"] == 4.25 and result.seconds["wait"] == 4.75
    assert result.seconds["disk_read"] == 5.0 and result.seconds["h2d"] == result.seconds["disk_write"] == 0.0
    assert result.bytes_moved == {"disk_read": 4000, "disk_write": 0, "h2d": 0, "d2h": 0}
    assert result.tokens_per_second == 2 / 9.0


def test_depth_overlaps_latencies_and_shares_the_bandwidth() -> None:
    seconds = {
        depth: run(accesses_to((0, [0, 1, 2])), Timing(1000, Link(1e-6, 0.25, depth)), slots=3).seconds["total"]
        for depth in (1, 2, 3)
    }
    assert seconds == {1: 3.75, 2: 3.25, 3: 3.25}


def test_waves_refill_a_slot_as_soon_as_its_expert_is_done() -> None:
    timing = Timing(1000, LINK, expert_seconds=0.125)
    result = run(accesses_to((0, [0, 1]), (0, [0, 1, 2])), timing, slots=2)
    # loads till 1.25 and 2.5, compute till 2.625 | compute expert 0 till 2.75, load 2 over it till 4.0, meanwhile 1
    assert result.seconds["total"] == 4.125 and result.seconds["compute"] == 0.625
    assert run(accesses_to((0, [0, 1])), timing, slots=1).seconds["total"] == 2.75


def test_two_tiers() -> None:
    """The copy to the device starts when the thread that waits has learnt that the host has the record."""
    timing = Timing(1000, LINK, h2d=Link(4e-6), expert_seconds=0.125)
    result = run(accesses_to((0, [0]), (0, [1]), (0, [0])), timing, slots=1, host_slots=2)
    # disk till 1.25, to the device till 1.5, compute till 1.625; the same again till 3.25; from the host till 3.5
    assert result.seconds["total"] == 3.625
    assert (sum(result.misses), sum(result.host_hits), sum(result.host_misses)) == (3, 1, 2)
    assert result.bytes_moved["disk_read"] == 2000 and result.bytes_moved["h2d"] == 3000
    assert result.seconds["h2d"] == 0.75 and result.seconds["disk_read"] == 2.5


def test_a_dirty_record_is_written_before_its_slot_is_filled() -> None:
    timing = Timing(1000, LINK, LINK, expert_seconds=0.125)
    accesses = accesses_to((0, [0]), (0, [1]))
    assert run(accesses, timing, slots=1).seconds["total"] == 2.75
    result = run(accesses, timing, slots=1, dirty=True)
    # load till 1.25, compute till 1.375, write back till 2.625, load till 3.875, compute till 4.0
    assert result.seconds["total"] == 4.0 and result.seconds["disk_write"] == 1.25
    assert result.bytes_moved["disk_write"] == 1000


def test_a_dirty_record_of_the_device_takes_two_links_home() -> None:
    timing = Timing(1000, Link(math.inf), LINK, Link(math.inf), Link(4e-6))
    result = run(accesses_to((0, [0]), (0, [1])), timing, slots=1, host_slots=2, dirty=True)
    assert result.seconds["total"] == 1.5 and result.seconds["d2h"] == 0.25 and result.seconds["disk_write"] == 1.25


def test_exclusive_tiers_copy_down_what_leaves() -> None:
    timing = Timing(1000, LINK, h2d=Link(4e-6), d2h=Link(8e-6), expert_seconds=0.125, layer_seconds=1.0)
    accesses = accesses_to(*[(0, [expert]) for expert in (0, 1, 2, 3)] * 3)
    plain = run(accesses, timing, slots=2, layers=1, host_slots=3)
    # four records in 2 + 3 slots: read once, 5 s; then one copy down and one up for each access, the former ahead
    once = run(accesses, timing, slots=2, layers=1, host_slots=3, exclusive=True, spare=1)
    assert plain.bytes_moved["disk_read"] == 12000 and once.bytes_moved["disk_read"] == 4000
    assert once.bytes_moved["d2h"] == 8000 and once.demotions == 9 and once.refills == 0, "the last is under way"
    assert once.seconds["wait"] == 4 * (1.25 + 0.25) + 8 * 0.25
    late = run(accesses, timing, slots=2, layers=1, host_slots=3, exclusive=True)
    assert late.bytes_moved["disk_read"] == 4000 and late.seconds["wait"] > once.seconds["wait"], "not ahead"


def test_what_left_is_read_again_if_the_disk_is_faster_than_the_link() -> None:
    accesses = accesses_to(*[(0, [expert]) for expert in (0, 1, 2, 3)] * 3)
    for down, refilled in ((0.25e-6, True), (4e-6, False)):
        timing = Timing(1000, LINK, h2d=Link(4e-6), d2h=Link(down), layer_seconds=10.0)
        result = run(accesses, timing, slots=2, layers=1, host_slots=2, exclusive=True, spare=1)
        assert bool(result.refills) == refilled and bool(result.demotions) != refilled
    told = run(accesses, timing, slots=2, layers=1, host_slots=2, exclusive=True, refill=True)
    assert told.refills and not told.demotions


class ExpertOneNext:
    """A predictor: expert 1 of the next layer."""

    def __init__(self, layers: int, experts: int, top_k: int):
        self.layers = layers

    def observe(self, access: Access, hidden: Any = None) -> None:
        pass

    def predict(self, access: Access, distance: int = 1) -> Iterable[Prediction]:
        return [Prediction(ExpertKey((access.layer + distance) % self.layers, 1), 1.0, distance)]


class AllNext(ExpertOneNext):
    """A predictor: experts 1, 2 and 3 of the next layer."""

    def predict(self, access: Access, distance: int = 1) -> Iterable[Prediction]:
        layer = (access.layer + distance) % self.layers
        return [Prediction(ExpertKey(layer, expert), 1.0, distance) for expert in (1, 2, 3)]


class Broken(ExpertOneNext):
    """A predictor that fails."""

    def predict(self, access: Access, distance: int = 1) -> Iterable[Prediction]:
        raise RuntimeError("no idea")


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_a_prefetch_that_is_still_on_its_way(scope: str) -> None:
    timing = Timing(1000, LINK, layer_seconds=0.5, expert_seconds=0.125)
    accesses = accesses_to((0, [0]), (1, [1]))
    result = run(accesses, timing, slots=4, predictor="test_clock:ExpertOneNext", scope=scope)
    # 0.5 | demand till 1.75, the prefetch behind it till 3.0; compute till 1.875 | layer 2.375, late: wait till 3.0
    # compute till 3.125; the prefetch for layer 0 is under way then
    assert result.seconds["total"] == 3.125 and result.seconds["wait"] == 1.875
    assert (result.hits, result.lates, result.misses) == ([0, 0], [0, 1], [1, 0])
    assert result.prefetches == {"issued": 2, "useful": 1, "late": 1, "wasted": 0, "cancelled": 0}
    assert result.bytes_moved["disk_read"] == 2000 and result.seconds["disk_read"] == 2.625
    assert run(accesses, timing, slots=4).seconds["total"] == 3.75


def test_a_prefetch_in_demand_does_not_wait_for_the_others() -> None:
    timing = Timing(1000, LINK, layer_seconds=0.5, expert_seconds=0.125)
    result = run(accesses_to((0, [0]), (1, [3])), timing, slots=8, predictor="test_clock:AllNext")
    # as above till 2.375, when expert 1 is under way till 3.0; then expert 3 till 4.25, before expert 2
    assert result.seconds["total"] == 4.375 and result.lates == [0, 1]


def test_a_predictor_that_fails_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"test_clock:Broken.*no idea"):
        run(accesses_to((0, [0]), (1, [1])), Timing(1), slots=4, predictor="test_clock:Broken")


def test_demand_overtakes_prefetches_and_promotion_moves_one_forward() -> None:
    mover = VirtualMover(Timing(1000, LINK), 1)
    home, slot = Place(1, -1), Place(0, 0)
    orders = [Copy(number, ExpertKey(0, number), home, slot, Kind.PREFETCH) for number in range(1, 4)]
    mover.start(0, orders, 0.0)
    mover.start(0, [Copy(4, ExpertKey(0, 4), home, slot, Kind.LOAD)], 0.5)
    mover.promote(0, [3])
    assert mover.next_event() == 1.25
    mover.run_until(1.24)
    assert not mover.done
    mover.run_until(100.0)
    assert [copy for _, copy in mover.done] == [1, 4, 3, 2]
    assert mover.links[0].busy_until(100.0) == 5.0 and mover.next_event() is None


# -- for any machine --------------------------------------------------------------------------------------------------

SECONDS = st.sampled_from([0.0, 1e-4, 0.003])
LINKS = st.builds(Link, st.sampled_from([0.001, 0.1, 10.0, math.inf]), SECONDS, st.integers(1, 4))
TIMINGS = st.builds(Timing, st.just(10**6), LINKS, LINKS, LINKS, LINKS, SECONDS, SECONDS, SECONDS, SECONDS)
OPTIONS = st.fixed_dictionaries(
    {
        "policy": st.sampled_from(["lru", "lfru", "horizon"]),
        "slots": st.integers(LAYERS, 18),
        "host_slots": st.sampled_from([None, LAYERS, 8, 30]),
        "scope": st.sampled_from(["global", "layer"]),
        "dirty": st.booleans(),
        "exclusive": st.booleans(),
        "spare": st.sampled_from([0, 2]),
        "predictor": st.sampled_from([None, "previous-token", "layer-transition"]),
        "prefetch_confidence": st.just(0.1),
        "timing": TIMINGS,
    }
)


@given(options=OPTIONS, seed=st.integers(0, 100))
@settings(derandomize=True, deadline=None, max_examples=60)
def test_time_and_bytes_are_conserved(options: dict[str, Any], seed: int) -> None:
    if options["host_slots"] is None or not options["exclusive"]:
        options |= {"exclusive": False, "spare": 0}
    config = SimulationConfig(**options, prefetch_displace=options["predictor"] is not None)
    timing = options["timing"]
    accesses = make_accesses(seed, 45)
    result = simulate_accesses(accesses, LAYERS, EXPERTS, config)
    found = zip(result.hits, result.lates, result.misses, strict=True)
    assert [sum(counts) for counts in found] == result.needs
    seconds = result.seconds
    assert seconds["total"] == pytest.approx(seconds["compute"] + seconds["wait"])
    more = sum(count - 1 for access in accesses for count in access.tokens)
    fixed = len(accesses) * timing.layer_seconds + result.steps * timing.step_seconds
    math_seconds = sum(result.needs) * timing.expert_seconds + more * timing.token_seconds
    assert seconds["compute"] == pytest.approx(fixed + math_seconds)
    for name, link in zip(result.bytes_moved, ("disk_read", "disk_write", "h2d", "d2h"), strict=True):
        assert name == link and result.bytes_moved[name] % 10**6 == 0
        in_bytes = result.bytes_moved[name] / (getattr(timing, name).gbps * 1e9)
        assert seconds["total"] >= seconds[name] * (1 - 1e-9) and seconds[name] >= in_bytes * (1 - 1e-9)
    if config.predictor is None:
        read = result.misses if config.host_slots is None else result.host_misses
        read_ahead = result.bytes_moved["disk_read"] - sum(read) * 10**6
        assert read_ahead <= result.refills * 10**6 and (read_ahead == 0 or result.refills)
        assert sum(result.lates) == 0
    if not config.dirty:
        assert result.bytes_moved["disk_write"] == 0 and result.bytes_moved["d2h"] <= result.demotions * 10**6
    if config.host_slots is not None:
        below = [hits + misses for hits, misses in zip(result.host_hits, result.host_misses, strict=True)]
        assert below == result.misses
    counts = result.prefetches
    assert counts["useful"] + counts["wasted"] + counts.get("cancelled", 0) <= counts["issued"]
    assert counts["late"] == sum(result.lates) <= counts["useful"]
    again = simulate_accesses(accesses, LAYERS, EXPERTS, config)
    again.wall_seconds = result.wall_seconds
    assert again == result


@given(seed=st.integers(0, 100), slots=st.integers(2, 20), host=st.sampled_from([None, 20]))
@settings(derandomize=True, deadline=None, max_examples=30)
def test_nobody_waits_for_links_that_take_no_time(seed: int, slots: int, host: int | None) -> None:
    free = Link(math.inf)
    timing = Timing(10**6, free, free, free, free, layer_seconds=1e-3, expert_seconds=1e-4)
    config = SimulationConfig("lru", slots, host_slots=host, timing=timing)
    result = simulate_accesses(make_accesses(seed, 60), LAYERS, EXPERTS, config)
    assert result.seconds["wait"] == 0.0 and result.seconds["total"] == result.seconds["compute"] > 0
    assert sum(result.lates) == 0


def test_faster_links_take_less_time() -> None:
    accesses = make_accesses(3, 200)
    totals = [
        simulate_accesses(
            accesses,
            LAYERS,
            EXPERTS,
            SimulationConfig("lru", 8, timing=Timing(10**6, Link(gbps, 1e-4), layer_seconds=1e-3)),
        ).seconds["total"]
        for gbps in (0.1, 1.0, 10.0)
    ]
    assert totals == sorted(totals, reverse=True) and totals[0] > 2 * totals[2]


@pytest.mark.parametrize("link", [Link(0.0), Link(-1.0), Link(1.0, -1e-3), Link(1.0, 0.0, 0), Link(math.nan)])
def test_links_that_cannot_be(link: Link) -> None:
    with pytest.raises(ConfigError, match="disk_read"):
        run(accesses_to((0, [0])), Timing(1000, link), slots=2)
    with pytest.raises(ConfigError, match="record_nbytes"):
        run(accesses_to((0, [0])), Timing(0), slots=2)
