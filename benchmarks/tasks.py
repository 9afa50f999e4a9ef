"""What the benchmarks' child processes do: run a model over a text, and all that is done once before.

A child gets a specification as JSON, does the task that it names, and writes what it found as JSON. Knows nothing about
other children, memory limits or reports.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import arms
import common
import llamacpp
from arms import ENGINES, Spec
from common import DEFAULT_THREADS, Shape

SCRIPT = Path(__file__).resolve()  # what `common.run_child` runs
SHARES = (25, 50, 75, 100)


# -- runs --------------------------------------------------------------------------------------------------------------


def task_arm(spec: Spec) -> dict[str, Any]:
    """One run of one arm: prefill, warm-up, decode."""
    return llamacpp.run(spec) if spec["kind"] == "llamacpp" else run_arm(spec, run_tokens)


def task_prefill(spec: Spec) -> dict[str, Any]:
    """One run of one arm: prefills only."""
    return run_arm(spec, run_prefills)


def run_arm(spec: Spec, run: Any) -> dict[str, Any]:
    """Load the arm's model and run it; with what is asked of the process afterwards."""
    import torch

    begin = time.perf_counter()
    model = arms.load(spec)
    result: dict[str, Any] = {"load_seconds": time.perf_counter() - begin}
    result |= run(model, spec)
    result["memory"] = common.memory_of()
    result["read_bytes_total"] = common.disk_read_bytes()
    result["torch_threads"] = torch.get_num_threads()
    if spec["kind"] in ENGINES:
        tiered = model.moetier
        result["plan_nbytes"] = tiered.plan.host_total_nbytes
        result["slots"] = tiered.plan.slots
        result["direct_io"] = getattr(tiered.cache.store, "direct", None)
        result["store"] = type(tiered.cache.store).__name__
        result["prefetches"] = tiered.stats().get("prefetches")
        tiered.close()
    return result


def run_tokens(model: Any, spec: Spec) -> dict[str, Any]:
    """Greedy decoding over given texts ([T], or [B, T] for several at once): the text's own token is fed, not the next.

    So every arm routes alike, and the random model cannot fall into a loop of one token, which would flatter caches.
    """
    import torch

    prompt, warm_up = spec["prompt"], spec["warm_up"]
    tokens = torch.tensor(spec["tokens"])
    tokens = tokens.unsqueeze(0) if tokens.dim() == 1 else tokens
    stats = model.moetier.stats if hasattr(model, "moetier") else dict
    chosen: list[int] = []
    steps: list[float] = []
    before: tuple[dict[str, Any], int] = ({}, 0)
    prefill_begin, reads_begin = time.perf_counter(), common.disk_read_bytes()
    with torch.no_grad():
        output = model(input_ids=tokens[:, :prompt], use_cache=True, logits_to_keep=1)
        chosen += output.logits[:, -1].argmax(-1).tolist()
        prefill, prefill_reads = time.perf_counter() - prefill_begin, common.disk_read_bytes() - reads_begin
        for position in range(prompt, tokens.shape[1]):
            if position == prompt + warm_up:
                before = stats(), common.disk_read_bytes()
            begin = time.perf_counter()
            output = model(
                input_ids=tokens[:, position : position + 1], past_key_values=output.past_key_values, use_cache=True
            )
            chosen += output.logits[:, -1].argmax(-1).tolist()
            steps.append(time.perf_counter() - begin)
    result = {
        "prompt": prompt,
        "prefill_seconds": prefill,
        "prefill_read_bytes": prefill_reads,
        "steps": steps[warm_up:],
        "warm_up_steps": steps[:warm_up],
        "read_bytes": common.disk_read_bytes() - before[1],
        "chosen": chosen,
    }
    return result | ({"engine": difference(before[0], stats())} if before[0] else {})


