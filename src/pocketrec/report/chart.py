"""Small figures as SVG: lines and dots on two axes, and bars. Text stays text; nothing is drawn over anything else.

Names of lines stand in a legend outside, so that a figure reads at 260 pixels as well as at 600. Pure functions: the
same data, the same characters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Literal

COLORS = ("#0b5cad", "#c2410c", "#0f766e", "#7c3aed", "#b4235a", "#667600", "#8a5a00", "#0279a0", "#a21caf", "#4d5968")
"""Each at least 4.5 : 1 on white; marks and dashes tell lines apart where colours cannot."""

INK, FAINT, GRID = "#1c2430", "#5b6673", "#e3e7ec"
DASHES = ("", "6 3", "2 3", "8 3 2 3")
WIDTH, HEIGHT = 300, 214
LEFT, RIGHT, TOP, BOTTOM = 38, 10, 24, 40
GAP = 18
"""Room around the figures of a poster."""

FLATTEST = 2e-3
"""Least range of a linear axis, as a share of its values: what differs by less is drawn as the same."""

PARTS = ("#0b5cad", "#7ba7d7", "#c2410c", "#e9a37f")

Format = Callable[[float], str]
AxisScale = Literal["linear", "log", "binary"]
"""``binary`` is a logarithmic axis with ticks at powers of two, for bytes."""


@dataclass(frozen=True)
class Marker:
    """A point, its spread to either side, and what a pointer that rests on it is told."""

    x: float
    y: float
    spread: float = 0.0
    hint: str = ""


@dataclass(frozen=True)
class Line:
    """Points that belong together; ``style`` chooses colour, mark and dash; ``marks`` shows the points themselves."""

    style: int | None
    dots: tuple[Marker, ...]
    marks: bool = True
    faint: bool = False


@dataclass(frozen=True)
class Figure:
    """Two axes.

    Attributes:
        title: for those who cannot see it.
        x: name of the axis below.
        y: name of the axis at the left, above it. Its range is that of the points; longer spreads are cut off.
        lines: what is drawn.
        x_format: how a number below is written.
        y_format: how a number at the left is written; by default with as many decimals as the ticks need.
        scale: of the axis below.
        star: the uncompressed model, as a star with a level line.
        whole: ticks below are whole numbers only.
    """

    title: str
    x: str
    y: str
    lines: tuple[Line, ...]
    x_format: Format = "{:g}".format
    y_format: Format | None = None
    scale: AxisScale = "linear"
    star: Marker | None = None
    whole: bool = False

    @property
    def dots(self) -> list[Marker]:
        """All of them."""
        return [d for line in self.lines for d in line.dots] + ([self.star] if self.star else [])


def svg(figure: Figure) -> str:
    """The figure, ``WIDTH`` x ``HEIGHT`` units, as wide as the place it stands in."""
    dots = figure.dots
    if not dots:
        return ""
    bounds = _bounds([d.x for d in dots], figure.scale), _bounds([d.y for d in dots], "linear")
    (x0, x1), (y0, y1) = bounds
    x_ticks = ticks(x0, x1, 5) if figure.scale == "linear" else log_ticks(x0, x1, figure.scale == "binary")
    x_ticks = [t for t in x_ticks if t == round(t)] if figure.whole else x_ticks
    y_ticks = ticks(y0, y1, 5)
    y_format = figure.y_format or _decimals(y_ticks)
    across = (lambda v: v) if figure.scale == "linear" else math.log

    def px(x: float) -> float:
        return LEFT + (across(x) - across(x0)) / (across(x1) - across(x0)) * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        y = min(max(y, y0), y1)
        return HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(figure.title)}">',
        *(_rule(LEFT, py(t), WIDTH - RIGHT, py(t)) for t in y_ticks),
        *(_text(LEFT - 6, py(t) + 3.5, y_format(t), "end") for t in y_ticks),
        *_x_axis(x_ticks, px, figure.x_format),
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, figure.x, "middle"),
        _text(0, 11, figure.y, "start"),
    ]
    if figure.star:
        y = py(figure.star.y)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="{INK}" stroke-dasharray="3 3" opacity=".6"/>')
    for line in figure.lines:
        parts += _line(line, px, py)
    if figure.star:
        parts.append(_mark(px(figure.star.x), py(figure.star.y), _STAR, INK, figure.star.hint))
    return "".join([*parts, "</svg>"])


def poster(title: str, names: Sequence[tuple[int | None, str]], figures: Sequence[tuple[str, str]]) -> str:
    """Figures side by side under their titles and one legend, as a file of its own.

    Args:
        title: above all of it.
        names: look of each line, ``None`` for the uncompressed model, and its name.
        figures: title and drawing of each.
    """
    width = (WIDTH + GAP) * len(figures) - GAP + 2 * GAP
    x, y, keys = float(GAP), 42.0, []
    for style, name in names:
        step = 40 + 6.8 * len(name)
        if x + step > width - GAP and keys:
            x, y = float(GAP), y + 18
        key = swatch(style).replace("<svg ", f'<svg x="{x:.1f}" y="{y - 10:.1f}" width="28" height="14" ', 1)
        keys.append(key + _text(x + 32, y, name, "start", ink=True))
        x += step
    parts = []
    for i, (name, drawn) in enumerate(figures):
        left = GAP + i * (WIDTH + GAP)
        parts.append(_text(left, y + 28, name, "start", ink=True))
        parts.append(drawn.replace("<svg ", f'<svg x="{left}" y="{y + 38:.0f}" width="{WIDTH}" height="{HEIGHT}" ', 1))
    height = y + 38 + HEIGHT + GAP
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height:.0f}" width="{width}" '
        f'height="{height:.0f}" font-family="system-ui, sans-serif" font-size="11" role="img" '
        f'aria-label="{escape(title)}"><rect width="100%" height="100%" fill="#fff"/>'
        f'<text x="{GAP}" y="20" font-size="14" font-weight="600" fill="{INK}">{escape(title)}</text>'
        f"{''.join([*keys, *parts])}</svg>\n"
    )


def swatch(style: int | None) -> str:
    """The mark of a line for a legend; ``None`` is the uncompressed model."""
    if style is None:
        return f'<svg class="key" viewBox="-9 -7 18 14" aria-hidden="true"><path d="{_STAR}" fill="{INK}"/></svg>'
    return (
        f'<svg class="key" viewBox="-14 -7 28 14" aria-hidden="true"><path d="M-13 0H13" stroke="{_color(style)}" '
        f'stroke-width="2"{_dash(style)}/><path d="{_shape(style)}" fill="{_color(style)}"/></svg>'
    )


@dataclass(frozen=True)
class Bar:
    """One bar: its name, the lengths of its parts, what is written at its end, and its colour where it has one part."""

    name: str
    parts: tuple[float, ...]
    text: str
    style: int | None = None


def bars(title: str, entries: Sequence[Bar]) -> str:
    """Bars below each other, each under its name, all on one scale from zero."""
    if not entries:
        return ""
    row, longest = 31, max(sum(bar.parts) for bar in entries) or 1.0
    parts = [f'<svg viewBox="0 0 {WIDTH} {row * len(entries)}" role="img" aria-label="{escape(title)}">']
    for i, bar in enumerate(entries):
        top, x = i * row, 0.0
        parts.append(_text(0, top + 12, _cut(bar.name, 48 - len(bar.text)), "start", ink=True))
        parts.append(_text(WIDTH, top + 12, bar.text, "end", ink=True))
        parts.append(f'<rect x="0" y="{top + 17}" width="{WIDTH}" height="8" rx="2" fill="#f1f4f7"/>')
        single = len(bar.parts) == 1
        for color, part in zip([_color(bar.style)] if single else PARTS, bar.parts, strict=False):
            length = part / longest * WIDTH
            parts.append(f'<rect x="{x:.1f}" y="{top + 17}" width="{length:.1f}" height="8" fill="{color}"/>')
            x += length
    return "".join([*parts, "</svg>"])


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers in ``[low, high]``, at most ``most`` of them, steps of 1, 2 or 5 times a power of ten.

    Example:
        >>> ticks(0.0, 1.0, 5)
        [0.0, 0.5, 1.0]
    """
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    for step in (power, 2 * power, 5 * power, 10 * power, 20 * power):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first + 1 <= most:
            return [round(i * step, 12) for i in range(first, last + 1)]
    return [low, high]


