"""A report as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from motet.bench.compare import Ratio
from motet.bench.figures import Report, Spread, Summary
from motet.bench.sweep import Point

_LATENCIES = (("TTFT", "ttft"), ("ITL", "itl"), ("TPOT", "tpot"), ("E2E", "e2e"))
_SHOWN = 5  # models, errors and stalls that are worth a line each


def report_table(report: Report) -> Group:
    """Everything that a report holds; latencies in milliseconds."""
    parts: list[Table | str] = [_latencies(report.overall), _totals(report)]
    if len(report.models) > 1:
        parts.append(_models(report.models))
    parts += [f"[yellow]{escape(line)}[/yellow]" for line in surprises(report)]
    return Group(*parts)


def surprises(report: Report) -> Iterator[str]:
    """What a reader should know before believing the figures: errors, cold first requests, stalls, a late client."""
    for errors, which in (
        (report.overall.errors, f"of {report.overall.requests} requests"),
        (report.failed_before, "requests before those measured"),
    ):
        for error, count in errors.items():
            said = " ".join(report.messages[error].split())
            yield f"{count} {which} failed: {error}" + (f": {said}" if said else "")
    cold = [use for use in report.first_uses if use.surprise]
    for use in cold[:_SHOWN]:
        yield (
            f"the first request of {use.model} took {1e3 * use.cold:.0f} ms to its first token, later ones "
            f"{1e3 * (use.warm or 0):.0f} ms: something was loaded or compiled for it"
        )
    if len(cold) > _SHOWN:
        yield f"{len(cold) - _SHOWN} more models were cold at their first request"
    for stall in report.stalls[:_SHOWN]:
        yield (
            f"{stall.requests} answers stood still for up to {1e3 * stall.seconds:.0f} ms, {stall.at:.1f} s after "
            "the start: a compilation, a load or a long prompt"
        )
    if len(report.stalls) > _SHOWN:
        yield f"{len(report.stalls) - _SHOWN} shorter stalls"
    if report.late > 0.01:
        yield f"this client was up to {1e3 * report.late:.0f} ms late in sending: it had too little of the processor"


def _latencies(overall: Summary) -> Table:
    table = Table("milliseconds", box=None, padding=(0, 2, 0, 0))
    for name in ("mean", "p50", "p90", "p99", "max"):
        table.add_column(name, justify="right")
    for label, key in _LATENCIES:
        spread: Spread | None = getattr(overall, key)
        values = (spread.mean, spread.p50, spread.p90, spread.p99, spread.max) if spread else ()
        table.add_row(f"[bold]{label}[/bold]", *(_ms(value) for value in values))
    return table


def _totals(report: Report) -> Table:
    overall, table = report.overall, Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    full = report.full_load_tokens_per_s
    rows = {
        "requests": f"{overall.completed} of {overall.requests} in {report.duration:.1f} s, "
        f"{overall.requests_per_s:.2f}/s",
        "prompt tokens": "not reported"
        if overall.prompt_tokens is None
        else f"{overall.prompt_tokens:,.0f} each",
        "output tokens": f"{overall.output_tokens:,}",
        "OTPS": "–" if overall.otps is None else f"{overall.otps:.1f}",
        "tokens/s": f"{overall.tokens_per_s:,.1f}" + (f"; {full:,.1f} at full load" if full else ""),
    }
    if overall.goodput is not None:
        bounds = ", ".join(f"{key} {bound:g}" for key, bound in report.slo.items())
        rows["goodput"] = f"{overall.goodput:.2f}/s within {bounds}"
    for label, value in rows.items():
        table.add_row(f"[bold]{label}[/bold]", value)
    return table


def _models(models: Sequence[Summary]) -> Table:
    table = Table("model", box=None, padding=(0, 2, 0, 0))
    for name in (
        "requests",
        "failed",
        "TTFT p50",
        "p99",
        "ITL p99",
        "E2E p50",
        "OTPS",
        "tokens/s",
        "goodput",
    ):
        table.add_column(name, justify="right")
    for model in models:
        table.add_row(
            escape(model.name),
            str(model.requests),
            str(model.requests - model.completed),
            *(_ms(None if spread is None else getattr(spread, of)) for spread, of in _chosen(model)),
            "–" if model.otps is None else f"{model.otps:.1f}",
            f"{model.tokens_per_s:,.1f}",
            "–" if model.goodput is None else f"{model.goodput:.2f}",
        )
    return table


def _chosen(model: Summary) -> tuple[tuple[Spread | None, str], ...]:
    return (model.ttft, "p50"), (model.ttft, "p99"), (model.itl, "p99"), (model.e2e, "p50")


def ratio_table(ratios: Sequence[Ratio], names: tuple[str, str]) -> Table:
    """What changed from the first run to the second."""
    table = Table("", box=None, padding=(0, 2, 0, 0))
    for name in (*names, "ratio", "95 % interval", ""):
        table.add_column(escape(name), justify="right")
    for ratio in ratios:
        verdict = "–" if ratio.low <= 1 <= ratio.high else "better" if ratio.better else "worse"
        interval = f"{ratio.low:.3f}–{ratio.high:.3f}"
        table.add_row(ratio.name, f"{ratio.a:.4g}", f"{ratio.b:.4g}", f"{ratio.ratio:.3f}", interval, verdict)
    return table


def curve_table(points: Sequence[Point]) -> Table:
    """A sweep's points."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in (
        "in flight",
        "prompt",
        "adapters",
        "rank",
        "TTFT p50",
        "p95",
        "OTPS",
        "tokens/s",
        "step ms",
        "failed",
    ):
        table.add_column(name, justify="right")
    for point in points:
        table.add_row(
            str(point.concurrency),
            f"{point.prompt:.0f}",
            str(point.adapters),
            "–" if point.rank is None else str(point.rank),
            _ms(point.ttft_p50),
            _ms(point.ttft_p95),
            "–" if point.otps is None else f"{point.otps:.1f}",
            f"{point.tokens_per_s:,.1f}",
            _ms(point.step_s),
            str(point.failed),
        )
    return table


def _ms(seconds: float | None) -> str:
    return "–" if seconds is None else f"{1e3 * seconds:,.1f}"
