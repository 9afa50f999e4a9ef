"""Prefetching on against off within one process: the same model twice, taking turns of a few tokens.

    python benchmarks/prefetch_turns.py --json benchmarks/results/prefetch-turns.json       # about ten minutes
    python benchmarks/prefetch_turns.py --update-docs benchmarks/results/prefetch-turns.json

`prefetch.py` compares processes, which on a shared machine differ by more than prefetching gains: a run of seconds
falls into a fast or a slow phase of it. Here both see the same machine, turn by turn, and what counts is the ratio
within a round (one turn each, in alternating order). Both are as a user gets them; the first rounds, in which the
controller and the split of threads make their trials, do not count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from transformers import AutoTokenizer

import common
import moetier
from prefetch import DEMO, TEXTS
from report import ROOT, bootstrap, machine_line, say, table, update_section, without_pieces, write_json

PROMPT, TURN = 64, 12


@dataclass(frozen=True)
class Workload:
    """A model, a text (a seed or the name of a file), and the share of the experts that is resident."""

    model: str  # big or demo
    text: int | str
    share: int
    rounds: int

    @property
    def name(self) -> str:
        """For a row."""
        return f"{self.model}, text {self.text}, {self.share} %"


WORKLOADS = (
    *(Workload("big", 0, share, 10) for share in (25, 50)),
    *(Workload("big", 0, share, 20) for share in (75, 90)),
    Workload("big", 7, 50, 10),
    Workload("demo", "code", 25, 80),
    Workload("demo", "prose", 50, 80),
    Workload("demo", "german", 75, 80),
    Workload("demo", "handbook", 90, 80),
)


def tokens_of(workload: Workload, folder: Path, count: int) -> torch.Tensor:
    """[1, count] tokens of the text, from its beginning again where it is too short."""
    if workload.model == "big":
        return torch.tensor([common.make_tokens(common.BIG, count, int(workload.text))])
    text = (TEXTS / f"{workload.text}.txt").read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(folder)(text).input_ids
    return torch.tensor([(ids * (count // len(ids) + 1))[:count]])


def turns(workload: Workload, work: Path, skipped: int) -> dict[str, Any]:
    """Seconds of every turn but those of the first `skipped` rounds, and what became of the prefetches."""
    folder = DEMO if workload.model == "demo" else work / "big"
    count = PROMPT + TURN * (workload.rounds + skipped)
    tokens = tokens_of(workload, folder, count)
    models = {
        name: moetier.from_pretrained(folder, slots=f"{workload.share}%", context=count, device="cpu", prefetch=name)
        for name in ("off", "auto")
    }
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with torch.no_grad():
        outputs = {name: model(tokens[:, :PROMPT], use_cache=True) for name, model in models.items()}
        for number in range(workload.rounds + skipped):
            for name in ("off", "auto") if number % 2 else ("auto", "off"):
                begin = time.perf_counter()
                for at in range(PROMPT + number * TURN, PROMPT + (number + 1) * TURN):
                    past = outputs[name].past_key_values
                    outputs[name] = models[name](tokens[:, at : at + 1], past_key_values=past, use_cache=True)
                if number >= skipped:
                    seconds[name].append(time.perf_counter() - begin)
            if not torch.equal(outputs["off"].logits, outputs["auto"].logits):
                raise SystemExit(f"{workload.name}: prefetching changed the output")
    report = models["auto"].moetier.stats()["prefetches"]
    for model in models.values():
        model.moetier.close()
    kept = ("issued", "useful", "late", "wasted", "cancelled")
    return {
        "name": workload.name,
        "seconds": seconds,
        "words": report["controller"]["words"],
        **{name: report[name] for name in kept},
    }


def row(found: dict[str, Any]) -> list[str]:
    """Of the table."""
    on, off = found["seconds"]["auto"], found["seconds"]["off"]
    ratios = [a / b for a, b in zip(on, off, strict=True)]
    low, high = bootstrap(ratios)
    return [
        found["name"],
        f"{1e3 * statistics.median(off) / TURN:.1f}",
        f"{1e3 * statistics.median(on) / TURN:.1f}",
        f"**{statistics.median(ratios):.3f}** ({low:.2f}–{high:.2f})",
        f"{found['issued']} / {found['useful']} / {found['wasted']}",
        found["words"],
    ]


def report(found: dict[str, Any]) -> str:
    """The section of the page."""
    head = ["workload", "off, ms a token", "on, ms a token", "on ÷ off", "issued / useful / wasted", "the controller"]
    rounds = len(found["workloads"][0]["seconds"]["off"])
    text = (
        f"{machine_line(found['machine'])} {found['threads']} compute threads, turns of {TURN} tokens, at least "
        f"{rounds} rounds; median of the ratios within rounds, in brackets its 95 % interval (bootstrap)."
    )
    return f"{text}\n\n{table(head, [row(one) for one in found['workloads']])}"


def main() -> None:
    """Run the workloads, or write their table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workloads", type=int, nargs="+", default=list(range(len(WORKLOADS))), metavar="NUMBER")
    parser.add_argument("--skip", type=int, default=7, help="rounds at the beginning that do not count")
    parser.add_argument("--work", type=Path, default=Path(__file__).parent / "work")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--smoke", action="store_true", help="one small workload, few rounds: does it run?")
    parser.add_argument("--update-docs", type=Path, metavar="JSON")
    args = parser.parse_args()
    if args.update_docs is not None:
        update_section("prefetch-turns", report(json.loads(args.update_docs.read_text(encoding="utf-8"))))
        return
    torch.set_num_threads(args.threads)
    chosen = [WORKLOADS[number] for number in args.workloads]
    if args.smoke:
        chosen, args.skip = [Workload("demo", "prose", 50, 2)], 1
    found: dict[str, Any] = {"machine": common.machine_info(ROOT), "threads": args.threads, "workloads": []}
    found["machine"]["command"] = without_pieces(found["machine"]["command"])
    for workload in chosen:
        one = turns(workload, args.work, args.skip)
        found["workloads"].append(one)
        say(" | ".join(row(one)))
        write_json(args.json, found)


if __name__ == "__main__":
    main()
