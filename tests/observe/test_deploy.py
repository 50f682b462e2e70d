"""The dashboard and the alert rules ask for metrics and labels that the server really has."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from prometheus_client.parser import text_string_to_metric_families

from motet.observe.metrics import Metrics
from motet.types import AdapterRecord, Delta, EngineStats, TierStats

DEPLOY = Path(__file__).parents[2] / "deploy"
METRIC = re.compile(r"\b(?:motet_|vllm:)[a-z0-9_:]+")
TARGET = {"instance", "job"}
"""Labels that Prometheus adds."""


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DEPLOY / "grafana" / "motet.json").read_text())
    return found


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


def expressions() -> dict[str, str]:
    """By where it stands."""
    found = {f"alert {rule['alert']}": rule["expr"] for rule in rules()}
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", []):
            found[f"panel {panel['id']} {panel['title']} {target['refId']}"] = target["expr"]
    for variable in dashboard()["templating"]["list"]:
        if variable["type"] == "query":
            found[f"variable {variable['name']}"] = variable["query"]
    return found


@pytest.fixture(scope="module")
def series() -> dict[str, set[str]]:
    """The labels of every sample that a server has once it has served and failed a request."""
    metrics = Metrics("base")
    meter = metrics.request("base", 3, 0.0, "acme")
    meter.delta(Delta(0, "x", (1,), queue_seconds=0.1))
    meter.delta(Delta(0, "y", (2,)))
    meter.end("stop", 0)
    metrics.error("base", "oops", "acme")
    record = AdapterRecord("poet", "digest", "/poet", "/image", 8, 1, 1, 1, 0.0)
    stats = EngineStats(tiers={"pool": TierStats()}, adapter_hits_by_pages={1: 0})
    text = metrics.render(stats, [record]).decode()
    return {
        sample.name: set(sample.labels) | TARGET
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.mark.parametrize("where", expressions())
def test_metrics_and_labels_exist(where: str, series: dict[str, set[str]]) -> None:
    expression = expressions()[where]
    names = METRIC.findall(expression)
    assert names, "every expression is of a metric of ours"
    for name in names:
        assert name in series, f"{name} is no metric of this server"
    known = set.union(*(series[name] for name in names))
    matched = re.findall(r"[{,]\s*([a-z_]+)\s*(?:=~|!=|=)", expression)
    asked = re.findall(r"label_values\([^,]+, ([a-z_]+)\)", expression)
    assert {*grouped_by(expression), *matched, *asked} <= known


def grouped_by(expression: str) -> set[str]:
    """The labels of its `by (...)`."""
    groups = re.findall(r"by \(([^)]*)\)", expression)
    return {label.strip() for group in groups for label in group.split(",")}


def test_legends_name_labels_that_the_expression_keeps() -> None:
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", []):
            named = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert named == grouped_by(target["expr"]) - {"le"}, panel["title"]


def test_every_alert_says_what_is_wrong() -> None:
    assert len({rule["alert"] for rule in rules()}) == len(rules()) >= 5
    for rule in rules():
        assert set(rule) == {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        kept = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
        if "by (" in rule["expr"]:
            assert kept <= grouped_by(rule["expr"])


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard()["panels"]:
        place = panel["gridPos"]
        columns = range(place["x"], place["x"] + place["w"])
        cells = {(x, y) for x in columns for y in range(place["y"], place["y"] + place["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells


def test_the_page_names_metrics_that_exist(series: dict[str, set[str]]) -> None:
    page = (DEPLOY.parent / "docs" / "observability.md").read_text()
    named = {name for name in METRIC.findall(page) if not name.endswith("_")}
    assert len(named) > 20
    known = set(series) | {name.removesuffix("_bucket") for name in series}
    assert named <= known
    families = {name for name in METRIC.findall(page) if name.endswith("_")}
    assert all(any(name.startswith(family) for name in known) for family in families)
