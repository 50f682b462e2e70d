"""What a scrape says after requests of every outcome, and that labels stay bounded."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from motet.config import TenantPolicy
from motet.observe.metrics import Metrics
from motet.observe.series import MAX_LABELS
from motet.types import AdapterRecord, Delta, EngineStats

from .fakes import House
from .tenants import platform


def scrape(text: str) -> dict[str, dict[tuple[str, ...], float]]:
    """Samples by name, then by the values of the labels in alphabetical order."""
    samples: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            samples.setdefault(sample.name, {})[tuple(v for _, v in sorted(sample.labels.items()))] = (
                sample.value
            )
    return samples


def test_requests_and_tokens(house: House, poet: str) -> None:
    house.chat(model="poet", n=2)
    house.chat(max_tokens=3)
    house.chat(temperature=9)
    house.chat(model="nobody")
    house.generator.fail_after = house.generator.yielded + 1
    house.chat(model="poet", stream=True)
    response = house.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    samples = scrape(response.text)
    assert samples["motet_requests_total"] == {
        ("poet", "stop"): 1,
        ("base", "length"): 1,
        ("poet", "error"): 1,
    }
    assert samples["motet_errors_total"] == {
        ("invalid_request", "base"): 1, ("model_not_found", "unknown"): 1, ("generation_failed", "poet"): 1
    }  # fmt: skip
    assert samples["motet_prompt_tokens_total"] == {("poet",): 16, ("base",): 8}
    assert samples["motet_cached_prompt_tokens_total"] == {("poet",): 4, ("base",): 2}
    assert samples["motet_generation_tokens_total"] == {("poet",): 7, ("base",): 3}
    assert samples["motet_queue_seconds_count"] == {("poet",): 3, ("base",): 1}
    assert samples["motet_queue_seconds_sum"]["poet",] == pytest.approx(0.06)
    assert samples["motet_ttft_seconds_count"] == {("poet",): 2, ("base",): 1}
    assert samples["motet_inter_token_seconds_count"] == {("poet",): 4, ("base",): 2}
    assert samples["motet_e2e_seconds_count"] == {("poet",): 2, ("base",): 1}
    assert poet


def test_the_engine_at_scrape_time(house: House, poet: str) -> None:
    house.generator.snapshot = msgspec.structs.replace(
        house.generator.snapshot,
        residency={poet: "ready"},
        running_by_adapter={poet: 1, "": 1},
        loads=4,
        cached_pages=10,
    )
    samples = scrape(house.get("/metrics").text)
    assert samples["motet_engine_up"] == {(): 1}
    assert samples["motet_adapter_resident"] == {("poet",): 1}
    assert samples["motet_adapter_loads_total"] == {(): 4}
    assert samples["motet_adapter_states"] == {
        ("ready",): 1, ("absent",): 0, ("loading",): 0, ("remaking",): 0, ("draining",): 0
    }  # fmt: skip
    assert samples["motet_pool_pages"] == {
        ("total",): 100, ("free",): 40, ("kv",): 30, ("cached",): 10, ("adapter",): 20
    }  # fmt: skip
    assert samples["vllm:num_requests_running"] == {("base",): 1}
    assert samples["vllm:num_requests_waiting"] == {("base",): 2}
    assert samples["vllm:kv_cache_usage_perc"] == {("base",): 30 / 80}
    assert list(samples["vllm:lora_requests_info"]) == [("1", "poet", "")]


def test_an_engine_that_is_gone(house: House) -> None:
    house.generator.alive = False
    samples = scrape(house.get("/metrics").text)
    assert samples["motet_engine_up"] == {(): 0}
    assert "motet_pool_pages" not in samples


def test_an_empty_pool() -> None:
    samples = scrape(Metrics("base").render(EngineStats(), []).decode())
    assert samples["vllm:kv_cache_usage_perc"] == {("base",): 0}


def test_labels_are_bounded() -> None:
    metrics = Metrics("base")
    for i in range(MAX_LABELS + 50):
        metrics.track(f"a{i}")
        metrics.request(f"a{i}", 1, 0.0).end("stop", 0)
    metrics.request("base", 1, 0.0).end("stop", 0)
    record = AdapterRecord("a", "d", "s", "i", 8, 1, 1, 1, 0.0)
    records = [msgspec.structs.replace(record, name=f"a{i}") for i in range(300)]
    samples = scrape(metrics.render(EngineStats(), records).decode())
    assert len(samples["motet_requests_total"]) == MAX_LABELS + 2
    assert samples["motet_requests_total"]["other", "stop"] == 50
    assert len(samples["motet_adapter_resident"]) == MAX_LABELS


def test_unloaded_names_leave_no_series() -> None:
    metrics = Metrics("base")
    for i in range(1000):
        metrics.track(name := f"a{i}")
        meter = metrics.request(name, 1, 0.0)
        meter.delta(Delta(0, "x", (1,)))
        metrics.error(name, "oops")
        metrics.forget(name)
        meter.end("stop", 0)
    samples = scrape(metrics.render(None, []).decode())
    assert samples["motet_requests_total"] == {("other", "stop"): 1000}
    assert "motet_ttft_seconds_count" not in samples
    assert "motet_errors_total" not in samples


def test_tenants_have_series_of_their_own(tmp_path: Path) -> None:
    served = platform(tmp_path, acme=TenantPolicy(max_concurrent=1, requests_per_minute=3))
    served.chat(served.acme, n=2)
    served.chat(served.acme, model="acme/poet")
    served.chat(served.acme, temperature=9)
    served.chat(served.acme)
    served.chat(served.beta, max_tokens=3)
    served.chat(None)
    served.ask(served.beta, "GET", "/metrics")
    samples = scrape(served.ask(served.monitor, "GET", "/metrics").text)
    assert samples["motet_tenant_requests_total"] == {("stop", "acme"): 2, ("length", "beta"): 1}
    assert samples["motet_tenant_errors_total"] == {
        ("invalid_request", "acme"): 1, ("rate_limit_exceeded", "acme"): 1, ("forbidden", "beta"): 1
    }  # fmt: skip
    assert samples["motet_errors_total"]["invalid_api_key", "unknown"] == 1
    assert samples["motet_tenant_prompt_tokens_total"] == {("acme",): 16, ("beta",): 8}
    assert samples["motet_tenant_generation_tokens_total"] == {("acme",): 9, ("beta",): 3}
    for name, counts in {"queue": (3, 1), "ttft": (2, 1), "inter_token": (6, 2), "e2e": (2, 1)}.items():
        assert samples[f"motet_tenant_{name}_seconds_count"] == {("acme",): counts[0], ("beta",): counts[1]}


def test_tenants_are_bounded_too() -> None:
    metrics = Metrics("base")
    for i in range(MAX_LABELS + 50):
        metrics.request("base", 1, 0.0, f"t{i}").end("stop", 0)
        metrics.error("base", "oops", f"t{i}")
    samples = scrape(metrics.render(None, []).decode())
    assert len(samples["motet_tenant_requests_total"]) == MAX_LABELS + 1
    assert samples["motet_tenant_requests_total"]["stop", "other"] == 50


def test_a_choice_that_gives_several_tokens_at_once() -> None:
    metrics = Metrics("base")
    meter = metrics.request("base", 1, 0.0)
    meter.delta(Delta(0, ""))
    meter.delta(Delta(0, "x", (1,)))
    meter.delta(Delta(0, "yz", (2, 3)))
    samples = scrape(metrics.render(None, []).decode())
    assert samples["motet_generation_tokens_total"] == {("base",): 3}
    assert samples["motet_ttft_seconds_count"] == {("base",): 1}
    assert samples["motet_inter_token_seconds_count"] == {("base",): 1}


@pytest.mark.parametrize("name", ["other", "unknown"])
def test_adapters_named_like_our_labels(name: str) -> None:
    metrics = Metrics("base")
    metrics.track(name)
    metrics.error(name, "x")
    metrics.forget(name)
    metrics.forget(name)
