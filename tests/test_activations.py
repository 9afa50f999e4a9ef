"""What forward keeps for backward: as much as there is room for, for as long as a backward is possible."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moetier
from layers import KINDS, Twins, routed
from moetier.errors import ConfigError
from moetier.plan import Machine
from moetier.training.activations import Activations, Block
from moetier.training.budget import activation_share
from moetier.training.footprint import up_nbytes, whole_layers
from test_training_budget import SIZES, workload
from training import batch, load_trained, trained_experts

PAGE = 4096
CPU = torch.device("cpu")


@settings(derandomize=True, deadline=None)
@given(st.integers(0, 20 * PAGE), st.lists(st.one_of(st.integers(1, 8 * PAGE), st.integers(-8, -1)), max_size=40))
def test_blocks_never_overlap(nbytes: int, moves: list[int]) -> None:
    """A positive move takes so many bytes; a negative one drops the block that was taken so many ago."""
    room = Activations(nbytes, CPU)
    held: list[tuple[Block, torch.Tensor, int]] = []
    for value, move in enumerate(moves):
        if move < 0 and len(held) >= -move:
            held.pop(move)
        elif move > 0:
            block = room.block()
            up = block.room(move, 1, torch.uint8)
            if up is None:
                assert -(-move // PAGE) * PAGE > nbytes or held, "an empty room has place for all that fits"
            else:
                held.append((block, up.fill_(value), value))
    for _, up, value in held:
        assert bool((up == value).all())
    assert room.kept + room.recomputed == sum(move > 0 for move in moves)


@pytest.fixture(autouse=True)
def _grad() -> Iterator[None]:
    with torch.enable_grad():
        yield


def used(twins: Twins) -> int:
    """Bytes that are taken."""
    room: Any = twins.hub.activations
    room.take(1 << 40)  # what was left is seen at the next request; this one gets nothing
    room.recomputed -= 1
    return sum(end - begin for begin, end in room._used)


@pytest.fixture
def twins() -> Any:
    made = Twins(KINDS[0], slots=3, activations=8 * PAGE)
    yield made
    made.close()


def test_a_layer_without_room_is_computed_again(twins: Twins) -> None:
    hidden, index, weights = routed(twins.kind, 20)
    nbytes = 20 * 3 * 2 * twins.kind.inner * 4
    assert nbytes <= 4 * PAGE < 2 * nbytes
    results = []
    for room in (0, 4 * PAGE, 8 * PAGE):  # for none, one and both of the layers
        twins.hub.activations = Activations(room, CPU)
        twins.sink.gradients.clear()
        x = hidden.clone().requires_grad_()
        y = twins.tiered[1](twins.tiered[0](x, index, weights), index, weights)
        layers = room // (4 * PAGE)
        assert twins.hub.activations.report() == {"nbytes": room, "kept": layers, "recomputed": 2 - layers}
        assert used(twins) == room
        y.square().sum().backward()
        assert used(twins) == 0, "backward is done, whoever holds on to the loss"
        found = [x.grad, *(g for key in sorted(twins.sink.gradients) for g in twins.sink.gradients[key].values())]
        results.append(found)
    for others in results[1:]:
        for mine, theirs in zip(results[0], others, strict=True):
            assert torch.equal(mine, theirs)


def test_a_retained_graph_gives_the_same_twice(twins: Twins) -> None:
    hidden, index, weights = routed(twins.kind, 20)
    loss = twins.tiered[0](hidden.requires_grad_(), index, weights).sum()
    found = [torch.autograd.grad(loss, hidden, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(*found) and used(twins) == 0


def test_a_graph_that_is_thrown_away_gives_its_room_back(twins: Twins) -> None:
    hidden, index, weights = routed(twins.kind, 20)
    loss = twins.tiered[0](hidden.requires_grad_(), index, weights).sum()
    assert used(twins) == 4 * PAGE
    del loss
    gc.collect()
    assert used(twins) == 0


def test_without_a_graph_nothing_is_kept(twins: Twins) -> None:
    with torch.no_grad():
        twins.tiered[0](*routed(twins.kind, 20))
    assert twins.hub.activations is not None
    assert twins.hub.activations.report() == {"nbytes": 8 * PAGE, "kept": 0, "recomputed": 0}


def test_a_forward_that_fails_gives_its_room_back(twins: Twins, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError("no")

    monkeypatch.setattr(twins.store, "read", fail)
    hidden, index, weights = routed(twins.kind, 20)
    with pytest.raises(OSError, match="no"):
        twins.tiered[0](hidden.requires_grad_(), index, weights)
    gc.collect()
    assert used(twins) == 0


def trained(path: Path, run: Path, steps: int = 2, **options: Any) -> tuple[dict[Any, Any], dict[str, Any]]:
    model = load_trained(path, run, **options)
    optimizer = moetier.AdamW(model, lr=0.01)
    try:
        for step in range(steps):
            model(**batch(step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        stats = model.moetier.stats()["activations"] | {"plan": model.moetier.plan.host_total_nbytes}
        return trained_experts(model), stats
    finally:
        model.moetier.close()


def test_training_has_the_same_bits_and_the_plan_the_difference(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    path = checkpoint("qwen3_moe", torch.float32)
    kept, of_kept = trained(path, tmp_path / "kept", slots=6)
    again, of_again = trained(path, tmp_path / "again", slots=6, activation_memory="0")
    assert (of_kept["kept"], of_kept["recomputed"]) == (6, 0) and (of_again["kept"], of_again["recomputed"]) == (0, 6)
    assert of_kept["plan"] - of_again["plan"] == of_kept["nbytes"] > 0 == of_again["nbytes"]
    assert kept.keys() == again.keys()
    for key, fields in kept.items():
        assert all(torch.equal(field, again[key][name]) for name, field in fields.items())


def test_a_budget_is_kept_to(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """The least that works, more than everything, and what is between: layers' bytes within a quarter of the slots'."""
    path = checkpoint("qwen3_moe", torch.float32)
    with pytest.raises(moetier.CapacityError) as error:
        load_trained(path, tmp_path / "none", slots=None, host_memory="1MiB")
    least = int(re.search(r"\((\d+) bytes\)", str(error.value))[1])  # type: ignore[index]
    found = {}
    for more in (1 << 30, None, 0):
        more = 4 * found[1 << 30] // 3 if more is None else more  # a quarter of this is a layer's
        _, stats = trained(path, tmp_path / str(more), 1, slots=None, host_memory=least + more)
        assert stats["plan"] <= least + more and stats["nbytes"] <= more
        assert stats["kept"] + stats["recomputed"] == 3
        found[more] = stats["nbytes"]
    assert sorted(found.values()) == [0, found[1 << 30] // 3, found[1 << 30]]
    with pytest.raises(moetier.CapacityError, match="leaves no room to train"):
        load_trained(path, tmp_path / "none", slots=None, host_memory=least, activation_memory="1MiB")


@pytest.mark.parametrize(("value", "message"), [("much", "is not a size"), (-1, "must not be negative")])
def test_a_size_that_is_none(value: Any, message: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    path = checkpoint("qwen3_moe", torch.float32)
    with pytest.raises(ConfigError, match=f"activation_memory.*{message}"):
        load_trained(path, tmp_path / "run", activation_memory=value)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="activation_memory: only with train=RUN_FOLDER"):
        moetier.from_pretrained(path, activation_memory="1MiB")


def test_the_default_leaves_slots_three_quarters() -> None:
    least = 45_000 + 16384  # resident weights and what training adds, workspace, a slot of each kind
    load = workload()
    assert activation_share(load, Machine(least - 1), SIZES) == 0
    assert activation_share(load, Machine(least + 4000), SIZES) == 1000
    assert activation_share(load, Machine(10**9, 10**9), SIZES) == 0


def test_whole_layers() -> None:
    assert [whole_layers([10, 10, 20], nbytes) for nbytes in (-5, 9, 10, 39, 40, 99)] == [0, 0, 10, 20, 40, 40]


def test_bytes_are_those_of_a_step() -> None:
    """48 tokens, 3 experts each: what gate and up projection give, in the dtype of weights; nothing with a norm."""
    twins = Twins(KINDS[3], torch.bfloat16)  # transposed
    modules = [(str(number), module) for number, module in enumerate(twins.plain)]
    layouts = [twins.store.layout(0)] * 2
    assert up_nbytes(modules, layouts, 48, 3) == [-(-48 * 3 * 64 * 2 // PAGE) * PAGE] * 2
    twins.close()
    twins = Twins(KINDS[6])
    assert up_nbytes([("0", twins.plain[0])], [twins.store.layout(0)], 48, 3) == [0]
    twins.close()
