"""Reusable KV: which pages hold the KV of which tokens, and which of them nobody is using.

A full block of `page_tokens` tokens is known by a key that hashes the block and the key before it, back to a
root made of the adapter's digest. Equal keys therefore mean the same adapter, the same tokens and the same
positions; nothing is ever shared between adapters, nor between an adapter and the base. The hash is BLAKE2b
with 256 bits: prompts come from strangers, so a collision must not be something that can be searched for.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from hashlib import blake2b

from motet.memory.pages import PageAllocator

KEY_BYTES = 32


def extend_keys(keys: list[bytes], adapter: str, tokens: Sequence[int], page_tokens: int) -> None:
    """Append the keys of the full blocks of `tokens` that `keys` lacks, so that each block is hashed once."""
    parent = keys[-1] if keys else blake2b(adapter.encode(), digest_size=KEY_BYTES).digest()
    for start in range(len(keys) * page_tokens, len(tokens) - page_tokens + 1, page_tokens):
        block = array("q", tokens[start : start + page_tokens])
        parent = blake2b(parent + block.tobytes(), digest_size=KEY_BYTES).digest()
        keys.append(parent)


class PrefixIndex:
    """Finds pages by key, and keeps pages that no sequence uses any more until their room is wanted.

    While sequences use an indexed page, the references are theirs. When the last one lets go, its reference
    passes to the index and the page is idle ("cached"); the next user takes it back.
    """

    def __init__(self, pages: PageAllocator) -> None:
        self._pages = pages
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._idle: dict[int, float] = {}  # page → time of last use, the least recently used first

    def match(self, keys: Sequence[bytes]) -> tuple[int, ...]:
        """The pages of the longest known run of blocks from the start."""
        pages = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            pages.append(page)
        return tuple(pages)

    def idle(self) -> Iterator[tuple[int, float]]:
        """Pages that nobody uses with the time of their last use, the least recently used first."""
        yield from self._idle.items()

    def is_idle(self, page: int) -> bool:
        return page in self._idle

    def share(self, pages: Sequence[int]) -> None:
        """One more sequence uses these matched pages."""
        for page in pages:
            if self._idle.pop(page, None) is None:
                self._pages.retain(page)
            else:
                self._pages.hand_over(page, "kv")

    def insert(self, key: bytes, page: int) -> None:
        """This page, in use, holds the block of this key. Of two equal blocks the first stays known."""
        if key not in self._page_of:
            assert page not in self._key_of, f"page {page} is indexed already"
            self._page_of[key] = page
            self._key_of[page] = key

    def release(self, pages: Sequence[int], now: float) -> None:
        """A sequence gives up its block table: pages that only it used become idle if indexed, else free.

        Later blocks count as used before earlier ones: without its predecessor a block can never match, so
        the tail of a chain must go first.
        """
        for page in reversed(pages):
            if page in self._key_of and self._pages.references(page) == 1:
                self._pages.hand_over(page, "cached")
                self._idle[page] = now
            else:
                self._pages.release((page,))

    def evict(self, count: int) -> None:
        """Free the `count` least recently used idle pages."""
        for _ in range(count):
            page = next(iter(self._idle))
            del self._idle[page]
            del self._page_of[self._key_of.pop(page)]
            self._pages.release((page,))

    def check_integrity(self) -> None:
        """The two directions of the index agree, and the index owns exactly the idle pages."""
        assert self._key_of == {page: key for key, page in self._page_of.items()}
        assert self._idle.keys() <= self._key_of.keys()
        assert len(self._idle) == self._pages.held("cached")
        for page in self._key_of:
            references = self._pages.references(page)
            assert references == 1 if page in self._idle else references > 0, (
                f"page {page}: {references} references"
            )
