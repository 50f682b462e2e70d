"""Serving the application in this process: uvicorn, with an orderly end.

SIGTERM or SIGINT: readiness turns 503 and new work is refused while the socket still answers; work in flight
has `grace_seconds` to finish, then ends with an error; then `serve` returns, so that the process can exit
with 0. A second signal skips the grace. Threads are not waited for: see `workers`.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

from motet.config import ServerConfig
from motet.errors import ConfigError
from motet.server.connection import KEEP_ALIVE_SECONDS, Connection, with_patience
from motet.server.gate import for_operators
from motet.server.lifecycle import Lifecycle
from motet.server.workers import Workers

logger = logging.getLogger(__name__)
_CLOSING_SECONDS = 5  # after the grace, for the last bytes


async def serve(
    app: FastAPI,
    config: ServerConfig,
    *,
    on_ready: Callable[[str], None] | None = None,
    grace_seconds: float = 30.0,
) -> None:
    """Serve `app` until a signal, then drain it. `on_ready` is called with the URL once the socket listens.

    Raises SystemExit, having logged why, when the address cannot be bound; ConfigError for that of `admin_port`.
    """
    main = Server(_settings(app, config, config.port), app.state.lifecycle, on_ready, grace_seconds)
    try:
        await _serve(main, app, config)
    finally:  # what is closed now must not queue behind threads that hang
        asyncio.get_running_loop().set_default_executor(Workers())


async def _serve(main: Server, app: FastAPI, config: ServerConfig) -> None:
    if config.admin_port is None:
        await main.serve()
        return
    side = _settings(for_operators(app), config, config.admin_port)
    try:
        family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        listening = socket.create_server((config.host, config.admin_port), family=family)
    except OSError as error:
        raise ConfigError(f"cannot listen on {config.host}:{config.admin_port}") from error
    logger.info("administration and metrics on %s", _url(listening))
    operators = SecondPort(side)
    serving = asyncio.create_task(operators.serve([listening]))
    try:
        await main.serve()
    finally:
        operators.should_exit = True
        await serving


def _settings(app: ASGIApp, config: ServerConfig, port: int) -> uvicorn.Config:
    return uvicorn.Config(
        with_patience(app, config),
        host=config.host,
        port=port,
        http=partial(Connection, config.head_seconds),  # type: ignore[arg-type]  # uvicorn only calls it
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=_CLOSING_SECONDS,
    )


def _url(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class Server(uvicorn.Server):
    """uvicorn with a drain between the signal and the end."""

    def __init__(
        self,
        config: uvicorn.Config,
        lifecycle: Lifecycle,
        on_ready: Callable[[str], None] | None,
        grace_seconds: float,
    ) -> None:
        super().__init__(config)
        self._lifecycle = lifecycle
        self._on_ready = on_ready
        self._grace = grace_seconds
        self._deadline: float | None = None
        self._hurry = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._on_ready is not None and self.started:
            self._on_ready(_url(self.servers[0].sockets[0]))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - uvicorn's signature
        """Drain. uvicorn's own handler would close the socket at once and die of the signal in the end."""
        self._hurry = self._lifecycle.draining
        self._lifecycle.drain()

    async def on_tick(self, counter: int) -> bool:
        """Called every 0.1 s; true ends the server."""
        lifecycle = self._lifecycle
        if lifecycle.draining:
            now = time.monotonic()
            if self._deadline is None:
                self._deadline = now + self._grace
                logger.info("draining: %d requests in flight", lifecycle.in_flight)
            if self._hurry or now >= self._deadline:
                lifecycle.cut()
            if self._hurry or now >= self._deadline or not lifecycle.in_flight:
                return True
        return await super().on_tick(counter)


class SecondPort(uvicorn.Server):
    """Another port of the same application. Signals are the first one's, and it ends after it."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
