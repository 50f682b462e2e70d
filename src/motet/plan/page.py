"""The plan as one HTML page that needs nothing else: tables, and charts in SVG."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from math import log

from motet.plan.place import FILL, Burst, Placed, Plan

COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#a463f2", "#97bbf5", "#9c6b4e", "#3ca951")
REST = "#d9dce1"
WIDTH, LABEL, ROW = 760, 150, 30
GIB = 1 << 30

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 820px; margin: 2em auto; padding: 0 1em; color: #222; }
h1 { font-size: 1.5em; } h2 { font-size: 1.1em; margin-top: 2em; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .25em .6em; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
.kept { color: #1a7f37; } .broken { color: #c62828; }
svg { width: 100%; height: auto; } svg text { font: 12px system-ui, sans-serif; fill: #222; }
"""

Part = tuple[str, float, str]
"""Of a bar: what it is, how much of the axis, its colour."""


def page(plan: Plan) -> str:
    """The whole page."""
    parts = [
        f"<h1>{escape(headline(plan))}</h1>",
        f"<p>{escape(conditions(plan))}</p>",
        *(f"<p><em>{escape(note)}</em></p>" for note in plan.notes),
        "<h2>GPUs</h2>",
        _bars(_counts(plan), max(plan.dedicated_gpus, plan.planned_gpus), "{:.0f}"),
        "<h2>Load of each planned GPU</h2>",
        f"<p>1 is all that a GPU can do within the service level; GPUs are filled to {FILL:g}.</p>",
        _bars([_load(plan, i, gpu) for i, gpu in enumerate(plan.gpus, 1)], 1.0, "{:.2f}"),
        _table(GPU_COLUMNS, gpu_rows(plan)),
        "<h2>Memory of each planned GPU</h2>",
        _bars([_memory(i, gpu) for i, gpu in enumerate(plan.gpus, 1)], _most_memory(plan), "{:.1f} GiB"),
        "<h2>Fine-tunes</h2>",
        f"<p>{escape(FINE_TUNE_LEGEND)}</p>",
        _table(FINE_TUNE_COLUMNS, fine_tune_rows(plan)),
        "<h2>Bursts</h2>",
        *(_bursts(plan, i, gpu) for i, gpu in enumerate(plan.gpus, 1)),
    ]
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(headline(plan))}</title><style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


# What the page and the terminal both say

FINE_TUNE_COLUMNS = ("fine-tune", "req/s", "load", "GPUs", "placed", "GB", "TTFT p95", "OTPS p5", "alone")
FINE_TUNE_LEGEND = (
    "req/s at its peak; load and GPUs in replicas of its own; GB of its adapter; TTFT and OTPS where it is placed; "
    "alone: TTFT and OTPS of a single request on an idle GPU."
)
GPU_COLUMNS = ("GPU", "who", "load", "busy", "rows", "tok/s", "weights GiB", "adapters", "KV", "free")
BURST_COLUMNS = ("GPU", "who bursts", "times the peak", "whose level", "TTFT p95 ms", "OTPS p5", "it is")


def headline(plan: Plan) -> str:
    """The plan in a line."""
    few, many = _gpus(plan.planned_gpus, plan.gpu), _gpus(plan.dedicated_gpus, plan.gpu)
    count = "one fine-tune" if len(plan.fine_tunes) == 1 else f"{len(plan.fine_tunes)} fine-tunes"
    if plan.planned_gpus == plan.dedicated_gpus:
        return f"{count}: {few}, sharing saves none"
    return f"{count}: {few} instead of {many}, {plan.saving:,.0f} saved per month"


def conditions(plan: Plan) -> str:
    """What the plan holds for."""
    return (
        f"{plan.model} on {plan.gpu} at {plan.price:g} an hour; 95 % of requests have their first token within "
        f"{1e3 * plan.slo_ttft:.0f} ms and then at least {plan.slo_otps:g} tokens per second (OTPS), all "
        "fine-tunes at their peaks at once."
    )


def fine_tune_rows(plan: Plan) -> list[list[str]]:
    """A row for each fine-tune, as the legend says."""
    return [
        [
            one.name,
            f"{one.peak_rate:.3g}",
            f"{one.own_load:.0%}",
            str(one.own_gpus),
            "shared" if one.shares else "own",
            f"{one.adapter_bytes / 1e9:.2f}",
            f"{1e3 * one.level.ttft_p95:,.0f} ms",
            f"{one.level.otps_p5:.0f}",
            f"{1e3 * one.own_ttft:.0f} ms, {one.own_otps:.0f}",
        ]
        for one in plan.fine_tunes
    ]


def gpu_rows(plan: Plan) -> list[list[str]]:
    """A row for each kind of GPU in the plan."""
    return [
        [
            _name(i, gpu),
            ", ".join(gpu.members),
            f"{gpu.load:.0%}",
            f"{gpu.busy:.0%}",
            f"{gpu.rows:.1f}",
            f"{gpu.tokens_per_s:,.0f}",
            *(
                f"{size / GIB:.1f}"
                for size in (gpu.weight_bytes, gpu.adapter_bytes, gpu.kv_bytes, gpu.free_bytes)
            ),
        ]
        for i, gpu in enumerate(plan.gpus, 1)
    ]


def burst_rows(plan: Plan) -> list[list[str]]:
    """A row for each burst that was tried."""
    return [[_name(i, gpu), *_burst(burst)] for i, gpu in enumerate(plan.gpus, 1) for burst in gpu.bursts]


