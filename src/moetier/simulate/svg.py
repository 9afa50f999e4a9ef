"""Plain SVG charts by hand: lines, heat map, bars. Colours come from the page's style sheet, so that both of its themes
work; every mark has a title that a pointer or a screen reader finds. Knows nothing of simulations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Bar", "Series", "bars", "heat_map", "lines"]

WIDTH, HEIGHT = 860, 400
LEFT, RIGHT, TOP, BOTTOM = 62, 178, 14, 50
COLOURS = 8  # --c0 … --c7 of the style sheet
DASHES = ("", "7 3", "2 3")


@dataclass(frozen=True)
class Series:
    """A line: points (x, y), deviations of y (or none), a colour by number; below 0 a reference, in the text's."""

    label: str
    points: Sequence[tuple[float, float]]
    deviations: Sequence[float] = ()
    colour: int = 0
    markers: bool = True


@dataclass(frozen=True)
class Bar:
    """A stacked horizontal bar: parts in the order of the legend, and a mark somewhere on the scale."""

    label: str
    parts: Sequence[float]
    mark: float | None = None


def ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Round numbers from low to high."""
    if high <= low:
        high = low + 1.0
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 10) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def plain(value: float) -> str:
    """A number without needless zeros: `0.25`, `1,200`."""
    return f"{value:,.10g}"


def lines(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    x_ticks: Sequence[float] = (),
    y_range: tuple[float, float] | None = None,
    unit: str = "",
    show: Callable[[float], str] = lambda value: f"{value:.1f}",
) -> str:
    """A line chart with the name of every line at its end. Series without points are left out."""
    series = [line for line in series if line.points]
    xs = [x for line in series for x, _ in line.points]
    ys = [y for line in series for _, y in line.points]
    if not xs:
        return ""
    low, high = y_range or (0.0, max(ys) * 1.05 or 1.0)
    left, right = min(xs), max(xs)
    pad = 0.03 * (right - left) or 1.0
    left, right = left - pad, right + pad

    def at_x(x: float) -> float:
        return LEFT + (x - left) / (right - left) * (WIDTH - LEFT - RIGHT)

    def at_y(y: float) -> float:
        return HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - BOTTOM - TOP)

    parts = [_frame(title, x_label, y_label, HEIGHT)]
    for tick in ticks(low, high):
        y = at_y(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{plain(tick)}</text>')
    for tick in x_ticks or ticks(left, right):
        x = at_x(tick)
        bottom = HEIGHT - BOTTOM
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 5}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 19}" text-anchor="middle">{plain(tick)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>')
    for line in series:
        parts.append(_line(line, at_x, at_y, unit, show))
    parts.append(_end_labels(series, at_x, at_y))
    return "".join(parts) + "</svg>"


def _frame(title: str, x_label: str, y_label: str, height: int) -> str:
    middle = (TOP + height - BOTTOM) / 2
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}" '
        f'xmlns="http://www.w3.org/2000/svg"><title>{escape(title)}</title>'
        f'<text class="label" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{height - 8}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
        f'<text class="label" transform="translate(15 {middle}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>"
    )


def _look(colour: int) -> tuple[str, str]:
    """Colour and dashes: a reference is dashed in the text's colour; the ninth line takes the first colour, dashed."""
    if colour < 0:
        return "var(--ink)", DASHES[-colour % len(DASHES)] or "7 3"
    return f"var(--c{colour % COLOURS})", DASHES[colour // COLOURS % len(DASHES)]


def _line(
    line: Series,
    at_x: Callable[[float], float],
    at_y: Callable[[float], float],
    unit: str,
    show: Callable[[float], str],
) -> str:
    colour, dashes = _look(line.colour)
    points = sorted(line.points)
    path = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in points)
    dash = f' stroke-dasharray="{dashes}"' if dashes else ""
    parts = [f'<g class="series" style="--c:{colour}"><title>{escape(line.label)}</title>']
    if len(points) > 1:
        parts.append(f'<polyline points="{path}"{dash}/>')
    for index, (x, y) in enumerate(line.points):
        if line.deviations and line.deviations[index]:
            top, bottom = at_y(y + line.deviations[index]), at_y(y - line.deviations[index])
            parts.append(
                f'<line class="error" x1="{at_x(x):.1f}" x2="{at_x(x):.1f}" y1="{top:.1f}" y2="{bottom:.1f}"/>'
            )
        if line.markers or len(points) == 1:
            off = f" ±{show(line.deviations[index])}" if line.deviations and line.deviations[index] else ""
            said = f"{line.label}: {show(y)}{off}{unit} at {plain(round(x, 2))}"
            parts.append(f'<g class="mark"><title>{escape(said)}</title>{_marker(line.colour, at_x(x), at_y(y))}</g>')
    return "".join(parts) + "</g>"


