"""The compute crew: every task once, errors told, and the very bits of a model whose products torch splits."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import moetier
from conftest import family_class
from families import VOCAB
from moetier import ConfigError
from moetier.crew import Crew
from moetier.products import MAX_ROWS, is_exact
from test_families import LAYOUTS, Outputs

THREADS = 3


@pytest.fixture
def threads() -> Iterator[int]:
    """Several torch threads, as on any other machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield THREADS
    torch.set_num_threads(before)


@pytest.fixture
def crew() -> Iterator[Crew]:
    made = Crew(2)
    yield made
    made.close()


@pytest.mark.parametrize("count", [0, 1, 2, 3, 50])
def test_every_task_runs_once(crew: Crew, count: int) -> None:
    for _ in range(20):
        done: list[int] = []
        crew.run([partial(done.append, number) for number in range(count)])
        assert sorted(done) == list(range(count))


def test_tasks_run_at_the_same_time(crew: Crew) -> None:
    barrier = threading.Barrier(3, timeout=10)  # passes only if three threads are in it
    crew.run([barrier.wait] * 3)


def test_an_error_of_a_task_is_raised_and_the_others_run(crew: Crew) -> None:
    done: list[int] = []

    def fail() -> None:
        raise KeyError("no")

    with pytest.raises(KeyError):
        crew.run([fail, *[lambda: done.append(1)] * 8])
    assert len(done) == 8
    crew.run([lambda: done.append(1)] * 4)  # and it goes on
    assert len(done) == 12


