from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from motet.engine.sampler import SamplingRow, sample, uniform
from motet.types import SamplingParams

VOCAB = 400


def row(tokens: tuple[int, ...] = (3, 4), prompt_length: int = 2, **params: Any) -> SamplingRow:
    position = len(tokens) - prompt_length
    return SamplingRow(0, SamplingParams(**params), tokens, prompt_length, position, (1,))


def draw(logits: Tensor, count: int, **params: Any) -> Counter[int]:
    rows = [row(seed=seed, **params) for seed in range(count)]
    return Counter(s.token_id for s in sample(logits.expand(count, -1), rows))


def peaked(*weights: tuple[int, float]) -> Tensor:
    """Logits whose softmax gives these tokens these probabilities, and nothing to the rest."""
    logits = torch.full((VOCAB,), -1e9)
    for token, weight in weights:
        logits[token] = torch.tensor(weight).log()
    return logits


def test_greedy_takes_the_most_likely() -> None:
    logits = torch.randn(5, VOCAB)
    tokens = [s.token_id for s in sample(logits, [row(temperature=0)] * 5)]
    assert tokens == logits.argmax(-1).tolist()


def test_frequencies_follow_probabilities() -> None:
    counts = draw(peaked((7, 0.6), (20, 0.3), (399, 0.1)), 4000)
    assert set(counts) == {7, 20, 399}
    for token, probability in ((7, 0.6), (20, 0.3), (399, 0.1)):
        assert counts[token] / 4000 == pytest.approx(probability, abs=0.03)


def test_temperature_sharpens_and_flattens() -> None:
    logits = peaked((7, 0.6), (20, 0.3), (30, 0.1))
    sharp, flat = draw(logits, 1000, temperature=0.25), draw(logits, 1000, temperature=2.0)
    assert sharp[7] > 900
    assert flat[7] < 500


@pytest.mark.parametrize(
    ("params", "allowed"),
    [
        ({"top_k": 2}, {7, 20}),
        ({"top_k": 1}, {7}),
        ({"top_p": 0.5}, {7}),
        ({"top_p": 0.65}, {7, 20}),
        ({"top_p": 0.95}, {7, 20, 30}),
        ({"min_p": 0.4}, {7, 20}),
        ({"min_p": 0.9}, {7}),
        ({"top_k": 3, "top_p": 0.65}, {7, 20}),
        ({"top_k": 3, "min_p": 0.4}, {7, 20}),
    ],
)
def test_filters_keep_exactly_the_right_tokens(params: dict[str, Any], allowed: set[int]) -> None:
    counts = draw(peaked((7, 0.6), (20, 0.3), (30, 0.1)), 600, **params)
    assert set(counts) == allowed


def test_top_p_beyond_the_first_look_equals_a_full_sort() -> None:
    logits = torch.zeros(5000)
    logits[4999] = 0.5
    tokens = [
        s.token_id for s in sample(logits.expand(300, -1), [row(seed=i, top_p=0.999) for i in range(300)])
    ]
    assert len(set(tokens)) > 250, "a nearly flat distribution must reach beyond its best 256 tokens"


def test_a_seed_repeats_whatever_the_batch() -> None:
    logits = torch.randn(VOCAB)
    alone = sample(logits[None], [row(seed=5)])[0].token_id
    crowd = torch.cat([torch.randn(3, VOCAB), logits[None]])
    rows = [row(seed=1), row(temperature=0), row(seed=9, top_p=0.4), row(seed=5)]
    assert sample(crowd, rows)[3].token_id == alone


def test_positions_and_seeds_are_independent() -> None:
    numbers = [uniform(seed, position) for seed in range(60) for position in range(60)]
    assert len(set(numbers)) == 3600
    assert min(numbers) >= 0
    assert max(numbers) < 1
    assert sum(numbers) / 3600 == pytest.approx(0.5, abs=0.02)


def test_presence_and_frequency_penalties_count_generated_tokens_only() -> None:
    logits = torch.zeros(VOCAB)
    logits[[5, 6, 7]] = torch.tensor([3.0, 2.5, 2.0])
    history = (5, 9, 6, 6)  # 5 is in the prompt, 6 was generated twice
    assert sample(logits[None], [row(history, 2, temperature=0, presence_penalty=1.0)])[0].token_id == 5
    logits[5] = 0
    assert sample(logits[None], [row(history, 2, temperature=0, presence_penalty=1.0)])[0].token_id == 7
    assert sample(logits[None], [row(history, 2, temperature=0, frequency_penalty=0.2)])[0].token_id == 6
    assert sample(logits[None], [row(history, 2, temperature=0, frequency_penalty=0.3)])[0].token_id == 7


def test_repetition_penalty_counts_the_prompt_too() -> None:
    logits = torch.zeros(VOCAB)
    logits[[5, 6]] = torch.tensor([3.0, 2.0])
    assert sample(logits[None], [row((5, 9), 2, temperature=0, repetition_penalty=2.0)])[0].token_id == 6
    negative = torch.full((VOCAB,), -10.0)
    negative[[5, 6]] = torch.tensor([-1.0, -1.5])
    assert sample(negative[None], [row((5, 9), 2, temperature=0, repetition_penalty=2.0)])[0].token_id == 6


def test_logit_bias_and_minimum_length() -> None:
    logits = torch.zeros(VOCAB)
    logits[1] = 9  # end of sequence
    logits[2] = 8
    assert sample(logits[None], [row(temperature=0, min_tokens=1)])[0].token_id == 2
    assert sample(logits[None], [row((3, 4, 2), 2, temperature=0, min_tokens=1)])[0].token_id == 1
    stop = row(temperature=0, min_tokens=1, stop_token_ids=(2,))
    assert sample(logits[None], [stop])[0].token_id not in (1, 2)
    assert sample(logits[None], [row(temperature=0, logit_bias={50: 20.0})])[0].token_id == 50


def test_logprobs_are_the_models_own() -> None:
    logits = torch.randn(1, VOCAB)
    found = sample(logits, [row(temperature=0, logprobs=3, logit_bias={50: 100.0})])[0]
    expected = torch.log_softmax(logits[0], -1)
    assert found.token_id == 50
    assert found.logprob is not None
    assert found.logprob.logprob == pytest.approx(float(expected[50]), abs=1e-5)
    assert [token for token, _ in found.logprob.top] == expected.topk(3).indices.tolist()
    assert sample(logits, [row(temperature=0)])[0].logprob is None
    none_but_chosen = sample(logits, [row(temperature=0, logprobs=0)])[0].logprob
    assert none_but_chosen is not None
    assert none_but_chosen.top == ()
