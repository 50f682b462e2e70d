"""What keys, quotas, per-tenant metrics and traces cost the server: processor time per request and per token.

The whole application in this process, in front of an engine that costs nothing; the median of alternating rounds with
everything off and with everything on. Run it from the repository: python -m benchmarks.tenancy_overhead
"""

from __future__ import annotations

import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path

from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.types import ASGIApp, Message, Scope

from motet.config import TenantPolicy
from motet.observe.tracing import SpanTracer
from tests.server.fakes import FakeGenerator, build
from tests.server.tenants import platform

ROUNDS, REQUESTS, TOKENS = 9, 100, 100
STREAMS, PACE = (
    16,
    100,
)  # the engine that the share of throughput is reckoned for: tokens per second of a stream
LIMITS = TenantPolicy(
    requests_per_minute=10**6, tokens_per_minute=10**9, max_concurrent=100, max_queued=100, queue_seconds=60
)


async def ask(app: ASGIApp, token: str) -> None:
    """One streamed completion, without a socket."""
    body = json.dumps({"model": "base", "prompt": "hello", "stream": True, "max_tokens": TOKENS}).encode()
    headers = [(b"content-type", b"application/json"), (b"authorization", f"Bearer {token}".encode())]
    scope: Scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "query_string": b"",
        "headers": headers,
    }
    asked = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> Message:
        for message in asked:
            return message
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Message) -> None:
        assert message.get("status", 200) == 200

    await app(scope, receive, send)


async def milliseconds(app: ASGIApp, token: str) -> float:
    """Processor time of a request."""
    await ask(app, token)
    began = time.process_time()
    for _ in range(REQUESTS):
        await ask(app, token)
    return (time.process_time() - began) / REQUESTS * 1e3


def main() -> None:
    tracer = SpanTracer(InMemorySpanExporter())
    with tempfile.TemporaryDirectory() as folder:
        took: dict[tuple[str, int], list[float]] = {}
        apps: dict[tuple[str, int], tuple[ASGIApp, str]] = {}
        for words in (1, TOKENS):
            made = platform(Path(folder) / str(words), generator(words), tracer=tracer, acme=LIMITS)
            apps["off", words] = build(generator(words)).app, "none"
            apps["on", words] = made.house.app, made.acme
        for _ in range(ROUNDS):
            for key, (app, token) in apps.items():
                took.setdefault(key, []).append(asyncio.run(milliseconds(app, token)))
    tracer.close()
    median = {key: statistics.median(times) for key, times in took.items()}
    token_us = {k: (median[k, TOKENS] - median[k, 1]) / (TOKENS - 1) * 1e3 for k in ("off", "on")}
    for name in ("off", "on"):
        share = token_us[name] * 1e-6 * STREAMS * PACE
        print(
            f"{name:3}: first token {median[name, 1]:.2f} ms, every further one {token_us[name]:.1f} µs, "
            f"{share:.1%} of a core at {STREAMS} streams of {PACE} tokens/s"
        )


def generator(words: int) -> FakeGenerator:
    return FakeGenerator(["word "] * words)


if __name__ == "__main__":
    main()