def difference(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """moetier's counters over the measured steps."""
    tiers = [stats["tiers"][-1] for stats in (before, after)]
    found = {key: sum(tiers[1][key]) - sum(tiers[0][key]) for key in ("hits", "lates", "misses")}
    seconds = {key: value for key, value in after["seconds"].items() if isinstance(value, (int, float))}
    found |= {key: value - before["seconds"].get(key, 0.0) for key, value in seconds.items()}
    return found | {"read_bytes": link_bytes(after) - link_bytes(before)}


def link_bytes(stats: dict[str, Any]) -> int:
    """Bytes read from home so far."""
    count: int = next(iter(stats["links"].values()))["bytes"]
    return count


def run_prefills(model: Any, spec: Spec) -> dict[str, Any]:
    """Prefills of different texts, one after the other: the first one finds an empty cache, later ones a used one.

    With moetier, also how often each expert was read in a layer pass: the orders, and the bytes against those needed.
    """
    import torch

    counter = ReadCounter(model.moetier) if hasattr(model, "moetier") else None
    passes, chosen = [], []
    with torch.no_grad():
        for text in spec["texts"]:
            if counter is not None:
                counter.clear()
            begin, reads = time.perf_counter(), common.disk_read_bytes()
            output = model(input_ids=torch.tensor([text]), use_cache=True, logits_to_keep=1)
            chosen.append(int(output.logits[0, -1].argmax()))
            found = {"seconds": time.perf_counter() - begin, "read_bytes": common.disk_read_bytes() - reads}
            passes.append(found | ({} if counter is None else counter.summary()))
    return {"passes": passes, "chosen": chosen, "prompt": len(spec["texts"][0])}


class ReadCounter:
    """Counts what is read from home, expert by expert, and which experts the routers asked for."""

    def __init__(self, tiered: Any):
        self.tiered, cache = tiered, tiered.cache
        self.orders: Counter[Any] = Counter()
        self.needed: set[tuple[int, int]] = set()
        self.begin = 0
        start, watch = cache.mover.start, tiered.watch
        home = len(cache.core.configs)

        def counted(orders: Iterable[Any]) -> None:
            orders = list(orders)
            self.orders.update(copy.key for copy in orders if copy.source.tier == home)
            start(orders)

        def watched(layer: int, index: Any, weights: Any, phase: Any) -> None:
            self.needed.update((layer, expert) for expert in index.unique().tolist())
            if watch is not None:
                watch(layer, index, weights, phase)

        cache.mover.start, tiered.watch = counted, watched

    def clear(self) -> None:
        """Begin anew."""
        self.orders.clear()
        self.needed.clear()
        self.begin = link_bytes(self.tiered.stats())

    def summary(self) -> dict[str, Any]:
        """`most_reads`: of any expert; `link_bytes` read, and `needed_bytes` if every needed expert were read once."""
        store = self.tiered.cache.store
        return {
            "experts_needed": len(self.needed),
            "experts_read": len(self.orders),
            "most_reads": max(self.orders.values(), default=0),
            "link_bytes": link_bytes(self.tiered.stats()) - self.begin,
            "needed_bytes": sum(store.layout(layer).nbytes for layer, _ in self.needed),
        }


# -- before the runs ---------------------------------------------------------------------------------------------------


def task_base(spec: Spec) -> dict[str, Any]:
    """What the interpreter and the libraries take: merely imported, and in use by plain transformers.

    Loading any model imports more of transformers and of torch. The limits and the plan check use the second number,
    taken with a model of a few kilobytes that moetier has no part in.
    """
    import torch
    import transformers  # noqa: F401

    import moetier  # noqa: F401

    imported = common.memory_of()
    common.make_checkpoint(Path(spec["folder"]), common.MICRO)
    model = arms.load_memory(spec)
    with torch.no_grad():
        model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False)
    return common.memory_of() | {"imported": imported["VmHWM"]}


def task_make(spec: Spec) -> dict[str, Any]:
    """The checkpoint."""
    common.make_checkpoint(Path(spec["folder"]), Shape(**spec["shape"]))
    return {}


