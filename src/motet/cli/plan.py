"""`motet plan`: options in, a table, JSON or a page out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from motet.errors import ConfigError

if TYPE_CHECKING:
    from motet.plan.fleet import Fleet
    from motet.plan.place import Plan


def plan(
    traffic: Annotated[
        list[Path],
        typer.Argument(
            help="Who asks for what: a CSV of rates (name, requests_per_day or requests_per_second, prompt, output, "
            "peak, rank, targets), a trace (at, prompt, output, adapter), or saved metrics of Motet or vLLM."
        ),
    ],
    model: Annotated[
        Path | None, typer.Option(help="config.json or model directory. [default: the curve's model]")
    ] = None,
    curve: Annotated[
        str | None,
        typer.Option(help="Capacity curve: a file, or one that comes with Motet. [default: the model's]"),
    ] = None,
    gpu: Annotated[str, typer.Option(help="L4, L40S, A100, H100, H200 or B200.")] = "H200",
    price: Annotated[float | None, typer.Option(help="Of a GPU per hour. [default: a rough one]")] = None,
    ttft: Annotated[float, typer.Option(help="Seconds to the first token, for 95 % of requests.")] = 0.5,
    otps: Annotated[float, typer.Option(help="Tokens per second after it, for 95 % of requests.")] = 80.0,
    rank: Annotated[int, typer.Option(help="Rank of adapters for which the traffic says none.")] = 16,
    targets: Annotated[
        str,
        typer.Option(help="What they change: attention, mlp, router or single modules, separated by commas."),
    ] = "attention,mlp",
    hours: Annotated[
        float | None, typer.Option(help="How long saved metrics have counted. [default: as they say]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    html: Annotated[Path | None, typer.Option(help="Also write the plan as a page with charts.")] = None,
) -> None:
    """Say which fine-tunes can share GPUs, how many GPUs that takes, what it saves, and what a burst does.

    Nothing runs: Motet's scheduler is simulated, with step times measured on the GPU.

    Example: motet plan examples/plan/five_customers.csv
    """
    import msgspec

    from motet.plan.page import page
    from motet.plan.place import make_plan
    from motet.plan.traffic import merge, read_traffic

    for name, value in (("price", price), ("ttft", ttft), ("otps", otps), ("hours", hours), ("rank", rank)):
        if value is not None and value <= 0:
            raise ConfigError(f"--{name} must be positive, got {value:g}")
    parts = tuple(part.strip() for part in targets.split(",") if part.strip())
    mix = merge([one for file in traffic for one in read_traffic(file, hours, rank, parts)])
    fleet = _fleet(model, curve, gpu)
    cost = fleet.gpu.price if price is None else price
    with Console(stderr=True).status("simulating") as status:
        from motet.plan.fleet import Slo

        found = make_plan(fleet, mix, Slo(ttft, otps), cost, lambda line: status.update(f"simulating {line}"))
    if as_json:
        print(msgspec.json.encode(found).decode())
    else:
        _show(Console(), found)
    if html is not None:
        try:
            html.write_text(page(found), "utf-8")
        except OSError as error:
            raise ConfigError(f"{html} cannot be written: {error.strerror}") from error


def _fleet(model: Path | None, curve: str | None, gpu: str) -> Fleet:
    """The engine to plan with: the curve decides the model unless one is named, and must then be of its shape."""
    from motet.plan.curve import curve_for, find_curve, read_config_values, same_shape
    from motet.plan.fleet import Fleet
    from motet.plan.gpus import find_gpu
    from motet.plan.sizes import sizes_of

    kind = find_gpu(gpu)
    if model is None:
        found = find_curve(curve or "h200-gpt-oss-20b", None, gpu)
        return Fleet.of(found, sizes_of(found.config, found.model), kind)
    values = read_config_values(model)
    found = find_curve(curve, values, gpu) if curve else curve_for(values, gpu)
    if not same_shape(found.config, values):
        raise ConfigError(f"the capacity curve is of {found.model}, and {model} has another shape")
    return Fleet.of(found, sizes_of(values, found.model), kind)


def _show(console: Console, found: Plan) -> None:
    from motet.plan.page import (
        BURST_COLUMNS,
        FINE_TUNE_COLUMNS,
        FINE_TUNE_LEGEND,
        GPU_COLUMNS,
        burst_rows,
        conditions,
        fine_tune_rows,
        gpu_rows,
        headline,
    )

    console.print(f"[bold]{escape(headline(found))}[/bold]")
    console.print(escape(conditions(found)))
    for title, columns, rows in (
        ("Fine-tunes", FINE_TUNE_COLUMNS, fine_tune_rows(found)),
        ("GPUs", GPU_COLUMNS, gpu_rows(found)),
        ("Bursts", BURST_COLUMNS, burst_rows(found)),
    ):
        console.print()
        console.print(_table(title, columns, rows))
    for note in (FINE_TUNE_LEGEND, *found.notes):
        console.print(f"\n{escape(note)}")


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        table.add_row(*map(escape, row))
    return table
