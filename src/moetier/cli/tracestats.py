"""The tables of `moetier trace stats`."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from rich.table import Table

from moetier.cli.console import Console


def show(summary: dict[str, Any], console: Console) -> None:
    """Print a summary (see `moetier.trace.summary`) for people."""
    trace = summary["trace"]
    console.print(
        f"{trace['tokens']} tokens of {trace['sequences']} sequences ({trace['prefill_tokens']} prefilled), "
        f"{trace['layers']} MoE layers, {trace['top_k']} of {trace['experts']} experts per token and layer",
        soft_wrap=True,
    )
    for title, table in (
        ("Popularity and overlap, over the layers", _per_layer(summary)),
        ("What a step needs", _demand(summary)),
        (f"Per-layer caches, emptied with every sequence ({_sampled(summary)})", _caches(summary)),
        (f"Consistency of routing ({_sampled(summary)})", _consistency(summary)),
        (f"Reuse ({summary['reuse']['needs']} needs)", _reuse(summary)),
        ("Global LRU, from reuse distances (needs one by one)", _curve(summary["reuse"]["lru"], "slots", "hit rate")),
        (
            f"Working set: share of all experts used in a window ({_sampled(summary)})",
            _curve(summary["working_set"], "tokens", "share", ""),
        ),
    ):
        console.print(f"\n{title}", style="bold")
        console.print(table)
    verdict = summary["verdict"]
    console.print(f"\nIs this model worth offloading? {verdict['answer']}", style="bold")
    for sentence in verdict["sentences"]:
        console.print(sentence, soft_wrap=True)


def _sampled(summary: dict[str, Any]) -> str:
    return f"{summary['locality']['sampled_tokens']} tokens"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=any(columns))
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    return table


def _per_layer(summary: dict[str, Any]) -> Table:
    skew, overlap = summary["skew"], summary["overlap"]
    table = _table("", "mean", "lowest", "highest")
    for name, values, form in (
        ("Gini coefficient of use", skew["gini"], "{:.2f}"),
        ("entropy of use, of its maximum", skew["entropy"], "{:.2f}"),
        ("Zipf exponent", skew["zipf"], "{:.2f}"),
        ("uses by the more popular half", skew["top_half"], "{:.1%}"),
        ("experts never used", skew["unused"], "{:.1f}"),
        ("experts shared with the token before", overlap["consecutive"], "{:.1%}"),
        ("the same by popularity alone", overlap["chance"], "{:.1%}"),
    ):
        table.add_row(name, *(form.format(value) for value in (fmean(values), min(values), max(values))))
    return table


def _demand(summary: dict[str, Any]) -> Table:
    demand, trace = summary["demand"], summary["trace"]
    records = trace["layers"] * trace["experts"]
    table = _table("", "", "")
    touched = demand["records_per_token"]
    table.add_row(
        "records per token (the LRU cliff)", f"{touched:.0f}", f"of {records}, {100 * touched / records:.1f} %"
    )
    table.add_row(
        "experts per access, as recorded",
        f"{demand['per_access']:.1f}",
        f"of {trace['experts']}, {_percent(demand['share'])}",
    )
    for streams, share in summary["streams"].items():
        if streams > 1:
            table.add_row(f"with {streams} sequences at once", f"{share * trace['experts']:.1f}", _percent(share))
    return table


def _caches(summary: dict[str, Any]) -> Table:
    table = _table("slots per layer", "LRU", "SCH, sees 16 tokens ahead", "random routing")
    for cache in summary["locality"]["caches"]:
        table.add_row(
            f"{cache['slots_per_layer']} ({cache['ratio']} x k)",
            *(_percent(cache[name]) for name in ("lru", "sch", "random")),
        )
    return table


def _consistency(summary: dict[str, Any]) -> Table:
    table = _table("", "", "")
    for length, value in summary["locality"]["srp"].items():
        table.add_row(f"SRP({length})", "-" if value is None else f"{value:.3f}", "1: segments keep to k experts")
    for name, label in (("same_layer", "pairs, same layer"), ("next_layer", "pairs, next layer")):
        pair = summary["co_occurrence"][name]
        if pair is not None:
            note = f"x shuffled over all; {pair['within']:.2f} x within sequences"
            table.add_row(label, f"{pair['over_all']:.2f}", note)
    return table


def _reuse(summary: dict[str, Any]) -> Table:
    reuse = summary["reuse"]
    quantiles = list(reuse["steps"])
    table = _table("percentile", *(f"{quantile} %" for quantile in quantiles))
    table.add_row("steps since the last use", *(f"{value:.0f}" for value in reuse["steps"].values()))
    table.add_row("other records in between", *(f"{value:.0f}" for value in reuse["records"].values()))
    return table


def _curve(values: dict[int, float], name: str, what: str, unit: str = " %") -> Table:
    table = _table(name, *(f"{key}{unit}" for key in values))
    table.add_row(what, *(f"{100 * value:.1f} %" for value in values.values()))
    return table
