"""Curves that Motet ships, and those that `motet bench sweep` writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from motet.bench import sweep
from motet.errors import ConfigError
from motet.plan.curve import curve_for, find_curve, read_config_values, read_curve, same_shape, shipped_curves

CONFIG = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "hidden_size": 64}


def point(concurrency: int, adapters: int, rank: int | None, failed: int = 0) -> sweep.Point:
    return sweep.Point(
        concurrency=concurrency,
        prompt_asked=100,
        prompt=100.4,
        output=20.0,
        adapters=adapters,
        rank=rank,
        requests=30,
        failed=failed,
        ttft_mean=None if failed else 0.05,
        ttft_p50=0.05,
        ttft_p95=0.06,
        otps=None if failed else 40.0,
        tokens_per_s=100.0,
        step_s=0.025,
    )


def write(tmp_path: Path, *points: sweep.Point, device: str = "NVIDIA H100 80GB HBM3") -> Path:
    file = tmp_path / "curve.json"
    sweep.write_curve(file, sweep.Curve("http://here", device, "tiny", "2026-01-31T12:00:00+00:00", points))
    return file


def test_a_sweep_is_a_curve_of_the_model_that_is_named_with_it(tmp_path: Path) -> None:
    file = write(tmp_path, point(1, 0, None), point(4, 2, 8), point(4, 2, 32), point(8, 2, 32, failed=3))
    curve = read_curve(file, CONFIG, "H200")
    assert (curve.gpu, curve.model, curve.rank, curve.config) == ("H100", "tiny", 32, CONFIG)
    assert [(case.in_flight, case.adapters) for case in curve.cases] == [(1, 0), (4, 2)]
    assert curve.cases[0].prompt == 100
    assert curve.cases[0].tpot_ms == pytest.approx(25.0)
    assert curve.cases[0].ttft_ms == pytest.approx(50.0)
    assert curve.most_rows == 4
    assert curve.cost.base > 0
    unnamed = read_curve(write(tmp_path, point(1, 0, None), device=""), CONFIG, "L40S")
    assert unnamed.gpu == "L40S"


def test_what_a_sweep_does_not_say_must_be_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give it with --model"):
        read_curve(write(tmp_path, point(1, 0, None)), None, "H200")
    with pytest.raises(ConfigError, match="NAME:RANK"):
        read_curve(write(tmp_path, point(1, 2, None)), CONFIG, "H200")


def test_a_curve_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    shipped = find_curve("h200-gpt-oss-20b", None, "H200")
    file = tmp_path / "mine.json"
    file.write_bytes(msgspec.json.encode(shipped))
    assert find_curve(str(file), None, "H200") == shipped


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not a capacity curve"),
        ('{"kind":"run"}', "not a capacity curve"),
        ("[]", "not a capacity curve"),
    ],
)
def test_another_file_is_refused_by_name(tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / "other.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=said):
        read_curve(file, None, "H200")


def test_an_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"no capacity curve 'h200-gpt'.*h200-gpt-oss-20b.*bench sweep"):
        find_curve("h200-gpt", None, "H200")


def test_a_model_finds_the_curve_of_its_shape() -> None:
    curves = shipped_curves()
    qwen = curves["h200-qwen3-30b-a3b"]
    assert curve_for({**qwen.config, "eos_token_id": 7}, "H100") == qwen
    smaller: dict[str, Any] = {**qwen.config, "num_hidden_layers": 47}
    assert not same_shape(qwen.config, smaller)
    with pytest.raises(ConfigError, match="no capacity curve of a model of this shape"):
        curve_for(smaller, "H200")


@pytest.mark.parametrize("name", sorted(shipped_curves()))
def test_shipped_curves_are_fitted_well_and_cost_what_they_should(name: str) -> None:
    curve = shipped_curves()[name]
    cost = curve.cost
    assert cost.error < (
        0.06 if len(curve.steps) > 30 else 0.01
    )  # a few coefficients for many points, or for as many
    assert min(cost.base, cost.prompt, cost.prompt_lora, cost.adapter, cost.row) > 0


def test_a_config_is_found_in_its_directory(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert read_config_values(tmp_path) == read_config_values(tmp_path / "config.json") == CONFIG
    with pytest.raises(ConfigError, match="cannot be read"):
        read_config_values(tmp_path / "nowhere")
