"""Zipf traffic over many more adapters than the pool holds, against the real server: `benchmarks/thousand_adapters.py`.

Times are for the benchmark to tell; here it is proven that nothing fails, mixes up or grows.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.thousand_adapters import Size, run
from tests.tiny import write_model

pytestmark = pytest.mark.xdist_group("live")


def test_zipf_traffic_over_a_pool_that_is_much_too_small(tmp_path: Path) -> None:
    size = Size(adapters=80, requests=300, hot_requests=100, sample=60)
    report = run(write_model(tmp_path / "model", "llama"), size, tmp_path)
    assert report.failed == 0
    assert report.different == 0
    pool, disk = report.tiers["pool"], report.tiers["disk"]
    assert pool["adapters"] < 40
    assert pool["evictions_total"] > 40
    assert disk["adapters"] == 80
    assert disk["hits_total"] == pool["loads_total"]
    assert max(report.engine_mib) - report.engine_mib[0] < 64
    assert max(report.server_mib) - report.server_mib[0] < 64
