"""Load a model, stream what it writes, and report where the time went. Shared by `run` and `demo`."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moetier.errors import ConfigError, StoreError
from moetier.plan import format_size

STATS_VERSION = 1


def check_writable(path: str | None) -> None:
    """Refuse a statistics file that could not be written, before minutes are spent on what it should hold."""
    if path is None:
        return
    parent = Path(path).absolute().parent
    if not parent.is_dir() or not os.access(parent, os.W_OK) or Path(path).is_dir():
        raise ConfigError(f"--stats-json {path}: cannot be written; give a file in an existing, writable folder")


def quiet_transformers(quiet: bool) -> None:
    """Keep transformers' advice off the terminal; with `quiet`, its progress bars too."""
    import transformers

    transformers.logging.set_verbosity_error()
    if quiet or not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()


class Generation:
    """What one call of `generate` did: text to standard output as it comes, and the time of every token."""

    def __init__(self, model: Any, tokenizer: Any):
        self.model, self.tokenizer = model, tokenizer
        self.prompt_tokens = 0
        self.times: list[float] = []  # seconds since the start, one per new token
        self.text = ""

    def run(self, inputs: dict[str, Any], **options: Any) -> None:
        """Generate from tokenised inputs, streaming."""
        import torch
        from transformers import TextStreamer

        generation = self
        begin = time.perf_counter()

        class Streamer(TextStreamer):  # type: ignore[misc]
            def put(self, value: Any) -> None:
                if not self.next_tokens_are_prompt:
                    generation.times.append(time.perf_counter() - begin)
                super().put(value)

            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                generation.text += text
                sys.stdout.write(text + ("\n" if stream_end else ""))
                sys.stdout.flush()

        self.prompt_tokens = inputs["input_ids"].shape[1]
        streamer = Streamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        with torch.no_grad():
            self.model.generate(**inputs, streamer=streamer, **options)

    def speeds(self) -> dict[str, float | int]:
        """Tokens and seconds; rates are None-free: 0 where there is nothing to divide."""
        first = self.times[0] if self.times else 0.0
        rest = self.times[-1] - first if self.times else 0.0
        return {
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": len(self.times),
            "first_token_seconds": first,
            "prefill_tokens_per_second": self.prompt_tokens / first if first else 0.0,
            "decode_tokens_per_second": (len(self.times) - 1) / rest if rest else 0.0,
        }


@contextmanager
def loaded(folder: Path, quiet: bool, threads: int | None, **options: Any) -> Iterator[tuple[Any, Any]]:
    """(model, tokenizer), closed at the end. Raises what `moetier.from_pretrained` raises."""
    console = Console(stderr=True, quiet=quiet)
    with console.status("importing torch and transformers"):
        import torch
        from transformers import AutoTokenizer

        import moetier
        from moetier.loading import translate

    quiet_transformers(quiet)
    if threads is not None:
        torch.set_num_threads(threads)
    hub = {name: options[name] for name in ("trust_remote_code",) if options.get(name)}
    model = moetier.from_pretrained(folder, **options)
    try:
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, **hub)
        except (OSError, ValueError, KeyError) as error:
            raise translate(error, folder) from error
        yield model, tokenizer
    finally:
        model.moetier.close()


def report(model: Any, speeds: dict[str, float | int]) -> dict[str, Any]:
    """Everything that the table and the statistics file show."""
    stats, plan = model.moetier.stats(), model.moetier.plan
    return {
        "version": STATS_VERSION,
        "speed": speeds,
        "plan": {
            "tiers": [{"name": t.name, "slots": t.slots, "bytes": t.nbytes} for t in plan.tiers],
            "experts": plan.workload.records,
            "host_bytes": plan.host_total_nbytes,
            "device_bytes": plan.device_total_nbytes,
            "recommended_slots": plan.recommended_slots,
            "status": str(plan.status),
        },
        **stats,
    }


def show(result: dict[str, Any]) -> None:
    """The table at the end of a run, on standard error."""
    table = Table(show_header=False, title="moetier", title_justify="left", box=None, padding=(0, 2, 0, 0))
    speed, seconds = result["speed"], result["seconds"]
    table.add_row("decode", f"{speed['decode_tokens_per_second']:.2f} tokens/s", f"{speed['new_tokens']} tokens")
    table.add_row(
        "prefill", f"{speed['prefill_tokens_per_second']:.2f} tokens/s", f"{speed['prompt_tokens']} tokens of prompt"
    )
    table.add_row("first token", f"{speed['first_token_seconds']:.2f} s")
    for tier, planned in zip(result["tiers"], result["plan"]["tiers"], strict=True):
        hits, lates, misses = (sum(tier[name]) for name in ("hits", "lates", "misses"))
        accesses = hits + lates + misses
        rate = f"{100 * hits / accesses:.1f} % hits" if accesses else "no accesses"
        detail = f"{hits} hits, {lates} late, {misses} misses ({tier['staged']} staged), {tier['evictions']} evictions"
        share = f"{planned['slots']} of {result['plan']['experts']} experts"
        table.add_row(f"{planned['name']} tier", rate, f"{detail}; {share}, policy {tier['policy']}")
    for name, link in result["links"].items():
        speed_now = link["bytes"] / link["busy_seconds"] / 1e9 if link["busy_seconds"] else 0.0
        table.add_row(
            name, format_size(link["bytes"]), f"{link['copies']} experts, {speed_now:.2f} GB/s per busy thread"
        )
    table.add_row("T_wait", f"{seconds['wait']:.2f} s", "nothing to compute, an expert on its way")
    table.add_row("T_compute", f"{seconds['compute']:.2f} s", "experts' math")
    table.add_row("decisions", f"{seconds['decide']:.2f} s", "residency core and queues")
    Console(stderr=True).print(table)


def write_stats(path: str, result: dict[str, Any]) -> None:
    """Write the statistics file, whole or not at all."""
    target = Path(path).absolute()
    try:
        with tempfile.NamedTemporaryFile("w", dir=target.parent, prefix=f".{target.name}-", delete=False) as file:
            json.dump(result, file, indent=2)
            file.write("\n")
        os.replace(file.name, target)
    except OSError as error:
        raise StoreError(f"--stats-json {path}: could not be written: {error.strerror}") from error
