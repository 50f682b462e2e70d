"""Sizes from config.json against files and figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from motet.errors import ConfigError, ModelRefused
from motet.plan.curve import shipped_curves
from motet.plan.gpus import GPUS, find_gpu
from motet.plan.sizes import Sizes, sizes_of
from tests.tiny import write_model

GIB = 1 << 30


@pytest.fixture(scope="module")
def gpt_oss() -> Sizes:
    curve = shipped_curves()["h200-gpt-oss-20b"]
    return sizes_of(curve.config, curve.model)


def test_gpt_oss_takes_what_it_took_on_an_h200(gpt_oss: Sizes) -> None:
    assert gpt_oss.weights / GIB == pytest.approx(12.8, abs=0.05)
    assert gpt_oss.held(find_gpu("H200")) / GIB == pytest.approx(48.4, abs=0.4)
    assert gpt_oss.adapter(32, ("mlp",)) / 1e9 == pytest.approx(0.708, abs=0.001)
    assert gpt_oss.adapter(32, ("attention", "mlp")) == 2 * gpt_oss.adapter(16, ("attention", "mlp"))


def test_copies_for_prompts_are_left_out_where_they_would_crowd_the_pool(gpt_oss: Sizes) -> None:
    assert gpt_oss.held(find_gpu("L40S")) == gpt_oss.weights
    assert gpt_oss.pool_pages(find_gpu("L40S")) * gpt_oss.page < 44 * GIB


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen3-moe"])
def test_weights_are_those_of_the_files(tmp_path: Path, family: str) -> None:
    """All but norms, which a tiny model has relatively many of; its files are in float32."""
    model = write_model(tmp_path / "model", family)
    found = sizes_of(json.loads((model / "config.json").read_text()), family)
    stored = sum(file.stat().st_size for file in model.glob("*.safetensors")) / 2
    assert found.copies == 0
    assert 0.85 * stored < found.weights < stored


def test_a_part_that_the_model_has_not_is_named(gpt_oss: Sizes) -> None:
    with pytest.raises(ConfigError, match="no 'qkv'"):
        gpt_oss.adapter(8, ("attention", "qkv"))


def test_a_model_larger_than_the_gpu_is_refused() -> None:
    curve = shipped_curves()["h200-qwen3-30b-a3b"]
    found = sizes_of(curve.config, curve.model)
    with pytest.raises(ConfigError, match=r"56.9 GiB and does not fit on one L40S of 44 GiB"):
        found.pool_pages(find_gpu("L40S"))


def test_an_unknown_model_or_gpu_is_named() -> None:
    with pytest.raises(ModelRefused, match="GPT2LMHeadModel"):
        sizes_of({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, "old")
    with pytest.raises(ConfigError, match="no GPU 'V100'"):
        find_gpu("V100")
    assert find_gpu("h200") is GPUS["H200"]
