"""`moetier demo`: the embedded model, under a budget smaller than its experts."""

from __future__ import annotations

import json
import time
from importlib.resources import as_file, files
from typing import Annotated, Any

import typer

from moetier.cli import options as o
from moetier.cli.console import Console
from moetier.cli.errors import reported
from moetier.cli.files import check_writable, write_text
from moetier.cli.generating import Generation, check_finite, speed, tokenise
from moetier.cli.loading import find, import_libraries, load_tokenizer, loaded
from moetier.cli.report import report, show

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
        str | None, typer.Argument(help="Your own prompt instead of the built-in ones.", metavar="PROMPT")
    ] = None,
    slots: o.Slots = "25%",
    policy: o.Policy = "horizon",
    prefetch: o.Prefetch = "auto",
    pin_after: o.PinAfter = None,
    profile: o.UseProfile = None,
    threads: o.Threads = None,
    max_new_tokens: o.MaxNewTokens = 80,
    temperature: o.Temperature = 0.7,
    seed: o.Seed = 0,
    stats_json: o.StatsJson = None,
    save_profile: o.SaveProfile = None,
) -> None:
    """Run the embedded model with most of its experts left on disk. Nothing is downloaded."""
    check_finite(temperature=temperature)
    check_writable(stats_json, "--stats-json")
    check_writable(save_profile, "--save-profile")
    prompts = PROMPTS if prompt is None else (("your prompt", prompt, 1.15),)
    console = Console(stderr=True, highlight=False)
    import_libraries(console, False, threads)
    import torch

    options: dict[str, Any] = {"slots": slots, "policy": policy, "context": 512, "device": "cpu", "prefetch": prefetch}
    options |= {"pin_after": pin_after, "profile": profile, "record_profile": save_profile is not None}
    with as_file(files("moetier") / "demo_model") as path:
        folder = find(str(path), None, console)
        tokenizer = load_tokenizer(folder)
        inputs = [tokenise(tokenizer, text, chat=False) for _, text, _ in prompts]
        begin = time.perf_counter()
        with loaded(folder, console, False, **options) as model:
            load_seconds = time.perf_counter() - begin
            plan = model.moetier.plan
            share = 100 * plan.slots / plan.workload.records
            console.print(
                f"{plan.workload.records} experts in {plan.workload.layers} layers, {plan.slots} slots: {share:.0f} % "
                "of the experts are in memory, the others are read from disk when needed.",
                soft_wrap=True,
            )
            if seed is not None:
                torch.manual_seed(seed)
            generations: list[Generation] = []
            for (title, text, penalty), tokens in zip(prompts, inputs, strict=True):
                console.print(f"\n--- {title} ---", markup=False)
                print(text, end="", flush=True)
                sampling: dict[str, Any] = {"do_sample": bool(temperature), "repetition_penalty": penalty}
                if temperature:
                    sampling |= {"temperature": temperature, "top_p": 0.9}
                generation = Generation(model, tokenizer)
                generation.run(tokens, max_new_tokens=max_new_tokens, **sampling)
                generations.append(generation)
            seconds = sum(generation.seconds for generation in generations)
            result = report(model, "demo", speed(generations), load_seconds, seconds)
            if save_profile is not None:
                model.moetier.profile().save(save_profile)
    console.print()
    show(result, console)
    if stats_json is not None:
        write_text(stats_json, json.dumps(result, indent=2) + "\n", "--stats-json")
