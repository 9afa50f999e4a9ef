"""What the lossy levers cost and save on the demo model: perplexity, KL, routing kept, hits, bytes, and speed.

    python benchmarks/lossy.py TEXTS --json benchmarks/results/lossy.json              # about an hour
    python benchmarks/lossy.py TEXTS --json benchmarks/results/lossy.json --resume --minutes 5    # a piece of it
    python benchmarks/lossy.py --json benchmarks/results/lossy.json --update-docs
    python benchmarks/lossy.py TEXTS --smoke                                           # does it run? a minute

TEXTS is a folder of plain texts (`*.txt`) that the model was not trained on; `scripts/collect_demo_text.py` marks such
documents. Every text is a window of its own. Each setting starts with an empty cache.

Speed is compared at the same time, because the machine drifts: the exact model and some settings are loaded side by
side and take turns of a few tokens, the same tokens, in changing order. What counts are the ratios within a round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import common
from report import ROOT, Pieces, bootstrap, say, update_section

DOCS = ROOT / "docs" / "lossy.md"
SHARES = (25, 50)
SETTINGS = (
    *(f"cache_prior={strength}" for strength in (0.1, 0.2, 0.3, 0.5, 0.8, 1)),
    *(f"cache_prior=0.5,keep_top={keep}" for keep in (1, 3)),
    *(f"max_rank={rank}" for rank in (6, 8, 12)),
    "max_rank=12,keep_top=1",
    "max_mass=0.8",
    *(f"drop_misses={share}" for share in (0.25, 0.5, 0.75, 1)),
    "cache_prior=0.3,drop_misses=0.5",
)
SAME = ("nll", "bytes_per_token", "hit_rate")  # of the exact model, however often it is run


# -- measuring ---------------------------------------------------------------------------------------------------------


def loader(folder: Path, share: int, context: int) -> Any:
    """The demo model with so many slots and these levers, as a context that closes it."""
    from moetier.loading import from_pretrained

    @contextmanager
    def load(levers: Any) -> Iterator[Any]:
        model = from_pretrained(
            folder, slots=f"{share}%", context=context, device="cpu", prefetch="off", **levers.to_dict()
        )
        try:
            yield model
        finally:
            model.moetier.close()

    return load


def take_turns(load: Any, windows: Sequence[Sequence[int]], settings: Sequence[Any], turn: int) -> list[dict[str, Any]]:
    """Read the windows with the exact model and with every setting; a row each, in this order.

    Each reads `turn` tokens, then the next reads the same ones; who begins changes from round to round. A row's `speed`
    holds per round how many times faster than the exact model it was.
    """
    from moetier.evaluation import Reading, try_on
    from moetier.levers import Levers

    with ExitStack() as models:
        exact: AbstractContextManager[Any] = load(Levers())
        first = models.enter_context(exact)
        try_on(first, settings)
        readings = [Reading(first, Levers(), windows)]
        readings += [Reading(models.enter_context(load(levers)), levers, windows) for levers in settings]
        speeds: list[list[float]] = [[] for _ in readings]
        rounds = 0
        for number, ids in enumerate(windows):
            if number % 6 == 0 < number:
                say(f"{number} of {len(windows)} texts")
            for reading in readings:
                reading.begin()
            for begin in range(0, len(ids), turn):
                seconds, logits = one_round(readings, ids[begin : begin + turn], rounds)
                for place, reading in enumerate(readings):
                    speeds[place].append(seconds[0] / seconds[place])
                    for following, right, found in zip(ids[begin + 1 :], logits[0], logits[place], strict=False):
                        reading.judge(right, found, following)
                rounds += 1
        return [
            {"name": name, **reading.outcome().to_dict(), "speed": [round(ratio, 4) for ratio in ratios]}
            for name, reading, ratios in zip(["exact", *map(label, settings)], readings, speeds, strict=True)
        ]


def one_round(readings: Sequence[Any], ids: Sequence[int], number: int) -> tuple[list[float], list[list[Any]]]:
    """Everyone's turn: seconds, and the logits after every token."""
    seconds, logits = [0.0] * len(readings), [list[Any]() for _ in readings]
    for step in range(len(readings)):
        place = (step + number) % len(readings)
        before = readings[place].seconds
        logits[place] = [readings[place].step(token) for token in ids]
        seconds[place] = readings[place].seconds - before
    return seconds, logits


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The chosen settings at the chosen sizes, `--at-once` of them beside the exact model; written after each group."""
    import torch
    from transformers import AutoTokenizer, logging

    from moetier.evaluation import windows_of
    from moetier.levers import Levers

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    torch.set_num_interop_threads(1)
    texts = sorted(args.texts.glob("*.txt"))[: args.first]
    if not texts:
        raise SystemExit(f"{args.texts}: no *.txt in it")
    pieces = Pieces(args)
    machine = common.machine_info(ROOT) | {"command": f"lossy.py TEXTS --tokens {args.tokens}"}
    conditions = {"tokens": args.tokens, "turn": args.turn, "threads": args.threads}
    found = pieces.open(
        {"machine": machine, "settings": conditions | {"texts": [path.name for path in texts]}, "runs": {}}
    )
    with as_file(files("moetier") / "demo_model") as folder:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        windows = windows_of(
            [tokenizer(path.read_text(encoding="utf-8"))["input_ids"] for path in texts], args.tokens, args.tokens
        )
        for group, share in groups(found, args):
            if not pieces.time_left():
                say("the time is over; --resume goes on")
                break
            rows = take_turns(loader(folder, share, args.tokens), windows, list(map(Levers.parse, group)), args.turn)
            keep(found, share, rows)
            pieces.write(found)
            for row in rows[1:]:
                speed = statistics.median(row["speed"])
                say(f"{share} % {row['name']}: KL {row['kl']:.4f}, {speed:.2f} × the exact model's tokens/s")
    return found


def groups(found: dict[str, Any], args: argparse.Namespace) -> Iterable[tuple[list[str], int]]:
    """What there is left to do: settings to be run together, and a share. All sizes of a group follow each other."""
    from moetier.levers import Levers

    for begin in range(0, len(args.settings), args.at_once):
        for share in args.shares:
            done = {row["name"] for row in found["runs"].get(str(share), [])}
            group = [
                text for text in args.settings[begin : begin + args.at_once] if label(Levers.parse(text)) not in done
            ]
            if group:
                yield group, share


def keep(found: dict[str, Any], share: int, rows: list[dict[str, Any]]) -> None:
    """Put a group's rows into the results; the exact model must have come out as it did beside the others."""
    known = found["runs"].setdefault(str(share), [])
    exact = {name: rows[0][name] for name in SAME}
    if known and (before := {name: known[0][name] for name in SAME}) != exact:
        raise SystemExit(f"the exact model came out as {exact}, with an earlier group as {before}: other weights?")
    known += rows[1:] if known else rows


