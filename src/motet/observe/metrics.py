"""What operators and gateways read: counts and latencies per model, the pool, and vLLM's names of the same.

Served names become the label `model`, tenants the label `tenant` of series of their own. Adapters come and go, so the
set of labels is bounded: a name has one from `track` (it was resolved) to `forget` (it was unloaded), at most
MAX_LABELS adapters at a time; the rest counts as "other". Gauges are not kept: they are made from an EngineStats
snapshot when somebody scrapes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from motet.observe.series import MAX_LABELS, Series
from motet.observe.tiers import tier_metrics
from motet.types import AdapterRecord, Delta, EngineStats

UNKNOWN = "unknown"  # the request failed before its model was known


class Metrics:
    """The counters and histograms of one server process, in a registry of their own."""

    def __init__(self, base: str) -> None:
        self.base = base
        self.registry = CollectorRegistry()
        self.models = Series(self.registry, "motet", "model")
        self.tenants = Series(self.registry, "motet_tenant", "tenant")
        self.audit_lost = Counter(
            "motet_audit_lost", "Refusals that the audit log was not told of", registry=self.registry
        )

    def track(self, model: str) -> None:
        """Give a served name its label, while there is room."""
        self.models.track(model)

    def forget(self, model: str) -> None:
        """Drop an unloaded name and its series; what is still in flight counts as "other"."""
        self.models.forget(model)

    def error(self, model: str, code: str, tenant: str = "") -> None:
        """Count a failed request; `model` may be UNKNOWN."""
        self.models.errors.labels(model if model == UNKNOWN else self.label(model), code).inc()
        if tenant:
            self.tenants.track(tenant)
            self.tenants.errors.labels(self.tenants.of(tenant), code).inc()

    def request(self, model: str, prompt_tokens: int, arrival: float, tenant: str = "") -> Meter:
        """Begin to measure an accepted request that arrived at `arrival` (`time.perf_counter` seconds).

        `tenant` is "" where there are none.
        """
        meter = Meter(self, model, arrival, tenant)
        for series, label in meter.labels():
            series.on(series.prompt, label).inc(prompt_tokens)
        return meter

    def label(self, model: str) -> str:
        return model if model == self.base else self.models.of(model)

    def render(self, stats: EngineStats | None, records: Sequence[AdapterRecord]) -> bytes:
        """All series in Prometheus' text format; the engine's are left out without `stats`."""
        snapshot = CollectorRegistry()
        snapshot.register(_Snapshot(stats, records, self.base))
        return generate_latest(self.registry) + generate_latest(snapshot)


class Meter:
    """Measures one request: every delta, then one end."""

    def __init__(self, metrics: Metrics, model: str, arrival: float, tenant: str) -> None:
        self._metrics = metrics
        self._model = model
        self._arrival = arrival
        self._tenant = tenant
        self._last: dict[int, float] = {}  # by choice: when its latest tokens came
        if tenant:
            metrics.tenants.track(tenant)

    def labels(self) -> list[tuple[Series, str]]:
        """Where this request counts now: a model may have been unloaded since."""
        metrics = self._metrics
        found = [(metrics.models, metrics.label(self._model))]
        if self._tenant:
            found.append((metrics.tenants, metrics.tenants.of(self._tenant)))
        return found

    def delta(self, delta: Delta) -> None:
        labels = self.labels()
        if delta.queue_seconds is not None:
            for series, label in labels:
                series.on(series.queue, label).observe(delta.queue_seconds)
        if not delta.token_ids:
            return
        now, count = time.perf_counter(), len(delta.token_ids)
        for series, label in labels:
            if not self._last:
                series.on(series.ttft, label).observe(now - self._arrival)
            elif delta.index in self._last:
                series.on(series.inter_token, label).observe((now - self._last[delta.index]) / count)
            series.on(series.generated, label).inc(count)
        self._last[delta.index] = now

    def end(self, outcome: str, cached_tokens: int) -> None:
        """`outcome` is stop, length, error or cancelled."""
        seconds = time.perf_counter() - self._arrival
        for series, label in self.labels():
            series.requests.labels(label, outcome).inc()
            series.on(series.cached, label).inc(cached_tokens)
            series.on(series.e2e, label).observe(seconds)


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
            yield from tier_metrics(self._stats)
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
            ("motet_prefill_seconds", "Time of steps with prompts", stats.prefill_seconds),
            ("motet_decode_seconds", "Time of steps without prompts", stats.decode_seconds),
            ("motet_graph_replays", "Steps that ran as a captured graph", stats.graph_replays),
            ("motet_graph_captures", "Graphs captured, and kernels compiled for them", stats.graph_captures),
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
            ("motet_adapter_pauses", "Adapters that left while requests ran with them", stats.pauses),
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
        states = GaugeMetricFamily("motet_adapter_states", "Adapters by where they are", labels=["state"])
        for state in ("absent", "loading", "remaking", "ready", "draining"):
            states.add_metric([state], list(stats.residency.values()).count(state))
        yield states
        loads = CounterMetricFamily(
            "motet_model_loads", "Times that the adapter was copied into the pool", labels=["model"]
        )
        for record in self._records[:MAX_LABELS]:
            loads.add_metric([record.name], stats.loads_by_adapter.get(record.digest, 0))
        yield loads

    def _vllm(self, stats: EngineStats) -> Iterator[Metric]:
        """What LoRA-aware gateways read of vLLM. `max_lora` is a capacity there; our pool takes any adapter, so
        it is the number of adapters served. KV usage is of the pages that adapters leave."""
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
