from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig as PeftLoraConfig

from motet.adapters.peft_config import HARMLESS, MAX_CONFIG_BYTES, REFUSED, USED, parse_config
from motet.errors import AdapterRefused
from tests.adapters.peft_files import CONFIG, settings


def parse(**changes: object) -> Any:
    return parse_config(json.dumps(settings(**changes)).encode())


def test_every_key_of_peft_is_on_one_list() -> None:
    keys = {field.name for field in dataclasses.fields(PeftLoraConfig)}
    lists = [USED, HARMLESS.keys(), REFUSED.keys(), {"task_type", "init_lora_weights"}]
    assert keys <= set().union(*lists)
    assert sum(map(len, lists)) == len(set().union(*lists))


def test_what_peft_writes_by_default_is_accepted(tmp_path: Path) -> None:
    PeftLoraConfig().save_pretrained(str(tmp_path))
    config = parse_config((tmp_path / CONFIG).read_bytes())
    assert (config.r, config.alpha, config.rslora) == (8, 8.0, False)


def test_scaling() -> None:
    assert parse(r=4, lora_alpha=6).scaling("model.x", 4) == 1.5
    assert parse(r=4, lora_alpha=6, use_rslora=True).scaling("model.x", 4) == 3.0
    config = parse(
        r=4, lora_alpha=6, use_rslora=True, rank_pattern={"q": 9}, alpha_pattern={"v": 1, "q": 0.5}
    )
    assert config.scaling("model.q", 9) == 0.5 / 3
    assert config.scaling("model.v", 4) == 0.5
    assert config.scaling("model.kq", 4) == 3.0
    assert config.rank("model.q") == 9
    assert config.rank("model.v") == 4


def test_names_that_patterns_are_matched_with() -> None:
    config = parse(target_parameters=["mlp.gate.weight", "experts.gate_up_proj"])
    assert config.targeted("model.layers.0.mlp.gate") == "model.layers.0.mlp.gate.weight"
    assert config.targeted("mlp.gate") == "mlp.gate.weight"
    assert config.targeted("model.xmlp.gate") == "model.xmlp.gate"
    assert config.targeted("model.mlp.experts") == "model.mlp.experts"
    assert parse().targeted("mlp.gate") == "mlp.gate"
    assert parse(target_parameters=None).parameters == frozenset()


def test_first_pattern_of_the_file_wins() -> None:
    text = '{"peft_type":"LORA","r":1,"lora_alpha":1,"rank_pattern":{"z.*":3,"a.z1":5}}'
    assert parse_config(text.encode()).rank("model.a.z1") == 3


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("use_dora", True, "DoRA"),
        ("lora_bias", True, "bias on B"),
        ("bias", "all", "trained biases"),
        ("bias", "lora_only", "trained biases"),
        ("modules_to_save", ["lm_head"], "fully trained modules"),
        ("trainable_token_indices", [1, 2], "trained embedding rows"),
        ("trainable_token_indices", {"embed_tokens": [1]}, "trained embedding rows"),
        ("layer_replication", [[0, 2], [1, 3]], "repeated layers"),
        ("fan_in_fan_out", True, "transposed"),
        ("megatron_config", {"x": 1}, "Megatron"),
        ("alora_invocation_tokens", [5], "activated LoRA"),
        ("use_qalora", True, "QALoRA"),
        ("velora_config", {"scale": 1.0}, "VeLoRA"),
        ("monteclora_config", {"num_samples": 8}, "Monte Carlo"),
        ("use_bdlora", {"nblocks": 2}, "block-diagonal"),
        ("arrow_config", {"top_k": 3}, "Arrow"),
        ("kasa_config", {"beta": 1e-4}, "KaSA"),
        ("enable_lora", [True, False, True], "merged projections"),
    ],
)
def test_other_mathematics_is_refused_by_name(key: str, value: object, reason: str) -> None:
    with pytest.raises(
        AdapterRefused, match=rf"adapter_config\.json: {key}=.* is not supported \(.*{reason}"
    ):
        parse(**{key: value})
    for neutral in (None, False, [], "none" if key == "bias" else {}):
        assert parse(**{key: neutral}).r == 4


