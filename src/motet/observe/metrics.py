"""What operators and gateways read: counts and latencies per model, the pool, and vLLM's names of the same.

Served names become the label `model`. Adapters come and go, so the set of labels is bounded: a name has one
from `track` (it was resolved) to `forget` (it was unloaded), at most MAX_LABELS adapters at a time; the rest
counts as "other". Gauges are not kept: they are made from an EngineStats snapshot when somebody scrapes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from motet.types import AdapterRecord, Delta, EngineStats

MAX_LABELS = 200
OTHER = "other"
UNKNOWN = "unknown"  # the request failed before its model was known

_TTFT = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3, 6, 12, 30, 60)
_INTER_TOKEN = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.4, 0.8, 2)
_E2E = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)


class Metrics:
    """The counters and histograms of one server process, in a registry of their own."""

    def __init__(self, base: str) -> None:
        self.base = base
        self._labels: set[str] = set()
        self.registry = registry = CollectorRegistry()
        model = ("model",)
        self._requests = Counter(
            "motet_requests",
            "Accepted requests that ended, by outcome",
            ("model", "outcome"),
            registry=registry,
        )
        self._errors = Counter(
            "motet_errors", "Requests that failed, by error code", ("model", "code"), registry=registry
        )
        self._prompt = Counter(
            "motet_prompt_tokens", "Prompt tokens of accepted requests", model, registry=registry
        )
        self._cached = Counter(
            "motet_cached_prompt_tokens",
            "Prompt tokens that were not computed again",
            model,
            registry=registry,
        )
        self._generated = Counter("motet_generation_tokens", "Generated tokens", model, registry=registry)
        self._ttft = Histogram(
            "motet_ttft_seconds",
            "From a request's arrival to its first token",
            model,
            buckets=_TTFT,
            registry=registry,
        )
        self._inter_token = Histogram(
            "motet_inter_token_seconds",
            "Between tokens of a choice",
            model,
            buckets=_INTER_TOKEN,
            registry=registry,
        )
        self._e2e = Histogram(
            "motet_e2e_seconds", "From a request's arrival to its end", model, buckets=_E2E, registry=registry
        )

    def track(self, model: str) -> None:
        """Give a served name its label, while there is room."""
        if len(self._labels) < MAX_LABELS:
            self._labels.add(model)

    def forget(self, model: str) -> None:
        """Drop an unloaded name and its series; what is still in flight counts as "other"."""
        self._labels.discard(model)
        for metric in (
            self._requests, self._errors, self._prompt, self._cached,
            self._generated, self._ttft, self._inter_token, self._e2e,
        ):  # fmt: skip
            metric.remove_by_labels({"model": model})

    def error(self, model: str, code: str) -> None:
        """Count a failed request; `model` may be UNKNOWN."""
        self._errors.labels(model if model == UNKNOWN else self.label(model), code).inc()

    def request(self, model: str, prompt_tokens: int, arrival: float) -> Meter:
        """Begin to measure an accepted request that arrived at `arrival` (`time.perf_counter` seconds)."""
        self._prompt.labels(self.label(model)).inc(prompt_tokens)
        return Meter(self, model, arrival)

    def label(self, model: str) -> str:
        return model if model == self.base or model in self._labels else OTHER

    def render(self, stats: EngineStats | None, records: Sequence[AdapterRecord]) -> bytes:
        """All series in Prometheus' text format; the engine's are left out without `stats`."""
        snapshot = CollectorRegistry()
        snapshot.register(_Snapshot(stats, records, self.base))
        return generate_latest(self.registry) + generate_latest(snapshot)


class Meter:
    """Measures one request: every delta, then one end."""

    def __init__(self, metrics: Metrics, model: str, arrival: float) -> None:
        self._metrics = metrics
        self._model = model
        self._arrival = arrival
        self._last: dict[int, float] = {}  # by choice: when its latest tokens came

    def delta(self, delta: Delta) -> None:
        if not delta.token_ids:
            return
        metrics, label, now = self._metrics, self._metrics.label(self._model), time.perf_counter()
        count = len(delta.token_ids)
        if not self._last:
            metrics._ttft.labels(label).observe(now - self._arrival)
        elif delta.index in self._last:
            metrics._inter_token.labels(label).observe((now - self._last[delta.index]) / count)
        self._last[delta.index] = now
        metrics._generated.labels(label).inc(count)

    def end(self, outcome: str, cached_tokens: int) -> None:
        """`outcome` is stop, length, error or cancelled."""
        label = self._metrics.label(self._model)
        self._metrics._requests.labels(label, outcome).inc()
        self._metrics._cached.labels(label).inc(cached_tokens)
        self._metrics._e2e.labels(label).observe(time.perf_counter() - self._arrival)


class _Snapshot(Collector):
    """The engine's side of a scrape."""

    def __init__(self, stats: EngineStats | None, records: Sequence[AdapterRecord], base: str) -> None:
        self._stats = stats
        self._records = records
        self._base = base

    def collect(self) -> Iterator[Metric]:
        yield _gauge("motet_engine_up", "1 while the engine answers", self._stats is not None)
        if self._stats is not None:
            yield from self._engine(self._stats)
            yield from self._adapters(self._stats)
            yield from self._vllm(self._stats)

    def _engine(self, stats: EngineStats) -> Iterator[Metric]:
        yield _gauge("motet_requests_running", "Sequences in the running batch", stats.running)
        yield _gauge("motet_requests_waiting", "Sequences waiting to be scheduled", stats.waiting)
        pages = GaugeMetricFamily("motet_pool_pages", "Pool pages by use", labels=["use"])
        for use in ("total", "free", "kv", "cached", "adapter"):
            pages.add_metric([use], getattr(stats, f"{use}_pages"))
        yield pages
        yield _gauge("motet_pool_page_bytes", "Size of a pool page", stats.page_bytes)
        yield _gauge("motet_weight_bytes", "Size of the base model's weights", stats.weight_bytes)
        yield _gauge(
            "motet_workspace_bytes", "GPU memory for activations, graphs and code", stats.workspace_bytes
        )
        for name, text, value in (
            ("motet_engine_steps", "Engine steps", stats.steps),
            ("motet_preemptions", "Sequences put back to waiting", stats.preemptions),
            ("motet_prefix_hit_tokens", "Prompt tokens found in the prefix cache", stats.prefix_hit_tokens),
            (
                "motet_prefix_query_tokens",
                "Prompt tokens looked up in the prefix cache",
                stats.prefix_query_tokens,
            ),
            ("motet_adapter_loads", "Adapters copied into the pool", stats.loads),
            ("motet_adapter_load_seconds", "Time spent on copying adapters", stats.load_seconds),
            ("motet_adapter_evictions", "Adapters taken out of the pool", stats.evictions),
        ):
            yield CounterMetricFamily(name, text, value=value)

    def _adapters(self, stats: EngineStats) -> Iterator[Metric]:
        yield _gauge("motet_adapters", "Adapters served by name", len(self._records))
        resident = GaugeMetricFamily(
            "motet_adapter_resident", "1 while the adapter is in the pool", labels=["model"]
        )
        for record in self._records[:MAX_LABELS]:
            resident.add_metric([record.name], stats.residency.get(record.digest) == "ready")
        yield resident

    def _vllm(self, stats: EngineStats) -> Iterator[Metric]:
        """What LoRA-aware gateways read of vLLM. `max_lora` is a capacity there; our pool takes any adapter,
        so it is
        the number of adapters served. KV usage is of the pages that adapters leave."""
        model = {"model_name": self._base}
        yield _gauge("vllm:num_requests_running", "As motet_requests_running", stats.running, model)
        yield _gauge("vllm:num_requests_waiting", "As motet_requests_waiting", stats.waiting, model)
        room = stats.total_pages - stats.adapter_pages
        usage = min(stats.kv_pages / room, 1.0) if room > 0 else 0.0
        yield _gauge("vllm:kv_cache_usage_perc", "Share of KV pages in use, 0-1", usage, model)
        info = {
            "max_lora": str(max(len(self._records), 1)),
            "running_lora_adapters": self._names(stats.running_by_adapter),
            "waiting_lora_adapters": self._names(stats.waiting_by_adapter),
        }
        yield _gauge("vllm:lora_requests_info", "Adapters at work; the value is unix time", time.time(), info)

    def _names(self, counts: dict[str, int]) -> str:
        return ",".join(record.name for record in self._records if counts.get(record.digest))


def memory_line(stats: EngineStats) -> str:
    """What the engine's memory was given to."""
    pool = stats.total_pages * stats.page_bytes
    parts = {"weights": stats.weight_bytes, "pool": pool, "workspace": stats.workspace_bytes}
    sizes = ", ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in parts.items() if size)
    return f"memory: {sizes} ({stats.total_pages} pages of {stats.page_bytes >> 10} KiB)"


def _gauge(name: str, text: str, value: float, labels: dict[str, str] | None = None) -> GaugeMetricFamily:
    labels = labels or {}
    gauge = GaugeMetricFamily(name, text, labels=list(labels))
    gauge.add_metric(list(labels.values()), value)
    return gauge
