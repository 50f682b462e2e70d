"""The demonstration: one concurrent batch over HTTP that uses the base and three of its fine-tunes."""

from __future__ import annotations

import asyncio
import http.client
import json
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console
from rich.live import Live
from rich.rule import Rule
from rich.table import Table

from motet.cli.demo_prompts import DEMO_PROMPTS
from motet.cli.service import run_server
from motet.cli.settings import EMBEDDED, Settings
from motet.config import EngineConfig, ServerConfig

BASE_NAME = "base"


@dataclass(frozen=True)
class Answer:
    """One streamed answer so far. Times are seconds since the request was sent."""

    model: str
    text: str = ""
    tokens: int = 0
    first: float | None = None
    last: float = 0.0

    @property
    def rate(self) -> float:
        """Tokens per second after the first."""
        return (self.tokens - 1) / (self.last - self.first) if self.first and self.last > self.first else 0.0


def run_demo(console: Console, adapters: Mapping[str, str], max_tokens: int) -> None:
    """Start the server, ask, print, stop."""
    settings = Settings(
        engine=EngineConfig(model=EMBEDDED, max_model_len=2048, pool_bytes=512 << 20),
        server=ServerConfig(port=0, served_model_name=BASE_NAME, adapters=dict(adapters)),
    )
    asyncio.run(_serve_and_ask(console, settings, max_tokens))


async def _serve_and_ask(console: Console, settings: Settings, max_tokens: int) -> None:
    serving: asyncio.Future[tuple[str, Callable[[], None]]] = asyncio.get_running_loop().create_future()

    def announce(url: str, stop: Callable[[], None]) -> None:
        serving.set_result((url, stop))

    server = asyncio.create_task(run_server(settings, console, announce, log_level="WARNING"))
    waiting: set[asyncio.Future[Any]] = {server, serving}
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    if not serving.done():
        await server  # raises what kept it from starting
        return
    url, stop = serving.result()
    try:
        await asyncio.to_thread(_ask_all, console, url, max_tokens)
    finally:
        stop()
        await server


def _ask_all(console: Console, url: str, max_tokens: int) -> None:
    """Every prompt to the base and to its fine-tune, all at once, shown as the answers grow."""
    pairs = [(prompt, model) for name, prompt in DEMO_PROMPTS.items() for model in (BASE_NAME, name)]
    answers = {pair: Answer(pair[1]) for pair in pairs}
    began = time.perf_counter()
    with (
        ThreadPoolExecutor(len(pairs)) as threads,
        Live(console=console, refresh_per_second=8, transient=True) as live,
    ):
        jobs = [threads.submit(_ask, url, *pair, max_tokens, answers) for pair in pairs]
        while not all(job.done() for job in jobs):
            live.update(_status(answers))
            time.sleep(0.1)
        for job in jobs:
            job.result()
    seconds = time.perf_counter() - began
    for name, prompt in DEMO_PROMPTS.items():
        console.print(Rule(f"[bold]{name}[/bold]"))
        console.print(f"[dim]{prompt}[/dim]\n")
        console.print(_side_by_side(answers[prompt, BASE_NAME], answers[prompt, name]))
    total = sum(answer.tokens for answer in answers.values())
    console.print(Rule())
    console.print(
        f"{len(pairs)} requests for the base and {len(DEMO_PROMPTS)} fine-tunes in one batch over one model in memory: "
        f"{total} tokens in {seconds:.1f} s, {total / seconds:.0f} tokens/s"
    )


def _ask(url: str, prompt: str, model: str, max_tokens: int, answers: dict[tuple[str, str], Answer]) -> None:
    """Stream one chat completion into `answers`."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    where = urlsplit(url)
    assert where.hostname is not None
    connection = http.client.HTTPConnection(where.hostname, where.port, timeout=120)
    sent = time.perf_counter()
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(f"{model}: HTTP {response.status}: {response.read().decode()}")
    for line in response:
        if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
            continue
        answers[prompt, model] = _extend(
            answers[prompt, model], json.loads(line[6:]), time.perf_counter() - sent
        )
    connection.close()


def _extend(answer: Answer, event: dict[str, object], now: float) -> Answer:
    match event:
        case {"error": {"message": str(message)}}:
            raise RuntimeError(f"{answer.model}: {message}")
        case {"usage": {"completion_tokens": int(tokens)}}:
            return replace(answer, tokens=tokens)
        case {"choices": [{"delta": {"content": str(text)}}]} if text:
            first = now if answer.first is None else answer.first
            return replace(answer, text=answer.text + text, tokens=answer.tokens + 1, first=first, last=now)
    return answer


def _status(answers: Mapping[tuple[str, str], Answer]) -> Table:
    table = Table(title="answering", box=None)
    for answer in answers.values():
        tail = answer.text.replace("\n", " ")[-60:]
        table.add_row(answer.model, f"{answer.tokens} tokens", f"[dim]{tail}[/dim]")
    return table


def _side_by_side(base: Answer, tuned: Answer) -> Table:
    table = Table(expand=True, show_lines=True)
    for answer in (base, tuned):
        first = f"{answer.first * 1000:.0f} ms" if answer.first is not None else "never"
        table.add_column(f"{answer.model}\nTTFT {first}, {answer.rate:.0f} tokens/s", ratio=1)
    table.add_row(base.text.strip(), tuned.text.strip())
    return table
