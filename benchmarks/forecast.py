"""The planner's forecast against real runs: predicted and measured tokens/s of the decode benchmark's model.

    python benchmarks/forecast.py --json benchmarks/results/forecast.json    # about five minutes
    python benchmarks/forecast.py --smoke                                    # does it run? about a minute

The text's routing is recorded once. Then, `--repeat` times: the machine is measured with *another* text (a warm run
from an empty cache, as `moetier plan --measure` does it), and the model decodes the text at every budget, each in a
fresh process. Nothing of the runs at the budgets goes into the forecast but the routing, which no budget changes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import common
from common import BIG, TINY, Shape

ROOT = Path(__file__).resolve().parent.parent
SHARES = (25, 50, 75)
LIMIT = 15.0  # %: what a forecast may be off


# -- in the child ------------------------------------------------------------------------------------------------------


def load(spec: dict[str, Any]) -> Any:
    """moetier with its defaults."""
    import torch

    import moetier

    torch.set_num_threads(spec["threads"])
    torch.set_num_interop_threads(1)
    slots = f"{spec['share']}%"
    return moetier.from_pretrained(spec["folder"], slots=slots, context=spec["context"], device="cpu")


def task_record(spec: dict[str, Any]) -> dict[str, Any]:
    """The routing of the text: a prefill, then a token per step."""
    import numpy as np
    import torch

    from moetier.recording import TraceRecorder

    model = load(spec)
    ids = torch.tensor([spec["tokens"]])
    past = None
    with torch.no_grad(), TraceRecorder(model) as recorder:
        for begin, end in steps_of(spec):
            output = model(input_ids=ids[:, begin:end], past_key_values=past, use_cache=True, logits_to_keep=1)
            past = output.past_key_values
            recorder.step([0], end - begin, ids[:, begin:end])
    trace = recorder.trace()
    np.savez(
        spec["trace"],
        experts=trace.experts,
        sequence=trace.sequence,
        step=trace.step,
        phase=trace.phase,
        num_experts=trace.num_experts,
    )
    model.moetier.close()
    return {"tokens": trace.tokens}


def steps_of(spec: dict[str, Any]) -> list[tuple[int, int]]:
    """Begin and end of every forward pass: the prompt, then single tokens."""
    prompt = spec["prompt"]
    return [(0, prompt), *((position, position + 1) for position in range(prompt, len(spec["tokens"])))]


def task_measure(spec: dict[str, Any]) -> dict[str, Any]:
    """What `moetier plan --measure` does."""
    from moetier.measure import measure

    model = load(spec)
    found = measure(model, spec["other_tokens"])
    model.moetier.close()
    return found.to_dict()


def task_run(spec: dict[str, Any]) -> dict[str, Any]:
    """The decode benchmark's run, with the engine's counters."""
    import tasks

    model = load(spec)
    plain = model.moetier.stats

    def stats() -> dict[str, Any]:
        found: dict[str, Any] = plain()
        found["seconds"]["core"] = 0.0
        return found

    model.moetier.stats = stats
    result: dict[str, Any] = tasks.run_tokens(model, spec)
    result["slots"] = model.moetier.plan.slots
    model.moetier.close()
    return result


TASKS = {"record": task_record, "measure": task_measure, "run": task_run}


# -- in the parent -----------------------------------------------------------------------------------------------------


def predict(spec: dict[str, Any], measured: dict[str, Any], slots: int) -> dict[str, Any]:
    """The forecast for the steps that the real run measures."""
    import numpy as np

    from moetier.access import Phase
    from moetier.forecast import Workday, forecast
    from moetier.simulate.config import Link, Timing
    from moetier.trace import Trace

    with np.load(spec["trace"]) as saved:
        arrays = {name: saved[name] for name in ("experts", "sequence", "step", "phase")}
        trace = Trace(num_experts=int(saved["num_experts"]), **arrays)
    accesses = trace.accesses()
    first_step = 1 + spec["warm_up"]  # the prefill is one step
    count_from = first_step * trace.layers
    assert accesses[count_from].phase is Phase.DECODE and accesses[count_from].layer == 0
    values = dict(measured["timing"])
    for name in ("disk_read", "disk_write", "h2d", "d2h"):
        values[name] = Link(**values[name])
    work = Workday(accesses, trace.layers, trace.num_experts, trace.top_k, count_from)
    return asdict(forecast(work, slots, values["record_nbytes"], Timing(**values)))


def child(spec: dict[str, Any], task: str, **more: Any) -> Any:
    """A fresh process, with an empty page cache, that must succeed."""
    common.drop_page_cache()
    result, ended = common.run_child(Path(__file__).resolve(), spec | {"task": task} | more, Path(spec["work"]))
    if result is None:
        raise SystemExit(f"{task}: failed with exit status {ended.returncode}\n{ended.stderr}")
    return result


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Everything, in order."""
    shape: Shape = TINY if args.smoke else BIG
    work: Path = args.work.resolve()
    folder = work / ("tiny" if args.smoke else "big")
    common.make_checkpoint(folder, shape)
    length = args.prompt + args.warm_up + args.tokens
    spec = {
        "folder": str(folder),
        "work": str(work),
        "trace": str(work / "forecast-trace.npz"),
        "threads": args.threads,
        "prompt": args.prompt,
        "warm_up": args.warm_up,
        "context": max(length, args.measure_tokens),
        "tokens": common.make_tokens(shape, length, args.seed),
        "other_tokens": common.make_tokens(shape, args.measure_tokens, args.seed + 1),
    }
    found: dict[str, Any] = {
        "machine": common.machine_info(ROOT),
        "settings": {name: value for name, value in vars(args).items() if isinstance(value, (int, str, bool))},
        "shape": asdict(shape),
        "rounds": [],
    }
    child(spec, "record", share=100)
    for number in range(args.repeat):
        measured = child(spec, "measure", share=args.measure_share)
        rows = []
        for share in SHARES:
            run = child(spec, "run", share=share)
            step = statistics.fmean(run["steps"])
            engine = {name: value / len(run["steps"]) for name, value in run["engine"].items()}
            forecast = predict(spec, measured, run["slots"])
            row = {"share": share, "measured": 1 / step, "engine_per_token": engine, "forecast": forecast}
            row["error_percent"] = 100 * (forecast["tokens_per_second"] * step - 1)
            rows.append(row)
            say(f"[{number + 1}/{args.repeat}] {describe(row)}")
        found["rounds"].append({"measured": measured, "budgets": rows})
        found["summary"] = summary(found)
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(found, indent=1) + "\n")
    return found


