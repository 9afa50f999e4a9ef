"""What the training benchmarks' child processes do: train a model for some steps, and all that is done once before.

A child gets a specification as JSON, does the task that it names, and writes what it found as JSON. Knows nothing about
other children, memory limits or reports. An arm is `memory` (plain transformers and `torch.optim.AdamW`), `reference`
(the same with moetier's arithmetic), `deepspeed-nvme` (`train_deepspeed.py`) or `moetier-SHARE[-WAY]`: a share of the
slots, and a write-back policy, `backward`, the time of updates, or `recompute`, which keeps no activations of experts.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import common
import train_deepspeed
from common import Shape

Spec = dict[str, Any]

SCRIPT = Path(__file__).resolve()  # what `common.run_child` runs
WHOLE = ("memory", "reference", train_deepspeed.NAME)
WAYS = ("evict", "periodic", "writethrough", "backward", "recompute")


@dataclass(frozen=True)
class Arm:
    """`share` of the slots in percent; None where there are none."""

    kind: str
    share: int | None = None
    writeback: str = "evict"
    update: str = "step"
    recompute: bool = False

    @classmethod
    def of(cls, name: str) -> Arm:
        """By its name. Raises `ValueError`."""
        found = re.fullmatch(rf"moetier-(\d+)(?:-({'|'.join(WAYS)}))?", name)
        if found is None:
            if name not in WHOLE:
                known = ", ".join(WHOLE)
                raise ValueError(f"{name}: no arm; {known}, or moetier-SHARE[-WAY] with {', '.join(WAYS)}")
            return cls(name)
        share, way = int(found[1]), found[2] or "evict"
        if way in ("backward", "recompute"):
            return cls("moetier", share, "evict", "backward" if way == "backward" else "step", way == "recompute")
        return cls("moetier", share, way)

    @property
    def on_disk(self) -> bool:
        """Whether its steps read and write."""
        return self.kind in ("moetier", train_deepspeed.NAME)


# -- before the runs ---------------------------------------------------------------------------------------------------


def task_make(spec: Spec) -> dict[str, Any]:
    """The checkpoint, in the dtype."""
    folder, shape = Path(spec["folder"]), Shape(**spec["shape"])
    if spec["dtype"] == "bfloat16":
        common.make_checkpoint(folder, shape)
    else:
        make_float32(folder, shape)
    return {}


def make_float32(folder: Path, shape: Shape) -> None:
    """The checkpoint with the same numbers in float32. Reused if it is there."""
    marker = folder / "float32.json"
    if marker.is_file() and json.loads(marker.read_text()) == asdict(shape):
        return
    from safetensors.torch import load_file, save_file

    marker.unlink(missing_ok=True)
    (folder / "shape.json").unlink(missing_ok=True)  # made anew: a half-converted one must not be taken for it
    common.make_checkpoint(folder, shape)
    (folder / "shape.json").unlink()
    for file in folder.glob("*.safetensors"):
        tensors = {name: tensor.float() for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=1))
    marker.write_text(json.dumps(asdict(shape)))


def task_base(spec: Spec) -> dict[str, Any]:
    """What the interpreter and the libraries take when they train a model of a few kilobytes in plain transformers."""
    import moetier.training.reference  # noqa: F401

    common.make_checkpoint(Path(spec["folder"]), common.MICRO)
    model, optimizer = load_memory(spec | {"arm": "memory", "dtype": "bfloat16"})
    run_steps(model, optimizer, [[1, 2, 3, 4]] * 2, 1)
    return common.memory_of()


# -- a run -------------------------------------------------------------------------------------------------------------


def task_train(spec: Spec) -> dict[str, Any]:
    """One run of one arm: some steps, then moetier's commit."""
    import torch

    arm = Arm.of(spec["arm"])
    begin = time.perf_counter()
    if arm.kind == "moetier":
        model, optimizer = load_moetier(spec, arm)
    elif arm.kind == train_deepspeed.NAME:
        model, optimizer = train_deepspeed.load(spec)
    else:
        model, optimizer = load_memory(spec)
    loaded = common.memory_of()
    result: dict[str, Any] = {"load_seconds": time.perf_counter() - begin, "loaded": loaded}
    tiered = getattr(model, "moetier", None)
    watch = None if tiered is None else Records(tiered)
    found = run_steps(model, optimizer, spec["tokens"], spec["rows"], watch, spec.get("checkpointing", False))
    result |= {"steps": found, "memory": common.memory_of(), "torch_threads": torch.get_num_threads()}
    if tiered is not None:
        assert watch is not None
        result |= {"plan_nbytes": tiered.plan.host_total_nbytes, "slots": tiered.plan.slots, **watch.sizes()}
        result["commit"] = timed(tiered.commit)
        result["memory_after_commit"] = common.memory_of()
        tiered.close()
    if arm.on_disk:
        shutil.rmtree(spec["run"])
    return result


def load_memory(spec: Spec) -> tuple[Any, Any]:
    """Plain transformers and torch's fused AdamW; with fp32 masters where the weights are half precision."""
    import torch
    from transformers import AutoModelForCausalLM

    options = {}
    if spec["arm"] == "reference":
        from moetier.training import reference

        options["experts_implementation"] = reference.NAME
    model = AutoModelForCausalLM.from_pretrained(spec["folder"], dtype="auto", **options).train()
    if spec["dtype"] == "float32":
        return model, torch.optim.AdamW(model.parameters(), lr=spec["lr"], fused=True)
    return model, Masters(model, spec["lr"])


