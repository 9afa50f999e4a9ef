"""The forecast of `moetier plan --trace`: what the command adds to `moetier.forecast` and `moetier.measure`.

In the JSON it is the key `forecast`: `source`, `policy`, `tokens` (that count), `measured` (null, or the timing and
what it rests on), `budgets` (the fields of `moetier.forecast.Forecast`, with --compare also
`measured_tokens_per_second` and `error_percent`), `splits` (context, bytes of its cache, forecast),
`recommended_context`, `words`, with --measure also `calibration` (see `moetier.cli.costs`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from rich.table import Table

from moetier.cli.console import Console
from moetier.cli.costs import calibration_of
from moetier.cli.loading import loaded
from moetier.errors import ConfigError
from moetier.forecast import (
    Forecast,
    Measured,
    Split,
    Workday,
    advice,
    forecast,
    from_profile,
    from_trace,
    recommend,
)
from moetier.plan import Plan, format_size, parse_slots
from moetier.profile import Profile

if TYPE_CHECKING:
    from moetier.loading import CheckedFolder
    from moetier.options import Options
    from moetier.trace import Trace

TOKENS, COMPARED = 512, 96  # of the trace that are served; with --compare, where they are run as well
WARM = 64  # tokens of the measuring run
WARM_SHARE = 0.3  # of the experts in slots at most: misses, and choosing victims, shall be seen often enough
CONTEXTS = (1024, 4096, 16384, 65536)


@dataclass(frozen=True)
class Asked:
    """The flags."""

    trace: str | None
    profile: str | None
    measure: bool
    compare: bool
    budgets: str | None
    verbose: bool

    def check(self) -> bool:
        """Whether a forecast is wanted. Raises `ConfigError` for flags that contradict each other."""
        if self.trace is None and self.profile is None:
            wrong = [flag for flag in ("compare", "budgets") if getattr(self, flag)]
            if wrong:
                raise ConfigError(f"--{wrong[0]} needs a recorded routing: give --trace FILE or --profile FILE")
            return False
        if self.trace is not None and self.profile is not None:
            raise ConfigError("--trace and --profile contradict each other; a trace tells more")
        if self.compare and self.trace is None:
            raise ConfigError("--compare runs the trace's own tokens: give --trace, not --profile")
        if self.compare and not self.measure:
            raise ConfigError("--compare compares with a forecast in seconds: give --measure too")
        return True


class Routing:
    """The trace or profile, checked against the plan's model."""

    def __init__(self, asked: Asked, plan: Plan):
        self.trace: Trace | None = None
        work = plan.workload
        if asked.trace is not None:
            from moetier.trace.files import read_trace

            self.trace, self.source = read_trace(asked.trace), asked.trace
            shape = self.trace.layers, self.trace.records
            if shape != (work.layers, work.records):
                raise ConfigError(
                    f"--trace {asked.trace}: of {shape[0]} layers and {shape[1]} experts in all, but the model has "
                    f"{work.layers} and {work.records}; record one with this model"
                )
            self.work: Workday = from_trace(self.trace, COMPARED if asked.compare else TOKENS)
        else:
            assert asked.profile is not None
            profile, self.source = Profile.load(asked.profile), asked.profile
            profile.require(work.layers, work.records // work.layers, f"--profile {asked.profile}")
            self.work = from_profile(profile, work.top_k)

    def tokens(self, vocabulary: int) -> list[int]:
        """Tokens to measure with: the end of the trace, which a forecast does not look at; without ids, random ones."""
        ids = None if self.trace is None else self.trace.token_ids
        if ids is not None and len(ids) >= WARM:
            return [int(number) for number in ids[-WARM:]]
        draw = random.Random(0)
        return [draw.randrange(vocabulary) for _ in range(WARM)]


def slots_of(budgets: str | None, plan: Plan) -> list[int]:
    """The budgets as numbers of slots, ascending; by default quarters, and what the plan gives."""
    texts = [text.strip() for text in (budgets or "25%,50%,75%,100%").split(",")]
    if not all(texts):
        raise ConfigError(f"--budgets {budgets}: write them with commas between, such as 25%,50%,75%")
    found = set()
    for text in texts:
        try:
            found.add(min(parse_slots(text, plan.workload.records), plan.workload.records))
        except ConfigError as error:
            raise ConfigError(f"--budgets {budgets}: {error}") from None
    if budgets is None and plan.slots:
        found.add(plan.slots)
    return sorted(found)


def make_forecast(
    asked: Asked, plan: Plan, folder: CheckedFolder, options: Options, arguments: dict[str, Any], console: Console
) -> dict[str, Any]:
    """Measure, simulate, and run for real, as asked. `options` are those of the plan, `arguments` of the loader."""
    routing = Routing(asked, plan)
    budgets = slots_of(asked.budgets, plan)
    if asked.compare:
        assert routing.trace is not None
        _can_replay(routing.trace)
    measured = calibration = None
    if asked.measure:
        measured, calibration = _measure(routing, plan, folder, options, arguments, asked.verbose, console)
    timing = None if measured is None else measured.timing
    host_slots = plan.tiers[1].slots if len(plan.tiers) > 1 else None

    def at(slots: int) -> Forecast:
        nbytes = plan.workload.record_nbytes
        return forecast(routing.work, slots, nbytes, timing, options.policy, options.admission, host_slots)

    with console.status("serving the trace at every budget"):
        forecasts = [at(slots) for slots in budgets]
        splits = _splits(plan, folder, options, arguments, at)
    rows = [asdict(found) for found in forecasts]
    if asked.compare:
        for row in rows:
            with console.status(f"running with {row['slots']} slots"):
                real = _run(routing, folder, options, arguments, row["slots"], asked.verbose, console)
            row["measured_tokens_per_second"] = real
            row["error_percent"] = 100 * (row["tokens_per_second"] / real - 1)
    words = advice(routing.work, forecasts)
    if routing.trace is not None:
        from moetier.trace.summary import summarise

        words += summarise(routing.trace, tokens=2048)["verdict"]["sentences"]
    best = recommend(splits) if splits else None
    if best is not None:
        words.append(
            f"Within this memory {best.context} tokens of context ({format_size(best.kv_nbytes)}) and "
            f"{best.forecast.slots} slots go best together: the longest context that is nearly as fast as the fastest."
        )
    return {
        "source": routing.source,
        "policy": options.policy,
        "tokens": routing.work.tokens,
        "measured": None if measured is None else measured.to_dict(),
        "budgets": rows,
        "splits": [asdict(split) for split in splits],
        "recommended_context": None if best is None else best.context,
        "words": words,
    } | ({} if calibration is None else {"calibration": calibration})


def _can_replay(trace: Trace) -> None:
    """Before minutes are spent on measuring."""
    import numpy as np

    if trace.token_ids is None:
        raise ConfigError("--compare: the trace does not hold its tokens' numbers; record it again with them")
    part = trace.first(COMPARED)
    pairs = {(int(step), int(sequence)) for step, sequence in zip(part.step, part.sequence, strict=True)}
    if len(pairs) > len(np.unique(part.step)):
        raise ConfigError("--compare: the trace has several sequences in a step; record one with --batch 1")


def _measure(
    routing: Routing,
    plan: Plan,
    folder: CheckedFolder,
    options: Options,
    arguments: dict[str, Any],
    verbose: bool,
    console: Console,
) -> tuple[Measured, dict[str, Any]]:
    """A warm run with as many slots as the plan has, but not so many that nothing is ever evicted; what math costs."""
    from moetier.measure import measure

    enough = max(plan.recommended_slots, round(WARM_SHARE * plan.workload.records))
    chosen = _arguments(options, arguments) | {"slots": min(plan.slots, enough)}
    with console.status("measuring the disk and a short run"), loaded(folder, console, verbose, **chosen) as model:
        calibration = calibration_of(model, plan.workload.top_k)
        vocabulary = int(model.get_input_embeddings().weight.shape[0])
        return measure(model, routing.tokens(vocabulary)), calibration


def _run(
    routing: Routing,
    folder: CheckedFolder,
    options: Options,
    arguments: dict[str, Any],
    slots: int,
    verbose: bool,
    console: Console,
) -> float:
    """Tokens per second of the real model over the steps that the forecast counts."""
    from moetier.access import Phase
    from moetier.measure import replay

    assert routing.trace is not None
    with loaded(folder, console, verbose, **_arguments(options, arguments), slots=slots) as model:
        steps = replay(model, routing.trace.first(COMPARED))
    counted = [step for step in steps[routing.work.count_from // routing.work.layers :] if step[0] is Phase.DECODE]
    return sum(tokens for _, tokens, _ in counted) / sum(seconds for *_, seconds in counted)


def _arguments(options: Options, arguments: dict[str, Any]) -> dict[str, Any]:
    chosen = {name: getattr(options, name) for name in options.__dataclass_fields__ if name != "slots"}
    return chosen | arguments


def _splits(
    plan: Plan, folder: CheckedFolder, options: Options, arguments: dict[str, Any], at: Callable[[int], Forecast]
) -> list[Split]:
    """The memory divided between context and slots; nothing where slots were given, or everything fits anyway."""
    if options.slots is not None:
        return []
    import torch

    from moetier.loading import inspect

    extra = {name: value for name, value in arguments.items() if name == "trust_remote_code"}
    device = torch.device(arguments["device"]) if arguments.get("device") else None
    found = []
    for context in sorted({*CONTEXTS, options.context}):
        other = inspect(folder, replace(options, context=context), device, **extra)
        if other.slots and all(tier.slots for tier in other.tiers):
            found.append((context, other.workload.kv_nbytes, other.slots))
    if len({slots for *_, slots in found}) < 2:
        return []
    known = {slots: at(slots) for *_, slots in found}
    return [Split(context, kv_nbytes, known[slots]) for context, kv_nbytes, slots in found]


def show_forecast(found: dict[str, Any], console: Console) -> None:
    """As tables and sentences on standard output."""
    rows, measured = found["budgets"], found["measured"]
    console.print(
        f"\nForecast from {found['source']}, policy {found['policy']}, {found['tokens']:.0f} decoded tokens",
        markup=False,
        soft_wrap=True,
    )
    if measured is not None:
        timing, alone = measured["timing"], measured["disk_alone"]
        console.print(
            f"measured: disk {alone['gbps']:.2f} GB/s alone, {timing['disk_read']['gbps']:.2f} beside the math; "
            f"a layer {1e3 * timing['layer_seconds']:.2f} ms, an expert {1e3 * timing['expert_seconds']:.3f} ms, an "
            f"access that misses {1e3 * timing['miss_seconds']:.2f} ms more",
            markup=False,
            soft_wrap=True,
        )
        if not measured["direct_io"]:
            console.print("the disk was read through the page cache: the forecast is too fast for a cold one")
    table = Table(box=None, padding=(0, 1, 0, 0))
    heads = ["slots", "share", "hits", "read/token"]
    heads += [] if measured is None else ["tokens/s", "math ms", "wait ms", "bound"]
    heads += ["really", "error"] if "error_percent" in rows[0] else []
    for name in heads:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*_cells(row))
    console.print(table)
    if measured is None:
        console.print("For tokens per second, add --measure.")
    if found["splits"]:
        _show_splits(found["splits"], console)
    for sentence in found["words"]:
        console.print(sentence, markup=False, soft_wrap=True)


def _cells(row: dict[str, Any]) -> list[str]:
    cells = [str(row["slots"]), f"{100 * row['share']:.0f} %", f"{100 * row['hit_rate']:.1f} %"]
    cells.append(format_size(row["bytes_per_token"]))
    if row["tokens_per_second"] is not None:
        cells += [f"{row['tokens_per_second']:.2f}", f"{1e3 * row['compute']:.0f}", f"{1e3 * row['wait']:.0f}"]
        cells.append(row["bound"])
    if "error_percent" in row:
        cells += [f"{row['measured_tokens_per_second']:.2f}", f"{row['error_percent']:+.1f} %"]
    return cells


def _show_splits(splits: Sequence[dict[str, Any]], console: Console) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    timed = splits[0]["forecast"]["tokens_per_second"] is not None
    for name in ("context", "its cache", "slots left", "hit rate", *(["tokens/s"] if timed else [])):
        table.add_column(name, justify="right")
    for split in splits:
        found = split["forecast"]
        cells = [str(split["context"]), format_size(split["kv_nbytes"]), str(found["slots"])]
        cells.append(f"{100 * found['hit_rate']:.1f} %")
        table.add_row(*cells, *([f"{found['tokens_per_second']:.2f}"] if timed else []))
    console.print(table)