def _burst(burst: Burst) -> list[str]:
    level = burst.level
    kept = "kept" if level.kept else "broken"
    times = f"{1e3 * level.ttft_p95:,.0f}"
    who, whose = ("all", "all") if burst.who is None else (burst.who, "others")
    return [who, f"{burst.factor:g}", whose, times, f"{level.otps_p5:.0f}", kept]


def _gpus(count: int, gpu: str) -> str:
    return f"one {gpu}" if count == 1 else f"{count} {gpu}s"


def _name(number: int, gpu: Placed) -> str:
    return f"{number}" if gpu.replicas == 1 else f"{number} (× {gpu.replicas})"


# Charts


def _counts(plan: Plan) -> list[tuple[str, list[Part]]]:
    return [
        ("a replica each", [("GPUs", plan.dedicated_gpus, REST)]),
        ("this plan", [("GPUs", plan.planned_gpus, COLOURS[0])]),
    ]


def _load(plan: Plan, number: int, gpu: Placed) -> tuple[str, list[Part]]:
    by_name = {one.name: one for one in plan.fine_tunes}
    loads = [
        by_name[name].shared_load if gpu.shared else by_name[name].own_load / gpu.replicas
        for name in gpu.members
    ]
    named = zip(gpu.members, loads, strict=True)
    return _name(number, gpu), [
        (name, load, COLOURS[i % len(COLOURS)]) for i, (name, load) in enumerate(named)
    ]


def _memory(number: int, gpu: Placed) -> tuple[str, list[Part]]:
    sizes = (gpu.weight_bytes, gpu.adapter_bytes, gpu.kv_bytes, gpu.free_bytes)
    kinds = zip(("weights", "adapters", "KV cache", "free"), sizes, (*COLOURS[:3], REST), strict=True)
    return _name(number, gpu), [(kind, size / GIB, colour) for kind, size, colour in kinds]


def _most_memory(plan: Plan) -> float:
    return max(sum(value for _, value, _ in _memory(1, gpu)[1]) for gpu in plan.gpus)


def _bars(rows: Sequence[tuple[str, list[Part]]], full: float, form: str) -> str:
    """Stacked bars, one below the other; `full` is the whole width."""
    shapes: list[str] = []
    scale = (WIDTH - LABEL) / max(full, *(sum(part[1] for part in parts) for _, parts in rows))
    for i, (label, parts) in enumerate(rows):
        top, left = i * ROW, float(LABEL)
        shapes.append(f'<text x="0" y="{top + 19}">{escape(label)}</text>')
        for name, value, colour in parts:
            wide = value * scale
            title = escape(f"{name}: {form.format(value)}")
            shapes.append(
                f'<rect x="{left:.1f}" y="{top + 4}" width="{wide:.1f}" height="22" fill="{colour}">'
                f"<title>{title}</title></rect>"
            )
            if wide > 7 * len(title):
                shapes.append(f'<text x="{left + 5:.1f}" y="{top + 19}">{title}</text>')
            left += wide
    return _svg(len(rows) * ROW, shapes)


def _bursts(plan: Plan, number: int, gpu: Placed) -> str:
    """TTFT over the height of the surge of all, on logarithmic axes, and the table of all bursts."""
    surges = [(1.0, gpu.level.ttft_p95)]
    surges += [(one.factor, one.level.ttft_p95) for one in gpu.bursts if one.who is None]
    rows = _table(BURST_COLUMNS[1:], [_burst(one) for one in gpu.bursts])
    title = f"<h3>GPU {_name(number, gpu)}: p95 of TTFT while all send more</h3>"
    return title + _curve(surges, plan.slo_ttft) + rows


def _curve(points: Sequence[tuple[float, float]], limit: float) -> str:
    high, wide = 220, WIDTH - LABEL
    low, top = min(limit, *(y for _, y in points)) / 1.5, max(limit, *(y for _, y in points)) * 1.5
    first, last = points[0][0], points[-1][0]

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - first) / max(last - first, 1e-9)
        up = log(y / low) / log(top / low)
        return LABEL + 0.95 * wide * across, (high - 30) * (1 - up) + 5

    line = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in points)
    level = place(first, limit)[1]
    shapes = [
        f'<line x1="{LABEL}" x2="{WIDTH}" y1="{level:.1f}" y2="{level:.1f}" stroke="#c62828" stroke-dasharray="5 4"/>',
        f'<text x="0" y="{level + 4:.1f}">limit: {1e3 * limit:.0f} ms</text>',
        f'<polyline points="{line}" fill="none" stroke="{COLOURS[0]}" stroke-width="2"/>',
    ]
    for x, y in points:
        left, above = place(x, y)
        shapes.append(f'<circle cx="{left:.1f}" cy="{above:.1f}" r="4" fill="{COLOURS[0]}"/>')
        shapes.append(f'<text x="{left + 7:.1f}" y="{above - 6:.1f}">{1e3 * y:,.0f} ms</text>')
        shapes.append(f'<text x="{left:.1f}" y="{high - 5}">× {x:g}</text>')
    return _svg(high, shapes)


def _svg(height: int, shapes: Iterable[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img">{"".join(shapes)}</svg>'


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _cell(text: str) -> str:
    mark = f' class="{text}"' if text in ("kept", "broken") else ""
    return f"<td{mark}>{escape(text)}</td>"