def label(levers: Any) -> str:
    """The name of a row beside the exact model's. `exact` run beside itself shows what the ratios are worth."""
    return str(levers) if levers.on else "exact again"


# -- the report --------------------------------------------------------------------------------------------------------


def tables(found: dict[str, Any]) -> str:
    """The machine, and a table per size."""
    machine, settings = found["machine"], found["settings"]
    first = next(iter(found["runs"].values()))[0]
    domains = sorted({name.partition("-")[0] for name in settings["texts"]})
    parts = [
        f"{first['predicted']:,} predicted tokens: the first {settings['tokens']} of each of {len(settings['texts'])} "
        f"held-out texts ({', '.join(domains)}). {machine['cpu']}, {settings['threads']} thread for math, torch "
        f"{machine['versions']['torch']}, transformers {machine['versions']['transformers']}; {machine['date'][:10]}, "
        f"commit {machine['commit']}; `python benchmarks/{machine['command']}`. Tokens/s are ratios to those of the "
        f"exact model, which took turns with the others every {settings['turn']} tokens: the median of "
        f"{len(first['speed'])} rounds, in brackets its 95 % interval (bootstrap).",
    ]
    for share in sorted(found["runs"], key=int):
        rows = in_order(found["runs"][share])
        exact = rows[0]
        base = exact["bytes_per_token"]["disk→host"]
        lines = [
            f"### {share} % of the experts in memory",
            "",
            "| levers | perplexity | against exact | KL, nats | same top | routing kept | dropped | hits | "
            "read, KB/token | bytes saved | tokens/s ÷ exact |",
            "| --- |" + " ---: |" * 10,
        ]
        for row in rows:
            read = row["bytes_per_token"]["disk→host"]
            change = row["perplexity"] / exact["perplexity"] - 1
            lines.append(
                f"| {_code(row['name'])} | {row['perplexity']:.2f} | {100 * change:+.1f} % | {row['kl']:.4f} | "
                f"{100 * row['agreement']:.1f} % | {100 * row['overlap']:.1f} % | {100 * row['dropped']:.1f} % | "
                f"{100 * row['hit_rate']:.1f} % | {read / 1e3:.0f} | {100 * (1 - read / base):.0f} % | {_speed(row)} |"
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The exact model, then the settings as they are listed above, then others."""
    from moetier.levers import Levers

    names = ["exact", "exact again", *(str(Levers.parse(text)) for text in SETTINGS)]
    return sorted(rows, key=lambda row: names.index(row["name"]) if row["name"] in names else len(names))


def _speed(row: dict[str, Any]) -> str:
    if row["name"] == "exact":
        return f"1 ({row['tokens_per_second']:.0f} tokens/s)"
    low, high = bootstrap(row["speed"])
    return f"{statistics.median(row['speed']):.2f} ({low:.2f}–{high:.2f})"


def _code(name: str) -> str:
    return f"**{name}**" if name.startswith("exact") else ", ".join(f"`{part}`" for part in name.split(","))


def setting(text: str) -> str:
    """A number of the list, or what a `--try` of `moetier eval` takes."""
    from moetier.errors import ConfigError
    from moetier.levers import Levers

    if text.isdecimal():
        if int(text) >= len(SETTINGS):
            raise argparse.ArgumentTypeError(f"{text}: the last number is {len(SETTINGS) - 1}")
        return SETTINGS[int(text)]
    try:
        Levers.parse(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def main() -> None:
    """Measure, or write the docs, or both."""
    listed = "; ".join(f"{number}: {text}" for number, text in enumerate(SETTINGS))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("texts", type=Path, nargs="?", help="folder of held-out texts; left out, nothing is run")
    add("--tokens", type=int, default=96, help="of each text")
    add(
        "--settings",
        nargs="+",
        type=setting,
        default=list(SETTINGS),
        metavar="SETTING",
        help=f"numbers: {listed}; or NAME=X,…; `exact` runs it beside itself, which shows the noise",
    )
    add("--shares", nargs="+", type=int, default=list(SHARES), metavar="PERCENT", help="of the experts in memory")
    add("--at-once", type=int, default=3, help="settings that take turns with the exact model")
    add("--turn", type=int, default=16, help="tokens of a turn")
    add("--threads", type=int, default=1)
    Pieces.add_options(parser)
    add("--update-docs", action="store_true", help="rewrite the tables in docs/lossy.md from --json")
    add("--smoke", action="store_true", help="two texts, two settings, 16 tokens")
    args = parser.parse_args()
    args.first = None
    if args.smoke:
        args.first, args.tokens, args.turn, args.settings = 2, 16, 8, list(SETTINGS[2::10])
    if args.texts is not None:
        found = run(args)
        if not args.update_docs:
            print(tables(found))
    if args.update_docs:
        if args.json is None or not args.json.is_file():
            parser.error("--update-docs needs --json with the results of a run")
        update_section("lossy", tables(json.loads(args.json.read_text())), DOCS)


if __name__ == "__main__":
    main()
