"""A line or scatter chart as SVG text, for pages that load nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 34, 46
_LEGEND = 170  # to the right of the axes, where several series are drawn
COLOURS = ("#2a6f97", "#c8553d", "#588157", "#8a5a9e", "#d19c1d", "#3a3a3a", "#4ea8a6", "#b56576")
_NAMED = 8  # series that the legend has room for
_TICKS = 5
STYLE = "svg{max-width:100%;height:auto}svg text{font:11px system-ui,sans-serif;fill:#333}"


@dataclass(frozen=True)
class Series:
    """Points under a name; `line` joins them, otherwise each is a dot."""

    name: str
    points: Sequence[tuple[float, float]]
    line: bool = True


def chart(title: str, x: str, y: str, series: Sequence[Series]) -> str:
    """The series over axes from 0 to round numbers; empty if there is no point."""
    shown = [one for one in series if one.points]
    if not shown:
        return ""
    width = WIDTH + (_LEGEND if len(shown) > 1 else 0)
    edge = WIDTH - _RIGHT
    right, x_step = axis(max(point[0] for one in shown for point in one.points))
    high, y_step = axis(max(point[1] for one in shown for point in one.points))

    def place(point: tuple[float, float]) -> tuple[float, float]:
        across = _LEFT + (edge - _LEFT) * point[0] / right
        return across, HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * point[1] / high

    parts = [_text(_LEFT, 14, title, weight="bold"), _text((WIDTH + _LEFT) / 2, HEIGHT - 8, x, "middle")]
    parts.append(_text(12, (HEIGHT - _BOTTOM + _TOP) / 2, y, "middle", turned=True))
    for i in range(round(right / x_step) + 1):
        at, base = place((i * x_step, 0))
        parts.append(_text(at, base + 16, f"{i * x_step:g}", "middle"))
    for i in range(round(high / y_step) + 1):
        left, at = place((0, i * y_step))
        parts.append(f'<path d="M{left:.1f} {at:.1f}H{edge}" stroke="#ddd"/>')
        parts.append(_text(left - 6, at + 4, f"{i * y_step:g}", "end"))
    for number, one in enumerate(shown):
        colour = COLOURS[number % len(COLOURS)]
        parts.append(_drawn(one, [place(point) for point in one.points], colour))
        if len(shown) > 1 and number < _NAMED:
            down = _TOP + 12 * number
            parts.append(f'<path d="M{WIDTH} {down}h14" stroke="{colour}" stroke-width="3"/>')
            parts.append(_text(WIDTH + 20, down + 4, one.name[:22]))
    return f'<svg viewBox="0 0 {width} {HEIGHT}" width="{width}" role="img">{"".join(parts)}</svg>'


def axis(largest: float) -> tuple[float, float]:
    """Where an axis that must hold `largest` ends, and the round number between its ticks."""
    if largest <= 0:
        return 1.0, 0.2
    rough = largest / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * (1 - 1e-9))
    return step * math.ceil(largest / step - 1e-9), step


def shares(name: str, values: Sequence[float], points: int = 200) -> Series:
    """The share of values (in per cent) that is at most so large."""
    ordered = sorted(values)
    if len(ordered) < 2:
        return Series(name, [(value, 100.0) for value in ordered], line=False)
    places = sorted({round(i * (len(ordered) - 1) / points) for i in range(points + 1)})
    return Series(name, [(ordered[i], 100 * (i + 1) / len(ordered)) for i in places])


def _drawn(one: Series, places: Sequence[tuple[float, float]], colour: str) -> str:
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>' for x, y in places)
    if not one.line or len(places) == 1:
        return dots
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    return f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>' + (
        dots if len(places) < 20 else ""
    )


def _text(
    x: float, y: float, text: str, anchor: str = "start", weight: str = "normal", turned: bool = False
) -> str:
    turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turned else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}"{turn}>{escape(text)}</text>'
