"""What the frontend asks of the engine."""

from __future__ import annotations

from motet.engine.frontend import _choices
from motet.types import Account, SamplingParams


def test_choices_are_charged_to_the_account_of_their_request() -> None:
    account = Account("acme", 2.0, 1, "salt")
    requests = _choices([1, 2], SamplingParams(n=3, seed=5), "digest", "r", account)
    assert [request.id for request in requests] == ["r.0", "r.1", "r.2"]
    assert {request.account for request in requests} == {account}
    assert len({request.params.seed for request in requests}) == 3
