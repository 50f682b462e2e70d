"""A report or a curve as one HTML page that needs nothing else: tables, charts, and the figures as JSON inside it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import msgspec
import numpy as np

from motet.bench.chart import STYLE, Series, chart, shares
from motet.bench.figures import Report, Spread, Summary
from motet.bench.records import Record, Run
from motet.bench.sweep import Curve, Point, lines
from motet.bench.table import surprises
from motet.errors import ConfigError

_CSS = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:72em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;margin:1em 0}td,th{padding:.2em .8em;text-align:right;border-bottom:1px solid #ddd}"
    "td:first-child,th:first-child{text-align:left}.note{background:#fdf3dc;padding:.3em .8em;margin:.3em 0}"
    + STYLE
)
_COLUMNS = ("mean", "p50", "p90", "p99", "max")
_MODELS = 8  # models that charts show apart
_INTERVALS = 60  # of the time of a run


def write_page(file: Path, html: str) -> None:
    """Raises ConfigError if the file cannot be written."""
    try:
        file.write_text(html, "utf-8")
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error.strerror}") from error


def report_page(run: Run, report: Report) -> str:
    """The page of a run."""
    settings = run.settings
    measured = [record for record in run.records if record.phase == "measured" and not record.error]
    load = (
        f"{settings.concurrency} in flight"
        if settings.concurrency
        else f"{settings.rate or 'a trace'} per second"
    )
    head = (
        f"{settings.workload} against {settings.target}, {load}, {settings.prompt} tokens in, {settings.output} out, "
        f"{len(settings.models)} models, {settings.popularity}; {settings.began}"
    )
    body = [
        f"<p>{escape(head)}</p>",
        *(f'<p class="note">{escape(line)}</p>' for line in surprises(report)),
        _table(("milliseconds", *_COLUMNS), _latencies(report.overall)),
        _table(("model", "requests", "failed", "TTFT p50", "TTFT p99", "OTPS", "tokens/s"), _models(report)),
        *_charts(run, measured),
    ]
    return _page("motet bench", body, msgspec.json.encode(report))


def curve_page(curve: Curve) -> str:
    """The page of a sweep."""
    groups = list(lines(curve.points))

    def drawn(title: str, unit: str, key: str, scale: float) -> str:
        values = [(name, [(p.concurrency, getattr(p, key)) for p in points]) for name, points in groups]
        series = [
            Series(name, [(x, y * scale) for x, y in points if y is not None]) for name, points in values
        ]
        return chart(title, "requests in flight", unit, series)

    columns = (
        "in flight",
        "prompt",
        "output",
        "adapters",
        "rank",
        "TTFT p50, ms",
        "p95",
        "OTPS",
        "tokens/s",
        "step, ms",
    )
    body = [
        f"<p>{escape(f'{curve.model} at {curve.target} {curve.device}; {curve.began}')}</p>",
        drawn("Output tokens per second of all", "tokens/s", "tokens_per_s", 1),
        drawn("Output tokens per second of one request", "OTPS", "otps", 1),
        drawn("Time to first token, 95th percentile", "ms", "ttft_p95", 1e3),
        drawn("Time of a decode step", "ms", "step_s", 1e3),
        _table(columns, [_row(point) for point in curve.points]),
    ]
    return _page("motet bench sweep", body, msgspec.json.encode(curve))


def _row(point: Point) -> list[str]:
    return [
        str(point.concurrency),
        f"{point.prompt:.0f}",
        f"{point.output:.0f}",
        str(point.adapters),
        "–" if point.rank is None else str(point.rank),
        _ms(point.ttft_p50),
        _ms(point.ttft_p95),
        "–" if point.otps is None else f"{point.otps:.1f}",
        f"{point.tokens_per_s:.1f}",
        _ms(point.step_s),
    ]


def _charts(run: Run, measured: Sequence[Record]) -> list[str]:
    names = list(dict.fromkeys(record.model for record in measured))[:_MODELS]
    by_model = {name: [record for record in measured if record.model == name] for name in names}
    first = [record for record in run.records if record.times and record.phase != "measured"]
    ttft = [shares(name, [1e3 * r.ttft for r in records]) for name, records in by_model.items()]
    gaps = [
        shares(name, [1e3 * gap for r in records for gap in r.gaps]) for name, records in by_model.items()
    ]
    sent = [
        Series("not measured", [(r.sent, 1e3 * r.ttft) for r in first], line=False),
        Series("measured", [(r.sent, 1e3 * r.ttft) for r in measured], line=False),
    ]
    return [
        chart("Time to first token: share of requests", "ms", "%", ttft),
        chart("Inter-token latency: share of gaps", "ms", "%", gaps),
        chart("Time to first token over the run, warm-up and lead-in too", "sent at, s", "ms", sent),
        chart("Tokens over the run", "s", "tokens/s", [_rate(run.records)]),
        chart("Requests in flight", "s", "requests", [_in_flight(run.records)]),
    ]


def _rate(records: Sequence[Record]) -> Series:
    times = [time for record in records for time in record.times]
    weights = [record.output_tokens / len(record.times) for record in records for _ in record.times]
    if not times:
        return Series("tokens", [])
    tokens, edges = np.histogram(times, _INTERVALS, (0, max(times)), weights=weights)
    width = edges[1] - edges[0]
    points = zip(edges[:-1] + width / 2, tokens / width, strict=True)
    return Series("tokens", [(float(at), float(rate)) for at, rate in points])


def _in_flight(records: Sequence[Record]) -> Series:
    spans = [(record.sent, record.times[-1]) for record in records if record.times]
    end = max((last for _, last in spans), default=0.0)
    moments = [end * i / _INTERVALS for i in range(_INTERVALS + 1)]
    return Series("requests", [(at, sum(a <= at < b for a, b in spans)) for at in moments if spans])


def _latencies(overall: Summary) -> list[list[str]]:
    rows = []
    for label, spread in (
        ("TTFT", overall.ttft),
        ("ITL", overall.itl),
        ("TPOT", overall.tpot),
        ("E2E", overall.e2e),
    ):
        rows.append([label, *(_of(spread, name) for name in _COLUMNS)])
    return rows


def _models(report: Report) -> list[list[str]]:
    return [
        [
            summary.name,
            str(summary.requests),
            str(summary.requests - summary.completed),
            _of(summary.ttft, "p50"),
            _of(summary.ttft, "p99"),
            "–" if summary.otps is None else f"{summary.otps:.1f}",
            f"{summary.tokens_per_s:.1f}",
        ]
        for summary in (report.overall, *report.models)
    ]


def _of(spread: Spread | None, name: str) -> str:
    return "–" if spread is None else f"{1e3 * getattr(spread, name):.1f}"


def _ms(seconds: float | None) -> str:
    return "–" if seconds is None else f"{1e3 * seconds:.1f}"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    rest = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{top}</tr>{rest}</table>"


def _page(title: str, body: Iterable[str], figures: bytes) -> str:
    data = figures.decode().replace("<", "\\u003c")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_CSS}</style></head><body><h1>{escape(title)}</h1>{''.join(body)}"
        f'<script type="application/json" id="figures">{data}</script></body></html>\n'
    )
