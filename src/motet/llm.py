"""The Python API: the whole engine in this process.

from motet import LLM
llm = LLM("path/or/hub-id", adapters={"support": "path/to/adapter"})
print(llm.complete("Hello", adapter="support").text)
"""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Coroutine, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import msgspec

from motet.adapters.store import ImageStore
from motet.config import EngineConfig, cache_dir
from motet.engine.client import EngineThread
from motet.engine.device import has_gpu, resolve
from motet.engine.frontend import Frontend
from motet.errors import MotetError
from motet.models.registry import locate
from motet.registry.catalog import Catalog
from motet.registry.prepare import Preparer
from motet.types import BASE, Delta, EngineStats, FinishReason, SamplingParams, TokenLogprob

T = TypeVar("T")


class Completion(msgspec.Struct, frozen=True):
    """One answer: its text, the sampled tokens, why it ended."""

    text: str
    token_ids: tuple[int, ...]
    finish: FinishReason
    logprobs: tuple[TokenLogprob, ...] = ()


class LLM:
    """A base model and its adapters, served in-process by the same engine as the server's.

    `model` is a directory or hub id, `adapters` maps names to PEFT directories; further keywords are EngineConfig's.
    """

    def __init__(self, model: str, adapters: dict[str, str] | None = None, **config: Any) -> None:
        self._config = resolve(EngineConfig(model=str(locate(model)), **config), has_gpu())
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="motet-llm", daemon=True)
        self._thread.start()
        self._client: EngineThread | None = None
        try:
            self._wait(self._start())
            for name, path in (adapters or {}).items():
                self.load_adapter(name, path)
        except BaseException:
            self.close()
            raise

    async def _start(self) -> None:
        self._client = EngineThread(self._config)
        ready = await self._client.started()
        directory = Path(self._config.model)
        rounded = self._config.device == "cuda"
        images = ImageStore(cache_dir() / "images", self._config.image_bytes)
        bind = Preparer(ready.spec, ready.page_bytes, images, rounded)
        self._client.use_disk(bind)
        self._frontend = Frontend(self._client, directory)
        self._catalog = Catalog(ready.spec, ready.spec.name, str(directory), bind, self._client)

    def load_adapter(self, name: str, path: str) -> str:
        """Serve the adapter at `path` as `name`, whatever the name pointed at; returns its digest.

        Raises AdapterRefused for files that do not bind to the base.
        """
        return self._wait(self._catalog.load(name, path, replace=True)).digest

    def encode_chat(self, messages: list[dict[str, object]]) -> list[int]:
        """Tokens of a conversation in the model's chat template."""
        return self._frontend.encode_chat(messages)

    def complete(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None, adapter: str | None = None
    ) -> Completion:
        """One answer to one prompt; see `generate`."""
        return self.generate([prompt], params, [adapter])[0]

    def chat(
        self,
        messages: list[dict[str, object]],
        params: SamplingParams | None = None,
        adapter: str | None = None,
    ) -> Completion:
        """The assistant's next message."""
        return self.complete(self.encode_chat(messages), params, adapter)

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: SamplingParams | None = None,
        adapters: Sequence[str | None] | None = None,
    ) -> list[Completion]:
        """Answer all prompts (text or tokens) in one batch, prompt i with `adapters[i]` (None is the base)."""
        chosen = [None] * len(prompts) if adapters is None else adapters
        return self._wait(self._generate_all(prompts, params or SamplingParams(), chosen))

    def stats(self) -> EngineStats:
        """A snapshot of the engine."""
        return self._wait(self._frontend.stats())

    def close(self) -> None:
        """Stop the engine and free its memory; closing again does nothing."""
        if self._loop.is_closed():
            return
        if self._client is not None:
            self._wait(self._client.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _generate_all(
        self, prompts: Sequence[str | Sequence[int]], params: SamplingParams, adapters: Sequence[str | None]
    ) -> list[Completion]:
        pairs = zip(prompts, adapters, strict=True)
        tasks = [asyncio.ensure_future(self._one(prompt, params, adapter)) for prompt, adapter in pairs]
        try:
            answers = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return [completion for choices in answers for completion in choices]

    async def _one(
        self, prompt: str | Sequence[int], params: SamplingParams, adapter: str | None
    ) -> list[Completion]:
        tokens = self._frontend.encode(prompt) if isinstance(prompt, str) else list(prompt)
        with self._catalog.hold(self._catalog.base if adapter is None else adapter) as record:
            digest = BASE if record is None else record.digest
            parts: list[list[Delta]] = [[] for _ in range(params.n)]
            async for delta in self._frontend.generate(tokens, params, digest, uuid.uuid4().hex):
                parts[delta.index].append(delta)
        return [_join(deltas) for deltas in parts]


def _join(deltas: Sequence[Delta]) -> Completion:
    last = deltas[-1]
    assert last.finish is not None, "an answer without an end"
    if last.finish == "error":
        raise MotetError(last.error or "the engine failed")
    return Completion(
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token for delta in deltas for token in delta.token_ids),
        finish=last.finish,
        logprobs=tuple(p for delta in deltas for p in delta.logprobs),
    )
