"""The report as one HTML page that needs nothing else: no script, no font, no request (its policy forbids them all)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from html import escape
from itertools import pairwise

from moetier.simulate import svg
from moetier.simulate.checklist import checklist, trace_facts
from moetier.simulate.page import CONTENT_SECURITY_POLICY, STYLE
from moetier.simulate.report import gap_cells, has_gaps, measure_cells
from moetier.simulate.summary import (
    BASELINE,
    Cell,
    Measure,
    Panel,
    TraceSummary,
    all_results,
    is_oracle,
    measures,
    percent,
)

__all__ = ["as_html"]


def as_html(summaries: Sequence[TraceSummary], record_nbytes: int | None = None, command: str = "") -> str:
    """The whole page. `command` is shown as how to make it again."""
    from moetier import __version__

    names = " · ".join(summary.name for summary in summaries)
    body = [
        f"<header><p class=kicker>moetier simulate</p><h1>{escape(names)}</h1>",
        f"<p class=lead>Expert caching, simulated: the routing of the trace served by the residency core of moetier "
        f"{escape(__version__)} under every policy and size.</p>",
        _contents(summaries),
        "</header><main>",
    ]
    body += [_trace(number, summary, record_nbytes) for number, summary in enumerate(summaries)]
    if command:
        body.append(f"<section><h2>Made with</h2><pre>{escape(command)}</pre></section>")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{CONTENT_SECURITY_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(names)} – moetier simulate</title><style>{STYLE}</style></head>"
        f"<body>{''.join(body)}</main></body></html>\n"
    )


def _contents(summaries: Sequence[TraceSummary]) -> str:
    """Links to the parts, where there are several."""
    entries = [
        (f"t{number}p{index}", f"{summary.name}: {panel.title}" if len(summaries) > 1 else panel.title)
        for number, summary in enumerate(summaries)
        for index, panel in enumerate(summary.panels)
    ]
    entries += [
        (f"t{number}checklist", f"{summary.name}: conditions" if len(summaries) > 1 else "conditions")
        for number, summary in enumerate(summaries)
    ]
    links = "".join(f'<li><a href="#{name}">{escape(text)}</a></li>' for name, text in entries)
    return f'<nav aria-label="Contents"><ul>{links}</ul></nav>'


def _trace(number: int, summary: TraceSummary, record_nbytes: int | None) -> str:
    found = measures(all_results(summary), record_nbytes)
    facts = "".join(f"<dt>{escape(word)}</dt><dd>{escape(text)}</dd>" for word, text in trace_facts(summary))
    said = "".join(
        f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in checklist(summary, record_nbytes)
    )
    failed = "".join(
        f"<li><code>{escape(failure.config.policy)}</code> at {failure.config.slots} slots: "
        f"{escape(failure.message)}</li>"
        for failure in summary.failures
    )
    return (
        f'<section class=trace id="t{number}"><h2>The trace: {escape(summary.name)}</h2>'
        f"<dl class=facts>{facts}</dl></section>"
        + (f"<section class=failed><h2>Failed simulations</h2><ul>{failed}</ul></section>" if failed else "")
        + "".join(_panel(f"t{number}p{index}", panel, found) for index, panel in enumerate(summary.panels))
        + f'<section id="t{number}checklist"><h2>Conditions of these numbers</h2>'
        f"<dl class=checklist>{said}</dl></section>"
    )


def _panel(name: str, panel: Panel, found: Sequence[Measure]) -> str:
    remarks = "".join(f"<p class=remark>{escape(text)}</p>" for text in panel.remarks())
    at = most_telling(panel)
    parts = [f'<section id="{name}"><h2>{escape(panel.title.capitalize())}</h2>{_headline(panel, at)}{remarks}']
    parts.append(_hit_curves(panel))
    parts.append(_table(panel, "Hit rate", found[0]))
    if has_gaps(panel):
        parts.append(_gap_table(panel))
    parts.append(_layers(panel, at))
    parts.append(_timeline(panel, at))
    for measure in found[1:]:
        parts.append(_measure_curves(panel, measure))
        parts.append(_table(panel, f"{measure.name}, {measure.unit}", measure))
    parts.append(_waiting(panel, at))
    return "".join(parts) + "</section>"


def most_telling(panel: Panel) -> int:
    """The size at which the policies differ most, for the figures that show one size.

    Sizes below what a step touches count only if there is no other: there LRU's zero makes all differences.
    """

    def width(slots: int) -> float:
        rates = [cell.hit_rate for cell in panel.contenders(slots)] or [0.0]
        return max(rates) - min(rates)

    sizes = [slots for slots in panel.sizes if panel.scope == "layer" or slots >= panel.touched]
    return max(sizes or panel.sizes, key=width)


def _headline(panel: Panel, slots: int) -> str:
    """The best policy in a sentence, unless nothing is to be ranked."""
    leaders = panel.leaders(slots)
    if not leaders:
        return ""
    best = panel.cells[leaders[0], slots]
    text = (
        f"With {percent(panel.share(slots))} of the experts resident, <b>{escape(best.policy)}</b> hits "
        f"<b>{100 * best.hit_rate:.1f} %</b> of the needs"
    )
    gap = panel.gap_closed(best.policy, slots)
    low, high = panel.cells.get((BASELINE, slots)), panel.oracle(slots)
    if gap and low is not None and high is not None and best.policy != BASELINE:
        text += (
            f" and closes {100 * statistics.fmean(gap):.0f} % of the distance from LRU ({100 * low.hit_rate:.1f} %) to "
            f"{escape(high.policy)} ({100 * high.hit_rate:.1f} %)"
        )
    if len(leaders) > 1:
        text += f"; not to be told from it: {escape(', '.join(leaders[1:]))}"
    return f"<p class=headline>{text}.</p>".replace(" %", "\u00a0%")


def colours(panel: Panel) -> dict[str, int]:
    """A colour for every policy, the same in all figures; oracles are -1, -2."""
    online = sorted(policy for policy in panel.policies if not is_oracle(policy))
    oracles = sorted(policy for policy in panel.policies if is_oracle(policy))
    return {policy: number for number, policy in enumerate(online)} | {
        policy: -1 - number for number, policy in enumerate(oracles)
    }


def _series(panel: Panel, measure: Measure) -> list[svg.Series]:
    """A line for every policy: the measure against the share of experts that is resident, in percent."""
    chosen, series = colours(panel), []
    for policy in panel.policies:
        cells = [cell for cell in panel.cells_of(policy) if measure.values(cell)]
        points = [(100 * panel.share(cell.slots), statistics.fmean(measure.values(cell))) for cell in cells]
        series.append(svg.Series(policy, points, [_deviation(cell, measure) for cell in cells], chosen[policy]))
    return series


def _deviation(cell: Cell, measure: Measure) -> float:
    values = measure.values(cell)
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _hit_curves(panel: Panel) -> str:
    rate = Measure("Hit rate", "%", lambda result: 100 * result.hit_rate)
    shares = [100 * panel.share(slots) for slots in panel.sizes]
    title = f"Hit rate of every policy against cache size, {panel.title}"
    picture = svg.lines(
        _series(panel, rate),
        title=title,
        x_label="experts resident, % of all experts of all layers",
        y_label="hit rate, % of needs",
        x_ticks=_x_ticks(shares),
        y_range=(0.0, 100.0),
        unit=" %",
    )
    oracles = [policy for policy in panel.policies if is_oracle(policy)]
    text = "Share of needs found resident, by cache size. Higher is better."
    if oracles:
        text += (
            f" Dashed, in the colour of the text: what knowledge of the future makes possible ({', '.join(oracles)})."
        )
    if any(len(cell.results) > 1 for cell in panel.cells.values()):
        text += " Vertical bars: one standard deviation over seeds."
    return _figure("Hit rate by cache size", picture, text)


def _x_ticks(shares: Sequence[float]) -> list[float]:
    """The sizes that were simulated, unless there are too many or they stand too close."""
    rounded = [round(share) if abs(share - round(share)) < 0.2 else round(share, 1) for share in shares]
    span = max(rounded) - min(rounded)
    close = any(after - before < 0.06 * span for before, after in pairwise(rounded))
    return [] if len(rounded) > 12 or close else rounded


def _layers(panel: Panel, slots: int) -> str:
    """The heat map of one size, the others folded away."""
    if panel.layers < 2:
        return ""
    first = _figure(
        f"Hit rate by layer, at {percent(panel.share(slots))} of the experts",
        _heat_map(panel, slots),
        "One row per policy, one column per MoE layer in the order of the forward pass; numbers in % of the layer's "
        "needs. Shown at the size where the policies differ most, if the cache holds a step at all.",
    )
    others = "".join(
        f"<h4>{percent(panel.share(size))} of the experts, {size} slots</h4>"
        f"<div class=scroll tabindex=0>{_heat_map(panel, size)}</div>"
        for size in panel.sizes
        if size != slots
    )
    folded = f"<details><summary>Hit rate by layer at the other sizes</summary>{others}</details>" if others else ""
    return first + folded


def _heat_map(panel: Panel, slots: int) -> str:
    rows = [
        (policy, [100 * rate for rate in panel.cells[policy, slots].per_layer()])
        for policy in panel.policies
        if (policy, slots) in panel.cells
    ]
    values = [value for _, row in rows for value in row]
    low, high = 10 * (min(values) // 10), min(100.0, 10 * -(-max(values) // 10))
    return svg.heat_map(
        rows,
        title=f"Hit rate by layer at {slots} slots, {panel.title}",
        x_label="MoE layer",
        unit=" %",
        low=low,
        high=high if high > low else low + 10,
    )


def _timeline(panel: Panel, slots: int) -> str:
    chosen, series = colours(panel), []
    for policy in panel.policies:
        cell = panel.cells.get((policy, slots))
        if cell is None or len(cell.results[0].timeline) < 2:
            continue
        result = cell.results[0]
        tokens = result.tokens / max(1, result.accesses)
        points = [(count * tokens, 100 * rate) for count, rate in result.timeline]
        series.append(svg.Series(policy, points, (), chosen[policy], markers=False))
    if not series:
        return ""
    seed = panel.cells[series[0].label, slots].results[0].config.seed
    picture = svg.lines(
        series,
        title=f"Hit rate over the run at {slots} slots, {panel.title}",
        x_label="tokens served",
        y_label="hit rate of the window, %",
        y_range=(0.0, 100.0),
        unit=" %",
    )
    return _figure(
        f"Hit rate over the run, at {percent(panel.share(slots))} of the experts",
        picture,
        f"Each point is one of {len(series[0].points)} windows of equal length"
        f"{'' if seed is None else f', of the run with seed {seed}'}. A cold cache rises at the left; drops show a "
        "change of text.",
    )


def _measure_curves(panel: Panel, measure: Measure) -> str:
    shares = [100 * panel.share(slots) for slots in panel.sizes]
    picture = svg.lines(
        _series(panel, measure),
        title=f"{measure.name} of every policy against cache size, {panel.title}",
        x_label="experts resident, % of all experts of all layers",
        y_label=f"{measure.name.lower()}, {measure.unit}",
        x_ticks=_x_ticks(shares),
        unit=f" {measure.unit}",
        show=lambda value: f"{value:.{measure.digits}f}",
    )
    if not picture:
        return ""
    return _figure(f"{measure.name} by cache size", picture, measure.caption)


def _waiting(panel: Panel, slots: int) -> str:
    """T_wait against T_compute, and what perfect overlap of the two would take."""
    rows = []
    for policy in panel.policies:
        cell = panel.cells.get((policy, slots))
        if cell is None or not cell.results[0].seconds.get("total"):
            continue
        result = cell.results[0]
        each = 1e3 / max(1, result.tokens)
        busy = max(result.seconds.get(link, 0.0) for link in ("disk_read", "disk_write", "h2d", "d2h"))
        compute, wait = result.seconds["compute"], result.seconds["wait"]
        rows.append(svg.Bar(policy, (compute * each, wait * each), max(compute, busy) * each))
    picture = svg.bars(
        rows,
        ("T_compute", "T_wait"),
        title=f"Computing and waiting per token at {slots} slots, {panel.title}",
        x_label="virtual milliseconds per token",
        unit=" ms",
        mark="perfect overlap",
    )
    if not picture:
        return ""
    return _figure(
        f"Where the time goes, at {percent(panel.share(slots))} of the experts",
        picture,
        "T_wait: nothing to compute, an expert on its way. The mark is the longer of all computing and the busiest "
        "link's time, latencies included: what the same work would take if the two overlapped perfectly.",
    )


def _figure(title: str, picture: str, caption: str) -> str:
    said = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure><h3>{escape(title)}</h3><div class=scroll tabindex=0>{picture}</div>{said}</figure>"


def _heads(panel: Panel) -> str:
    sizes = "".join(
        f'<th scope="col">{percent(panel.share(slots))}<br><small>{slots} slots</small></th>' for slots in panel.sizes
    )
    return f'<thead><tr><th scope="col">policy</th>{sizes}</tr></thead>'


def _table(panel: Panel, title: str, measure: Measure) -> str:
    rate = measure.name == "Hit rate"
    rows = []
    for policy in panel.policies:
        cells = measure_cells(panel, policy, measure)
        best = [rate and policy in panel.leaders(slots) for slots in panel.sizes]
        said = "".join(
            f"<td class=best>{escape(cell)}</td>" if won else f"<td>{escape(cell)}</td>"
            for cell, won in zip(cells, best, strict=True)
        )
        oracle = " <small>oracle</small>" if is_oracle(policy) else ""
        rows.append(f'<tr><th scope="row">{escape(policy)}{oracle}</th>{said}</tr>')
    caption = f"{title}, % of needs. Bold: the best without knowledge of the future, and what cannot be told from it."
    return _frame(panel, caption if rate else title, rows, folded=not rate)


def _gap_table(panel: Panel) -> str:
    rows = [
        f'<tr><th scope="row">{escape(policy)}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in gap_cells(panel, policy))
        + "</tr>"
        for policy in panel.policies
        if not is_oracle(policy) and policy != BASELINE
    ]
    title = "Share of the distance from LRU to Belady that a policy closes, %. Negative: worse than LRU."
    return _frame(panel, title, rows, folded=False) if rows else ""


def _frame(panel: Panel, title: str, rows: Sequence[str], folded: bool) -> str:
    table = (
        f"<div class=scroll tabindex=0><table><caption>{escape(title)}</caption>{_heads(panel)}"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )
    return f"<details><summary>Numbers: {escape(title)}</summary>{table}</details>" if folded else table
