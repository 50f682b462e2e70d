"""An engine in this process as a target: what Motet does without HTTP, by the same drive and the same figures."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType

from motet.adapters.store import ImageStore
from motet.bench.calls import Call
from motet.bench.records import Answer
from motet.config import EngineConfig, cache_dir
from motet.engine.client import EngineThread, OnProgress
from motet.engine.frontend import Frontend
from motet.errors import MotetError
from motet.registry.catalog import Catalog
from motet.registry.prepare import prepare
from motet.types import BASE, FinishReason, Request, SamplingParams


class InProcess:
    """`config` is resolved; `adapters` are PEFT directories by name. Models are named by these, the base by its
    directory's name."""

    def __init__(
        self, config: EngineConfig, adapters: Mapping[str, Path], on_progress: OnProgress | None = None
    ) -> None:
        self._config = config
        self._adapters = adapters
        self._on_progress = on_progress
        self._numbers = itertools.count()

    async def __aenter__(self) -> InProcess:
        """Start the engine and bind the adapters. Raises what kept one of them from it."""
        self._client = EngineThread(self._config, self._on_progress)
        try:
            ready = await self._client.started()
            directory = Path(self._config.model)
            bind = partial(
                prepare,
                spec=ready.spec,
                page_bytes=ready.page_bytes,
                images=ImageStore(cache_dir() / "images"),
                rounded=self._config.device == "cuda",
            )
            self.base = ready.spec.name
            self.vocabulary = ready.spec.vocab_size
            self._frontend = Frontend(self._client, directory)
            self._catalog = Catalog(ready.spec, self.base, str(directory), bind, self._client)
            for name, path in self._adapters.items():
                await self._catalog.load(name, str(path))
        except BaseException:
            await self._client.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.close()

    async def send(self, call: Call) -> Answer:
        """See `Target`."""
        sent, tokens = time.perf_counter(), self._encode(call)
        times: list[float] = []
        count, finish, error = 0, None, ""
        params = SamplingParams(max_tokens=call.output, temperature=1.0, ignore_eos=True)
        with ExitStack() as held:
            try:
                adapter = held.enter_context(self._catalog.hold(call.model))
                digest = BASE if adapter is None else adapter.digest
                request = Request(f"bench-{next(self._numbers)}", tokens, params, digest, time.monotonic())
                async for output in self._client.stream([request]):
                    if output.token_ids:
                        times.append(time.perf_counter())
                        count += len(output.token_ids)
                    finish, error = output.finish, output.error or ""
            except MotetError as failure:
                return Answer(sent, tuple(times), len(tokens), count, failure.code, str(failure))
        failed: FinishReason | None = finish if finish in ("error", "abort") else None
        return Answer(sent, tuple(times), len(tokens), count, failed or "", error)

    def _encode(self, call: Call) -> tuple[int, ...]:
        if isinstance(call.prompt, str):
            return tuple(self._frontend.encode(call.prompt))
        if messages := [part for part in call.prompt if not isinstance(part, int)]:
            return tuple(self._frontend.encode_chat(messages))
        return tuple(part for part in call.prompt if isinstance(part, int))
