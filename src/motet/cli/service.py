"""The composition root: engine process, frontend, catalog and HTTP application of one server, wired together."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from pathlib import Path

import msgspec
from rich.console import Console

from motet.adapters.store import ImageStore
from motet.cli.progress import progress_bar
from motet.cli.settings import EMBEDDED, Settings
from motet.config import cache_dir
from motet.engine.client import EngineProcess
from motet.engine.device import has_gpu, resolve
from motet.engine.frontend import Frontend
from motet.engine.loop import resolve_max_model_len
from motet.errors import ConfigError
from motet.memory.pool import KV_DTYPE, page_bytes
from motet.models.embedded import ensure_embedded
from motet.models.registry import load_spec, locate
from motet.observe import log
from motet.observe.metrics import Metrics, memory_line
from motet.observe.tracing import tracer_of
from motet.registry.catalog import Catalog
from motet.registry.follow import RegistryCatalog
from motet.registry.judge import Judge
from motet.registry.policy import read_policy
from motet.registry.prepare import Preparer
from motet.registry.store import Registry
from motet.server.app import create_app
from motet.server.gate import check_exposure, tenancy_of
from motet.server.run import serve
from motet.server.sagemaker import SageMaker
from motet.types import ModelSpec, PreparedAdapter

logger = logging.getLogger(__name__)


def model_directory(model: str, console: Console) -> Path:
    """The directory of a model: a path, a hub id, or the embedded default, which is fetched once."""
    if model != EMBEDDED:
        return locate(model)
    with progress_bar(console, "embedded model") as report:
        return ensure_embedded(on_progress=report)


async def run_server(
    settings: Settings,
    console: Console,
    on_serving: Callable[[str, Callable[[], None]], None] | None = None,
    json_logs: bool = False,
    log_level: str = "INFO",
) -> None:
    """Serve until a signal, or until the function handed to `on_serving` beside the URL is called.

    The socket listens from the start; `/ready` turns 200 when the engine is warm and the named adapters are bound.
    Raises what kept the engine or an adapter from starting.
    """
    log.setup(log_level, as_json=json_logs)
    tenancy = tenancy_of(settings.server)
    check_exposure(settings.server, tenancy.guard)
    tracer = tracer_of(settings.server.otlp_endpoint)
    directory = model_directory(settings.engine.model, console)
    engine = resolve(msgspec.structs.replace(settings.engine, model=str(directory)), has_gpu())
    name = settings.server.served_model_name or directory.name
    spec = load_spec(directory, name)
    spec = msgspec.structs.replace(spec, max_model_len=resolve_max_model_len(engine, spec))
    images = ImageStore(cache_dir() / "images", engine.image_bytes)
    bind = Preparer(
        spec=spec,
        page_bytes=page_bytes(spec, engine.page_tokens, KV_DTYPE[engine.device]),
        images=images,
        rounded=engine.device == "cuda",
    )
    with ExitStack() as bar:
        client = EngineProcess(engine, bar.enter_context(progress_bar(console, "engine")))
        try:
            client.use_disk(bind)
            frontend = Frontend(client, directory)
            metrics = Metrics(name)
            catalog = _catalog(settings, spec, name, bind, client, metrics)
            app = create_app(frontend, catalog, settings.server, metrics, tenancy, tracer)
            if settings.server.sagemaker:
                limit = settings.server.max_body_bytes
                app.add_middleware(SageMaker, base=name, max_body_bytes=limit, guard=tenancy.guard)
            drain = app.state.lifecycle.drain
            url = asyncio.get_running_loop().create_future()
            # A Ctrl-C until now ends this task here; from now on the server handles it.
            await asyncio.sleep(0)
            start = _start(client, frontend, catalog, settings.server.adapters, bar)
            started = asyncio.create_task(_announce(start, url, drain, on_serving))
            following = asyncio.create_task(catalog.follow())
            try:
                await serve(app, settings.server, on_ready=url.set_result)
            except SystemExit as error:  # uvicorn's, which has logged the reason
                where = f"{settings.server.host}:{settings.server.port}"
                raise ConfigError(f"cannot listen on {where}") from error
            finally:
                started.cancel()
                following.cancel()
                await asyncio.gather(started, following, return_exceptions=True)
        finally:
            await client.close()
            await asyncio.to_thread(tracer.close)
    if not started.cancelled():
        started.result()


def _catalog(
    settings: Settings,
    spec: ModelSpec,
    name: str,
    bind: Callable[[Path], PreparedAdapter],
    client: EngineProcess,
    metrics: Metrics,
) -> Catalog:
    server, model = settings.server, settings.engine.model
    if server.registry is None:
        if server.policy is not None:
            raise ConfigError("a policy judges what is in a registry: name one with --registry")
        return Catalog(spec, name, model, bind, client)
    registry = Registry(server.registry)
    judge = None
    if server.policy is not None:
        judge = Judge(read_policy(Path(server.policy)), registry, metrics.audit_lost.inc)
    return RegistryCatalog(
        registry, cache_dir() / "copies", spec, name, model, bind, client, judge, metrics.forget
    )


async def _start(
    client: EngineProcess, frontend: Frontend, catalog: Catalog, adapters: dict[str, str], bar: ExitStack
) -> None:
    await client.started()
    bar.close()
    logger.info(memory_line(await client.stats()))
    for name, path in adapters.items():
        await catalog.load(name, path)
    await catalog.sync()
    frontend.open()


async def _announce(
    start: Coroutine[object, object, None],
    url: asyncio.Future[str],
    drain: Callable[[], None],
    on_serving: Callable[[str, Callable[[], None]], None] | None,
) -> None:
    """Tell that the server serves; drain it if it never will."""
    try:
        await start
    except BaseException:
        drain()
        raise
    if on_serving is not None:
        on_serving(await url, drain)