def test_two_callers_at_once(crew: Crew) -> None:
    done: list[int] = []

    def slow() -> None:
        time.sleep(0.001)
        done.append(1)

    callers = [threading.Thread(target=crew.run, args=([slow] * 10,)) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(20)
    assert len(done) == 40


def test_the_number_of_threads_is_put_back(crew: Crew, threads: int) -> None:
    seen: list[int] = []
    crew.run([lambda: seen.append(torch.get_num_threads())] * 9)
    assert set(seen) == {1}
    assert torch.get_num_threads() == threads


def test_helpers_write_to_tensors_of_any_mode(crew: Crew) -> None:
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out, x, w = torch.zeros(9, 4), torch.randn(9, 4), torch.randn(4, 4)
            crew.run([partial(torch.mm, x[row : row + 1], w, out=out[row : row + 1]) for row in range(9)])
            assert torch.allclose(out, x @ w)


def test_exactness_is_measured_not_assumed() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        assert is_exact(dtype, ((96, 64), (64, 48)), False, 2)
    assert is_exact(torch.bfloat16, ((64, 96),), True, 2)


@pytest.mark.parametrize("name", [*LAYOUTS, "deepseek_v3", "olmoe", "qwen3_next"])
def test_bits_with_a_crew(name: str, checkpoint: Callable[..., Path], threads: int) -> None:
    """Plain transformers with several threads against the crew, prefill and decode."""
    kind, folder = family_class(name), checkpoint(name)
    with torch.no_grad():
        expected = Outputs.of(kind.from_pretrained(folder, dtype="auto").eval())
    model = moetier.from_pretrained(folder, slots="50%", model_class=kind, context=64, split="experts")
    runs = count_runs(model.moetier.crew)
    try:
        expected.check(Outputs.of(model))
    finally:
        model.moetier.close()
    assert runs[0] > 0
    assert torch.get_num_threads() == threads


def count_runs(crew: Crew) -> list[int]:
    """Counts the runs of more than one task."""
    runs, plain = [0], crew.run

    def counted(tasks: Any, first: Any = None) -> None:
        tasks = list(tasks)
        runs[0] += len(tasks) > 1
        plain(tasks, first)

    crew.run = counted  # type: ignore[method-assign]
    return runs


def test_who_gets_a_crew(tiered: Callable[..., Any], threads: int) -> None:
    assert tiered("qwen3_moe").moetier.crew.helpers == threads - 1
    assert tiered("qwen3_moe", split="products").moetier.crew is None
    assert tiered("qwen3_moe", torch.float32).moetier.crew is None
    with pytest.raises(ConfigError, match="split='products'"):
        tiered("qwen3_moe", torch.float32, split="experts")
    torch.set_num_threads(1)
    assert tiered("qwen3_moe").moetier.crew is None


def test_large_steps_keep_torchs_own_threads(tiered: Callable[..., Any], threads: int) -> None:
    model = tiered("qwen3_moe")
    seen: list[int] = []
    model.moetier.watch = lambda *_: seen.append(torch.get_num_threads())
    with torch.no_grad():
        model(input_ids=torch.randint(3, VOCAB, (1, MAX_ROWS + 1)))
        assert set(seen) == {threads}
        seen.clear()
        model(input_ids=torch.randint(3, VOCAB, (1, MAX_ROWS)))
        assert set(seen) == {1}
        with pytest.raises(IndexError):
            model(input_ids=torch.tensor([[VOCAB + 10**6]]))
    assert torch.get_num_threads() == threads


def test_a_wrong_split_is_told(checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="split: 'rows' is unknown"):
        moetier.from_pretrained(checkpoint("qwen3_moe"), split="rows")


def test_an_interrupted_run_leaves_nothing_for_the_next(crew: Crew, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while helpers work: the next run must not take their late end for the end of its own tasks."""
    slow = threading.Event()

    def interrupt() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(crew, "_work", _only_helpers(crew._work, interrupt))
        with pytest.raises(KeyboardInterrupt):
            crew.run([lambda: slow.wait(10)] * 3)
    slow.set()
    done: list[int] = []

    def late() -> None:
        time.sleep(0.02)
        done.append(1)

    crew.run([late] * 6)
    assert len(done) == 6


def _only_helpers(work: Callable[[], None], instead: Callable[[], None]) -> Callable[[], None]:
    main = threading.current_thread()
    return lambda: instead() if threading.current_thread() is main else work()


def test_the_caller_does_its_own_task_while_the_others_work(crew: Crew) -> None:
    begun, told = threading.Event(), threading.Event()
    caller = []

    def first() -> None:
        caller.append(threading.get_ident())
        assert begun.wait(10)  # passes only if a helper began meanwhile
        told.set()

    def task() -> None:
        begun.set()
        assert told.wait(10)

    crew.run([task, task], first)
    assert caller == [threading.get_ident()]


@pytest.mark.parametrize("helpers", [1, 2, 5])
def test_one_expert_alone_is_shared_bit_for_bit(helpers: int, threads: int) -> None:
    """Gated and plain, with and without bias: outputs shared among threads are the whole products'."""
    from moetier import experts

    class Family(torch.nn.Module):
        is_transposed = has_post_expert_norm = False

        def __init__(self, has_gate: bool):
            super().__init__()
            self.has_gate, self.act_fn = has_gate, torch.nn.functional.silu

        def _apply_gate(self, x: torch.Tensor) -> torch.Tensor:
            gate, up = x.chunk(2, dim=-1)
            return torch.nn.functional.silu(gate) * up

    crew = Crew(helpers, cuts=True)
    generator = torch.Generator().manual_seed(helpers)
    try:
        for has_gate in (True, False):
            for bias in (True, False):
                width, inner = 130, 192
                outputs = 2 * inner if has_gate else inner
                name = "gate_up_proj" if has_gate else "up_proj"
                shapes = {name: (outputs, width), "down_proj": (width, inner)}
                if bias:
                    shapes |= {f"{name}_bias": (outputs,), "down_proj_bias": (width,)}
                fields = {n: torch.randn(s, generator=generator).bfloat16() for n, s in shapes.items()}
                x = torch.randn(1, width, generator=generator).bfloat16()
                whole = experts.expert_math(Family(has_gate), x, fields)
                math = experts._Math(Family(has_gate), x, fields, (1,))
                math.compute_shared(0, fields, crew, None)
                assert torch.equal(math.down, whole)
    finally:
        crew.close()
