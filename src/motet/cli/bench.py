"""`motet bench`: options in; tables, JSON lines, pages out."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich.console import Console

from motet.errors import ConfigError

if TYPE_CHECKING:
    from motet.bench.experiment import Experiment, Tokens
    from motet.bench.records import Record, Run, Target

bench_app = typer.Typer(
    help="Measure an endpoint, or an engine in this process.",
    invoke_without_command=True,
    no_args_is_help=True,
    rich_markup_mode=None,
)

Endpoint = Annotated[
    str | None, typer.Argument(help="URL of an OpenAI-compatible server, such as http://127.0.0.1:8000.")
]
InProcess = Annotated[
    str | None,
    typer.Option(
        "--in-process", metavar="MODEL", help="Measure an engine in this process: a directory or hub id."
    ),
]
Model = Annotated[str | None, typer.Option(help="Served name of the base. [default: the first listed]")]
Adapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        help="Served name of an adapter; repeatable. In process NAME=PATH. Of a sweep also NAME:RANK.",
    ),
]
Workload = Annotated[str, typer.Option(help="sonnet, random, jsonl or trace.")]
Chat = Annotated[bool, typer.Option("--chat", help="Use /v1/chat/completions.")]
Tokenizer = Annotated[
    Path | None, typer.Option(help="Local directory of the model: exact lengths. [default: ask the endpoint]")
]
IgnoreEos = Annotated[
    bool, typer.Option(help="Ask for answers of their full length, which not every endpoint understands.")
]
Timeout = Annotated[float, typer.Option(help="Seconds that a request may take.")]
Pool = Annotated[str | None, typer.Option(help="In process: as of serve.")]
Html = Annotated[Path | None, typer.Option(help="Write a page with charts.")]


@bench_app.callback()
def compare(
    runs: Annotated[
        tuple[Path, Path] | None,
        typer.Option("--compare", metavar="A B", help="Ratios of two results of --out, with 95 % intervals."),
    ] = None,
) -> None:
    """Measure latency and throughput under a chosen load, or compare two results."""
    if runs is None:
        return
    from motet.bench.compare import compare as ratios_of
    from motet.bench.records import read_run
    from motet.bench.table import ratio_table

    a, b = runs
    Console().print(ratio_table(ratios_of(read_run(a), read_run(b)), (a.name, b.name)))


@bench_app.command()
def run(
    endpoint: Endpoint = None,
    in_process: InProcess = None,
    model: Model = None,
    adapter: Adapters = None,
    workload: Workload = "sonnet",
    file: Annotated[Path | None, typer.Option(help="Prompts of jsonl, or the trace.")] = None,
    popularity: Annotated[
        str, typer.Option(help="Of the adapters: one, distinct, uniform, zipf:ALPHA or weights:W,W,…")
    ] = "distinct",
    concurrency: Annotated[int, typer.Option(help="Requests in flight.")] = 16,
    together: Annotated[
        bool, typer.Option("--together", help="Start them all at once and count them all.")
    ] = False,
    rate: Annotated[float | None, typer.Option(help="Instead: requests per second, at random times.")] = None,
    burst: Annotated[int, typer.Option(help="With --rate: requests that come at once.")] = 1,
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 1600,
    output: Annotated[int, typer.Option(help="Tokens of an answer.")] = 600,
    requests: Annotated[
        int | None,
        typer.Option(help="Requests to measure. [default: four times --concurrency, or a minute's]"),
    ] = None,
    warm_up: Annotated[int, typer.Option(help="Requests to each model before, one at a time.")] = 2,
    slo: Annotated[
        str, typer.Option(help="Objective for goodput, such as ttft:500,tpot:40 (ms; also e2el, otps).")
    ] = "",
    chat: Chat = False,
    tokenizer: Tokenizer = None,
    ignore_eos: IgnoreEos = True,
    timeout: Timeout = 600.0,
    seed: Annotated[
        int | None, typer.Option(help="Makes prompts and times repeatable. [default: random]")
    ] = None,
    pool: Pool = None,
    out: Annotated[
        Path | None, typer.Option(help="Write JSON lines: the run, each request, the report.")
    ] = None,
    html: Html = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """One run: TTFT, ITL, TPOT, end-to-end latency, OTPS, tokens/s, goodput, errors; per adapter and overall.

    Example: motet bench run http://127.0.0.1:8000 --adapter support --adapter legal --concurrency 8
    """
    from motet.bench.calls import Closed, Open
    from motet.bench.experiment import Experiment, check, perform
    from motet.bench.figures import parse_slo, report
    from motet.bench.page import report_page, write_page
    from motet.bench.records import write_run
    from motet.bench.table import report_table

    if rate is None and burst != 1:
        raise ConfigError("--burst needs a --rate")
    options = _Options(endpoint, in_process, model, adapter or [], chat, tokenizer, ignore_eos, timeout, pool)
    names = tuple(option.partition("=")[0] for option in options.adapters)
    arrival = Closed(concurrency, together) if rate is None else Open(rate, burst)
    chosen = secrets.randbelow(1 << 31) if seed is None else seed
    wanted = Experiment(
        options.target, model or "", names or (model or "",), workload, file, popularity, arrival,
        prompt, output, requests, warm_up, parse_slo(slo), seed=chosen,
    )  # fmt: skip
    check(wanted)
    console = Console(stderr=True)

    async def measured() -> Run:
        async with _opened(options, concurrency, console) as (target, base, tokens):
            with _Progress(console) as progress:
                return await perform(target, _based(wanted, base), tokens, progress.ended)

    result = asyncio.run(measured())
    told = report(result)
    if out is not None:
        write_run(out, result, told)
    if html is not None:
        write_page(html, report_page(result, told))
    if as_json:
        print(msgspec.json.encode(told).decode())
    else:
        Console().print(report_table(told))
    if not told.overall.completed:
        raise typer.Exit(1)


@bench_app.command()
def sweep(
    endpoint: Endpoint = None,
    out: Annotated[Path, typer.Option(help="File for the curve, which `motet plan --curve` reads.")] = Path(
        "curve.json"
    ),
    in_process: InProcess = None,
    model: Model = None,
    adapter: Adapters = None,
    workload: Workload = "sonnet",
    concurrency: Annotated[str, typer.Option(help="Requests in flight, separated by commas.")] = "1,4,16,64",
    prompt: Annotated[str, typer.Option(help="Tokens of a prompt, separated by commas.")] = "1600",
    output: Annotated[int, typer.Option(help="Tokens of an answer.")] = 600,
    adapters: Annotated[
        str | None,
        typer.Option(
            help="How many adapters, separated by commas; 0 is the base alone. [default: 0 and all]"
        ),
    ] = None,
    requests: Annotated[int, typer.Option(help="Requests to measure, for each in flight.")] = 4,
    warm_up: Annotated[int, typer.Option(help="Requests to each model before, one at a time.")] = 2,
    device: Annotated[str, typer.Option(help="The GPU's name, for the curve.")] = "",
    chat: Chat = False,
    tokenizer: Tokenizer = None,
    ignore_eos: IgnoreEos = True,
    timeout: Timeout = 600.0,
    pool: Pool = None,
    html: Html = None,
) -> None:
    """A capacity curve: the same run over concurrency, prompt length, number of adapters and rank.

    Ranks come with the adapters: --adapter a:8 --adapter b:8 --adapter c:64 measures adapters of rank 8 and of rank 64.
    """
    from motet.bench.experiment import Experiment, check, perform
    from motet.bench.page import curve_page, write_page
    from motet.bench.sweep import Axes, Curve, Point, by_rank, experiments, parse_numbers, point, write_curve
    from motet.bench.table import curve_table

    named = [option.partition("=") for option in adapter or []]
    ranks = by_rank([name for name, _, _ in named])
    bare = [name for names in ranks.values() for name in names]
    renamed = [f"{name}{equals}{path}" for name, (_, equals, path) in zip(bare, named, strict=True)]
    options = _Options(endpoint, in_process, model, renamed, chat, tokenizer, ignore_eos, timeout, pool)
    least = min(len(names) for names in ranks.values())
    counts = parse_numbers(adapters, "--adapters", 0) if adapters else sorted({0, least})
    in_flight = parse_numbers(concurrency, "--concurrency")
    axes = Axes(in_flight, parse_numbers(prompt, "--prompt"), counts, ranks)
    if workload not in ("sonnet", "random"):
        raise ConfigError(f"a sweep takes the workload sonnet or random, not {workload!r}")
    seed = secrets.randbelow(1 << 31)
    start = Experiment(options.target, model or "", (), workload, output=output, warm_up=warm_up, seed=seed)
    for wanted in experiments(start, axes, requests):
        check(wanted)
    console, began = Console(stderr=True), datetime.now(UTC).isoformat(timespec="seconds")

    async def measured() -> Curve:
        points: list[Point] = []
        async with _opened(options, in_flight[-1], console) as (target, base, tokens):
            for wanted in experiments(_based(start, base), axes, requests):
                with _Progress(console) as progress:
                    points.append(point(await perform(target, wanted, tokens, progress.ended), base))
                console.print(curve_table(points[-1:]))
                curve = Curve(options.target, device, base, began, tuple(points))
                write_curve(out, curve)  # what is measured is kept, whatever comes after it
        return curve

    curve = asyncio.run(measured())
    if html is not None:
        write_page(html, curve_page(curve))
    Console().print(curve_table(curve.points))


@bench_app.command()
def cases(
    model: Annotated[
        str | None, typer.Argument(help="Model directory or hub id. [default: embedded]")
    ] = None,
    adapter: Annotated[
        list[Path] | None, typer.Option("--adapter", help="A PEFT LoRA directory; repeatable.")
    ] = None,
    cases: Annotated[
        str, typer.Option(help="Of steady, together, base, alone, cold, crowd, many; separated by commas.")
    ] = "steady,base,alone",
    in_flight: Annotated[int, typer.Option(help="Requests at a time.")] = 16,
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 1600,
    output: Annotated[int, typer.Option(help="Tokens of an answer.")] = 600,
    pool: Annotated[str | None, typer.Option(help="As of serve.")] = None,
) -> None:
    """The engine alone, in this process, in the cases that peers are measured with; one JSON line per case.

    OTPS is the output tokens per second of one request, TTFT the time to its first token. Prompts are random.
    """
    from motet.bench.run import run_cases
    from motet.cli.service import model_directory
    from motet.cli.settings import EMBEDDED, parse_size
    from motet.config import EngineConfig, cache_dir

    console = Console(stderr=True)
    config = EngineConfig(
        model=str(model_directory(model or EMBEDDED, console)),
        max_model_len=prompt + output,
        max_running=in_flight,
        pool_bytes=parse_size(pool) if pool else None,
        prefix_caching=False,
    )
    images, names = cache_dir() / "images", cases.split(",")
    for result in run_cases(config, adapter or [], images, names, in_flight, prompt, output, console.print):
        print(msgspec.json.encode(result).decode(), flush=True)


@dataclass(frozen=True)
class _Options:
    """What is measured, as the command line names it."""

    endpoint: str | None
    in_process: str | None
    model: str | None
    adapters: list[str]
    chat: bool
    tokenizer: Path | None
    ignore_eos: bool
    timeout: float
    pool: str | None

    def __post_init__(self) -> None:
        if (self.endpoint is None) == (self.in_process is None):
            raise ConfigError("name what is to be measured: the URL of an endpoint, or --in-process MODEL")
        if self.in_process is not None and self.chat:
            raise ConfigError("--chat is a way to ask an endpoint; an engine in this process has none")

    @property
    def target(self) -> str:
        return self.endpoint or f"{self.in_process} in process"


@asynccontextmanager
async def _opened(
    options: _Options, concurrency: int, console: Console
) -> AsyncIterator[tuple[Target, str, Tokens]]:
    """The target, its base's served name, and what is known of its tokens."""
    from motet.bench.endpoint import Endpoint as Server
    from motet.bench.experiment import Tokens
    from motet.bench.prompts import Counted

    if options.endpoint is None:
        async with _engine(options, concurrency, console) as opened:
            yield opened
        return
    counted = Counted(options.tokenizer) if options.tokenizer else None
    server = Server(
        options.endpoint, "chat" if options.chat else "completions", options.ignore_eos, options.timeout
    )
    async with server:
        base = options.model or next(iter(await server.models()), "")
        vocabulary = counted.vocabulary if counted and not options.chat else None
        yield server, base, Tokens(counted, vocabulary)


