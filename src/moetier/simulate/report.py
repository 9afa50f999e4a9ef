"""A sweep for people and programs: tables for the terminal, JSON, CSV. The page is `html`'s.

The JSON, version 1: `version`, `moetier`, and `traces`, a list of: `name`, `fingerprint` (SHA-256 of the routing),
`trace` (counts and metadata), `fit`, `checklist` (pairs), `panels` (scope, batch, remarks, and rows with the means and
spreads of the tables), `failures`, and `results`, every field of `moetier.simulate.config.Result` with its config.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from moetier.simulate.checklist import checklist
from moetier.simulate.config import Result
from moetier.simulate.summary import (
    BASELINE,
    Cell,
    Measure,
    Panel,
    TraceSummary,
    all_results,
    host_hit_rate,
    is_oracle,
    measures,
    percent,
    spread,
    wait_share,
)

__all__ = ["CSV_COLUMNS", "REPORT_VERSION", "as_csv", "as_json", "number", "tables"]

REPORT_VERSION = 1


def number(values: Sequence[float], digits: int = 1) -> str:
    """Mean, and ± the standard deviation if there are several; a dash for none."""
    if not values:
        return "–"
    text = f"{statistics.fmean(values):.{digits}f}"
    text = text.removeprefix("-") if not text.strip("-0.") else text  # no minus zero
    return text if len(values) == 1 else f"{text} ±{spread(values):.{digits}f}"


def gap_cells(panel: Panel, policy: str) -> list[str]:
    """Gap closed between LRU and the oracle, in percent, by size."""
    return [number([100 * value for value in panel.gap_closed(policy, slots)], 0) for slots in panel.sizes]


def measure_cells(panel: Panel, policy: str, measure: Measure) -> list[str]:
    """A measure of a policy, by size."""
    found = [panel.cells.get((policy, slots)) for slots in panel.sizes]
    return ["–" if cell is None else number(measure.values(cell), measure.digits) for cell in found]


def size_heads(panel: Panel) -> list[str]:
    """`10 %\\n77 slots`."""
    return [f"{percent(panel.share(slots))}\n{slots}" for slots in panel.sizes]


def has_gaps(panel: Panel) -> bool:
    """Whether the gap column has anything to say."""
    return any(panel.gap_closed(policy, slots) for policy in panel.policies for slots in panel.sizes)


def tables(summary: TraceSummary, record_nbytes: int | None = None) -> list[tuple[Table, list[str]]]:
    """A table for every panel and measure, for rich; the remarks come with the last one of a panel.

    Bold: the best policy without knowledge of the future, and those that cannot be told from it.
    """
    found = []
    for panel in summary.panels:
        made = []
        for measure in measures(all_results(summary), record_nbytes):
            rows = {policy: measure_cells(panel, policy, measure) for policy in panel.policies}
            made.append(_table(panel, f"{measure.name}, {measure.unit}", rows, bold=measure.name == "Hit rate"))
            if measure.name == "Hit rate" and has_gaps(panel):
                rows = {
                    policy: gap_cells(panel, policy)
                    for policy in panel.policies
                    if policy != BASELINE and not is_oracle(policy)
                }
                made.append(_table(panel, "Gap between LRU and Belady closed, %", rows))
        found += [(table, panel.remarks() if table is made[-1] else []) for table in made]
    return found


def _table(panel: Panel, title: str, rows: dict[str, list[str]], bold: bool = False) -> Table:
    table = Table(title=f"{title} — {panel.title}", title_justify="left", title_style="bold")
    table.add_column("of all experts\nslots", no_wrap=True)
    for head in size_heads(panel):
        table.add_column(head, justify="right", no_wrap=True)
    oracles = [policy for policy in rows if is_oracle(policy)]
    leaders = [panel.leaders(slots) if bold else [] for slots in panel.sizes]
    for policy, cells in rows.items():
        marked = [f"[bold]{cell}[/bold]" if policy in best else cell for cell, best in zip(cells, leaders, strict=True)]
        name = policy.replace("[", "\\[")
        last = policy == oracles[-1] if oracles else False
        table.add_row(name + (" (oracle)" if is_oracle(policy) else ""), *marked, end_section=last)
    return table


def as_json(summaries: Sequence[TraceSummary], record_nbytes: int | None = None) -> dict[str, Any]:
    """Everything, for programs."""
    from moetier import __version__

    return {
        "version": REPORT_VERSION,
        "moetier": __version__,
        "traces": [_trace_json(summary, record_nbytes) for summary in summaries],
    }


def _trace_json(summary: TraceSummary, record_nbytes: int | None) -> dict[str, Any]:
    trace, results = summary.trace, all_results(summary)
    found = measures(results, record_nbytes)
    return {
        "name": summary.name,
        "fingerprint": summary.fingerprint,
        "trace": {
            "tokens": trace.tokens,
            "layers": trace.layers,
            "experts": trace.num_experts,
            "top_k": trace.top_k,
            "sequences": len(trace.sequences()),
            **{name: getattr(trace.info, name) for name in ("model", "tokenizer", "source", "extra")},
        },
        "fit": summary.fit,
        "checklist": [list(pair) for pair in checklist(summary, record_nbytes)],
        "panels": [_panel_json(panel, found) for panel in summary.panels],
        "failures": [{"config": asdict(failure.config), "message": failure.message} for failure in summary.failures],
        "results": [result.to_dict() | {"hit_rate": result.hit_rate} for result in results],
    }


def _panel_json(panel: Panel, found: Sequence[Measure]) -> dict[str, Any]:
    rows = []
    for policy in panel.policies:
        for cell in panel.cells_of(policy):
            gap = panel.gap_closed(policy, cell.slots)
            row: dict[str, Any] = {"policy": policy, "slots": cell.slots, "share": panel.share(cell.slots)}
            row |= {"seeds": len(cell.results), "gap_closed": statistics.fmean(gap) if gap else None}
            row["measures"] = [_measure_json(measure, cell) for measure in found if measure.values(cell)]
            rows.append(row)
    return {"scope": panel.scope, "batch": panel.batch, "remarks": panel.remarks(), "rows": rows}


def _measure_json(measure: Measure, cell: Cell) -> dict[str, Any]:
    values = measure.values(cell)
    return {"name": measure.name, "unit": measure.unit, "mean": statistics.fmean(values), "spread": spread(values)}


CSV_COLUMNS = (
    *("trace", "policy", "oracle", "scope", "batch", "semantics", "slots", "share", "host_slots", "exclusive", "seed"),
    *("tokens", "accesses", "needs", "hits", "lates", "misses", "hit_rate", "gap_closed", "host_hit_rate"),
    *("evictions", "demotions", "refills", "staged", "disk_read", "disk_write", "h2d", "d2h", "bytes_unit"),
    *("prefetches_issued", "prefetches_useful", "demand_ratio", "overcommitted"),
    *("tokens_per_second", "seconds_total", "seconds_compute", "seconds_wait", "wait_share", "fit"),
)


def as_csv(summaries: Sequence[TraceSummary]) -> str:
    """One line per simulated run; empty where a value does not exist."""
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for summary in summaries:
        for panel in summary.panels:
            for (policy, slots), cell in panel.cells.items():
                gaps = panel.gap_closed(policy, slots)
                for index, result in enumerate(cell.results):
                    gap = gaps[index] if len(gaps) == len(cell.results) else None
                    writer.writerow(_csv_row(summary, panel, result, gap))
    return text.getvalue()


def _csv_row(summary: TraceSummary, panel: Panel, result: Result, gap: float | None) -> dict[str, Any]:
    config, seconds = result.config, result.seconds
    row = {name: getattr(config, name) for name in ("policy", "scope", "batch", "semantics", "slots", "host_slots")}
    row |= {"seed": config.seed, "trace": summary.name, "oracle": int(is_oracle(config.policy)), "gap_closed": gap}
    row |= {"share": panel.share(config.slots), "tokens": result.tokens, "accesses": result.accesses}
    row |= {name: sum(getattr(result, name)) for name in ("needs", "hits", "lates", "misses")}
    host, wait = host_hit_rate(result), wait_share(result)
    row |= {"hit_rate": result.hit_rate, "host_hit_rate": None if host is None else host / 100}
    names = ("evictions", "demotions", "refills", "staged", "demand_ratio", "overcommitted")
    row |= {name: getattr(result, name) for name in names} | {"exclusive": int(config.exclusive)}
    row |= {name: result.bytes_moved.get(name, 0) for name in ("disk_read", "disk_write", "h2d", "d2h")}
    row |= {"bytes_unit": "experts" if config.timing is None else "bytes"}
    row |= {f"prefetches_{name}": result.prefetches.get(name, 0) for name in ("issued", "useful")}
    row |= {f"seconds_{name}": seconds.get(name) for name in ("total", "compute", "wait")}
    row |= {"tokens_per_second": result.tokens_per_second, "wait_share": None if wait is None else wait / 100}
    return row | {"fit": summary.fit}
