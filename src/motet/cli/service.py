"""The composition root: engine process, frontend, catalog and HTTP application of one server, wired together."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import msgspec
from rich.console import Console

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
from motet.registry.catalog import Catalog
from motet.registry.prepare import prepare
from motet.server.app import create_app
from motet.server.run import serve

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
    directory = model_directory(settings.engine.model, console)
    engine = resolve(msgspec.structs.replace(settings.engine, model=str(directory)), has_gpu())
    name = settings.server.served_model_name or directory.name
    spec = load_spec(directory, name)
    spec = msgspec.structs.replace(spec, max_model_len=resolve_max_model_len(engine, spec))
    bind = partial(
        prepare,
        spec=spec,
        page_bytes=page_bytes(spec, engine.page_tokens, KV_DTYPE[engine.device]),
        images=cache_dir() / "images",
        rounded=engine.device == "cuda",
    )
    with ExitStack() as bar:
        client = EngineProcess(engine, bar.enter_context(progress_bar(console, "engine")))
        try:
            frontend = Frontend(client, directory)
            catalog = Catalog(spec, name, settings.engine.model, bind, client)
            app = create_app(frontend, catalog, settings.server, Metrics(name))
            drain = app.state.lifecycle.drain
            url = asyncio.get_running_loop().create_future()
            # A Ctrl-C until now ends this task here; from now on the server handles it.
            await asyncio.sleep(0)
            start = _start(client, frontend, catalog, settings.server.adapters, bar)
            started = asyncio.create_task(_announce(start, url, drain, on_serving))
            try:
                await serve(app, settings.server, on_ready=url.set_result)
            except SystemExit as error:  # uvicorn's, which has logged the reason
                where = f"{settings.server.host}:{settings.server.port}"
                raise ConfigError(f"cannot listen on {where}") from error
            finally:
                started.cancel()
                await asyncio.gather(started, return_exceptions=True)
        finally:
            await client.close()
    if not started.cancelled():
        started.result()


async def _start(
    client: EngineProcess, frontend: Frontend, catalog: Catalog, adapters: dict[str, str], bar: ExitStack
) -> None:
    await client.started()
    bar.close()
    logger.info(memory_line(await client.stats()))
    for name, path in adapters.items():
        await catalog.load(name, path)
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
