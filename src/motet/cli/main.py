"""The command line: parsing and printing only."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from motet.cli.bench import bench_app
from motet.cli.keys import keys_app, tenants_app
from motet.cli.plan import plan
from motet.cli.policy import policy_app
from motet.cli.registry import registry_app
from motet.cli.residency import residency
from motet.errors import ConfigError, MotetError

app = typer.Typer(
    help="Motet serves many LoRA fine-tunes of one base model from one process, mixed in one batch.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,  # it takes "[default: 8000]" for a style and swallows it
)
adapters_app = typer.Typer(
    help="Look into adapters, and release them.", no_args_is_help=True, rich_markup_mode=None
)
adapters_app.add_typer(registry_app)
app.add_typer(policy_app, name="policy")
app.add_typer(adapters_app, name="adapters")
app.add_typer(keys_app, name="keys")
app.add_typer(tenants_app, name="tenants")
app.add_typer(bench_app, name="bench")
bench_app.command()(residency)
app.command()(plan)

DEMO_ADAPTERS = Path(__file__).parents[3] / "examples" / "adapters"
Adapters = Annotated[
    list[str] | None,
    typer.Option("--adapter", metavar="NAME=PATH", help="Serve a PEFT LoRA directory; repeatable."),
]


@app.command()
def serve(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Model directory or Hugging Face hub id; 'embedded' is the small model that Motet fetches. "
            "[default: embedded]"
        ),
    ] = None,
    adapter: Adapters = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML file with [engine], [server] and [adapters]; options here win.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on. [default: 127.0.0.1]")] = None,
    port: Annotated[
        int | None, typer.Option(help="Port to listen on, 0 for a free one. [default: 8000]")
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="The base model's name in the API. [default: the directory's name]")
    ] = None,
    pool: Annotated[
        str | None,
        typer.Option(
            help="Memory for KV cache and adapters together, such as 2GiB. [default: 1GiB on a CPU; on a GPU what "
            "--memory-fraction leaves]"
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda. [default: cuda where there is a GPU]")
    ] = None,
    memory_fraction: Annotated[
        float | None, typer.Option(help="Share of the GPU's memory that may be used. [default: 0.9]")
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(help="Tokens of prompt and answer together. [default: the model's]")
    ] = None,
    max_running: Annotated[int | None, typer.Option(help="Sequences in one batch. [default: 64]")] = None,
    max_step_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens computed in one step; longer prompts are cut in chunks. [default: 512; 2048 on a GPU]"
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads. [default: all cores]")] = None,
    verify_adapters: Annotated[
        bool | None,
        typer.Option(
            "--verify-adapters", help="Run a prompt through each adapter first; refuse what has no effect."
        ),
    ] = None,
    tuned_configs: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Folder with tuned configurations of GPU kernels, before Motet's own. [default: $MOTET_TUNED_CONFIGS]",
        ),
    ] = None,
    prompt_copies: Annotated[
        bool | None,
        typer.Option(
            "--prompt-copies/--no-prompt-copies",
            help="Keep four-bit experts in bfloat16 too: faster prompts, less room for KV cache and adapters. "
            "[default: where they take at most half of that room]",
        ),
    ] = None,
    demo_adapters: Annotated[
        bool, typer.Option("--demo-adapters", help="Also serve the three demo adapters.")
    ] = False,
    json_logs: Annotated[bool, typer.Option("--json-logs", help="One JSON object per log line.")] = False,
    database: Annotated[
        str | None,
        typer.Option(envvar="MOTET_DATABASE", help="SQLAlchemy URL of keys and tenants; see `motet keys`."),
    ] = None,
    registry: Annotated[
        str | None,
        typer.Option(
            envvar="MOTET_REGISTRY",
            metavar="URL",
            help="Serve what is promoted in a registry; see `motet adapters push`.",
        ),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            envvar="MOTET_POLICY",
            metavar="FILE",
            help="What of the registry may be served to whom, TOML; see `motet policy`.",
        ),
    ] = None,
    sagemaker: Annotated[
        bool | None,
        typer.Option(
            "--sagemaker",
            envvar="MOTET_SAGEMAKER",
            help="Be a SageMaker container, on 0.0.0.0:8080 with /opt/ml/model.",
        ),
    ] = None,
    admin_port: Annotated[
        int | None, typer.Option(help="Answer administration and metrics here, and nowhere else.")
    ] = None,
    allow_open: Annotated[
        bool | None, typer.Option("--allow-open", help="Serve everybody without keys, not only loopback.")
    ] = None,
) -> None:
    """Serve MODEL and its adapters over an OpenAI-compatible API.

    A request's `model` names the base or an adapter. Adapters can be added and removed while serving:
    POST /v1/load_lora_adapter {"lora_name": ..., "lora_path": ...} and /v1/unload_lora_adapter.

    Example: motet serve embedded --adapter support=./support --adapter legal=./legal
    """
    from motet.cli.service import run_server
    from motet.cli.settings import parse_size, read_settings
    from motet.server.workers import run

    demo = [f"{name}={path}" for name, path in demo_paths().items()] if demo_adapters else []
    settings = read_settings(
        config,
        {
            "model": model,
            "pool_bytes": parse_size(pool) if pool else None,
            "device": device,
            "memory_fraction": memory_fraction,
            "max_model_len": max_model_len,
            "max_running": max_running,
            "max_step_tokens": max_step_tokens,
            "threads": threads,
            "verify_adapters": verify_adapters,
            "tuned_configs": tuned_configs,
            "prompt_copies": prompt_copies,
        },
        {
            "host": host,
            "port": port,
            "served_model_name": served_model_name,
            "database": database,
            "sagemaker": sagemaker,
            "registry": registry,
            "policy": policy,
            "admin_port": admin_port,
            "allow_open": allow_open,
        },
        [*demo, *(adapter or [])],
    )
    console = Console(stderr=True)

    def serving(url: str, _stop: object) -> None:
        names = ", ".join(settings.server.adapters) or "none"
        console.print(f"serving on [bold]{url}/v1[/bold]; adapters: {names}; Ctrl-C stops", soft_wrap=True)

    run(run_server(settings, console, serving, json_logs))


@app.command()
def top(
    url: Annotated[
        str, typer.Argument(help="The server, or its port of administration.")
    ] = "http://127.0.0.1:8000",
    key: Annotated[
        str | None, typer.Option(envvar="MOTET_API_KEY", help="A key of role metrics or admin.")
    ] = None,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Print one screen and leave.")] = False,
) -> None:
    """Watch a server's models, tenants and memory; Ctrl-C leaves."""
    from motet.cli.top import watch

    watch(Console(), url, key, interval, once)


