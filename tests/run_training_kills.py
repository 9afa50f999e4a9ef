"""Kill training at random moments, resume it until it ends, and compare what comes out.

    python run_training_kills.py CHECKPOINT FOLDER KILLS [SEED]

Trains in children of its own by fork, so that nothing is imported again. Every step is committed. After each kill all
that is in the run folder must be whole, and no commit may be lost that the child had reported. When a run has ended its
weights are compared, and the next one begins, until there were KILLS kills.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import moetier
from moetier.stores.runfolder import RunFolder
from moetier.training import attach
from training import batch, load_trained, model_class, trained_experts

STEPS = 8
assert model_class() and moetier.AdamW and attach  # all imports are before the first fork


def train(checkpoint: Path, folder: Path, result: Path, tell: Any = print) -> None:
    """Go on from the last commit, and save the final weights."""
    torch.manual_seed(0)
    model = load_trained(checkpoint, folder, slots=4, state_slots=3, gradient_slots=3)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    optimizer = moetier.AdamW(model, lr=0.01, weight_decay=0.1, max_grad_norm=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)
    found = optimizer.resume(scheduler=scheduler)
    tell(0)
    for step in range(0 if found is None else found["step"], STEPS):
        model(**batch(step, rows=1, length=4), use_cache=False).loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        model.moetier.commit(scheduler=scheduler)
        tell(step + 1)
    tensors = {f"{key} {name}": t for key, fields in trained_experts(model).items() for name, t in fields.items()}
    tensors |= {name: p.data.clone() for name, p in model.named_parameters() if not name.endswith("proxy.weight")}
    save_file(tensors, result.with_suffix(".tmp"))
    result.with_suffix(".tmp").rename(result)
    model.moetier.close()


class Child:
    """A training process, and what it has reported: the steps it has committed, 0 when it is ready."""

    def __init__(self, checkpoint: Path, folder: Path, result: Path):
        reads, writes = os.pipe()
        self.reports: list[int] = []
        self.pid = os.fork()
        if not self.pid:
            code = 1
            try:
                train(checkpoint, folder, result, lambda step: os.write(writes, bytes([step])))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        os.close(writes)
        self._reads = reads

    def wait_ready(self) -> None:
        """Until it has loaded its model, or ended."""
        self.reports += os.read(self._reads, 1)

    def end(self) -> int:
        """The signal that it died of, 0 if it ended by itself. Raises `ChildProcessError` if it failed."""
        while more := os.read(self._reads, 64):
            self.reports += more
        os.close(self._reads)
        _, status = os.waitpid(self.pid, 0)
        if os.WIFSIGNALED(status):
            return os.WTERMSIG(status)
        if os.WEXITSTATUS(status):
            raise ChildProcessError("a training process failed")
        return 0


def check(folder: Path, committed: int) -> int:
    """The newest step of a run, all of which must be whole."""
    if not RunFolder.exists(folder):
        assert not committed, "the run is lost"
        return 0
    with RunFolder.open(folder, write=False) as run:
        damaged = list(run.verify())
        assert not damaged, damaged
        newest = run.step or 0
    assert newest >= committed, f"step {committed} was committed, but the newest is {newest}"
    return newest


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether all tensors have the same bits."""
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def main(checkpoint: Path, folder: Path, kills: int, seed: int) -> None:
    """All rounds; the last line says how they went."""
    torch.set_num_threads(1)
    draw = random.Random(seed)
    child = Child(checkpoint, folder / "whole", folder / "expected")
    child.wait_ready()
    begin = time.monotonic()
    assert child.end() == 0
    seconds = time.monotonic() - begin
    expected = load_file(folder / "expected")
    killed, runs, resumed = 0, 0, 0
    while killed < kills:
        runs += 1
        run, result = folder / f"run{runs}", folder / f"result{runs}"
        newest = 0
        while not result.exists():
            child = Child(checkpoint, run, result)
            if killed < kills:
                if draw.random() < 0.9:
                    child.wait_ready()
                time.sleep(draw.random() * seconds * 0.6)
                os.kill(child.pid, signal.SIGKILL)
            killed += child.end() == signal.SIGKILL
            if not result.exists():
                newest = check(run, max([newest, *child.reports]))
                resumed += newest > 0
        assert same(load_file(result), expected), f"run {runs} came out different"
        shutil.rmtree(run)
    print(f"{killed} kills in {runs} runs, {resumed} resumed; all ended the same")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]) if len(sys.argv) > 4 else 0)