def task_offload(spec: Spec) -> dict[str, Any]:
    """accelerate's folder, which the fused mapped model uses too."""
    arms.write_offload(spec)
    return {}


def task_gguf(spec: Spec) -> dict[str, Any]:
    """llama.cpp's file."""
    llamacpp.write_gguf(Path(spec["folder"]), Path(spec["gguf"]))
    return {}


def task_pack(spec: Spec) -> dict[str, Any]:
    """The packed store, by moetier's own command; kept if it is there."""
    out = Path(spec["packed"])
    if not out.exists():
        command = "import sys; from moetier.cli import main; sys.exit(main())"
        subprocess.run([sys.executable, "-c", command, "pack", spec["folder"], str(out)], check=True)
    return {}


def task_plan(spec: Spec) -> dict[str, Any]:
    """moetier's plan for each share. Fails where this engine does not know one of the options."""
    from moetier.loading import inspect
    from moetier.options import Options

    options = spec.get("options", {})
    unknown = sorted(set(options) - set(Options.__dataclass_fields__))
    if unknown:
        raise SystemExit(f"this engine has no option {', '.join(unknown)}")
    plans = {}
    for share in SHARES:
        plan = inspect(Path(spec["folder"]), Options(slots=f"{share}%", context=spec["context"], **options))
        plans[str(share)] = {
            "total": plan.host_total_nbytes,
            "slots": plan.slots,
            "workload": asdict(plan.workload),
        }
    return plans


def task_skew(spec: Spec) -> dict[str, Any]:
    """How the text is routed: popularity and likeness of consecutive tokens, per layer, over the whole text."""
    import torch

    model = arms.load_memory(spec)
    routed: list[Any] = []
    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_hook(lambda module, args, output: routed.append(output[2]))
    with torch.no_grad():
        model(input_ids=torch.tensor([spec["tokens"]]), use_cache=False, logits_to_keep=1)
    experts = model.config.num_experts
    found = routing_skew(routed, experts)
    generator = torch.Generator().manual_seed(0)
    rows, top_k = routed[0].shape
    uniform = [torch.rand(rows, experts, generator=generator).topk(top_k).indices for _ in range(20)]
    return found | {"uniform": routing_skew(uniform, experts), "tokens": rows}


def routing_skew(routed: list[Any], experts: int) -> dict[str, float]:
    """Means over layers of [T, K] expert ids."""
    top_half, recall, distinct = [], [], []
    for index in routed:
        counts = index.flatten().bincount(minlength=experts).sort(descending=True).values
        top_half.append(float(counts[: experts // 2].sum() / counts.sum()))
        distinct.append(float((counts > 0).sum()))
        chosen = index.new_zeros(len(index), experts).scatter_(1, index, 1)
        recall.append(float((chosen[1:] * chosen[:-1]).sum() / chosen[1:].sum()))
    return {
        "top_half_share": statistics.mean(top_half),
        "recall_of_previous": statistics.mean(recall),
        "experts_used": statistics.mean(distinct),
    }


def task_disk(spec: Spec) -> dict[str, Any]:
    """Rounds of plain direct reads and of moetier's read path, interleaved, over the same files."""
    from readpath import measure_disk

    return measure_disk(spec)


TASKS = {name.removeprefix("task_"): task for name, task in globals().items() if name.startswith("task_")}
UNTHREADED = ("make", "offload", "gguf", "pack", "plan")


def child(text: str) -> None:
    """Do what the specification says, and write what was found."""
    spec = json.loads(text)
    threads = spec.get("threads", 1)
    other = spec["task"] in UNTHREADED or spec.get("kind") == "llamacpp"  # which has threads of its own, and no torch
    if not other and threads != DEFAULT_THREADS:
        import torch

        torch.set_num_threads(threads if spec["task"] != "skew" else 2)
        torch.set_num_interop_threads(1)
    result = TASKS[spec["task"]](spec)
    Path(spec["out"]).write_text(json.dumps(result))


if __name__ == "__main__":
    child(sys.argv[2])
