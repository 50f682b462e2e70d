from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from motet.config import EngineConfig, tuned_folder
from motet.engine.device import resolve
from motet.errors import ConfigError
from motet.kernels.gpu import lora, tuned
from motet.kernels.gpu.dense import DenseConfig
from motet.kernels.gpu.moe import ProductConfig
from motet.kernels.gpu.moe_lora import ShrinkConfig

DEVICE = "NVIDIA H200"
DEFAULT = DenseConfig()
QKV = {"features": 5120, "depth": 2880}
PACKED = {"sides": 2, "rows": 8, "few": 0, "packed": 1}


@pytest.fixture(autouse=True)
def nothing_shipped_or_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with mock.patch.object(tuned, "SHIPPED", tmp_path_factory.mktemp("shipped")):
        yield
    tuned.load(None, "")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three shapes of one operation, for this device; one for another."""
    configs = [
        (QKV, DenseConfig(splits=2)),
        ({"features": 2880, "depth": 4096}, DenseConfig(splits=4)),
        ({"features": 3000, "depth": 4000}, DenseConfig(splits=5)),
    ]
    (tmp_path / "dense.json").write_text(tuned.dump(DEVICE, "dense_product", configs))
    (tmp_path / "other.json").write_text(
        tuned.dump("NVIDIA H100", "dense_product", [(QKV, DenseConfig(splits=9))])
    )
    return tmp_path


def write(folder: Path, **changes: Any) -> None:
    """A folder with one file, of which `changes` are made to the first entry's `config` or, if there, to the file."""
    content = json.loads(tuned.dump(DEVICE, "dense_product", [(QKV, DEFAULT)]))
    for name, value in changes.items():
        place = content if name in content else content["configs"][0]
        if name not in place:
            place = place["config"]
        if value is None:
            place.pop(name)
        else:
            place[name] = value
    (folder / "it.json").write_text(json.dumps(content))


def test_the_shape_itself_is_taken_and_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    tuned.load(folder, DEVICE)
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            assert tuned.tuned("dense_product", DEFAULT, **QKV) == DenseConfig(splits=2)
    assert [(one.levelname, one.getMessage()) for one in caplog.records] == [
        ("INFO", f"dense_product features=5120 depth=2880: tuned configuration, from {folder / 'dense.json'}")
    ]


