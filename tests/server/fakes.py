"""An engine made of a list of words, a catalog over it, and ways to talk to the application."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import msgspec
from fastapi import FastAPI

from motet.config import ServerConfig
from motet.errors import EngineDead, InvalidRequest, MotetError
from motet.observe.metrics import Metrics
from motet.observe.tracing import NO_TRACER, Tracer
from motet.registry.catalog import Catalog
from motet.server.app import create_app
from motet.server.gate import Tenancy
from motet.server.run import serve
from motet.types import (
    ANYBODY,
    Account,
    Delta,
    EngineStats,
    KVGroup,
    ModelSpec,
    PreparedAdapter,
    SamplingParams,
    TokenLogprob,
)

SPEC = ModelSpec(
    architecture="FakeForCausalLM",
    name="fake",
    digest="sha256:ba5eba5eba5eba5eba5e",
    num_layers=3,
    hidden_size=48,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    vocab_size=256,
    max_model_len=500,
    num_experts=0,
    eos_token_ids=(0,),
    kv_groups=(KVGroup((0, 1, 2)),),
    sites=(),
)


class FakeGenerator:
    """Bytes are tokens. Every request is answered with `words`, one token each, `delay` seconds apart."""

    def __init__(self, words: Sequence[str] = ("Hel", "lo", "!"), delay: float = 0.0) -> None:
        self.words = list(words)
        self.delay = delay
        self.alive = True
        self.ready = True
        self.refusal: MotetError | None = None
        self.fail_after: int | None = None
        self.failure: Exception | None = None
        self.cached = 2
        self.calls: list[tuple[tuple[int, ...], SamplingParams, str, str]] = []
        self.accounts: list[Account] = []
        self.running = 0
        self.aborted: list[str] = []
        self.yielded = 0
        self.prefetched: list[str] = []
        self.snapshot = EngineStats(
            running=1, waiting=2, total_pages=100, free_pages=40, kv_pages=30, adapter_pages=20
        )

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_chat(self, messages: list[dict[str, object]]) -> list[int]:
        if messages[-1]["role"] == "assistant":
            raise InvalidRequest("the last message must not be the assistant's", "messages")
        return self.encode("".join(f"<{m['role']}>{m['content']}" for m in messages))

    def decode_token(self, token_id: int) -> str:
        return chr(token_id) if token_id < 128 else "\N{REPLACEMENT CHARACTER}"

    async def generate(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        adapter: str,
        request_id: str,
        account: Account = ANYBODY,
    ) -> AsyncIterator[Delta]:
        self.calls.append((tuple(prompt), params, adapter, request_id))
        self.accounts.append(account)
        if self.refusal is not None:
            raise self.refusal
        self.running += 1
        try:
            for delta in self._deltas(params):
                await asyncio.sleep(self.delay)
                if self.fail_after is not None and self.yielded >= self.fail_after:
                    if self.failure is not None:
                        raise self.failure
                    delta = Delta(index=delta.index, text="", finish="error", error="the engine fell over")
                self.yielded += 1
                yield delta
        except (asyncio.CancelledError, GeneratorExit):
            self.aborted.append(request_id)
            raise
        finally:
            self.running -= 1

    def _deltas(self, params: SamplingParams) -> Iterator[Delta]:
        for position, word in enumerate(self.words):
            for index in range(params.n):
                last = position == len(self.words) - 1
                token = ord(word[0]) % 256
                top = tuple((token + i, -0.5 - i) for i in range(params.logprobs or 0))
                yield Delta(
                    index=index,
                    text=word,
                    token_ids=(token,),
                    logprobs=(TokenLogprob(token, -0.5, top),) if params.logprobs is not None else (),
                    finish=("length" if len(self.words) >= params.max_tokens else "stop") if last else None,
                    cached_tokens=self.cached,
                    queue_seconds=0.02 if position == 0 else None,
                )

    async def prefetch(self, adapter: str) -> None:
        self.prefetched.append(adapter)

    async def pin_adapter(self, adapter: str, pinned: bool) -> None:
        kept = {*self.snapshot.pinned, adapter} if pinned else {*self.snapshot.pinned} - {adapter}
        self.snapshot = msgspec.structs.replace(self.snapshot, pinned=tuple(kept))

    async def stats(self) -> EngineStats:
        if not self.alive:
            raise EngineDead("gone")
        return self.snapshot


@dataclass
class FakeEngine:
    """Remembers which digests it was told of, and what it was told."""

    known: set[str] = field(default_factory=set)
    log: list[tuple[str, str]] = field(default_factory=list)
    sources: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0

    async def register_adapter(self, digest: str, image: str, num_pages: int, source: str) -> None:
        assert digest not in self.known
        assert image
        assert num_pages > 0
        await asyncio.sleep(self.delay)
        self.known.add(digest)
        self.sources[digest] = source
        self.log.append(("register", digest))

    async def forget_adapter(self, digest: str) -> None:
        await asyncio.sleep(self.delay)
        self.known.remove(digest)
        self.log.append(("forget", digest))


def prepare(path: Path) -> PreparedAdapter:
    """The digest of a fake adapter is that of the text in its one file."""
    text = (path / "weights").read_text()
    return PreparedAdapter(
        digest="sha256:" + hashlib.sha256(text.encode()).hexdigest(),
        image=str(path / "image"),
        rank=8,
        num_parameters=1234,
        num_pages=3,
        size_bytes=4096,
        source=str(path),
    )


def adapter_at(path: Path, text: str) -> str:
    path.mkdir(parents=True, exist_ok=True)
    (path / "weights").write_text(text)
    return str(path)


@dataclass
class House:
    """An application and everything behind it."""

    generator: FakeGenerator
    engine: FakeEngine
    catalog: Catalog
    metrics: Metrics
    config: ServerConfig
    app: FastAPI

    def client(self) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://motet")

    def post(self, path: str, body: object, **headers: str) -> httpx.Response:
        async def call() -> httpx.Response:
            async with self.client() as client:
                return await client.post(path, json=body, headers=headers)

        return asyncio.run(call())

    def post_bytes(self, path: str, body: bytes) -> httpx.Response:
        async def call() -> httpx.Response:
            async with self.client() as client:
                return await client.post(path, content=body, headers={"content-type": "application/json"})

        return asyncio.run(call())

    def get(self, path: str, **headers: str) -> httpx.Response:
        async def call() -> httpx.Response:
            async with self.client() as client:
                return await client.get(path, headers=headers)

        return asyncio.run(call())

    def chat(self, **fields: object) -> httpx.Response:
        body = {"model": "base", "messages": [{"role": "user", "content": "hi"}], **fields}
        return self.post("/v1/chat/completions", body)

    def complete(self, **fields: object) -> httpx.Response:
        return self.post("/v1/completions", {"model": "base", "prompt": "abc", **fields})


def build(
    generator: FakeGenerator | None = None,
    config: ServerConfig | None = None,
    tenancy: Tenancy | None = None,
    tracer: Tracer = NO_TRACER,
) -> House:
    generator = generator or FakeGenerator()
    config = config or ServerConfig()
    engine = FakeEngine()
    catalog = Catalog(SPEC, "base", "/models/fake", prepare, engine)
    metrics = Metrics(catalog.base)
    return House(
        generator,
        engine,
        catalog,
        metrics,
        config,
        create_app(generator, catalog, config, metrics, tenancy, tracer),
    )


@contextlib.contextmanager
def listening(house: House, grace_seconds: float = 5.0) -> Iterator[str]:
    """The application behind a real socket, in a thread; drained at the end."""
    urls: list[str] = []
    up = threading.Event()

    def on_ready(url: str) -> None:
        urls.append(url)
        up.set()

    config = msgspec.structs.replace(house.config, port=0)
    thread = threading.Thread(
        target=lambda: asyncio.run(serve(house.app, config, on_ready=on_ready, grace_seconds=grace_seconds))
    )
    thread.start()
    try:
        assert up.wait(5)
        yield urls[0]
    finally:
        house.app.state.lifecycle.drain()
        thread.join(10)
        assert not thread.is_alive()


async def until(condition: Callable[[], bool], seconds: float = 3.0) -> None:
    """Wait for `condition`, and fail if it does not come."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - the condition is often in another thread
            await asyncio.sleep(0.002)


def run(work: Coroutine[object, object, None]) -> None:
    asyncio.run(work)