@asynccontextmanager
async def _engine(
    options: _Options, concurrency: int, console: Console
) -> AsyncIterator[tuple[Target, str, Tokens]]:
    from motet.bench.experiment import Tokens
    from motet.bench.in_process import InProcess as Engine
    from motet.bench.prompts import Counted
    from motet.cli.service import model_directory
    from motet.cli.settings import parse_size, split_adapter
    from motet.config import EngineConfig
    from motet.engine.device import has_gpu, resolve

    assert options.in_process is not None
    directory = model_directory(options.in_process, console)
    config = EngineConfig(
        model=str(directory),
        max_running=max(64, concurrency),
        pool_bytes=parse_size(options.pool) if options.pool else None,
    )
    adapters = {name: Path(path) for name, path in map(split_adapter, options.adapters)}
    async with Engine(resolve(config, has_gpu()), adapters) as engine:
        yield engine, engine.base, Tokens(Counted(directory), engine.vocabulary)


def _based(wanted: Experiment, base: str) -> Experiment:
    """The experiment with the base's name, which the endpoint may have had to tell."""
    return replace(wanted, base=base, models=tuple(name or base for name in wanted.models))


class _Progress:
    """How many requests have ended, on a terminal."""

    def __init__(self, console: Console) -> None:
        self._status = console.status("measuring", refresh_per_second=2)  # each takes a moment from the clock
        self._count = 0

    def __enter__(self) -> _Progress:
        self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._status.stop()

    def ended(self, record: Record) -> None:
        self._count += 1
        self._status.update(f"{self._count} requests ended, the last one {record.error or record.phase}")
