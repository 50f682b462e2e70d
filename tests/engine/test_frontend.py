"""What the frontend asks of the engine."""

from __future__ import annotations

from typing import cast

from motet.engine.detokenize import Detokenizer
from motet.engine.frontend import _choices, _delta
from motet.types import Account, SamplingParams, SeqOutput


def test_choices_are_charged_to_the_account_of_their_request() -> None:
    account = Account("acme", 2.0, 1, "salt")
    requests = _choices([1, 2], SamplingParams(n=3, seed=5), "digest", "r", account)
    assert [request.id for request in requests] == ["r.0", "r.1", "r.2"]
    assert {request.account for request in requests} == {account}
    assert len({request.params.seed for request in requests}) == 3


class Letters:
    """A detokenizer of one letter per token."""

    stopped = False

    def push(self, tokens: tuple[int, ...]) -> str:
        return "x" * len(tokens)


def test_a_delta_tells_what_the_engine_measured() -> None:
    output = SeqOutput("r", (1, 2), cached_tokens=3, queue_seconds=0.5, prefill_seconds=0.25, at=7.0)
    delta = _delta(1, output, cast(Detokenizer, Letters()))
    assert (delta.index, delta.text, delta.token_ids, delta.cached_tokens) == (1, "xx", (1, 2), 3)
    assert (delta.queue_seconds, delta.prefill_seconds, delta.at) == (0.5, 0.25, 7.0)
