"""`motet top`: a server's models, tenants and memory, live, from what its /metrics says."""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from motet.errors import ConfigError

Labels = frozenset[tuple[str, str]]
_ROWS = 20  # of a table: the busiest


@dataclass(frozen=True)
class Scrape:
    """What /metrics said at `at` (seconds): samples by name and labels."""

    at: float = 0.0
    samples: Mapping[str, Mapping[Labels, float]] = field(default_factory=dict)

    def value(self, name: str, **labels: str) -> float:
        """One sample, 0 if there is none."""
        return self.samples.get(name, {}).get(frozenset(labels.items()), 0.0)

    def total(self, name: str, **labels: str) -> float:
        """The sum of all samples that have these labels, whatever others they have."""
        wanted = frozenset(labels.items())
        return sum(value for has, value in self.samples.get(name, {}).items() if wanted <= has)

    def values_of(self, name: str, label: str) -> set[str]:
        """The values that a label has among the samples."""
        return {dict(labels)[label] for labels in self.samples.get(name, {}) if label in dict(labels)}


def parse(text: str, at: float) -> Scrape:
    """A scrape of Prometheus' text format."""
    samples: dict[str, dict[Labels, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            samples.setdefault(sample.name, {})[frozenset(sample.labels.items())] = sample.value
    return Scrape(at, samples)


def rate(before: Scrape, now: Scrape, name: str, **labels: str) -> float:
    """Per second between two scrapes; 0 over a restart of the server."""
    return max(0.0, now.total(name, **labels) - before.total(name, **labels)) / (now.at - before.at)


def quantile(before: Scrape, now: Scrape, name: str, share: float, **labels: str) -> float | None:
    """A quantile of what a histogram saw between two scrapes, linear within a bucket; None if it saw nothing."""
    wanted = frozenset(labels.items())
    edges = sorted(
        (float(dict(has)["le"]), value - before.samples.get(f"{name}_bucket", {}).get(has, 0.0))
        for has, value in now.samples.get(f"{name}_bucket", {}).items()
        if wanted <= has
    )
    if not edges or edges[-1][1] <= 0:
        return None
    target, low, below = share * edges[-1][1], 0.0, 0.0
    for high, count in edges:
        if count >= target:
            inside = (target - below) / (count - below) if count > below else 1.0
            return low if high == float("inf") else low + (high - low) * inside
        low, below = high, count
    return low


def screen(before: Scrape, now: Scrape) -> RenderableType:
    """What is shown: the server in two lines, then the busiest models and tenants."""
    parts: list[RenderableType] = [_summary(before, now), _table(before, now, "model", "motet")]
    if now.values_of("motet_tenant_prompt_tokens_total", "tenant"):
        parts.append(_table(before, now, "tenant", "motet_tenant"))
    return Group(*parts)


def _summary(before: Scrape, now: Scrape) -> Text:
    if not now.value("motet_engine_up"):
        return Text("the engine does not answer", style="bold red")
    total = now.value("motet_pool_pages", use="total") or 1.0
    uses = ", ".join(
        f"{use} {now.value('motet_pool_pages', use=use) / total:.0%}"
        for use in ("kv", "cached", "adapter", "free")
    )
    states = ", ".join(
        f"{now.value('motet_adapter_states', state=state):.0f} {state}"
        for state in ("ready", "loading", "remaking", "absent")
    )
    return Text(
        f"running {now.value('motet_requests_running'):.0f}, waiting {now.value('motet_requests_waiting'):.0f}, "
        f"{rate(before, now, 'motet_generation_tokens_total'):.1f} tokens/s, "
        f"{rate(before, now, 'motet_errors_total'):.1f} errors/s\n"
        f"pool: {uses}; adapters: {states}, {rate(before, now, 'motet_adapter_loads_total'):.1f} loads/s\n"
    )


def _table(before: Scrape, now: Scrape, label: str, prefix: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in (
        label,
        "requests/s",
        "prompt/s",
        "tokens/s",
        "queue p95",
        "TTFT p95",
        "inter-token p95",
        "errors/s",
    ):
        table.add_column(column, justify="left" if column == label else "right")
    names = now.values_of(f"{prefix}_prompt_tokens_total", label) | now.values_of(
        f"{prefix}_errors_total", label
    )

    def per_second(what: str, name: str) -> float:
        return rate(before, now, f"{prefix}_{what}_total", **{label: name})

    def p95(what: str, name: str) -> str:
        found = quantile(before, now, f"{prefix}_{what}_seconds", 0.95, **{label: name})
        return "–" if found is None else f"{found * 1000:.0f} ms"

    busiest = sorted(names, key=lambda name: (-per_second("generation_tokens", name), name))
    for name in busiest[:_ROWS]:
        table.add_row(
            Text(name),
            f"{per_second('requests', name):.1f}",
            f"{per_second('prompt_tokens', name):.0f}",
            f"{per_second('generation_tokens', name):.1f}",
            *(p95(what, name) for what in ("queue", "ttft", "inter_token")),
            f"{per_second('errors', name):.1f}",
        )
    return table


def watch(console: Console, url: str, key: str | None, seconds: float, once: bool) -> None:
    """Show the screen every `seconds`, or one of them. Raises ConfigError when the server cannot be asked."""
    before = fetch(url, key)
    if once:
        time.sleep(seconds)
        console.print(screen(before, fetch(url, key)))
        return
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(seconds)
            now = fetch(url, key)
            live.update(screen(before, now), refresh=True)
            before = now


def fetch(url: str, key: str | None) -> Scrape:
    """One scrape. Raises ConfigError."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        request = urllib.request.Request(url.rstrip("/") + "/metrics", headers=headers)
        with urllib.request.urlopen(request, timeout=10) as answer:
            return parse(answer.read().decode(), time.monotonic())
    except urllib.error.HTTPError as error:
        error.close()
        why = "a key of role metrics or admin is needed: --key" if error.code in (401, 403) else error.reason
        raise ConfigError(f"{url}/metrics answers {error.code}: {why}") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{url}/metrics cannot be read: {error}") from error