def _marker(kind: int, x: float, y: float) -> str:
    shape = kind % 4 if kind >= 0 else 4
    if shape == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.6"/>'
    if shape == 1:
        return f'<rect x="{x - 3.3:.1f}" y="{y - 3.3:.1f}" width="6.6" height="6.6"/>'
    if shape == 2:
        return f'<path d="M{x:.1f} {y - 4.4:.1f}l4.4 7.6h-8.8z"/>'
    if shape == 3:
        return f'<path d="M{x:.1f} {y - 4.6:.1f}l4.6 4.6l-4.6 4.6l-4.6 -4.6z"/>'
    return f'<circle class="hollow" cx="{x:.1f}" cy="{y:.1f}" r="3.2"/>'


def _end_labels(series: Sequence[Series], at_x: Callable[[float], float], at_y: Callable[[float], float]) -> str:
    """Names to the right of the last points, moved apart where they would overlap, with a thin line to their point."""
    gap = 15.5
    ends = sorted(((at_y(max(line.points)[1]), line) for line in series), key=lambda end: end[0])
    places = _apart([y for y, _ in ends], gap, TOP + 4, HEIGHT - BOTTOM)
    parts = []
    for (y, line), place in zip(ends, places, strict=True):
        x = at_x(max(line.points)[0])
        colour, _ = _look(line.colour)
        start = WIDTH - RIGHT + 14
        parts.append(f'<path class="leader" d="M{x + 6:.1f} {y:.1f}L{start - 4} {place:.1f}"/>')
        parts.append(
            f'<text class="name" style="--c:{colour}" x="{start}" y="{place + 4:.1f}">'
            f"{escape(_cut(line.label, 24))}</text>"
        )
    return "".join(parts)


