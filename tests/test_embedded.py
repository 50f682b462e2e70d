"""The embedded model with its three demo adapters: real text, equal to transformers + PEFT token by token."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from demo_data import Example, check, held_out
from peft import PeftModel
from transformers import AutoModelForCausalLM

from motet import LLM
from motet.cli.demo_prompts import DEMO_PROMPTS
from motet.models.embedded import ensure_embedded
from motet.types import SamplingParams

ADAPTERS = Path(__file__).parents[1] / "examples" / "adapters"
NAMES = ("support", "sql", "legal")
TOKENS = 64

pytestmark = pytest.mark.xdist_group("embedded")


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    adapters = {name: str(ADAPTERS / name) for name in NAMES}
    with LLM(str(ensure_embedded()), adapters, max_model_len=1024, pool_bytes=256 << 20) as llm:
        yield llm


def chat_tokens(llm: LLM, prompt: str) -> list[int]:
    return llm.encode_chat([{"role": "user", "content": prompt}])


def load_reference(adapter: str | None) -> Any:
    """The model as transformers and PEFT run it, float32. Any: PEFT's and transformers' types do not meet."""
    model: Any = AutoModelForCausalLM.from_pretrained(ensure_embedded(), dtype=torch.float32)
    return (model if adapter is None else PeftModel.from_pretrained(model, ADAPTERS / adapter)).eval()


def greedy_reference(model: Any, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        mask = torch.ones_like(ids)
        out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=TOKENS, do_sample=False)
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


@pytest.mark.parametrize("name", [None, *NAMES])
def test_greedy_text_equals_transformers_and_peft(llm: LLM, name: str | None) -> None:
    """All four are answered in one mixed batch here, and the one named alone there."""
    adapters: list[str | None] = [None, *NAMES]
    prompts = [chat_tokens(llm, DEMO_PROMPTS[adapter or "legal"]) for adapter in adapters]
    ours = llm.generate(prompts, SamplingParams(max_tokens=TOKENS, temperature=0), adapters)
    asked = adapters.index(name)
    assert list(ours[asked].token_ids) == greedy_reference(load_reference(name), prompts[asked])


@pytest.mark.parametrize("name", NAMES)
def test_adapters_change_answers_visibly_on_held_out_prompts(llm: LLM, name: str) -> None:
    examples = held_out(name, per_subject=1)[:8]
    assert len(examples) == 8
    base, tuned = (_score(llm, name, examples, adapter) for adapter in (None, name))
    assert base <= 1, f"the base passes {base} of 8"
    assert tuned >= 6, f"the fine-tune passes {tuned} of 8"


def _score(llm: LLM, name: str, examples: list[Example], adapter: str | None) -> int:
    prompts = [chat_tokens(llm, example.prompt) for example in examples]
    params = SamplingParams(max_tokens=96, temperature=0)
    answers = llm.generate(prompts, params, [adapter] * len(prompts))
    return sum(check(name, example, answer.text) for example, answer in zip(examples, answers, strict=True))


def test_demo_adapters_are_small() -> None:
    size = sum(file.stat().st_size for file in ADAPTERS.rglob("*") if file.is_file())
    assert size <= 12e6
