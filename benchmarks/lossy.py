"""What the lossy levers cost and save on the demo model: perplexity, KL, routing kept, hits, bytes, tokens/s.

    python benchmarks/lossy.py TEXTS --json benchmarks/results/lossy.json --update-docs    # about half an hour
    python benchmarks/lossy.py TEXTS --smoke                                               # does it run? a minute

TEXTS is a folder of plain texts (`*.txt`) that the model was not trained on; `scripts/collect_demo_text.py` marks such
documents. Every text is a window of its own. Each setting starts with an empty cache; all are run one after another in
one process. `--update-docs` without TEXTS rewrites the tables in docs/lossy.md from `--json`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import common

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs" / "lossy.md"
BEGIN, END = "<!-- lossy results: begin -->", "<!-- lossy results: end -->"
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


def loader(folder: Path, share: int, context: int) -> Any:
    """The demo model with so many slots, as `evaluate` wants it."""
    from moetier.levers import Levers
    from moetier.loading import from_pretrained

    @contextmanager
    def load(levers: Levers) -> Iterator[Any]:
        model = from_pretrained(
            folder, slots=f"{share}%", context=context, device="cpu", prefetch="off", **levers.to_dict()
        )
        try:
            yield model
        finally:
            model.moetier.close()

    return load


def run(texts: list[Path], tokens: int, settings: tuple[str, ...], threads: int, target: Path | None) -> dict[str, Any]:
    """All sizes and settings; what is done is written after every setting."""
    import torch
    from transformers import AutoTokenizer, logging

    from moetier.evaluation import evaluate, windows_of
    from moetier.levers import Levers

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    torch.set_num_interop_threads(1)
    machine = common.machine_info(ROOT)
    tries = "" if settings == SETTINGS else " --try " + " --try ".join(settings)
    machine["command"] = f"lossy.py TEXTS --tokens {tokens}{tries}"
    found: dict[str, Any] = {
        "machine": machine,
        "settings": {"tokens": tokens, "threads": threads, "texts": [path.name for path in texts]},
        "runs": {},
    }
    with as_file(files("moetier") / "demo_model") as folder:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        encoded = [tokenizer(path.read_text(encoding="utf-8"))["input_ids"] for path in texts]
        windows = windows_of(encoded, tokens, tokens)
        sizes = [
            evaluate(loader(folder, share, tokens), windows, [Levers.parse(text) for text in settings])
            for share in SHARES
        ]
        for outcomes in zip(*sizes, strict=True):  # a setting at every size, so that what there is can be compared
            for share, outcome in zip(SHARES, outcomes, strict=True):
                row = {"name": str(outcome.levers), **outcome.to_dict()}
                found["runs"].setdefault(str(share), []).append(row)
                print(
                    f"{share} % {row['name']}: perplexity {row['perplexity']:.3f}, KL {row['kl']:.4f}, "
                    f"{row['tokens_per_second']:.1f} tokens/s",
                    flush=True,
                )
            if target is not None:
                target.write_text(json.dumps(found, indent=1) + "\n")
    return found


def tables(found: dict[str, Any]) -> str:
    """The machine, and a table per size."""
    machine, settings = found["machine"], found["settings"]
    first = next(iter(found["runs"].values()))[0]
    domains = sorted({name.partition("-")[0] for name in settings["texts"]})
    parts = [
        f"{first['predicted']:,} predicted tokens: the first {settings['tokens']} of each of {len(settings['texts'])} "
        f"held-out texts ({', '.join(domains)}). {machine['cpu']}, {settings['threads']} thread for math, torch "
        f"{machine['versions']['torch']}, transformers {machine['versions']['transformers']}; {machine['date'][:10]}, "
        f"commit {machine['commit']}; `python benchmarks/{machine['command']}`."
    ]
    for share, rows in found["runs"].items():
        exact = rows[0]
        base = exact["bytes_per_token"]["disk→host"]
        lines = [
            f"### {share} % of the experts in memory",
            "",
            "| levers | perplexity | against exact | KL, nats | same top | routing kept | dropped | hits | "
            "read, KB/token | bytes saved | tokens/s |",
            "| --- |" + " ---: |" * 10,
        ]
        for row in rows:
            read = row["bytes_per_token"]["disk→host"]
            change = row["perplexity"] / exact["perplexity"] - 1
            lines.append(
                f"| {_code(row['name'])} | {row['perplexity']:.2f} | {100 * change:+.1f} % | {row['kl']:.4f} | "
                f"{100 * row['agreement']:.1f} % | {100 * row['overlap']:.1f} % | {100 * row['dropped']:.1f} % | "
                f"{100 * row['hit_rate']:.1f} % | {read / 1e3:.0f} | {100 * (1 - read / base):.0f} % | "
                f"{row['tokens_per_second']:.1f} |"
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _code(name: str) -> str:
    return "**exact**" if name == "exact" else ", ".join(f"`{part}`" for part in name.split(","))


def update_docs(found: dict[str, Any]) -> None:
    """Replace what is between the markers."""
    before, _, rest = DOCS.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"{DOCS}: the markers {BEGIN} and {END} are missing")
    DOCS.write_text(f"{before}{BEGIN}\n\n{tables(found)}\n\n{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, nargs="?", help="folder of held-out texts; left out, nothing is run")
    parser.add_argument("--tokens", type=int, default=96, help="of each text")
    parser.add_argument("--try", action="append", dest="settings", metavar="NAME=X,…", help="instead of all settings")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--update-docs", action="store_true", help="rewrite the tables in docs/lossy.md from --json")
    parser.add_argument("--smoke", action="store_true", help="two texts, two settings, 16 tokens")
    arguments = parser.parse_args()
    if arguments.texts is not None:
        texts = sorted(arguments.texts.glob("*.txt"))
        if not texts:
            parser.error(f"{arguments.texts}: no *.txt in it")
        if arguments.smoke:
            found = run(texts[:2], 16, SETTINGS[2::10], arguments.threads, None)
            print(tables(found))
        else:
            run(texts, arguments.tokens, tuple(arguments.settings or SETTINGS), arguments.threads, arguments.json)
    if arguments.update_docs:
        if arguments.json is None or not arguments.json.is_file():
            parser.error("--update-docs needs --json with the results of a run")
        update_docs(json.loads(arguments.json.read_text()))


if __name__ == "__main__":
    main()
