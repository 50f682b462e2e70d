"""The tiers of adapters' weights as an operator reads them: what is where, found where, brought how fast."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from motet.types import EngineStats

_GAUGES = {
    "resident": ("motet_tier_adapters", "Adapters in the tier"),
    "bytes": ("motet_tier_bytes", "Bytes of adapters in the tier"),
    "max_bytes": ("motet_tier_max_bytes", "Budget of the tier"),
}
_COUNTERS = {
    "hits": ("motet_tier_hits", "Times that an adapter was wanted from the tier and was there"),
    "loads": ("motet_tier_loads", "Times that an adapter was brought to the tier from the one below"),
    "load_seconds": ("motet_tier_load_seconds", "Time spent on that"),
    "evictions": ("motet_tier_evictions", "Adapters that left the tier for others"),
}


def tier_metrics(stats: EngineStats) -> Iterator[Metric]:
    """One series per tier (pool, host, disk) and figure of TierStats; how often other sizes of the pool would hit."""
    for field, (name, text) in _GAUGES.items():
        gauge = GaugeMetricFamily(name, text, labels=["tier"])
        for tier, found in stats.tiers.items():
            gauge.add_metric([tier], getattr(found, field))
        yield gauge
    for field, (name, text) in _COUNTERS.items():
        counter = CounterMetricFamily(name, text, labels=["tier"])
        for tier, found in stats.tiers.items():
            counter.add_metric([tier], getattr(found, field))
        yield counter
    yield CounterMetricFamily(
        "motet_adapter_requests", "Requests with an adapter", value=stats.adapter_requests
    )
    hits = CounterMetricFamily(
        "motet_adapter_hits_if",
        "Of those, how many would have found their adapter at hand if adapters had so many pages to themselves",
        labels=["pages"],
    )
    for pages, count in stats.adapter_hits_by_pages.items():
        hits.add_metric([str(pages)], count)
    yield hits
