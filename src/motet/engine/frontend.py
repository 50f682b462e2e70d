"""Text ↔ tokens: chat template, tokeniser, incremental detokenising, stop strings, and the n choices of a request."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import msgspec
from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from motet.engine.client import EngineClient
from motet.engine.detokenize import Detokenizer
from motet.engine.messages import typed_error
from motet.errors import InvalidRequest, ModelRefused
from motet.types import ANYBODY, Account, Delta, EngineStats, Request, SamplingParams, SeqOutput


class Frontend:
    """The tokeniser of one model in front of one engine."""

    def __init__(self, client: EngineClient, directory: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(directory)
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise ModelRefused(f"{directory} has no fast tokenizer (tokenizer.json)")
        self._tokenizer = tokenizer
        self._client = client
        self._open = False

    @property
    def alive(self) -> bool:
        """The engine answers."""
        return self._client.alive

    @property
    def ready(self) -> bool:
        """The engine is warm, and `open` was called."""
        return self._open and self._client.ready

    def open(self) -> None:
        """Everything that was to be served at the start is there: be ready."""
        self._open = True

    def encode(self, text: str) -> list[int]:
        """Tokens of a plain prompt, with the special tokens that the tokeniser adds by itself."""
        ids: list[int] = self._tokenizer(text)["input_ids"]
        return ids

    def encode_chat(self, messages: list[dict[str, object]]) -> list[int]:
        """Tokens of a conversation in the model's own chat template, ready for the assistant's answer."""
        if not self._tokenizer.chat_template:
            raise InvalidRequest("the model has no chat template; use /v1/completions", "messages")
        try:
            conversation: Any = messages  # transformers types it narrower than templates do
            text = self._tokenizer.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=True
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise InvalidRequest(f"the chat template refuses these messages: {error}", "messages") from error
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def decode_token(self, token_id: int) -> str:
        """The text of one token by itself."""
        text = self._tokenizer.decode([token_id])
        assert isinstance(text, str)
        return text

    async def stats(self) -> EngineStats:
        """A snapshot of the engine."""
        return await self._client.stats()

    async def prefetch(self, adapter: str) -> None:
        """As the client's."""
        await self._client.prefetch(adapter)

    async def pin_adapter(self, adapter: str, pinned: bool) -> None:
        """As the client's."""
        await self._client.pin_adapter(adapter, pinned)

    async def generate(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        adapter: str,
        request_id: str,
        account: Account = ANYBODY,
    ) -> AsyncIterator[Delta]:
        """The deltas of all choices, interleaved; see `engine.protocol.Generator`."""
        requests = _choices(prompt, params, adapter, request_id, account)
        index = {request.id: i for i, request in enumerate(requests)}
        texts = [Detokenizer(self._tokenizer.backend_tokenizer, params.stop) for _ in requests]
        began = False
        async with aclosing(self._client.stream(requests)) as outputs:  # type: ignore[type-var]
            async for output in outputs:
                i = index[output.request_id]
                if texts[i].stopped:
                    continue  # what came between the stop string and the engine's end of the request
                if output.finish == "error" and not began:
                    raise typed_error(output.error or "the engine failed", output.code)
                began = True
                delta = _delta(i, output, texts[i])
                if texts[i].stopped and output.finish is None:
                    self._client.abort({output.request_id})
                yield delta


def _choices(
    prompt: Sequence[int], params: SamplingParams, adapter: str, request_id: str, account: Account
) -> list[Request]:
    """One request per choice. Choice i of a seeded request has a seed of its own, derived from the request's."""
    seed = secrets.randbits(62) if params.seed is None else params.seed
    now = time.monotonic()
    return [
        Request(
            id=f"{request_id}.{i}",
            prompt=tuple(prompt),
            params=msgspec.structs.replace(params, seed=(seed + i * 0x9E3779B97F4A7C15) & 0x7FFFFFFFFFFFFFFF),
            adapter=adapter,
            arrival=now,
            account=account,
        )
        for i in range(params.n)
    ]


def _delta(index: int, output: SeqOutput, text: Detokenizer) -> Delta:
    """Fold one output into the answer's text."""
    ended_by_token = output.finish == "stop"
    visible = output.token_ids[:-1] if ended_by_token else output.token_ids
    piece = text.push(visible)
    finish = output.finish
    if text.stopped:
        finish = "stop"
    elif finish is not None:
        piece += text.flush()
    return Delta(
        index,
        piece,
        output.token_ids,
        output.logprobs,
        finish,
        output.error,
        output.cached_tokens,
        output.queue_seconds,
        output.prefill_seconds,
        output.at,
    )
