"""The HTTP application: which route does what. `Routes.chat_completions` is a request's life."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from contextlib import ExitStack
from importlib.metadata import version

import msgspec
from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from motet.config import ServerConfig
from motet.engine.protocol import AdapterHost, Generator
from motet.errors import EngineDead
from motet.observe.metrics import Metrics
from motet.server.admin import Admin, LoadRequest, UnloadRequest, adapter_card, base_card
from motet.server.answers import ChatWriter, CompletionWriter, Tally, Writer
from motet.server.envelope import Envelope, read_body
from motet.server.failures import Unavailable, handlers
from motet.server.intake import Intake, Job
from motet.server.lifecycle import Lifecycle
from motet.server.openai import ChatRequest, CompletionRequest, ModelList, R, parse
from motet.server.stream import EventStream, deltas_of, events, whole
from motet.types import AdapterRecord, EngineStats

logger = logging.getLogger(__name__)
_STATS_SECONDS = 2.0  # that a scrape waits for the engine
DIGEST_HEADER = "X-Motet-Adapter-Digest"


def create_app(generator: Generator, host: AdapterHost, config: ServerConfig, metrics: Metrics) -> FastAPI:
    """The application over a generator and its models; its `state.lifecycle` is what a server drains."""
    lifecycle = Lifecycle()
    routes = Routes(generator, host, config, metrics, lifecycle)
    app = FastAPI(
        title="Motet",
        version=version("motet"),
        routes=[
            Route("/v1/chat/completions", routes.chat_completions, methods=["POST"]),
            Route("/v1/completions", routes.completions, methods=["POST"]),
            Route("/v1/models", routes.models, methods=["GET"]),
            Route("/v1/models/{model:path}", routes.model, methods=["GET"]),
            Route("/v1/load_lora_adapter", routes.load_adapter, methods=["POST"]),
            Route("/v1/unload_lora_adapter", routes.unload_adapter, methods=["POST"]),
            Route("/health", routes.health, methods=["GET"]),
            Route("/ready", routes.ready, methods=["GET"]),
            Route("/version", routes.version, methods=["GET"]),
            Route("/metrics", routes.metrics, methods=["GET"]),
        ],
        exception_handlers=handlers(metrics),
        openapi_url=None,
        redirect_slashes=False,
    )
    app.add_middleware(Envelope, lifecycle=lifecycle, metrics=metrics)
    app.state.lifecycle = lifecycle
    return app


class Routes:
    """The endpoints, over what they need."""

    def __init__(
        self,
        generator: Generator,
        host: AdapterHost,
        config: ServerConfig,
        metrics: Metrics,
        lifecycle: Lifecycle,
    ) -> None:
        self._generator = generator
        self._host = host
        self._config = config
        self._metrics = metrics
        self._lifecycle = lifecycle
        self._intake = Intake(generator, host, config)
        self._admin = Admin(host, config, metrics)

    async def chat_completions(self, request: Request) -> Response:
        self._admit()
        asked = await self._read(request, ChatRequest)
        adapter = self._resolve(request, asked.model)
        job = await self._intake.chat(asked, adapter)
        return await self._answer(request, job, ChatWriter(job, self._generator.decode_token))

    async def completions(self, request: Request) -> Response:
        self._admit()
        asked = await self._read(request, CompletionRequest)
        adapter = self._resolve(request, asked.model)
        job = await self._intake.completion(asked, adapter)
        return await self._answer(request, job, CompletionWriter(job, self._generator.decode_token))

    async def models(self, _: Request) -> Response:
        adapters = [adapter_card(record, self._host) for record in self._host.records()]
        return _json(ModelList([base_card(self._host), *adapters]))

    async def model(self, request: Request) -> Response:
        record = self._host.resolve(request.path_params["model"])
        return _json(base_card(self._host) if record is None else adapter_card(record, self._host))

    async def load_adapter(self, request: Request) -> Response:
        self._lifecycle.admit()
        return _json(await self._admin.load(await self._read(request, LoadRequest)))

    async def unload_adapter(self, request: Request) -> Response:
        return _json(await self._admin.unload(await self._read(request, UnloadRequest)))

    async def health(self, _: Request) -> Response:
        """Liveness: restart this server when it is not 200."""
        if not self._generator.alive:
            raise EngineDead("the engine process is gone")
        return _json({"status": "ok"})

    async def ready(self, _: Request) -> Response:
        """Readiness: send requests here while it is 200."""
        self._admit()
        return _json({"status": "ready"})

    async def version(self, _: Request) -> Response:
        return _json({"version": version("motet")})

    async def metrics(self, _: Request) -> Response:
        stats = await self._stats()
        text = await asyncio.to_thread(self._metrics.render, stats, self._host.records())
        return Response(text, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _answer(self, request: Request, job: Job, writer: Writer) -> Response:
        """Generate, and send what comes as it comes or all at once."""
        tally = Tally(job)
        prompt_tokens = tally.usage().prompt_tokens
        meter = self._metrics.request(job.model, prompt_tokens, request.state.arrival)
        deltas = deltas_of(job, self._generator, meter, tally)
        headers = {DIGEST_HEADER: job.digest or "base"}
        if job.stream:
            return EventStream(
                events(deltas, writer, tally, job.include_usage), self._lifecycle, self._metrics, headers
            )
        body = await self._lifecycle.attend(request.receive, whole(deltas, writer, tally))
        return _json_bytes(body, headers)

    async def _read(self, request: Request, shape: type[R]) -> R:
        return parse(await read_body(request, self._config.max_body_bytes), shape, self._intake.max_commas)

    def _admit(self) -> None:
        """Raise unless a request can be served now."""
        self._lifecycle.admit()
        if not self._generator.alive:
            raise EngineDead("the engine process is gone")
        if not self._generator.ready:
            raise Unavailable("the engine is warming up")

    def _resolve(self, request: Request, model: str) -> AdapterRecord | None:
        """The adapter that the request names, kept servable until the request ends. Raises ModelNotFound."""
        held: ExitStack = request.state.held
        adapter = held.enter_context(self._host.hold(model))
        if adapter is not None:
            self._metrics.track(model)
        request.state.model = model
        return adapter

    async def _stats(self) -> EngineStats | None:
        if not self._generator.alive:
            return None
        try:
            return await asyncio.wait_for(self._generator.stats(), _STATS_SECONDS)
        except (EngineDead, TimeoutError):
            return None


def _json(value: object) -> Response:
    return _json_bytes(msgspec.json.encode(value), {})


def _json_bytes(body: bytes, headers: Mapping[str, str]) -> Response:
    return Response(body, headers=dict(headers), media_type="application/json")