class Masters:
    """AdamW over fp32 copies of a half-precision model: the recipe that moetier's records follow."""

    def __init__(self, model: Any, lr: float):
        import torch

        self._own = list(model.parameters())
        self._masters = [p.detach().float().requires_grad_() for p in self._own]
        self._optimizer = torch.optim.AdamW(self._masters, lr=lr, fused=True)

    def step(self) -> None:
        """Gradients to the masters, a step, masters to the weights; one parameter's fp32 gradient after the other."""
        for own, master in zip(self._own, self._masters, strict=True):
            master.grad, own.grad = (None if own.grad is None else own.grad.float()), None
        self._optimizer.step()
        for own, master in zip(self._own, self._masters, strict=True):
            own.data.copy_(master.data)
            master.grad = None

    def zero_grad(self) -> None:
        """All of them are taken by `step` already."""


def load_moetier(spec: Spec, arm: Arm) -> tuple[Any, Any]:
    """moetier with its defaults, into a new run folder."""
    import moetier

    engine = Path(moetier.__file__).resolve()
    if not engine.is_relative_to(Path(spec["source"]).resolve()):
        raise RuntimeError(f"the engine came from {engine.parent}, not from {spec['source']}")
    shutil.rmtree(spec["run"], ignore_errors=True)
    tokens = len(spec["tokens"][0])
    memory = {"host_memory": spec["host_memory"]} if "host_memory" in spec else {"slots": f"{arm.share}%"}
    memory |= {"activation_memory": "0"} if arm.recompute else {}
    model = moetier.from_pretrained(
        spec["folder"], train=spec["run"], context=tokens, device="cpu", writeback=arm.writeback, **memory
    ).train()
    optimizer = moetier.AdamW(
        model, lr=spec["lr"], fused=True, update=arm.update, max_grad_norm=spec.get("max_grad_norm")
    )
    return model, optimizer


def run_steps(
    model: Any,
    optimizer: Any,
    texts: list[list[int]],
    rows: int,
    watch: Records | None = None,
    checkpointing: bool = False,
) -> list[dict[str, Any]]:
    """A plain loop: each text is a step of `rows` sequences. Seconds, the disk's bytes and the loss of every step."""
    import torch

    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    found = []
    for text in texts:
        tokens = torch.tensor(text).view(rows, -1)
        step: dict[str, Any] = {}

        def run(step: dict[str, Any] = step, tokens: Any = tokens) -> None:
            begin = time.perf_counter()
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            forward = time.perf_counter()
            loss.backward()
            backward = time.perf_counter()
            optimizer.step()
            optimizer.zero_grad()
            step |= {"forward": forward - begin, "backward": backward - forward}
            step |= {"update": time.perf_counter() - backward, "loss": loss.item()}

        found.append(timed(run) | step | ({} if watch is None else watch.since()))
    return found


def timed(call: Callable[[], Any]) -> dict[str, float]:
    """Seconds of a call, and the bytes that this process made the disk read and write meanwhile."""
    before, begin = disk_bytes(), time.perf_counter()
    call()
    seconds, after = time.perf_counter() - begin, disk_bytes()
    return {"seconds": seconds, "read": after[0] - before[0], "written": after[1] - before[1]}


def disk_bytes() -> tuple[int, int]:
    """Bytes that this process has made the disk read, and write (as far as the system knows yet)."""
    text = Path("/proc/self/io").read_text()
    read, written = (re.search(rf"^{name}_bytes: (\d+)", text, re.M) for name in ("read", "write"))
    return int(read[1]) if read else 0, int(written[1]) if written else 0


class Records:
    """What a step does to records, by moetier's own counters."""

    def __init__(self, tiered: Any):
        self._engine = tiered.training.engine
        self._updates = self._engine.ledger.updates.copy()
        self._before = self._moved()

    def _caches(self) -> dict[str, Any]:
        caches = {"weights": self._engine.weights, "gradients": self._engine.gradients.cache}
        state = None if self._engine.applied is None else self._engine.applied.state
        return caches if state is None else caches | {"state": state}

    def _moved(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, cache in self._caches().items():
            stats = cache.stats()
            for link, values in stats["links"].items():
                found[f"{name}, {link}"] = values["bytes"]
            found[f"{name}, wait"] = stats["seconds"]["wait"]
        return found

    def since(self) -> dict[str, Any]:
        """Since the last call: bytes by cache and direction, and the bytes of the records that were changed."""
        now, updates = self._moved(), self._engine.ledger.updates.copy()
        moved = {name: value - self._before[name] for name, value in now.items()}
        changed = updates > self._updates
        nbytes = sum(
            int(changed[layer].sum()) * self._caches()[name].store.layout(layer).nbytes
            for name in ("weights", "state")
            if name in self._caches()
            for layer in range(len(changed))
        )
        self._before, self._updates = now, updates
        return {"moved": moved, "changed_records": int(changed.sum()), "changed_nbytes": nbytes}

    def sizes(self) -> dict[str, Any]:
        """Of all records of a kind, and of its slots, in bytes."""
        counts = self._engine.ledger.counts
        records = {
            name: sum(cache.store.layout(layer).nbytes * count for layer, count in enumerate(counts))
            for name, cache in self._caches().items()
        }
        slots = {name: cache.host.slots * cache.host.slot_nbytes for name, cache in self._caches().items()}
        return {"record_nbytes": records, "slot_nbytes": slots}


TASKS: dict[str, Callable[[Spec], dict[str, Any]]] = {
    "make": task_make,
    "base": task_base,
    "build": train_deepspeed.task_build,
    "train": task_train,
}


def child(text: str) -> None:
    """Do what the specification says, and write what was found."""
    spec = json.loads(text)
    if spec["task"] != "make":
        import torch

        torch.set_num_threads(spec["threads"])
        torch.set_num_interop_threads(1)
    result = TASKS[spec["task"]](spec)
    Path(spec["out"]).write_text(json.dumps(result))


if __name__ == "__main__":
    child(sys.argv[2])
