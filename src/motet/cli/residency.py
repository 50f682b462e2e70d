"""`motet bench residency`: policies of residency as a table."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from motet.errors import ConfigError


def residency(
    pages: Annotated[
        str, typer.Option(help="Sizes of the pool, in pages; an adapter has 4 to 64.")
    ] = "300,1500,5000",
    adapters: Annotated[int, typer.Option(min=5, help="How many there are.")] = 1000,
    uses: Annotated[int, typer.Option(min=100, help="Length of each trace.")] = 20_000,
    seed: Annotated[int, typer.Option(help="Of the traces.")] = 0,
    json_lines: Annotated[bool, typer.Option("--json", help="One JSON object per trace and pool.")] = False,
) -> None:
    """Compare policies of who leaves the pool, on simulated traffic: adapters and conversations, Zipf to bursts.

    A cell is the share of uses that missed, and the seconds that bringing things back took.

    Example: motet bench residency --pages 500,2000 --adapters 2000
    """
    from motet.bench.residency import compare, overall

    rows = list(compare(_sizes(pages), adapters, uses, seed))
    if json_lines:
        for row in rows:
            print(json.dumps(asdict(row)))
        return
    names = list(rows[0].outcomes)
    table = Table("pool", "trace", *names, box=None, padding=(0, 2, 0, 0))
    for row in rows:
        cells = (
            ("[bold]{}[/bold]" if outcome.seconds == row.best else "{}").format(
                f"{outcome.misses:.3f} {outcome.seconds:.0f} s"
            )
            for outcome in row.outcomes.values()
        )
        table.add_row(str(row.num_pages), row.trace, *cells)
    scores = [overall(rows, name) for name in names]
    table.add_row("", "× best, mean", *(f"{mean:.2f}" for mean, _ in scores))
    table.add_row("", "× best, worst", *(f"{worst:.2f}" for _, worst in scores))
    Console().print(table)


def _sizes(text: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--pages must be numbers separated by commas, got {text!r}") from None
    if min(sizes) < 64:
        raise ConfigError(f"--pages must be at least 64, the largest adapter, got {min(sizes)}")
    return sizes