def log_ticks(low: float, high: float, binary: bool) -> list[float]:
    """Powers of two, or 1, 2, 5 times powers of ten, in ``[low, high]``, at most five, evenly chosen.

    Example:
        >>> log_ticks(900, 5e6, binary=False)
        [1000.0, 10000.0, 100000.0, 1000000.0]
    """
    if binary:
        every = [2.0**i for i in range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)]
    else:
        span = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        tens = [10.0**i for i in span if low <= 10.0**i <= high]
        fine = [m * 10.0**i for i in span for m in (1, 2, 5) if low <= m * 10.0**i <= high]
        every = tens if len(tens) > 2 else fine if len(fine) > 2 else ticks(low, high, 4)
    return every[:: max(1, math.ceil(len(every) / 5))]


def _bounds(values: Iterable[float], scale: AxisScale) -> tuple[float, float]:
    """Ends of an axis, a little beyond the values."""
    found = list(values)
    low, high = min(found), max(found)
    if scale != "linear":
        room = max((high / low) ** 0.06, 1.2)
        return low / room, high * room
    least = FLATTEST * max(abs(low), abs(high)) or 1.0
    room = 0.07 * (high - low) + max(0.0, least - (high - low)) / 2
    return low - room, high + room


def _decimals(marks: Sequence[float]) -> Format:
    """As many decimals as tell the ticks apart."""
    step = min((b - a for a, b in pairwise(marks)), default=1.0)
    places = max(0, -math.floor(math.log10(step) + 1e-9)) if step > 0 else 2

    def write(value: float) -> str:
        text = f"{value:.{places}f}"
        return text.removeprefix("0") if places else text

    return write


