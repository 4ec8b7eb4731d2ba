"""Charts as SVG for pages that load nothing: lines and points with axes.

A chart fills its column and is drawn 360 units wide, so that its texts are readable on
a telephone. Colours are CSS variables of the page: ``--soft`` of what isn't data, and
``--c0``, ``--c1``... of the data (:func:`colour_rules`). Series differ by their marks,
too, which the page holds once (:func:`marks`). Names are escaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from adaptspec.colours import distinct_colours

LIGHT, DARK = "#ffffff", "#14181c"  # backgrounds of pages
WIDTH, HEIGHT = 360, 230
LEFT, RIGHT, TOP, BOTTOM = 56, 10, 12, 40
# Paths around the origin, four units to each side.
MARKS = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z",  # circle
    "M-3.5 -3.5h7v7h-7z",  # square
    "M0 -4.5L4.2 3.5H-4.2z",  # triangle
    "M0 -4.8L4.8 0L0 4.8L-4.8 0z",  # diamond
    "M0 4.5L4.2 -3.5H-4.2z",  # triangle on its head
)
CROSS = "M-3.5 -3.5L3.5 3.5M-3.5 3.5L3.5 -3.5"


@dataclass(frozen=True)
class Series:
    """Points of one name.

    Args:
        colour: Which of the page's colours, and with it which mark; None is the colour
            of what isn't data.
        points: Across and up, ascending where they are joined.
        notes: What each point says when it is pointed at.
        crossed: Indices of points that are drawn as crosses.
        pale: Draw it as small, half transparent dots, without notes.
    """

    name: str
    colour: int | None
    points: Sequence[tuple[float, float]]
    notes: Sequence[str] = ()
    joined: bool = True
    dashed: bool = False
    marked: bool = True
    crossed: frozenset[int] = frozenset()
    pale: bool = False


def colour_rules(count: int) -> str:
    """CSS that sets the colours of ``count`` series, by day and by night."""

    def rules(background: str) -> str:
        colours = distinct_colours(count, background)
        return " ".join(f"--c{i}: {colour};" for i, colour in enumerate(colours))

    return (
        f":root {{ {rules(LIGHT)} }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {rules(DARK)} }} }}"
    )


def chart(
    series: Sequence[Series],
    across: str,
    up: str,
    *,
    title: str,
    percent: bool = False,
    from_zero: bool = False,
    level: float | None = None,
) -> str:
    """A chart and its legend, as HTML; empty without any point.

    Args:
        across: What the horizontal axis shows.
        up: What the vertical axis shows.
        title: For those who can't see it.
        percent: Whether the vertical axis is of shares.
        level: Where a dotted line is drawn across.
    """
    series = [one for one in series if one.points]
    if not series:
        return ""
    xs = [x for one in series for x, _ in one.points]
    ys = [y for one in series for _, y in one.points]
    ys += [] if level is None else [level]
    ys += [0.0] if from_zero else []
    x_ticks = _ticks(min(xs), max(xs), 5, 1.0 if all(x % 1 == 0 for x in xs) else 0.0)
    y_ticks = _ticks(min(ys), max(ys), 4)
    x_low, x_high = min(x_ticks[0], *xs), max(x_ticks[-1], *xs)
    y_low, y_high = min(y_ticks[0], *ys), max(y_ticks[-1], *ys)

    def place(x: float, y: float) -> tuple[float, float]:
        share_x = (x - x_low) / (x_high - x_low)
        share_y = (y - y_low) / (y_high - y_low)
        return (
            round(LEFT + share_x * (WIDTH - LEFT - RIGHT), 1),
            round(HEIGHT - BOTTOM - share_y * (HEIGHT - TOP - BOTTOM), 1),
        )

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
    ]
    for tick in y_ticks:
        _, y = place(x_low, tick)
        shown = f"{tick:.0%}" if percent else _number(tick)
        parts.append(
            f'<path class="grid" d="M{LEFT} {y}H{WIDTH - RIGHT}"/>'
            f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{shown}</text>'
        )
    for tick in x_ticks:
        x, _ = place(tick, y_low)
        parts.append(
            f'<text x="{x}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">'
            f"{_number(tick)}</text>"
        )
    parts.append(
        f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" '
        f'text-anchor="middle">{escape(across)}</text>'
        f'<text class="axis" text-anchor="middle" transform="translate(11 '
        f'{(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)">{escape(up)}</text>'
    )
    if level is not None:
        _, y = place(x_low, level)
        parts.append(f'<path class="level" d="M{LEFT} {y}H{WIDTH - RIGHT}"/>')
    for one in series:
        parts.append(_drawn(one, [place(x, y) for x, y in one.points]))
    return "".join([*parts, "</svg>", _legend(series)])


def marks() -> str:
    """What a page must hold before its charts: the shapes that they use."""
    shapes = "".join(
        f'<path id="m{number}" d="{shape}" fill="currentColor"/>'
        for number, shape in enumerate(MARKS)
    )
    cross = f'<path id="mx" d="{CROSS}" stroke="currentColor" stroke-width="1.5"/>'
    return (
        '<svg width="0" height="0" style="position: absolute" aria-hidden="true">'
        f"{shapes}{cross}</svg>"
    )


def key(
    colour: int | None,
    dashed: bool = False,
    marked: bool = True,
    joined: bool = True,
    pale: bool = False,
) -> str:
    """A small picture of how a series is drawn, for a legend."""
    line = ' stroke-dasharray="4 3"' if dashed else ""
    drawn = f'<path d="M1 6H25" stroke="currentColor" stroke-width="2"{line}/>'
    mark = f'<use href="#{_mark(colour)}" x="13" y="6"/>'
    if pale:
        mark = _dots("13 6")
    return (
        f'<svg class="key" viewBox="0 0 26 12" aria-hidden="true" '
        f'style="color: {_paint(colour)}">'
        f"{drawn if joined else ''}{mark if marked else ''}</svg>"
    )


def _drawn(one: Series, places: Sequence[tuple[float, float]]) -> str:
    if one.pale:
        dots = _dots(*(f"{x} {y}" for x, y in places))
        return f'<g style="color: {_paint(one.colour)}">{dots}</g>'
    parts = [f'<g style="color: {_paint(one.colour)}">']
    if one.joined and len(places) > 1:
        path = "M" + "L".join(f"{x} {y}" for x, y in places)
        dash = ' stroke-dasharray="5 4"' if one.dashed else ""
        parts.append(
            f'<path d="{path}" fill="none" stroke="currentColor" stroke-width="2"'
            f"{dash}/>"
        )
    for index, (x, y) in enumerate(places if one.marked else ()):
        note = escape(one.notes[index]) if index < len(one.notes) else ""
        told = f"<title>{note}</title>" if note else ""
        mark = "mx" if index in one.crossed else _mark(one.colour)
        parts.append(f'<use href="#{mark}" x="{x}" y="{y}">{told}</use>')
    return "".join([*parts, "</g>"])


def _dots(*places: str) -> str:
    path = "".join(f"M{place}h0" for place in places)
    return (
        f'<path d="{path}" opacity=".5" stroke="currentColor" stroke-width="4" '
        'stroke-linecap="round"/>'
    )


def _legend(series: Sequence[Series]) -> str:
    items = "".join(f"<li>{_key_of(one)}{escape(one.name)}</li>" for one in series)
    return f'<ul class="legend">{items}</ul>'


def _mark(colour: int | None) -> str:
    return f"m{0 if colour is None else colour % len(MARKS)}"


def _key_of(one: Series) -> str:
    return key(one.colour, one.dashed, one.marked, one.joined, one.pale)


def _paint(colour: int | None) -> str:
    return "var(--soft)" if colour is None else f"var(--c{colour})"


def _ticks(low: float, high: float, about: int, least_step: float = 0.0) -> list[float]:
    """Round numbers from at most ``low`` to at least ``high``."""
    span = high - low or abs(high) or 1.0
    rough = max(span / about, least_step)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * f for f in (1, 2, 2.5, 5, 10) if power * f >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    if first == last:
        last += 1
    return [round(number * step, 12) for number in range(first, last + 1)]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"