def _apart(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Ascending places as near as may be to the wanted ones, at least `gap` apart where there is room."""
    if not wanted:
        return []
    gap = min(gap, (high - low) / max(1, len(wanted) - 1))
    places: list[float] = []
    for place in wanted:
        places.append(max(place, low, places[-1] + gap if places else low))
    limit = high
    for index in range(len(places) - 1, -1, -1):
        places[index] = min(places[index], limit)
        limit = places[index] - gap
    return places


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def heat_map(
    rows: Sequence[tuple[str, Sequence[float]]], *, title: str, x_label: str, unit: str, low: float, high: float
) -> str:
    """Rows of cells, as deep in colour as their value lies between low and high; numbers where there is room."""
    columns = max((len(values) for _, values in rows), default=0)
    if not columns:
        return ""
    left, right, cell_height = 168, 14, 25
    width = (WIDTH - left - right) / columns
    height = TOP + cell_height * len(rows) + 92
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}" '
        f'xmlns="http://www.w3.org/2000/svg"><title>{escape(title)}</title>'
    ]
    for row, (name, values) in enumerate(rows):
        y = TOP + row * cell_height
        parts.append(
            f'<text class="name" x="{left - 8}" y="{y + 17}" text-anchor="end">{escape(_cut(name, 24))}</text>'
        )
        for column, value in enumerate(values):
            depth = min(1.0, max(0.0, (value - low) / (high - low or 1.0)))
            x = left + column * width
            parts.append(
                f'<g class="cell"><title>{escape(name)}, {escape(x_label)} {column}: {value:.1f}{unit}</title>'
                f'<rect x="{x + 0.5:.2f}" y="{y + 0.5}" width="{width - 1:.2f}" height="{cell_height - 1}" '
                f'fill-opacity="{0.04 + 0.96 * depth:.3f}"/>'
            )
            if width >= 18:
                tone = "deep" if depth > 0.5 else "pale"
                parts.append(
                    f'<text class="{tone}" x="{x + width / 2:.1f}" y="{y + 16.5}" text-anchor="middle">'
                    f"{value:.0f}</text>"
                )
            parts.append("</g>")
    bottom = TOP + cell_height * len(rows)
    every = max(1, math.ceil(20 / width))
    for column in range(0, columns, every):
        x = left + (column + 0.5) * width
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{column}</text>')
    middle = (left + WIDTH - right) / 2
    parts.append(f'<text class="label" x="{middle}" y="{bottom + 36}" text-anchor="middle">{escape(x_label)}</text>')
    return "".join(parts) + _scale(left, bottom + 52, low, high, unit) + "</svg>"


def _scale(x: float, y: float, low: float, high: float, unit: str) -> str:
    """The colour bar of a heat map."""
    steps, width = 12, 20
    cells = "".join(
        f'<rect x="{x + 70 + index * width}" y="{y}" width="{width}" height="11" '
        f'fill-opacity="{0.04 + 0.96 * index / (steps - 1):.3f}"/>'
        for index in range(steps)
    )
    end = x + 70 + steps * width + 8
    return (
        f'<g class="cell scale">{cells}</g><text class="tick" x="{x + 62}" y="{y + 10}" text-anchor="end">'
        f'{plain(low)}{unit}</text><text class="tick" x="{end}" y="{y + 10}">{plain(high)}{unit}</text>'
    )


def bars(rows: Sequence[Bar], names: Sequence[str], *, title: str, x_label: str, unit: str, mark: str) -> str:
    """Stacked horizontal bars with a legend; `mark` names what the mark on each bar is."""
    if not rows:
        return ""
    left, right, thick, pitch = 168, 78, 17, 27
    top = 40
    height = top + pitch * len(rows) + 46
    high = max(max(sum(bar.parts), bar.mark or 0.0) for bar in rows) or 1.0
    scale = (WIDTH - left - right) / high
    bottom = top + pitch * len(rows)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}" '
        f'xmlns="http://www.w3.org/2000/svg"><title>{escape(title)}</title>'
    ]
    x = float(left)
    for index, name in enumerate(names):
        parts.append(f'<rect class="part p{index}" x="{x:.0f}" y="10" width="13" height="13"/>')
        parts.append(f'<text class="tick" x="{x + 19:.0f}" y="21">{escape(name)}</text>')
        x += 40 + 7.2 * len(name)
    parts.append(f'<line class="bound" x1="{x:.0f}" x2="{x:.0f}" y1="8" y2="25"/>')
    parts.append(f'<text class="tick" x="{x + 10:.0f}" y="21">{escape(mark)}</text>')
    for tick in ticks(0, high):
        at = left + tick * scale
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{top - 4}" y2="{bottom}"/>')
        parts.append(f'<text class="tick" x="{at:.1f}" y="{bottom + 16}" text-anchor="middle">{plain(tick)}</text>')
    for row, bar in enumerate(rows):
        y, x = top + row * pitch + 3, float(left)
        parts.append(
            f'<text class="name" x="{left - 8}" y="{y + 13}" text-anchor="end">{escape(_cut(bar.label, 24))}</text>'
        )
        for index, value in enumerate(bar.parts):
            parts.append(
                f'<g class="mark"><title>{escape(bar.label)}, {escape(names[index])}: {value:.3g}{unit}</title>'
                f'<rect class="part p{index}" x="{x:.1f}" y="{y}" '
                f'width="{max(0.0, value * scale):.1f}" height="{thick}"/></g>'
            )
            x += value * scale
        if bar.mark is not None:
            at = left + bar.mark * scale
            parts.append(
                f'<g class="mark"><title>{escape(bar.label)}, {escape(mark)}: {bar.mark:.3g}{unit}</title>'
                f'<line class="bound" x1="{at:.1f}" x2="{at:.1f}" y1="{y - 3}" y2="{y + thick + 3}"/></g>'
            )
        parts.append(f'<text class="tick" x="{x + 6:.1f}" y="{y + 13}">{sum(bar.parts):.3g}</text>')
    middle = (left + WIDTH - right) / 2
    parts.append(f'<text class="label" x="{middle}" y="{height - 6}" text-anchor="middle">{escape(x_label)}</text>')
    return "".join(parts) + "</svg>"
