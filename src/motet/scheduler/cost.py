"""What a request's progress costs, in prompt tokens of the base model: the currency of fairness.

The prices are ratios of time measured on an H200 with gpt-oss-20b (docs/performance.md). They need not be exact: an
error of a factor of two shifts a tenant's share by as much, and only while tenants with unlike work compete.
"""

from __future__ import annotations

OUTPUT_PRICE = 4.0
"""Of a token that is chosen, with its computation. A row of a decode step of 16 takes 0.23 ms, ten times a prompt's
token (0.022); one that rides on a prompt's step hardly more than that. 4 is between the two."""

LOAD_PRICE = 0.3
"""Of moving the bytes that a token's KV takes in one group. 0.71 GB are loaded in 0.2 s, the time of 9,000 prompt
tokens; they are as many bytes as the KV of 29,000."""

ADAPTER_PRICE = 12.0
"""Of an adapter's parameter, in parameters of the base. Adapters of rank 32 on every expert have 1.2 % of the base's
parameters active in a token, and take 14 % of a prompt's and 17 % of a decode step's time."""


def progress_cost(tokens: int, chosen: int, work: float) -> float:
    """Of computing `tokens`, of which `chosen` next ones come.

    `work` is the adapter's share: its active parameters (rank × active experts) in those of the base. Tokens computed
    again cost again: what is charged is what the device does.
    """
    return (tokens + (OUTPUT_PRICE - 1) * chosen) * (1 + ADAPTER_PRICE * work)


def load_cost(num_pages: int, page_tokens: int) -> float:
    """Of bringing an adapter into the pool."""
    return LOAD_PRICE * num_pages * page_tokens
