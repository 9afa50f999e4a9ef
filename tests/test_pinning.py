"""Profiles and warm pinning: what is counted, what is pinned, and that the guard lets go when pins hurt."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from moetier.access import Access, ExpertKey
from moetier.cli import app
from moetier.errors import ConfigError
from moetier.eventlog import Recorder, replay
from moetier.pinning import GhostCore, WarmPinning, choose, load_profile
from moetier.profile import Profile
from moetier.residency import Residency
from moetier.tiers import TierConfig
from moetier.trace import Trace
from moetier.trace.synthetic import zipf_markov

LAYERS, EXPERTS, TOP_K = 3, 16, 2


def serve(core: Residency | Recorder, access: Access) -> int:
    """One access to its end; its hits."""
    ticket = core.acquire(access)
    hits = len(ticket.ready)
    while not ticket.done:
        for copy in core.take():
            core.completed(copy.id)
        while ticket.ready:
            core.release(ticket, ticket.ready.popleft())
    return hits


def run(accesses: Sequence[Access], slots: int, policy: str = "lru", **options: Any) -> tuple[int, WarmPinning | None]:
    """All hits, and the pinning if options are given."""
    core = Residency([TierConfig(slots, policy)], LAYERS, EXPERTS)
    pinning = WarmPinning(core, LAYERS, EXPERTS, slots, TOP_K, **options) if options else None
    hits = 0
    for access in accesses:
        found = serve(core, access)
        hits += found
        if pinning is not None:
            pinning.observe(access, found)
        core.check()
    return hits, pinning


def hot_cold(steps: int, hot: Sequence[int], seed: int) -> list[list[int]]:
    """Per step, two experts: with chance 0.5 the hot ones, else any two: popularity without memory."""
    rng = np.random.default_rng(seed)
    return [
        sorted(hot) if rng.random() < 0.5 else sorted(rng.choice(EXPERTS, TOP_K, replace=False).tolist())
        for _ in range(steps)
    ]


def accesses_of(steps: Sequence[Sequence[int]]) -> list[Access]:
    """The same experts in every layer."""
    return [
        Access(1 + LAYERS * number + layer, layer, tuple(ExpertKey(layer, expert) for expert in experts))
        for number, experts in enumerate(steps)
        for layer in range(LAYERS)
    ]


# -- profiles ----------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 1000), tokens=st.integers(1, 40))
@settings(derandomize=True, deadline=None, max_examples=25)
def test_a_profile_counts_what_the_trace_says(seed: int, tokens: int) -> None:
    trace = zipf_markov(tokens, LAYERS, EXPERTS, TOP_K, sequences=1, seed=seed)
    profile = Profile.from_trace(trace)
    assert profile.tokens == tokens
    assert profile.accesses.tolist() == [tokens] * LAYERS
    for layer in range(LAYERS):
        counts = np.bincount(trace.experts[:, layer].ravel(), minlength=EXPERTS)
        assert profile.uses[layer].tolist() == counts.tolist()
    assert trace.weights is not None
    assert profile.mass.sum() == pytest.approx(trace.weights.sum(), rel=1e-3)
    top = profile.top(0, 3)
    assert [profile.uses[0, expert] for expert in top] == sorted(profile.uses[0], reverse=True)[: len(top)]


def test_a_saved_profile_is_the_same(tmp_path: Path) -> None:
    profile = Profile.from_trace(zipf_markov(50, LAYERS, EXPERTS, TOP_K, sequences=2, seed=1), "a source")
    profile.model, profile.fingerprint, profile.texts = "a model", "f00", ["one", "two"]
    profile.save(tmp_path / "p.json")
    again = Profile.load(tmp_path / "p.json")
    for name in ("layers", "experts", "model", "fingerprint", "source", "texts", "tokens"):
        assert getattr(again, name) == getattr(profile, name)
    assert (again.uses == profile.uses).all() and (again.accesses == profile.accesses).all()
    assert np.allclose(again.mass, profile.mass, atol=1e-6)
    assert [path.name for path in tmp_path.iterdir()] == ["p.json"]


def damaged(change: Callable[[dict[str, Any]], object]) -> Callable[[str], str]:
    def apply(text: str) -> str:
        record = json.loads(text)
        change(record)
        return json.dumps(record)

    return apply


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text[: len(text) // 2], "not a profile"),
        (lambda text: "[1, 2]", "not a profile"),
        (damaged(lambda r: r.update(version=9)), "profile version 9; this moetier reads 1"),
        (damaged(lambda r: r.pop("uses")), "damaged profile .*uses"),
        (damaged(lambda r: r["uses"].pop()), "damaged profile"),
        (damaged(lambda r: r["uses"][0].__setitem__(0, -1)), "uses are not counts"),
        (damaged(lambda r: r["uses"][0].__setitem__(0, 0.5)), "uses are not counts"),
        (damaged(lambda r: r.update(layers="3")), "layers is '3'"),
        (damaged(lambda r: r["mass"][0].__setitem__(0, "x")), "damaged profile"),
        (damaged(lambda r: r.update(layers=4)), "not those of 4 layers"),
    ],
)
def test_a_damaged_profile(change: Callable[[str], str], words: str, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    Profile.from_accesses(accesses_of([[0, 1]]), LAYERS, EXPERTS).save(path)
    path.write_text(change(path.read_text()))
    with pytest.raises(ConfigError, match=words) as told:
        Profile.load(path)
    assert str(told.value).startswith(f"{path}: ")


def test_profiles_that_cannot_be_used(tmp_path: Path) -> None:
    profile = Profile.from_accesses(accesses_of([[0, 1]]), LAYERS, EXPERTS)
    profile.fingerprint = "one"
    path = tmp_path / "p.json"
    profile.save(path)
    with pytest.raises(ConfigError, match=rf"{path}: a profile of 3 layers x 16 experts, but the model has 3 x 8"):
        load_profile(path, LAYERS, 8)
    with pytest.raises(ConfigError, match="another checkpoint of the same shape"):
        load_profile(path, LAYERS, EXPERTS, "two")
    assert load_profile(path, LAYERS, EXPERTS, "one").tokens == load_profile(path, LAYERS, EXPERTS).tokens
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        Profile.load(tmp_path / "none.json")
    with pytest.raises(ConfigError, match="cannot be written"):
        profile.save(tmp_path / "no" / "p.json")


# -- what is pinned ----------------------------------------------------------------------------------------------------


@given(slots=st.integers(1, 60), per_layer=st.integers(0, 6), seed=st.integers(0, 99))
@settings(derandomize=True, deadline=None, max_examples=60)
def test_never_more_than_half_and_the_most_used_first(slots: int, per_layer: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    profile = Profile(LAYERS, EXPERTS)
    profile.uses[:] = rng.integers(0, 5, (LAYERS, EXPERTS))
    profile.accesses[:] = rng.integers(1, 9, LAYERS)
    keys = choose(profile, slots, per_layer)
    assert len(keys) == len(set(keys)) <= slots // 2
    for layer in range(LAYERS):
        pinned = [key.expert for key in keys if key.layer == layer]
        assert len(pinned) <= per_layer
        others = set(range(EXPERTS)) - set(pinned)
        if pinned:
            assert min(profile.uses[layer, pinned]) >= 1
            assert (
                min(profile.uses[layer, pinned]) >= max((profile.uses[layer, expert] for expert in others), default=0)
                or len(pinned) == per_layer
                or len(keys) == slots // 2
            )
    full = [layer for layer in range(LAYERS) if len(profile.top(layer, per_layer))]
    order = sorted(full, key=lambda layer: (-profile.accesses[layer], layer))
    counts = [sum(key.layer == layer for key in keys) for layer in order]
    short = [index for index, layer in enumerate(order) if counts[index] < len(profile.top(layer, per_layer))]
    assert not short or not any(counts[short[0] + 1 :])  # layers with more accesses are served first


def test_as_many_experts_as_a_token_uses() -> None:
    accesses = accesses_of([[0, 1]] * 5 + [[2, 3]] * 2)
    _, pinning = run(accesses, 20, after=len(accesses))
    assert pinning is not None and pinning.state == "pinned" and pinning.per_layer == TOP_K
    assert pinning.pinned == [ExpertKey(layer, expert) for layer in range(LAYERS) for expert in (0, 1)]
    report = pinning.report()
    assert json.loads(json.dumps(report)) == report
    assert report["accesses"] == {"before": len(accesses), "pinned": 0, "dropped": 0}
    assert report["hit_rates"]["before"] == pytest.approx(1 - 12 / (2 * len(accesses)))


@pytest.mark.parametrize("slots", [LAYERS * EXPERTS, LAYERS * EXPERTS + 5, 1])
def test_nothing_to_pin(slots: int) -> None:
    hits, pinning = run(accesses_of([[0], [1], [0]]), slots, after=2)
    assert pinning is not None and (pinning.state, pinning.pinned, pinning.guarded) == ("off", [], False)
    assert pinning.report()["hit_rates"]["before"] == hits / 9


def test_what_cannot_be_asked_for() -> None:
    core = Residency([TierConfig(4, "lru")], LAYERS, EXPERTS)
    with pytest.raises(ConfigError, match="needs a number of accesses to wait for, or a profile"):
        WarmPinning(core, LAYERS, EXPERTS, 4, TOP_K)
    with pytest.raises(ConfigError, match="pin_after: at least 1"):
        WarmPinning(core, LAYERS, EXPERTS, 4, TOP_K, after=0)
    with pytest.raises(ConfigError, match="a profile of 1 layers"):
        WarmPinning(core, LAYERS, EXPERTS, 4, TOP_K, profile=Profile(1, 1))


# -- what it does ------------------------------------------------------------------------------------------------------


def test_pins_help_where_popularity_lasts() -> None:
    accesses = accesses_of(hot_cold(500, (3, 7), seed=1))
    plain, _ = run(accesses, 14)
    hits, pinning = run(accesses, 14, after=90)
    assert pinning is not None and pinning.state == "pinned"
    assert {key.expert for key in pinning.pinned} == {3, 7}
    rates = pinning.report()["hit_rates"]
    assert rates["pinned"] > rates["without"] + 0.05
    assert hits > plain + 100
    known = Profile.from_accesses(accesses, LAYERS, EXPERTS)
    at_once, from_profile = run(accesses, 14, profile=known)
    assert at_once >= hits - 20 and from_profile is not None and from_profile.report()["accesses"]["before"] == 0


@pytest.mark.parametrize("policy", ["lru", "horizon"])
def test_the_guard_lets_go_when_the_hot_set_changes(policy: str) -> None:
    accesses = accesses_of(hot_cold(100, (3, 7), seed=1) + hot_cold(600, (0, 12), seed=2))
    plain, _ = run(accesses, 14, policy)
    forced, _ = run(accesses, 14, policy, after=90, guard=False)
    hits, pinning = run(accesses, 14, policy, after=90)
    assert pinning is not None and pinning.state == "dropped" and pinning.dropped_after is not None
    assert forced < plain - 20
    # what was lost is what the guard allows, one refill of every pinned slot, and one access more
    assert plain - hits <= 2 * len(pinning.pinned) + TOP_K
    report = pinning.report()
    assert report["accesses"]["pinned"] == pinning.dropped_after
    assert sum(report["accesses"].values()) == len(accesses)
    assert report["most_hits_lost"] > len(pinning.pinned)


def test_the_ghost_is_the_run_without_pins() -> None:
    accesses = accesses_of(hot_cold(80, (3, 7), seed=5))
    core = Residency([TierConfig(9, "horizon", "decode-only", 2, 1)], LAYERS, EXPERTS)
    ghost = GhostCore(core.configs[0], LAYERS, EXPERTS)
    assert [ghost(access) for access in accesses] == [serve(core, access) for access in accesses]


def test_an_offline_policy_has_no_ghost() -> None:
    core = Residency([TierConfig(9, "belady")], LAYERS, EXPERTS)
    assert not WarmPinning(core, LAYERS, EXPERTS, 9, TOP_K, after=3).guarded


def test_pins_are_in_the_event_log() -> None:
    recorder = Recorder(Residency([TierConfig(9, "lru")], LAYERS, EXPERTS))
    pinning = WarmPinning(recorder, LAYERS, EXPERTS, 9, TOP_K, after=60)
    for access in accesses_of(hot_cold(30, (3, 7), seed=1) + hot_cold(100, (0, 12), seed=2)):
        pinning.observe(access, serve(recorder, access))
    assert pinning.state == "dropped"
    names = [event[0] for event in recorder.log.events]
    assert names.count("pin") == names.count("unpin") == len(pinning.pinned) == 4
    assert replay(recorder.log).digest() == recorder.digest()


# -- in the engine -----------------------------------------------------------------------------------------------------


def test_pins_change_no_output(tiered: Callable[..., Any], plain: Callable[..., Any], tmp_path: Path) -> None:
    ids = torch.arange(3, 23).view(1, -1)
    expected = plain("qwen3_moe").generate(ids, max_new_tokens=12, do_sample=False)
    first = tiered("qwen3_moe", slots=8, pin_after=9, record_profile=True, record_events=True)
    assert torch.equal(first.generate(ids, max_new_tokens=12, do_sample=False), expected)
    pinning = first.moetier.stats()["pinning"]
    assert pinning["state"] in ("pinned", "dropped") and 0 < len(pinning["pinned"]) <= 4
    assert sum(pinning["accesses"].values()) == first.moetier._clock
    assert replay(first.moetier.events()).digest() == first.moetier.cache.core.digest()
    profile = first.moetier.profile()
    assert profile.fingerprint and profile.tokens >= 12 and profile.mass.sum() > 0
    assert profile.accesses.sum() == first.moetier._clock
    profile.save(tmp_path / "p.json")
    second = tiered("qwen3_moe", slots=8, profile=str(tmp_path / "p.json"))
    assert second.moetier.stats()["pinning"]["state"] == "pinned"
    assert torch.equal(second.generate(ids, max_new_tokens=12, do_sample=False), expected)
    with pytest.raises(ConfigError, match="load the model with record_profile=True"):
        second.moetier.profile()
    assert "pinning" not in tiered("qwen3_moe", slots=8).moetier.stats()


def test_a_profile_of_another_model(tiered: Callable[..., Any], tmp_path: Path) -> None:
    Profile.from_accesses(accesses_of([[0]]), LAYERS, EXPERTS).save(tmp_path / "p.json")
    with pytest.raises(ConfigError, match=rf"{tmp_path / 'p.json'}: a profile of 3 layers x 16 experts"):
        tiered("qwen3_moe", profile=str(tmp_path / "p.json"))
    with pytest.raises(ConfigError, match="pin_after: at least 1"):
        tiered("qwen3_moe", pin_after=0)


def test_on_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    common = ["demo", "In the", "--max-new-tokens", "8", "--threads", "1"]
    result = CliRunner().invoke(app, [*common, "--pin-after", "30", "--save-profile", str(path)])
    assert result.exit_code == 0 and "pinned" in result.stderr, result.stderr
    assert Profile.load(path).layers == 6
    result = CliRunner().invoke(app, [*common, "--profile", str(path), "--stats-json", str(tmp_path / "s.json")])
    assert result.exit_code == 0, result.stderr
    assert json.loads((tmp_path / "s.json").read_text())["pinning"]["from_profile"] is True
    path.write_text("{}")
    result = CliRunner().invoke(app, [*common, "--profile", str(path)])
    assert (result.exit_code, result.stderr.strip()) == (2, f"error: {path}: not a profile of moetier")


def test_a_trace_of_concurrent_sequences_counts_unions() -> None:
    experts = np.array([[[0, 1]], [[1, 2]]], dtype=np.int16)
    zeros = np.zeros(2, np.int64)
    trace = Trace(experts, 4, np.arange(2, dtype=np.int32), zeros, np.ones(2, np.uint8))
    profile = Profile.from_trace(trace)
    assert profile.uses.tolist() == [[1, 1, 1, 0]] and profile.accesses.tolist() == [1] and profile.tokens == 2
