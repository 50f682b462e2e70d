from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from motet.kernels.gpu.sample import SamplingTensors, sample, sample_torch
from tests.close import assert_close

SIZES = [37, 4099]


def make_rows(count: int, device: str, **values: float) -> SamplingTensors:
    def column(name: str, default: float, kind: torch.dtype) -> Tensor:
        return torch.full((count,), values.get(name, default), dtype=kind, device=device)

    return SamplingTensors(
        temperature=column("temperature", 1.0, torch.float32),
        seed=torch.arange(count, device=device) + int(values.get("seed", 0)),
        position=column("position", 7, torch.int32),
        top_k=column("top_k", 0, torch.int32),
        top_p=column("top_p", 1.0, torch.float32),
        min_p=column("min_p", 0.0, torch.float32),
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("truncate", [False, True])
def test_greedy_takes_the_first_best(size: int, truncate: bool, dtype: torch.dtype, device: str) -> None:
    logits = torch.randn(3, size, device=device).to(dtype)
    logits[0, size - 1] = logits[0, size // 2] = 9.0
    tokens, logprobs = sample(logits, make_rows(3, device, temperature=0, top_k=3), truncate)
    expected = torch.log_softmax(logits.float(), -1)
    assert tokens[0] == size // 2
    assert torch.equal(tokens, logits.float().argmax(-1))
    assert_close(logprobs, expected.gather(1, tokens[:, None])[:, 0])


RULES = {
    "temperature": {"temperature": 0.7},
    "hot": {"temperature": 30.0},
    "top_k": {"top_k": 3},
    "top_k beyond chunks": {"top_k": 40},
    "top_k all": {"top_k": 1_000_000},
    "top_p": {"top_p": 0.6, "temperature": 1.3},
    "tiny top_p": {"top_p": 1e-6},
    "top_k and top_p": {"top_k": 20, "top_p": 0.8},
    "min_p": {"min_p": 0.3},
    "all": {"top_k": 30, "top_p": 0.9, "min_p": 0.05, "temperature": 2.0},
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("size", SIZES)
def test_matches_reference(rule: dict[str, float], size: int, dtype: torch.dtype, device: str) -> None:
    logits = (3 * torch.randn(5, size, device=device)).to(dtype)
    logits[1] = torch.round(logits[1])  # many equal ones
    logits[2, size // 3 :] = -torch.inf
    logits[3] = 0.0
    rows = make_rows(5, device, seed=2**40 + 3, **rule)
    truncate = any(name in rule for name in ("top_k", "top_p", "min_p"))
    expected, expected_logprobs = sample_torch(logits, rows, truncate)
    tokens, logprobs = sample(logits, rows, truncate)
    assert torch.equal(tokens, expected)
    assert_close(logprobs, expected_logprobs)


def test_frequencies_are_the_distribution(device: str) -> None:
    count = 20_000 if device == "cuda" else 100
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, -torch.inf], device=device).expand(count, 5).contiguous()
    for truncate, rule, kept in ((False, {}, [0, 1, 2, 3]), (True, {"top_k": 2}, [1, 3])):
        tokens, _ = sample(logits, make_rows(count, device, temperature=1.5, **rule), truncate)
        expected = torch.zeros(5)
        expected[kept] = torch.softmax(logits[0, kept].cpu() / 1.5, -1)
        seen = torch.bincount(tokens.cpu(), minlength=5) / count
        assert float((seen - expected).abs().max()) < 4 * (0.25 / count) ** 0.5


def test_the_batch_does_not_matter(device: str) -> None:
    logits = torch.randn(4, 5000, device=device)
    rows = make_rows(4, device, top_k=50, top_p=0.9)
    rows = replace(rows, top_k=torch.tensor([50, 0, 0, 7], dtype=torch.int32, device=device))
    tokens, logprobs = sample(logits, rows, True)
    for i in range(4):
        one = SamplingTensors(*(getattr(rows, name)[i : i + 1] for name in rows.__dataclass_fields__))
        token, logprob = sample(logits[i : i + 1], one, True)
        assert torch.equal(token, tokens[i : i + 1])
        assert torch.equal(logprob, logprobs[i : i + 1])
    other = sample(logits, replace(rows, position=rows.position + 1), True)[0]
    assert not torch.equal(other, tokens)
