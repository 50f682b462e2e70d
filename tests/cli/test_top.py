"""`motet top`: rates and quantiles of two scrapes, and the screen of a server that serves."""

from __future__ import annotations

import io
import threading
from pathlib import Path

import httpx
import pytest
from rich.console import Console

from motet.cli.top import Scrape, fetch, parse, quantile, rate, screen, watch
from motet.config import TenantPolicy
from motet.errors import ConfigError
from motet.observe.metrics import Metrics
from motet.types import Delta, EngineStats
from tests.server.fakes import FakeGenerator, listening
from tests.server.tenants import CHAT, platform


def scrape(metrics: Metrics, at: float, **stats: int) -> Scrape:
    return parse(metrics.render(EngineStats(**stats), []).decode(), at)  # type: ignore[arg-type]


def shown(before: Scrape, now: Scrape) -> str:
    console = Console(width=140, file=io.StringIO())
    console.print(screen(before, now))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_rates_and_quantiles_are_of_the_time_between() -> None:
    metrics = Metrics("base")
    old = metrics.request("base", 100, 0.0)
    old.delta(Delta(0, "", (1,), queue_seconds=20.0))
    before = scrape(metrics, 10.0)
    for i in range(20):
        metrics.request("base", 3, 0.0).delta(Delta(0, "", (1, 2), queue_seconds=0.02 if i < 19 else 0.09))
    now = scrape(metrics, 14.0)
    assert rate(before, now, "motet_prompt_tokens_total", model="base") == 15.0
    assert rate(before, now, "motet_generation_tokens_total") == 10.0
    assert rate(now, scrape(Metrics("base"), 15.0), "motet_generation_tokens_total") == 0.0
    median = quantile(before, now, "motet_queue_seconds", 0.5, model="base")
    last = quantile(before, now, "motet_queue_seconds", 0.99, model="base")
    assert median == pytest.approx(0.01 + 0.015 * 10 / 19)
    assert last == pytest.approx(0.05 + 0.05 * 0.8)
    assert quantile(now, now, "motet_queue_seconds", 0.5, model="base") is None
    assert quantile(before, now, "motet_queue_seconds", 0.5, model="nobody") is None


def test_what_is_above_the_last_bucket() -> None:
    metrics = Metrics("base")
    before = scrape(metrics, 0.0)
    metrics.request("base", 1, 0.0).delta(Delta(0, "", (1,), queue_seconds=1e6))
    assert quantile(before, scrape(metrics, 1.0), "motet_queue_seconds", 0.95, model="base") == 60.0


def test_the_screen() -> None:
    metrics = Metrics("base")
    before = scrape(metrics, 0.0)
    metrics.track("[red]poet")
    for model, tenant in (("base", "acme"), ("[red]poet", "beta")):
        metrics.request(model, 30, 0.0, tenant).delta(Delta(0, "", (1,), queue_seconds=0.1))
    metrics.error("base", "oops", "acme")
    stats = {"running": 3, "waiting": 4, "total_pages": 200, "kv_pages": 50, "free_pages": 150}
    text = shown(before, scrape(metrics, 2.0, **stats))
    assert "running 3, waiting 4, 1.0 tokens/s, 0.5 errors/s" in text
    assert "kv 25%, cached 0%, adapter 0%, free 75%" in text
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line}
    assert rows["[red]poet"][2:4] == ["15", "0.5"]
    assert rows["acme"][-1] == "0.5"
    assert "beta" in rows
    metrics_down = parse(metrics.render(None, []).decode(), 3.0)
    assert "does not answer" in shown(before, metrics_down)


def test_against_a_server(tmp_path: Path) -> None:
    served = platform(tmp_path, FakeGenerator(["a"] * 5), acme=TenantPolicy())
    with listening(served.house) as url:
        for wrong in (None, served.acme):
            with pytest.raises(ConfigError, match="role metrics or admin"):
                fetch(url, wrong)
        with pytest.raises(ConfigError, match="cannot be read"):
            fetch("http://127.0.0.1:9", None)

        def ask() -> None:
            httpx.post(
                f"{url}/v1/chat/completions", json=CHAT, headers={"authorization": f"Bearer {served.acme}"}
            )

        console = Console(width=140, file=io.StringIO())
        later = threading.Timer(0.2, ask)
        later.start()
        watch(console, url, served.monitor, 1.0, once=True)
        later.join()
    assert isinstance(console.file, io.StringIO)
    assert "acme" in console.file.getvalue()
