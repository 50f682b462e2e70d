"""Does it fit? Pure functions of counts: nothing here takes or frees a page."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from motet.errors import CapacityExceeded, InvalidRequest
from motet.types import BASE, Request


def pages_for(num_tokens: int, page_tokens: int) -> int:
    """Pages that hold the KV of so many tokens."""
    return -(-num_tokens // page_tokens)


def longest_kv(prompt_tokens: int, max_tokens: int) -> int:
    """Tokens of a sequence that ever get KV: the last token generated is never computed."""
    return prompt_tokens + max_tokens - 1


def check_length(request: Request, max_model_len: int) -> None:
    """Raise InvalidRequest for a request that no pool could serve."""
    prompt, wanted = len(request.prompt), request.params.max_tokens
    if prompt == 0:
        raise InvalidRequest("the prompt is empty", param="prompt")
    if wanted < 1:
        raise InvalidRequest(f"max_tokens must be at least 1, got {wanted}", param="max_tokens")
    if prompt + wanted > max_model_len:
        raise InvalidRequest(
            f"the prompt has {prompt} tokens and max_tokens is {wanted}: together {prompt + wanted}, "
            f"more than the model's context of {max_model_len} tokens",
            param="max_tokens" if prompt < max_model_len else "prompt",
        )


def check_capacity(kv_pages: int, adapter_pages: int, num_pages: int, pinned_pages: int = 0) -> None:
    """Raise CapacityExceeded for a request that would not fit alone, at full length with its adapter.

    `pinned_pages` are those of other adapters that are never evicted.
    """
    if kv_pages + adapter_pages + pinned_pages > num_pages:
        pinned = f", {pinned_pages} of them for pinned adapters" if pinned_pages else ""
        raise CapacityExceeded(
            f"the request needs up to {kv_pages} pages of KV cache and {adapter_pages} for its adapter, "
            f"the pool has {num_pages}{pinned}"
        )


@dataclass(frozen=True, slots=True)
class Victim:
    """Something in the pool that nobody uses: a page of a cached prefix, or an adapter."""

    num_pages: int
    adapter: str = BASE
    page: int = -1


def choose_victims(victims: Iterable[Victim], shortfall: int) -> tuple[Victim, ...]:
    """The first victims that together free `shortfall` pages, or all if they do not, without needless ones.

    A victim is needless if a larger one after it frees enough without it; of these the dearest is spared first.
    """
    chosen: list[Victim] = []
    freed = 0
    if freed < shortfall:
        for victim in victims:
            chosen.append(victim)
            freed += victim.num_pages
            if freed >= shortfall:
                break
    needed = []
    for victim in reversed(chosen):
        if victim.num_pages <= freed - shortfall:
            freed -= victim.num_pages
        else:
            needed.append(victim)
    return tuple(reversed(needed))