def summary(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Medians over the rounds, per budget."""
    rows = []
    for index, share in enumerate(SHARES):
        budgets = [one["budgets"][index] for one in found["rounds"]]
        measured = statistics.median(row["measured"] for row in budgets)
        predicted = statistics.median(row["forecast"]["tokens_per_second"] for row in budgets)
        rows.append(
            {
                "share": share,
                "measured": measured,
                "predicted": predicted,
                "error_percent": 100 * (predicted / measured - 1),
                "errors_percent": [row["error_percent"] for row in budgets],
                "hits_per_token": budgets[0]["engine_per_token"]["hits"],
                "misses_per_token": budgets[0]["engine_per_token"]["misses"],
                "predicted_loads_per_token": budgets[0]["forecast"]["loads_per_token"],
            }
        )
    return rows


def describe(row: dict[str, Any]) -> str:
    forecast, engine = row["forecast"], row["engine_per_token"]
    return (
        f"{row['share']} %: predicted {forecast['tokens_per_second']:.2f}, measured {row['measured']:.2f} tokens/s "
        f"({row['error_percent']:+.1f} %); waiting {1e3 * forecast['wait']:.0f} and {1e3 * engine['wait']:.0f} ms, "
        f"the rest {1e3 * forecast['compute']:.0f} and {1e3 * (1 / row['measured'] - engine['wait']):.0f} "
        f"ms; loads {forecast['loads_per_token']:.2f} and {engine['misses']:.2f}"
    )


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--repeat", type=int, default=3, help="rounds of measuring and running")
    add("--threads", type=int, default=1, help="torch threads")
    add("--prompt", type=int, default=64)
    add("--warm-up", type=int, default=4, help="decoded tokens before the measured ones")
    add("--tokens", type=int, default=32, help="measured tokens")
    add("--measure-tokens", type=int, default=48, help="tokens of the warm run that the forecast rests on")
    add("--measure-share", type=int, default=30, help="%% of the experts in slots in that run")
    add("--seed", type=int, default=0, help="of the text")
    add("--work", type=Path, default=Path(__file__).parent / "work")
    add("--json", type=Path)
    add("--smoke", action="store_true", help="a tiny model")
    add("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        spec = json.loads(args.child)
        Path(spec["out"]).write_text(json.dumps(TASKS[spec["task"]](spec)))
        return
    if args.smoke:
        args.prompt, args.warm_up, args.tokens, args.repeat = 16, 2, 8, 1
    found = compare(args)
    print("| budget | measured, tokens/s | predicted | error | errors of the rounds |\n|---|---:|---:|---:|---|")
    for row in found["summary"]:
        errors = ", ".join(f"{error:+.1f} %" for error in row["errors_percent"])
        print(
            f"| {row['share']} % | {row['measured']:.2f} | {row['predicted']:.2f} | {row['error_percent']:+.1f} % | "
            f"{errors} |"
        )
    worst = max(abs(row["error_percent"]) for row in found["summary"])
    print(f"\nWorst error of the medians: {worst:.1f} % (goal: {LIMIT:.0f} %).")


if __name__ == "__main__":
    main()
