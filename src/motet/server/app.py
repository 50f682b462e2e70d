"""The HTTP application: which route does what. `Routes.chat_completions` is a request's life."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Mapping
from contextlib import AsyncExitStack, ExitStack
from importlib.metadata import version
from typing import Any

import msgspec
from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from motet.config import ServerConfig
from motet.engine.protocol import AdapterHost, Generator
from motet.errors import EngineDead, ModelNotFound
from motet.observe.metrics import Metrics
from motet.observe.tracing import NO_TRACER, Trace, Tracer
from motet.server.admin import Admin, LoadRequest, UnloadRequest, adapter_card, base_card
from motet.server.answers import ChatWriter, CompletionWriter, Tally, Writer
from motet.server.describe import document
from motet.server.envelope import Envelope, read_body
from motet.server.failures import Unavailable, handlers
from motet.server.flight import Flight, Place
from motet.server.gate import Gate, Tenancy
from motet.server.intake import Intake, Job
from motet.server.lifecycle import Lifecycle
from motet.server.openai import ChatRequest, CompletionRequest, ModelList, R, Sampling, parse
from motet.server.prefetch import residency_routes
from motet.server.registry_routes import registry_routes
from motet.server.rollout import Rollout
from motet.server.sticky import user_of
from motet.server.stream import EventStream, deltas_of, events, whole
from motet.server.visible import Visible
from motet.tenancy.access import Guard, Principal
from motet.tenancy.load import Load
from motet.tenancy.quota import LocalCounters, Visit
from motet.types import AdapterRecord, EngineStats

logger = logging.getLogger(__name__)
_STATS_SECONDS = 2.0  # that a scrape waits for the engine
DIGEST_HEADER = "X-Motet-Adapter-Digest"


def create_app(
    generator: Generator,
    host: AdapterHost,
    config: ServerConfig,
    metrics: Metrics,
    tenancy: Tenancy | None = None,
    tracer: Tracer = NO_TRACER,
) -> FastAPI:
    """The application over a generator and its models; its `state.lifecycle` is what a server drains.

    Without `tenancy` nobody needs a key.
    """
    lifecycle = Lifecycle()
    tenancy = tenancy or Tenancy(Guard(), LocalCounters(), Load(config.max_queued))
    routes = Routes(generator, host, config, metrics, lifecycle, tenancy)
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
            Route("/openapi.json", routes.openapi, methods=["GET"]),
            *registry_routes(host, config, lifecycle),
            *residency_routes(generator, host, lifecycle),
        ],
        exception_handlers=handlers(metrics),
        openapi_url=None,
        redirect_slashes=False,
    )
    app.add_middleware(Gate, guard=tenancy.guard, config=config, metrics=metrics)
    app.add_middleware(Envelope, lifecycle=lifecycle, metrics=metrics, tracer=tracer)
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
        tenancy: Tenancy,
    ) -> None:
        self._generator = generator
        self._host = host
        self._config = config
        self._metrics = metrics
        self._lifecycle = lifecycle
        self._tenancy = tenancy
        self._document = msgspec.json.encode(document(config))
        self._intake = Intake(generator, host, config)
        self._admin = Admin(host, config, metrics)
        self._rollout = Rollout(generator, host)

    async def chat_completions(self, request: Request) -> Response:
        self._admit()
        await self._enter(request)
        asked = await self._read(request, ChatRequest)
        adapter = await self._resolve(request, asked)
        place = self._queue(request, adapter)
        job = await self._understood(
            request, place, self._intake.chat(asked, adapter, _principal(request).account)
        )
        return await self._answer(request, job, place, ChatWriter(job, self._generator.decode_token))

    async def completions(self, request: Request) -> Response:
        self._admit()
        await self._enter(request)
        asked = await self._read(request, CompletionRequest)
        adapter = await self._resolve(request, asked)
        place = self._queue(request, adapter)
        job = await self._understood(
            request, place, self._intake.completion(asked, adapter, _principal(request).account)
        )
        return await self._answer(request, job, place, CompletionWriter(job, self._generator.decode_token))

    async def models(self, request: Request) -> Response:
        visible = Visible(self._host, _principal(request))
        base = [base_card(self._host)] if visible.base else []
        return _json(ModelList([*base, *(adapter_card(record, self._host) for record in visible.records())]))

    async def model(self, request: Request) -> Response:
        record = Visible(self._host, _principal(request)).resolve(request.path_params["model"])
        return _json(base_card(self._host) if record is None else adapter_card(record, self._host))

    async def load_adapter(self, request: Request) -> Response:
        self._lifecycle.admit()
        asked = await self._read(request, LoadRequest)
        return _json(await self._lifecycle.finish(self._admin.load(asked, _principal(request))))

    async def unload_adapter(self, request: Request) -> Response:
        self._lifecycle.admit()
        asked = await self._read(request, UnloadRequest)
        return _json(await self._lifecycle.finish(self._admin.unload(asked, _principal(request))))

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

    async def openapi(self, _: Request) -> Response:
        """What this server answers."""
        return _json_bytes(self._document, {})

    async def metrics(self, _: Request) -> Response:
        stats = await self._stats()
        text = await asyncio.to_thread(self._metrics.render, stats, self._host.records())
        return Response(text, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _enter(self, request: Request) -> None:
        """Count the request, which is in flight until its end. Raises RateLimited."""
        visit = request.state.visit = Visit(self._tenancy.counters, _principal(request).tenant)
        await request.state.held.enter_async_context(visit)

    def _queue(self, request: Request, adapter: AdapterRecord | None) -> Place:
        """Take a place among those that wait for a first token, before anything costs time.

        Raises RateLimited or Overloaded.
        """
        held: AsyncExitStack = request.state.held
        tenant, load = _principal(request).tenant, self._tenancy.load
        if adapter is not None:
            held.enter_context(load.hold(tenant, adapter.digest, adapter.size_bytes))
        place = held.enter_context(ExitStack())
        place.enter_context(load.wait(tenant))
        limits = [s for s in (tenant.policy.queue_seconds, self._config.queue_seconds) if s is not None]
        return Place(place, min(limits, default=None))

    async def _understood(self, request: Request, place: Place, work: Coroutine[Any, Any, Job]) -> Job:
        """The job that `work` makes of the request, unless its client goes or its time is up before its turn."""
        job = await self._lifecycle.attend(request.receive, place.within(work))
        request.state.trace.event("tokenized")
        return job

    async def _answer(self, request: Request, job: Job, place: Place, writer: Writer) -> Response:
        """Generate, and send what comes as it comes or all at once."""
        flight = await self._start(request, job, place)
        deltas = deltas_of(job, self._generator, flight)
        deltas = self._rollout.watch(deltas, job)
        headers = {DIGEST_HEADER: job.digest or "base"}
        if job.stream:
            return EventStream(
                events(deltas, writer, flight.tally, job.include_usage),
                self._lifecycle,
                self._metrics,
                headers,
            )
        body = await self._lifecycle.attend(request.receive, whole(deltas, writer, flight.tally))
        return _json_bytes(body, headers)

    async def _start(self, request: Request, job: Job, place: Place) -> Flight:
        """Reserve the tokens that the job may need. Raises RateLimited."""
        visit: Visit = request.state.visit
        tenant = _principal(request).tenant
        await visit.reserve(job.most_tokens)
        meter = self._metrics.request(job.model, job.prompt_tokens, request.state.arrival, tenant.name)
        trace: Trace = request.state.trace
        trace.set(
            {
                "gen_ai.request.model": job.model,
                "motet.adapter.digest": job.digest or "base",
                "motet.tenant": tenant.name,
            }
        )
        return Flight(Tally(job), meter, visit, place, trace)

    async def _read(self, request: Request, shape: type[R]) -> R:
        return parse(await read_body(request, self._config.max_body_bytes), shape, self._intake.max_commas)

    def _admit(self) -> None:
        """Raise unless a request can be served now."""
        self._lifecycle.admit()
        if not self._generator.alive:
            raise EngineDead("the engine process is gone")
        if not self._generator.ready:
            raise Unavailable("the engine is warming up")

    async def _resolve(self, request: Request, asked: Sampling) -> AdapterRecord | None:
        """The adapter that the request names, kept servable until the request ends. Raises ModelNotFound."""
        held: AsyncExitStack = request.state.held
        visible, user = Visible(self._host, _principal(request)), user_of(request, asked)
        try:
            adapter = held.enter_context(visible.hold(asked.model, user))
        except ModelNotFound:  # so far
            await self._lifecycle.finish(visible.want(asked.model))
            adapter = held.enter_context(visible.hold(asked.model, user))
        if adapter is not None:
            self._metrics.track(adapter.name)
        request.state.model = adapter.name if adapter else asked.model
        return adapter

    async def _stats(self) -> EngineStats | None:
        if not self._generator.alive:
            return None
        try:
            return await asyncio.wait_for(self._generator.stats(), _STATS_SECONDS)
        except (EngineDead, TimeoutError):
            return None


def _principal(request: Request) -> Principal:
    principal: Principal = request.state.principal
    return principal


def _json(value: object) -> Response:
    return _json_bytes(msgspec.json.encode(value), {})


def _json_bytes(body: bytes, headers: Mapping[str, str]) -> Response:
    return Response(body, headers=dict(headers), media_type="application/json")