@pytest.mark.parametrize(
    "value",
    ["pissa", "PiSSA", "pissa_niter_16", "olora", "OLoRA", "corda", "lora_ga", "loftq", "loft", 7, [], "new"],
)
def test_inits_that_change_the_base_are_refused(value: object) -> None:
    with pytest.raises(
        AdapterRefused, match=r"init_lora_weights=.*(changes the base weights|may change the base)"
    ):
        parse(init_lora_weights=value)


@pytest.mark.parametrize("value", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_inits_that_leave_the_base_alone_are_accepted(value: object) -> None:
    assert parse(init_lora_weights=value).r == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA"),
        ({"peft_type": "ADALORA"}, "peft_type is 'ADALORA'"),
        ({"peft_type": None}, "peft_type is None"),
        ({"task_type": "SEQ_CLS"}, "task_type='SEQ_CLS' is not supported"),
        ({"surprise": 0}, "unknown key 'surprise'"),
        ({"x\ud800y": 0}, r"unknown key 'x\\ud800y'"),
        ({"r": 0}, "r is 0, not a rank"),
        ({"r": True}, "r is True, not a rank"),
        ({"r": 4.0}, r"r is 4\.0, not a rank"),
        ({"r": "4"}, "r is '4', not a rank"),
        ({"r": None}, "r is None, not a rank"),
        ({"r": 1 << 40}, "not a rank"),
        ({"lora_alpha": None}, "lora_alpha is None, not a finite number"),
        ({"lora_alpha": True}, "lora_alpha is True, not a finite number"),
        ({"lora_alpha": 10**400}, "not a finite number"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes', not true or false"),
        ({"ensure_weight_tying": 1}, "ensure_weight_tying is 1, not true or false"),
        ({"rank_pattern": {"q": -1}}, r"rank_pattern\['q'\] is -1, not a rank"),
        ({"rank_pattern": {"q": [True]}}, r"rank_pattern\['q'\] is \[True\], not a rank"),
        ({"rank_pattern": [1]}, r"rank_pattern is \[1\], not an object"),
        ({"alpha_pattern": {"q": "1"}}, r"alpha_pattern\['q'\] is '1', not a finite number"),
        ({"rank_pattern": {"(?=q)": 1}}, r"rank_pattern: pattern '\(\?=q\)' is not supported: look-around"),
    ],
)
def test_bad_values_are_refused_by_name(changes: dict[str, object], message: str) -> None:
    with pytest.raises(AdapterRefused, match=message):
        parse(**changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not valid JSON"),
        (b"[]", "not a JSON object"),
        (b'{"r": 4', "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b'{"peft_type": "LORA", "r": NaN}', "not valid JSON: NaN is not JSON"),
        (b'{"peft_type": "LORA", "r": 1, "r": 2}', "the key 'r' occurs twice"),
        (b'{"peft_type": "LORA", "rank_pattern": {"q": 1, "q": 2}}', "the key 'q' occurs twice"),
        (b'{"peft_type": "LORA", "r": 1e999, "lora_alpha": 1}', "r is inf, not a rank"),
        (b'{"peft_type": "LORA", "r": 1, "lora_alpha": 1e999}', "lora_alpha is inf, not a finite number"),
        (b'{"peft_type": "LORA", "r": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a":' * 100_000, "not valid JSON"),
        (b" " * (MAX_CONFIG_BYTES + 1), "larger than"),
    ],
)
def test_malformed_json_is_refused(text: bytes, message: str) -> None:
    with pytest.raises(AdapterRefused, match=message):
        parse_config(text)


def test_scaling_beyond_float32_is_refused() -> None:
    assert math.isfinite(parse(lora_alpha=1e30).scaling("q", 4))
    with pytest.raises(AdapterRefused, match="not a finite number"):
        parse(lora_alpha=1e39)
