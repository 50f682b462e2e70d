"""The tiers' figures in a scrape."""

from __future__ import annotations

from motet.observe.metrics import Metrics
from motet.observe.series import MAX_LABELS
from motet.types import AdapterRecord, EngineStats, TierStats

from .test_metrics import scrape


def test_every_figure_of_every_tier() -> None:
    pool = TierStats(resident=3, bytes=4096, max_bytes=9000, hits=7, loads=5, load_seconds=0.25, evictions=2)
    stats = EngineStats(tiers={"pool": pool, "disk": TierStats(resident=9)})
    samples = scrape(Metrics("base").render(stats, []).decode())
    wanted = {
        "adapters": (3, 9), "bytes": (4096, 0), "max_bytes": (9000, 0), "hits_total": (7, 0),
        "loads_total": (5, 0), "load_seconds_total": (0.25, 0), "evictions_total": (2, 0),
    }  # fmt: skip
    assert {name: samples[f"motet_tier_{name}"] for name in wanted} == {
        name: {("pool",): of_pool, ("disk",): of_disk} for name, (of_pool, of_disk) in wanted.items()
    }


def test_how_often_other_sizes_of_the_pool_would_hit() -> None:
    stats = EngineStats(adapter_requests=9, adapter_hits_by_pages={64: 3, 128: 8})
    samples = scrape(Metrics("base").render(stats, []).decode())
    assert samples["motet_adapter_requests_total"] == {(): 9}
    assert samples["motet_adapter_hits_if_total"] == {("64",): 3, ("128",): 8}


def test_loads_by_adapter_have_bounded_labels() -> None:
    records = [AdapterRecord(f"a{i:03}", f"d{i}", "s", "i", 8, 1, 1, 1, 0.0) for i in range(MAX_LABELS + 9)]
    stats = EngineStats(loads_by_adapter={"d3": 4, "gone": 1})
    loads = scrape(Metrics("base").render(stats, records).decode())["motet_model_loads_total"]
    assert len(loads) == MAX_LABELS
    assert loads[("a003",)] == 4
    assert loads[("a004",)] == 0
