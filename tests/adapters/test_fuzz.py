"""Headers and configs that nobody wrote by hand: whatever they say, an adapter is refused by name or it binds.

`test_checkpoint.py` damages the bytes of a sound adapter; here whole structures are made up, near to what is sound.
"""

from __future__ import annotations

import json
import math
import struct
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from motet.adapters.checkpoint import load_checkpoint
from motet.adapters.peft_config import parse_config
from motet.errors import AdapterRefused
from tests.adapters.peft_files import CONFIG, HIDDEN, WEIGHTS, peft_adapter, spec_of

LLAMA = spec_of("llama")
Q = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
SECONDS = 1.0
FUZZ = settings(
    max_examples=400,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)

numbers = st.sampled_from([0, 1, 2, 3, 4, 48, -1, 2**31, 2**63, 2**64, 10**30, 1.5, math.inf]) | st.integers()
scalars = st.none() | st.booleans() | numbers | st.text(max_size=20)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=12,
)
names = st.builds(Q.format, st.integers(0, 4), st.sampled_from("AB")) | st.text(max_size=60)
shapes = st.just([4, HIDDEN]) | st.just([HIDDEN, 4]) | st.lists(numbers, max_size=9) | values
entries = (
    st.fixed_dictionaries(
        {"dtype": st.sampled_from(["F32", "BF16", "F16", "F64", "I8", "U8", "f32"]) | values,
         "shape": shapes,
         "data_offsets": st.lists(st.sampled_from([0, 1, 384, 768, 1536, 2**40]) | numbers, max_size=3) | values},
        optional={"name": values},
    )
    | values
)  # fmt: skip
headers = st.dictionaries(names, entries, max_size=5) | values


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole")
    peft_adapter("llama", path, target_modules=["q_proj"], r=4, lora_alpha=8)
    return path


def refused_or_bound(path: Path) -> bool:
    """Whether it was bound; nothing but AdapterRefused may come out, and it must come soon."""
    began = time.thread_time()
    try:
        load_checkpoint(path, LLAMA)
        bound, reason = True, ""
    except AdapterRefused as refused:
        bound, reason = False, str(refused)
    assert time.thread_time() - began < SECONDS
    assert bound or 0 < len(reason) < 2000
    return bound


@FUZZ
@given(
    header=headers,
    data=st.sampled_from([0, 1, 768, 1536, 3072]),
    length=st.none() | st.integers(0, 2**64 - 1),
)
def test_headers_that_were_made_up(
    whole: Path, tmp_path: Path, header: Any, data: int, length: int | None
) -> None:
    text = json.dumps(header).encode()
    (tmp_path / CONFIG).write_bytes((whole / CONFIG).read_bytes())
    size = len(text) if length is None else length
    (tmp_path / WEIGHTS).write_bytes(struct.pack("<Q", size) + text + bytes(data))
    refused_or_bound(tmp_path)


@FUZZ
@given(content=st.binary(max_size=300))
def test_files_that_were_made_up(whole: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / CONFIG).write_bytes((whole / CONFIG).read_bytes())
    (tmp_path / WEIGHTS).write_bytes(content)
    assert not refused_or_bound(tmp_path)


KEYS = [
    "peft_type", "r", "lora_alpha", "target_modules", "target_parameters", "rank_pattern", "alpha_pattern",
    "use_rslora", "layers_to_transform", "layers_pattern", "modules_to_save", "lora_bias", "use_dora",
    "fan_in_fan_out", "bias", "base_model_name_or_path", "init_lora_weights",
    "inference_mode", "exclude_modules", "unheard_of",
]  # fmt: skip
patterns = st.dictionaries(st.sampled_from(["q_proj", "(a+)+$", "[", ".*", "^" * 50]), numbers, max_size=3)
words = st.lists(st.sampled_from(["q_proj", "("]))
configs = st.dictionaries(st.sampled_from(KEYS), values | patterns | words, max_size=6)


@FUZZ
@given(changes=configs)
def test_configs_that_were_made_up(whole: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    sound = json.loads((whole / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**sound, **changes}))
    (tmp_path / WEIGHTS).write_bytes((whole / WEIGHTS).read_bytes())
    if refused_or_bound(tmp_path):
        assert "unheard_of" not in changes


@FUZZ
@given(content=st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_config_files_that_were_made_up(content: bytes) -> None:
    with pytest.raises(AdapterRefused):
        parse_config(content)