@app.command()
def demo(
    max_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 64,
) -> None:
    """Serve the embedded Mixture-of-Experts model with three fine-tunes and compare their answers to the base's.

    Starts the real server on a free port, sends one concurrent batch over HTTP, prints the answers side by side
    with time to first token and tokens per second, and stops.
    """
    from motet.cli.demo import run_demo

    run_demo(Console(), demo_paths(), max_tokens)


@app.command()
def tune(
    model: Annotated[str, typer.Argument(help="Model directory or hub id; only its config is read.")],
    out: Annotated[
        Path, typer.Option(help="Folder for the files, and for the log that an interrupted run goes on from.")
    ],
    rank: Annotated[int, typer.Option(help="Rank of the adapters.")] = 32,
    adapters: Annotated[int, typer.Option(help="Adapters in a step.")] = 8,
    rows: Annotated[str, typer.Option(help="Sizes of decode steps, separated by commas.")] = "1,16,64",
    context: Annotated[int, typer.Option(help="Tokens of context of a decode step.")] = 1900,
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 1600,
    layers: Annotated[int, typer.Option(help="Layers that are measured.")] = 4,
    minutes: Annotated[float, typer.Option(help="Begin nothing after so many.")] = 60,
    jobs: Annotated[int, typer.Option(help="Processes that compile.")] = 8,
) -> None:
    """Find the configurations of GPU kernels that are fastest for a model on this GPU; serve with --tuned-configs OUT.

    Whole decode steps and prompts are measured, on a few layers of random weights.
    """
    from motet.engine.device import has_gpu

    if not has_gpu():
        raise ConfigError("tuning measures GPU kernels: it needs a CUDA GPU and Triton")
    from motet.bench.stack import Work, few_layers
    from motet.bench.tune import steps_of, tune_model
    from motet.cli.progress import progress_bar
    from motet.models.registry import locate

    console, directory = Console(stderr=True), locate(model)
    values = few_layers(json.loads((directory / "config.json").read_text()), layers)
    sizes = sorted(int(size) for size in rows.split(","))
    work = Work(sizes[-1], context, max(context + 1, prompt), adapters, rank)
    with progress_bar(console, "tuning") as report:
        report("starting", 0.0)
        steps = steps_of(sizes, prompt)
        for fraction, answer in tune_model(values, work, steps, out, directory.name, minutes * 60, jobs):
            report(str(answer), fraction)
            console.print(answer)


