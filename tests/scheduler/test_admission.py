from __future__ import annotations

from collections.abc import Iterator

import pytest

from motet.errors import CapacityExceeded, InvalidRequest
from motet.scheduler.admission import (
    Victim,
    check_capacity,
    check_length,
    choose_victims,
    longest_kv,
    pages_for,
)
from motet.types import Request, SamplingParams


def request(prompt: int, max_tokens: int) -> Request:
    return Request("r", tuple(range(prompt)), SamplingParams(max_tokens=max_tokens))


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (7, 1), (8, 2), (14, 2), (15, 3)])
def test_pages_for_rounds_up(tokens: int, pages: int) -> None:
    assert pages_for(tokens, 7) == pages


def test_the_last_token_generated_has_no_kv() -> None:
    assert longest_kv(5, 1) == 5
    assert longest_kv(5, 3) == 7


def test_a_request_of_exactly_the_context_is_fine() -> None:
    check_length(request(7, 5), max_model_len=12)


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message", "param"),
    [
        (0, 3, "the prompt is empty", "prompt"),
        (3, 0, "max_tokens must be at least 1, got 0", "max_tokens"),
        (
            7,
            6,
            "7 tokens and max_tokens is 6: together 13, more than the model's context of 12",
            "max_tokens",
        ),
        (12, 1, "12 tokens and max_tokens is 1: together 13, more than the model's context of 12", "prompt"),
        (5, 10**9, "together 1000000005", "max_tokens"),
    ],
)
def test_a_request_that_no_pool_could_serve_is_refused_with_its_numbers(
    prompt: int, max_tokens: int, message: str, param: str
) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        check_length(request(prompt, max_tokens), max_model_len=12)
    assert caught.value.param == param


def test_capacity_counts_the_adapter() -> None:
    check_capacity(kv_pages=4, adapter_pages=7, num_pages=11)
    with pytest.raises(
        CapacityExceeded, match="up to 5 pages of KV cache and 7 for its adapter, the pool has 11"
    ):
        check_capacity(kv_pages=5, adapter_pages=7, num_pages=11)
    check_capacity(kv_pages=4, adapter_pages=5, num_pages=11, pinned_pages=2)
    with pytest.raises(CapacityExceeded, match="the pool has 11, 3 of them for pinned adapters"):
        check_capacity(kv_pages=4, adapter_pages=5, num_pages=11, pinned_pages=3)


A, B, C = Victim(3, adapter="a"), Victim(1, page=8), Victim(5, adapter="c")


@pytest.mark.parametrize(
    ("shortfall", "chosen"),
    [
        (-2, ()),
        (0, ()),
        (1, (A,)),
        (3, (A,)),
        (4, (A, B)),
        (5, (C,)),
        (6, (A, C)),
        (7, (A, C)),
        (9, (A, B, C)),
        (10, (A, B, C)),
    ],
)
def test_victims_are_the_first_that_suffice_without_the_needless(
    shortfall: int, chosen: tuple[Victim, ...]
) -> None:
    assert choose_victims([A, B, C], shortfall) == chosen


def test_no_more_victims_are_looked_at_than_needed() -> None:
    def victims() -> Iterator[Victim]:
        yield A
        raise RuntimeError("asked for more")

    assert choose_victims(victims(), 2) == (A,)
