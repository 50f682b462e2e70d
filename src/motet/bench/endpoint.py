"""An OpenAI-compatible endpoint as a target: Motet, vLLM or another, over streaming completions or chat."""

from __future__ import annotations

import asyncio
import os
import time
from functools import partial
from types import TracebackType
from typing import Any, Literal
from urllib.parse import urlsplit

import msgspec

from motet.bench.calls import Call
from motet.bench.http import BadResponse, Connection, Exchange, OnEvent
from motet.bench.records import Answer
from motet.errors import ConfigError

Api = Literal["completions", "chat"]
_SAID = 300  # characters kept of an endpoint's message


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Chunk(msgspec.Struct):
    """What matters of an event, whichever of the two APIs it is from."""

    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_chunk = msgspec.json.Decoder(_Chunk)


class _Stream:
    """The answer to one request as it comes."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.usage = _Usage()
        self.ended = False
        self.failure = ""

    def event(self, data: bytes, now: float) -> None:
        """One event's data. Only a piece with text counts as a token: an opening role, a closing reason do not."""
        if data == b"[DONE]":
            self.ended = True
            return
        try:
            chunk = _chunk.decode(data)
        except msgspec.MsgspecError as error:
            self.failure = self.failure or f"{error}: {data[:_SAID].decode(errors='replace')}"
            return
        if chunk.error is not None:
            self.failure = str(chunk.error)[:_SAID]
        self.usage = chunk.usage or self.usage
        for choice in chunk.choices[:1]:
            said = choice.delta
            if choice.text or (said and (said.content or said.reasoning_content or said.reasoning)):
                self.times.append(now)
            self.ended = self.ended or choice.finish_reason is not None


class Endpoint:
    """Sends requests to a server. Connections are kept and used again; there are as many as requests in flight.

    `url` may end in /v1 or not. `ignore_eos` asks for answers of their full length, which Motet, vLLM and SGLang
    understand. An API key is taken from $OPENAI_API_KEY.
    """

    def __init__(
        self, url: str, api: Api = "completions", ignore_eos: bool = True, timeout: float = 600.0
    ) -> None:
        """Raises ConfigError for what is no HTTP URL."""
        parts = urlsplit(url if "//" in url else f"http://{url}")
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
            raise ConfigError(f"{url!r} is not the URL of an endpoint; write http://HOST:PORT")
        self._secure = parts.scheme == "https"
        self._host, self._port = parts.hostname, port or (443 if self._secure else 80)
        self._path = parts.path.rstrip("/").removesuffix("/v1") + "/v1"
        self._api = api
        self._ignore_eos = ignore_eos
        self._timeout = timeout
        key = os.environ.get("OPENAI_API_KEY")
        self._headers = (
            f"Host: {parts.netloc.rpartition('@')[2]}\r\nAccept: */*\r\nUser-Agent: motet-bench\r\n"
            + (f"Authorization: Bearer {key}\r\n" if key else "")
        )
        self._idle: list[Connection] = []

    async def __aenter__(self) -> Endpoint:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._idle:
            self._idle.pop().close()

    async def models(self) -> list[str]:
        """The served names, in the endpoint's order. Raises ConfigError if it does not say."""
        try:
            async with asyncio.timeout(self._timeout):
                listed = await self._perform(b"GET", "/models", b"", lambda _data, _now: None)
        except (OSError, BadResponse) as error:  # TimeoutError is an OSError
            raise ConfigError(f"no endpoint answers at {self._host}:{self._port}: {error}") from error
        try:
            return [str(model["id"]) for model in msgspec.json.decode(listed.body)["data"]]
        except (msgspec.MsgspecError, KeyError, TypeError) as error:
            told = listed.body[:_SAID].decode(errors="replace")
            raise ConfigError(f"{self._path}/models did not list models: {told}") from error

    async def send(self, call: Call) -> Answer:
        """See `Target`. The clock starts before a connection is looked for, as a user's does."""
        path, body = self._request(call)
        stream = _Stream()
        answer = partial(_answer, stream, time.perf_counter())
        try:
            async with asyncio.timeout(self._timeout):
                exchange = await self._perform(b"POST", path, body, stream.event)
        except TimeoutError:
            return answer("timeout", f"no end within {self._timeout:g} s")
        except ConnectionRefusedError as error:
            return answer("refused", str(error))
        except OSError as error:
            return answer("disconnected" if stream.times else "connection", str(error))
        except BadResponse as error:
            return answer("bad response", str(error))
        status = exchange.response.status
        if status != 200:
            return answer(f"http {status}", exchange.body[:_SAID].decode(errors="replace"))
        if stream.failure:
            return answer("error event", stream.failure)
        if not stream.ended:
            return answer("cut short", "the stream ended without finish_reason and [DONE]")
        if not stream.times:
            return answer("no text", exchange.body[:_SAID].decode(errors="replace"))
        return answer("", "")

    def _request(self, call: Call) -> tuple[str, bytes]:
        body: dict[str, object] = {
            "model": call.model,
            "max_tokens": call.output,
            "temperature": 1.0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self._ignore_eos:
            body["ignore_eos"] = True
        messages = _is_chat(call)
        if self._api == "chat" or messages:
            said = {"role": "user", "content": call.prompt}
            body["messages"] = call.prompt if messages else [said]
            return "/chat/completions", msgspec.json.encode(body)
        body["prompt"] = call.prompt
        return "/completions", msgspec.json.encode(body)

    async def _perform(self, method: bytes, path: str, body: bytes, on_event: OnEvent) -> Exchange:
        head = f" {self._path}{path} HTTP/1.1\r\n{self._headers}"
        if body:
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        request = method + head.encode() + b"\r\n" + body
        while True:
            reused, connection = await self._connection()
            exchange = Exchange(on_event)
            try:
                await connection.perform(request, exchange)
            except OSError:
                if reused and not exchange.response.status:
                    continue  # the server closed an idle connection while the request was on its way
                raise
            if connection.open:
                self._idle.append(connection)
            return exchange

    async def _connection(self) -> tuple[bool, Connection]:
        while self._idle:
            connection = self._idle.pop()
            if connection.open:
                return True, connection
        loop = asyncio.get_running_loop()
        _, made = await loop.create_connection(
            Connection, self._host, self._port, ssl=True if self._secure else None
        )
        return False, made


def _is_chat(call: Call) -> bool:
    return bool(call.prompt) and isinstance(call.prompt[0], dict)


def _answer(stream: _Stream, sent: float, error: str, message: str) -> Answer:
    usage = stream.usage
    return Answer(sent, tuple(stream.times), usage.prompt_tokens, usage.completion_tokens, error, message)
