"""`moetier demo`: the embedded model, under a budget smaller than its experts."""

from __future__ import annotations

import sys
from importlib.resources import as_file, files
from typing import Annotated

import typer

from moetier.cli import options as o
from moetier.cli.errors import reported
from moetier.cli.generating import Generation, check_writable, loaded, report, show, write_stats

# title, prompt, repetition penalty: so small a model loops in code and manuals without one
PROMPTS = (
    ("English prose", "3 And it came to pass, when the king of Israel", 1.0),
    ("Python", "class FileHandler:\n    def __init__(self, filename):", 1.15),
    ("a manual page", "RETURN VALUE\n       On success,", 1.15),
    ("German manual page", "BESCHREIBUNG\n       Diese Funktion", 1.15),
)


@reported
def demo(
    prompt: Annotated[
        str | None, typer.Argument(help="Your own prompt instead of the built-in ones.", show_default=False)
    ] = None,
    slots: o.Slots = "25%",
    policy: o.Policy = "horizon",
    max_new_tokens: o.MaxNewTokens = 80,
    temperature: o.Temperature = 0.7,
    seed: o.Seed = 0,
    stats_json: o.StatsJson = None,
    threads: o.Threads = None,
) -> None:
    """Run the embedded model with most of its experts left on disk. Nothing is downloaded."""
    check_writable(stats_json)
    prompts = PROMPTS if prompt is None else (("your prompt", prompt, 1.15),)
    with (
        as_file(files("moetier") / "demo_model") as folder,
        loaded(folder, False, threads, slots=slots, policy=policy, context=512, device="cpu") as (model, tokenizer),
    ):
        import torch

        plan = model.moetier.plan
        print(
            f"The embedded model has {plan.workload.records} experts in {plan.workload.layers} layers. {plan.slots} "
            f"slots in memory hold {100 * plan.slots / plan.workload.records:.0f} % of them; the others are read "
            "from disk when the router asks for them.",
            file=sys.stderr,
        )
        torch.manual_seed(seed or 0)
        speeds: list[dict[str, float | int]] = []
        for title, text, penalty in prompts:
            print(f"\n--- {title} ---", file=sys.stderr, flush=True)
            print(text, end="", flush=True)
            generation = Generation(model, tokenizer)
            sampling: dict[str, float] = {"do_sample": bool(temperature), "repetition_penalty": penalty}
            if temperature:
                sampling |= {"temperature": temperature, "top_p": 0.9}
            inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
            generation.run(dict(inputs), max_new_tokens=max_new_tokens, **sampling)
            speeds.append(generation.speeds())
        result = report(model, _total(speeds))
    print(file=sys.stderr)
    show(result)
    if stats_json is not None:
        write_stats(stats_json, result)


def _total(speeds: list[dict[str, float | int]]) -> dict[str, float | int]:
    """Several generations as one: tokens added, rates over the time of all."""
    tokens, prompts = sum(s["new_tokens"] for s in speeds), sum(s["prompt_tokens"] for s in speeds)
    first = sum(s["first_token_seconds"] for s in speeds)
    decoding = sum(
        (s["new_tokens"] - 1) / s["decode_tokens_per_second"] for s in speeds if s["decode_tokens_per_second"]
    )
    return {
        "prompt_tokens": prompts,
        "new_tokens": tokens,
        "first_token_seconds": first / len(speeds),
        "prefill_tokens_per_second": prompts / first if first else 0.0,
        "decode_tokens_per_second": (tokens - len(speeds)) / decoding if decoding else 0.0,
    }