def test_the_nearest_is_taken_and_said_aloud(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    tuned.load(folder, DEVICE)
    assert tuned.tuned("dense_product", DEFAULT, features=2900, depth=4096) == DenseConfig(splits=4)
    assert [(one.levelname, one.getMessage()) for one in caplog.records] == [
        (
            "WARNING",
            "dense_product features=2900 depth=4096: nearest configuration is that of features=2880 depth=4096, "
            f"from {folder / 'dense.json'}",
        )
    ]


def test_what_is_not_near_has_the_default(folder: Path) -> None:
    tuned.load(folder, DEVICE)
    assert tuned.tuned("dense_product", DEFAULT, features=32, depth=2880) is DEFAULT
    assert tuned.tuned("dense_product", DEFAULT, features=5120, depth=8200) is DEFAULT
    assert tuned.tuned("lora_decode", lora.DECODE, hidden=2880, rank=32) is lora.DECODE


def test_another_device_has_its_own(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    tuned.load(folder, "NVIDIA H100")
    assert tuned.tuned("dense_product", DEFAULT, **QKV) == DenseConfig(splits=9)
    tuned.load(folder, "NVIDIA L4")
    assert tuned.tuned("dense_product", DEFAULT, **QKV) is DEFAULT
    assert "has no configuration for NVIDIA L4" in caplog.text


def test_shipped_files_load_by_themselves_behind_the_users(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = tmp_path_factory.mktemp("shipped")
    monkeypatch.setattr(tuned, "SHIPPED", shipped)
    router = {"features": 32, "depth": 2880}
    text = tuned.dump(
        DEVICE, "dense_product", [(QKV, DenseConfig(splits=7)), (router, DenseConfig(splits=3))]
    )
    (shipped / "all.json").write_text(text)
    tuned.load(None, DEVICE)
    assert tuned.tuned("dense_product", DEFAULT, **QKV) == DenseConfig(splits=7)
    tuned.load(folder, DEVICE)
    assert tuned.tuned("dense_product", DEFAULT, **QKV) == DenseConfig(splits=2)
    assert tuned.tuned("dense_product", DEFAULT, **router) == DenseConfig(splits=3)


def test_what_is_shipped_can_be_read() -> None:
    tuned.load(None, DEVICE)


def test_ranks_are_near_however_far(tmp_path: Path) -> None:
    wide = replace(lora.DECODE, slice=1024)
    entries = [({"hidden": 2880, "rank": 8}, lora.PREFILL), ({"hidden": 2880, "rank": 256}, wide)]
    (tmp_path / "it.json").write_text(tuned.dump(DEVICE, "lora_decode", entries))
    tuned.load(tmp_path, DEVICE)
    assert tuned.tuned("lora_decode", lora.DECODE, hidden=2880, rank=200) == wide
    assert tuned.tuned("lora_decode", lora.DECODE, hidden=2880, rank=2) == lora.PREFILL


def test_experts_have_exact_numbers_too_and_their_steps_divide_k(tmp_path: Path) -> None:
    config, default = ProductConfig(64, 96, warps=2, stages=4), ProductConfig(64, 32, warps=2, stages=3)
    (tmp_path / "it.json").write_text(
        tuned.dump(DEVICE, "moe_product", [({"features": 2880, "depth": 2880, **PACKED}, config)])
    )
    tuned.load(tmp_path, DEVICE)
    ask = {"features": 2880, "depth": 2880, **PACKED}
    assert tuned.tuned("moe_product", default, **ask) == config
    assert tuned.tuned("moe_product", default, **{**ask, "rows": 16}) is default
    assert tuned.tuned("moe_product", default, **{**ask, "depth": 2880 + 96}) == config
    assert tuned.tuned("moe_product", default, **{**ask, "depth": 2880 + 32}) is default


def test_shrink_of_experts(tmp_path: Path) -> None:
    config = ShrinkConfig(warps=4, split=False)
    (tmp_path / "it.json").write_text(
        tuned.dump(DEVICE, "moe_shrink_decode", [({"hidden": 64, "rank": 32}, config)])
    )
    tuned.load(tmp_path, DEVICE)
    assert tuned.tuned("moe_shrink_decode", ShrinkConfig(), hidden=64, rank=32) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"splits": "two"}, r"configs\[0\].config.splits must be a whole number, got 'two'"),
        ({"splits": 2.0}, r"configs\[0\].config.splits must be a whole number"),
        ({"splits": True}, r"configs\[0\].config.splits must be a whole number"),
        ({"splits": -1}, r"configs\[0\].config.splits must not be negative"),
        ({"splits": 0}, r"configs\[0\].config: splits = 0 must be at least 1"),
        ({"warps": 6}, r"configs\[0\].config: warps = 6 must be a power of two"),
        ({"even": 1}, r"configs\[0\].config.even must be true or false"),
        ({"colour": 3}, r"configs\[0\].config has an unknown field colour"),
        ({"features": None}, r"configs\[0\] lacks features"),
        ({"features": 0}, r"configs\[0\].features must be at least 1"),
        ({"config": 3}, r"configs\[0\].config must be a table"),
        ({"configs": 3}, "configs must be a list"),
        ({"configs": [3]}, r"configs\[0\] must be a table"),
        ({"device": None}, "the file lacks device"),
        ({"device": 3}, "device must be the name of a GPU"),
        ({"operation": "sense_product"}, "operation 'sense_product' is not known"),
        ({"operation": "lora_decode"}, r"configs\[0\] lacks hidden"),
    ],
)
@pytest.mark.parametrize("device", [DEVICE, "another"])
def test_a_bad_file_is_an_error_that_names_it_and_the_field(
    changes: dict[str, Any], message: str, device: str, tmp_path: Path
) -> None:
    write(tmp_path, **changes)
    with pytest.raises(ConfigError, match=f"it.json: {message}"):
        tuned.load(tmp_path, device)


def test_fields_without_a_default_must_be_there(tmp_path: Path) -> None:
    content = json.loads(tuned.dump(DEVICE, "lora_decode", [({"hidden": 1, "rank": 1}, lora.DECODE)]))
    del content["configs"][0]["config"]["stages"]
    (tmp_path / "it.json").write_text(json.dumps(content))
    tuned.load(tmp_path, DEVICE)
    del content["configs"][0]["config"]["rows"]
    (tmp_path / "it.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"configs\[0\].config lacks rows"):
        tuned.load(tmp_path, DEVICE)


def test_what_cannot_be_read(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match=f"{place.name} is no folder with"):
            tuned.load(place, DEVICE)
    (tmp_path / "it.json").write_text("{")
    with pytest.raises(ConfigError, match=r"it.json is not valid JSON"):
        tuned.load(tmp_path, DEVICE)


def test_the_folder_is_configured_or_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOTET_TUNED_CONFIGS", raising=False)
    assert tuned_folder(EngineConfig(model="m")) is None
    monkeypatch.setenv("MOTET_TUNED_CONFIGS", "/there")
    assert tuned_folder(EngineConfig(model="m")) == Path("/there")
    config = EngineConfig(model="m", tuned_configs="/here")
    assert tuned_folder(config) == Path("/here")
    assert resolve(config, gpu=True).tuned_configs == "/here"
    with pytest.raises(ConfigError, match="tuned_configs"):
        resolve(config, gpu=False)
    assert (
        resolve(EngineConfig(model="m"), gpu=False).device == "cpu"
    )  # a variable for all engines harms none


def test_files_of_motets_own_are_sound_and_load_by_themselves() -> None:
    with mock.patch.object(tuned, "SHIPPED", Path(tuned.__file__).with_name("configs")):
        entries = tuned.shipped(DEVICE)
        tuned.load(None, DEVICE)
        for operation, shape, config in entries:
            assert tuned.tuned(operation, None, **shape) == config
            assert tuned.OPERATIONS[operation].fits(config, shape)
    assert {operation for operation, _, _ in entries} >= {"moe_product", "lora_decode", "lora_prefill"}
