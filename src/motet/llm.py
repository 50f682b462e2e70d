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

from motet.config import EngineConfig, cache_dir
from motet.engine.client import EngineThread
from motet.engine.frontend import Frontend
from motet.errors import ModelNotFound, MotetError
from motet.models.registry import locate
from motet.registry.prepare import prepare
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
        self._config = EngineConfig(model=str(locate(model)), **config)
        self._digests: dict[str, str] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="motet-llm", daemon=True)
        self._thread.start()
        self._client, self._frontend, self._spec, self._page_bytes = self._wait(self._start())
        for name, path in (adapters or {}).items():
            self.load_adapter(name, path)

    async def _start(self) -> tuple[EngineThread, Frontend, Any, int]:
        client = EngineThread(self._config)
        ready = await client.started()
        frontend = Frontend(client, Path(self._config.model))
        return client, frontend, ready.spec, ready.page_bytes

    def load_adapter(self, name: str, path: str, images: Path | None = None) -> str:
        """Serve the adapter at `path` as `name`; returns its digest. Raises AdapterRefused."""
        folder = images or cache_dir() / "images"
        prepared = prepare(Path(path), self._spec, self._page_bytes, folder)
        self._wait(self._client.register_adapter(prepared.digest, prepared.image, prepared.num_pages))
        self._digests[name] = prepared.digest
        return prepared.digest

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
        chosen = adapters or [None] * len(prompts)
        return self._wait(self._generate_all(prompts, params or SamplingParams(), chosen))

    def stats(self) -> EngineStats:
        """A snapshot of the engine."""
        return self._wait(self._client.stats())

    def close(self) -> None:
        """Stop the engine and free its memory."""
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
        answers = await asyncio.gather(*(self._one(prompt, params, adapter) for prompt, adapter in pairs))
        return [completion for choices in answers for completion in choices]

    async def _one(
        self, prompt: str | Sequence[int], params: SamplingParams, adapter: str | None
    ) -> list[Completion]:
        tokens = self._frontend.encode(prompt) if isinstance(prompt, str) else list(prompt)
        stream = self._frontend.generate(tokens, params, self._digest(adapter), uuid.uuid4().hex)
        parts: list[list[Delta]] = [[] for _ in range(params.n)]
        async for delta in stream:
            parts[delta.index].append(delta)
        return [_join(deltas) for deltas in parts]

    def _digest(self, name: str | None) -> str:
        if name is None:
            return BASE
        if name not in self._digests:
            raise ModelNotFound(f"no adapter {name!r}; loaded are {sorted(self._digests)}")
        return self._digests[name]


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