@app.command()
def complete(
    prompt: Annotated[str, typer.Argument(help="The user's message, or with --raw the text to continue.")],
    model: Annotated[str, typer.Option(help="Model directory or hub id.")] = "embedded",
    adapter: Annotated[Path | None, typer.Option(help="A PEFT LoRA directory to answer with.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")
    ] = False,
) -> None:
    """Answer one prompt in this process, without a server."""
    from motet.cli.service import model_directory
    from motet.llm import LLM
    from motet.types import SamplingParams

    console = Console(stderr=True)
    directory = model_directory(model, console)
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
    adapters = {"it": str(adapter)} if adapter else {}
    with console.status("loading the model"):
        llm = LLM(str(directory), adapters)
    with llm:
        tokens: str | list[int] = prompt if raw else llm.encode_chat([{"role": "user", "content": prompt}])
        print(llm.complete(tokens, params, "it" if adapter else None).text)


@adapters_app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A PEFT LoRA directory.")],
    model: Annotated[
        str | None, typer.Option(help="Check it against this model; 'embedded' is Motet's own.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Say what is inside an adapter: ranks by module, layers, size, digest; and whether it would bind, or why not.

    Exits with 1 if it would not.
    """
    from motet.cli.inspect import print_report
    from motet.cli.service import model_directory
    from motet.models.registry import load_spec

    spec = load_spec(model_directory(model, Console(stderr=True))) if model else None
    if not print_report(Console(), path, spec, as_json):
        raise typer.Exit(1)


@adapters_app.command()
def verify(
    path: Annotated[Path, typer.Argument(help="A PEFT LoRA directory.")],
    model: Annotated[
        str, typer.Option(help="The base: a model directory or hub id; 'embedded' is Motet's own.")
    ] = "embedded",
    as_json: Annotated[bool, typer.Option("--json", help="Print the effects as JSON.")] = False,
) -> None:
    """Run a short prompt through base and adapter and say how much each of its tensors changes.

    Exits with 1 if a tensor changes nothing, or if rows of the base change.
    """
    from motet.cli.service import model_directory
    from motet.cli.verify import verify_adapter

    console = Console(stderr=True)
    verify_adapter(Console(), console, model_directory(model, console), path, as_json)


def demo_paths() -> dict[str, str]:
    """The three adapters that come with a checkout of the repository."""
    found = {folder.name: str(folder) for folder in sorted(DEMO_ADAPTERS.glob("*/")) if folder.is_dir()}
    if not found:
        raise ConfigError(f"the demo adapters are part of the repository and {DEMO_ADAPTERS} is not there")
    return found


def main() -> None:
    """Entry point: an error that is meant for the user is one line on stderr and exit status 1."""
    try:
        app()
    except MotetError as error:
        print("motet:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
