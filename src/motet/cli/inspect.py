"""Printing what an adapter holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from motet.adapters.describe import AdapterReport, describe
from motet.types import ModelSpec


def print_report(console: Console, path: Path, spec: ModelSpec | None, as_json: bool) -> bool:
    """Print the report of an adapter directory; False if it would not bind."""
    report = describe(path, spec)
    if as_json:
        console.print_json(msgspec.json.encode(report).decode())
    else:
        console.print(_facts(report))
        if report.modules:
            console.print(_modules(report))
    return report.binds is not False


def _facts(report: AdapterReport) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    rows = {
        "path": report.path,
        "digest": report.digest or "known with --model",
        "made for": report.base_model or "not stated",
        "rank": "not stated" if report.rank is None else f"{report.rank}, alpha {report.alpha:g}",
        "rsLoRA": "yes" if report.rslora else "no",
        "targets": ", ".join(report.targets) or "none",
        "layers": _ranges(report.layers),
        "experts": _ranges(report.experts),
        "parameters": f"{report.num_parameters:,}",
        "weights": f"{report.bytes / 1e6:.1f} MB, {', '.join(report.dtypes) or 'none'}",
        "no effect": ", ".join(report.no_effect[:5]) or "none",
        "binds": _verdict(report),
    }
    for label, value in rows.items():
        table.add_row(f"[bold]{label}[/bold]", escape(value))
    return table


def _verdict(report: AdapterReport) -> str:
    if report.binds is None:
        return "not checked: name a model with --model"
    return "yes" if report.binds else f"no, because {report.reason}"


def _modules(report: AdapterReport) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("module", "count", "rank", "scaling"):
        table.add_column(column, justify="left" if column == "module" else "right")
    for module in report.modules:
        rank = _span(module.min_rank, module.max_rank)
        table.add_row(
            escape(module.module), str(module.count), rank, _span(module.min_scaling, module.max_scaling)
        )
    return table


def _span(low: float, high: float) -> str:
    return f"{low:g}" if low == high else f"{low:g}–{high:g}"


def _ranges(numbers: Sequence[int]) -> str:
    """0, 1, 2, 5 as '0–2, 5'."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][1] + 1 == number:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in parts) or "none"