def _x_axis(marks: Sequence[float], px: Callable[[float], float], write: Format) -> list[str]:
    """Ticks below; one whose text would touch the one before is left bare."""
    parts, free = [], -math.inf
    for t in marks:
        text = write(t)
        half = 3.0 * len(text) + 4
        parts.append(_rule(px(t), HEIGHT - BOTTOM, px(t), HEIGHT - BOTTOM + 4))
        if px(t) - half > free and px(t) + half < WIDTH + 4:
            parts.append(_text(px(t), HEIGHT - BOTTOM + 16, text, "middle"))
            free = px(t) + half
    return parts


def _line(line: Line, px: Callable[[float], float], py: Callable[[float], float]) -> list[str]:
    color, opacity = _color(line.style), ' opacity=".45"' if line.faint else ""
    route = "L".join(f"{px(d.x):.1f} {py(d.y):.1f}" for d in line.dots)
    parts = [f'<path d="M{route}" fill="none" stroke="{color}" stroke-width="1.8"{_dash(line.style)}{opacity}/>']
    if not line.marks:
        return parts
    for d in line.dots:
        x = px(d.x)
        if d.spread > 0:
            parts.append(f'<path d="M{x:.1f} {py(d.y - d.spread):.1f}V{py(d.y + d.spread):.1f}" stroke="{color}"/>')
        parts.append(_mark(x, py(d.y), _shape(line.style), color, d.hint))
    return parts


_STAR = "M0 -6.5L1.7 -2.2L6.2 -2L2.7 .9L3.9 5.3L0 2.8L-3.9 5.3L-2.7 .9L-6.2 -2L-1.7 -2.2Z"
_SHAPES = (
    "M-4 0A4 4 0 1 0 4 0A4 4 0 1 0 -4 0Z",
    "M-3.6 -3.6H3.6V3.6H-3.6Z",
    "M0 -4.8L4.6 3.6H-4.6Z",
    "M0 -5L5 0L0 5L-5 0Z",
    "M0 4.8L4.6 -3.6H-4.6Z",
    "M-1.6 -4.6H1.6V-1.6H4.6V1.6H1.6V4.6H-1.6V1.6H-4.6V-1.6H-1.6Z",
    "M-4.2 -2.2L0 -4.8L4.2 -2.2V2.2L0 4.8L-4.2 2.2Z",
)


def _mark(x: float, y: float, shape: str, color: str, hint: str) -> str:
    title = f"<title>{escape(hint)}</title>" if hint else ""
    return (
        f'<path d="{shape}" transform="translate({x:.1f} {y:.1f})" fill="{color}" stroke="#fff" stroke-width="1">'
        f"{title}</path>"
    )


def _shape(style: int | None) -> str:
    return _SHAPES[(style or 0) % len(_SHAPES)]


def _color(style: int | None) -> str:
    return INK if style is None else COLORS[style % len(COLORS)]


def _dash(style: int | None) -> str:
    dash = DASHES[(style or 0) // len(COLORS) % len(DASHES)]
    return f' stroke-dasharray="{dash}"' if dash else ""


def _rule(x0: float, y0: float, x1: float, y1: float) -> str:
    return f'<path d="M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}" stroke="{GRID}"/>'


def _text(x: float, y: float, text: str, anchor: str, *, ink: bool = False) -> str:
    color = INK if ink else FAINT
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{color}">{escape(text)}</text>'


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
