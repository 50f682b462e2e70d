"""A completed config is the same whether this process asks transformers, a child does, or an earlier start did."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from transformers import Llama4Config

from motet.errors import ModelRefused
from motet.models import config as reading
from motet.models.config import ModelConfig, read_config
from motet.models.registry import load_spec
from motet.types import ModelSpec
from tests.tiny import write_model

YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32,
    "attention_factor": 1.2,
}  # fmt: skip


def everything(config: ModelConfig) -> dict[str, object]:
    return {
        name: everything(value) if isinstance(value, ModelConfig) else value
        for name, value in vars(config).items()
    }


def test_a_child_completes_as_transformers_does_here(tmp_path: Path) -> None:
    Llama4Config(text_config={"rope_parameters": YARN, "num_hidden_layers": 2}).save_pretrained(tmp_path)
    here = read_config(tmp_path)
    child = ModelConfig(json.loads(reading._ask_child(tmp_path)))
    assert everything(child) == everything(here)
    inverse, scale = here.text_config.rope_frequencies
    assert (len(inverse), scale) == (64, 1.2)
    assert here.vision_config.rope_frequencies is None


def test_a_child_refuses_as_transformers_does_here(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nonsense"}))
    with pytest.raises(ModelRefused, match="nonsense") as here:
        read_config(tmp_path)
    with pytest.raises(ModelRefused) as there:
        reading._ask_child(tmp_path)
    assert str(there.value) == str(here.value)


ENGINE = """
import subprocess, sys
from pathlib import Path
import msgspec
import motet.engine.process
from motet.models.registry import load_spec
spec = load_spec(Path(sys.argv[1]))
def never(*args, **options):
    raise AssertionError("asked again")
subprocess.run = never
assert load_spec(Path(sys.argv[1])) == spec
assert not {"transformers", "torch._dynamo", "huggingface_hub"} & set(sys.modules)
print(msgspec.json.encode(spec).decode())
"""


def test_an_engine_asks_once_and_imports_no_transformers(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "llama")
    environment = {**os.environ, "MOTET_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", ENGINE, str(model)]
    said = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    assert msgspec.json.decode(said.splitlines()[-1], type=ModelSpec) == load_spec(model)
    assert len(list((tmp_path / "cache" / "configs").iterdir())) == 1


def test_an_answer_is_for_one_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "config.json"
    keys = set()
    for text, version in (("{}", "5.0"), ('{"a": 1}', "5.0"), ("{}", "5.1")):
        file.write_text(text)
        monkeypatch.setattr("importlib.metadata.version", lambda _name, version=version: version)
        keys.add(reading._key(tmp_path))
    assert len(keys) == 3
    file.unlink()
    with pytest.raises(ModelRefused, match=r"config\.json cannot be read"):
        reading._key(tmp_path)
