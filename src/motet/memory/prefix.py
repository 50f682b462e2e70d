"""Reusable KV: which pages hold the KV of which tokens, and which of them nobody is using.

A full block of `page_tokens` tokens is known by a key that hashes the block and the key before it, back to a
root made of the adapter's digest and the account's salt. Equal keys therefore mean the same adapter, the same salt,
the same tokens and the same positions; nothing is ever shared between adapters, between an adapter and the base, or
between tenants of different salts. The hash is BLAKE2b with 256 bits: prompts come from strangers, so a collision must
not be something that can be searched for.

Each of the model's KV groups has its own pages, known by the same keys. A sequence can go on from a prefix of n
blocks if every group has those blocks that a query behind them reads: all n, or the last ones.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b

from motet.memory.pages import PageAllocator
from motet.memory.reuse import NEVER, Reuse
from motet.memory.victims import Idle
from motet.types import KVGroup

KEY_BYTES = 32


def extend_keys(keys: list[bytes], adapter: str, salt: str, tokens: Sequence[int], page_tokens: int) -> None:
    """Append the keys of the full blocks of `tokens` that `keys` lacks, so that each block is hashed once."""
    parent = keys[-1] if keys else _root(adapter, salt)
    for start in range(len(keys) * page_tokens, len(tokens) - page_tokens + 1, page_tokens):
        block = array("q", tokens[start : start + page_tokens])
        parent = blake2b(parent + block.tobytes(), digest_size=KEY_BYTES).digest()
        keys.append(parent)


def _root(adapter: str, salt: str) -> bytes:
    """The parent of first blocks. The length keeps ("ab", "c") and ("a", "bc") apart."""
    digest = adapter.encode()
    return blake2b(len(digest).to_bytes(8, "little") + digest + salt.encode(), digest_size=KEY_BYTES).digest()


class PrefixIndex:
    """Finds pages by key and group, and keeps pages that no sequence uses any more until their room is wanted.

    While sequences use an indexed page, the references are theirs. When the last one lets go, its reference
    passes to the index and the page is idle ("cached"); the next user takes it back.
    """

    def __init__(
        self, pages: PageAllocator, groups: Sequence[KVGroup], page_tokens: int, reuse: Reuse
    ) -> None:
        self._pages = pages
        self._reuse = reuse
        self._worth: dict[int, float] = {}
        self._groups = groups
        self._page_tokens = page_tokens
        self._page_of: tuple[dict[bytes, int], ...] = tuple({} for _ in groups)
        self._place_of: dict[int, tuple[int, bytes]] = {}  # page → group and key
        self._idle: Idle[int] = Idle()

    def match(self, keys: Sequence[bytes]) -> tuple[tuple[int, ...], ...]:
        """Block tables, one per group, of the longest known prefix that a sequence can go on from.

        All are equally long; -1 stands for blocks that no query behind the prefix reads.
        """
        length = self._continuable(keys, self._unbroken(keys))
        tables = []
        for group, pages in enumerate(self._page_of):
            first = self._first_block(group, length)
            tables.append((-1,) * first + tuple(pages[key] for key in keys[first:length]))
        return tuple(tables)

    def _unbroken(self, keys: Sequence[bytes]) -> int:
        """The number of blocks from the start that all unbounded groups have."""
        length = len(keys)
        for group, pages in zip(self._groups, self._page_of, strict=True):
            if not group.window and not group.chunk:
                missing = (block for block in range(length) if keys[block] not in pages)
                length = next(missing, length)
        return length

    def _continuable(self, keys: Sequence[bytes], length: int) -> int:
        """The length of the longest prefix, of at most `length` blocks, of which each group has what is read.

        Looks at each block of a group once: for a prefix that ends with the blocks [low, length), of which none
        is missing, and reads more, block low - 1 is the next. If it is missing, every longer prefix misses it.
        """
        lows = [length if group.window or group.chunk else 0 for group in self._groups]
        while True:
            for group, pages in enumerate(self._page_of):
                low, first = min(lows[group], length), self._first_block(group, length)
                while low > first and keys[low - 1] in pages:
                    low -= 1
                lows[group] = low
                if low > first:
                    length = low - 1
                    break
            else:
                return length

    def _first_block(self, group: int, blocks: int) -> int:
        """The first block that a query behind so many blocks reads."""
        return self._groups[group].first_key(blocks * self._page_tokens) // self._page_tokens

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    def cheapest(self) -> Iterator[tuple[int, float]]:
        """Pages that nobody uses with the cost to lose them, the cheapest first."""
        return self._idle.cheapest()

    def is_idle(self, page: int) -> bool:
        return page in self._idle

    def share(self, pages: Iterable[int]) -> None:
        """One more sequence uses these matched pages."""
        for page in pages:
            if page in self._idle:
                self._idle.remove(page)
                self._pages.hand_over(page, "kv")
            else:
                self._pages.retain(page)

    def insert(self, key: bytes, group: int, page: int) -> None:
        """This page, in use, holds the group's block of this key. Of two equal blocks the first stays known."""
        if key not in self._page_of[group]:
            assert page not in self._place_of, f"page {page} is indexed already"
            self._page_of[group][key] = page
            self._place_of[page] = group, key
            self._worth[page] = NEVER

    def release(self, pages: Sequence[int]) -> None:
        """A sequence gives up these pages, in block order: what only it used is idle if indexed, else free.

        Later blocks count as used before earlier ones: without its predecessors a block can seldom match, so
        the tail of a chain must go first. What is lost with an idle page is its worth by `Reuse`.
        """
        for page in reversed(pages):
            if page not in self._place_of:
                self._pages.release((page,))
                continue
            worth = self._worth[page] = self._reuse.used(self._worth[page], 1)
            if self._pages.references(page) == 1:
                self._pages.hand_over(page, "cached")
                self._idle.add(page, worth)
            else:
                self._pages.release((page,))

    def evict(self, pages: Iterable[int]) -> None:
        """Free these idle pages."""
        for page in pages:
            self._idle.remove(page)
            del self._worth[page]
            group, key = self._place_of.pop(page)
            del self._page_of[group][key]
            self._pages.release((page,))

    def check_integrity(self) -> None:
        """The two directions of the index agree, and the index owns exactly the idle pages."""
        assert self._place_of == {
            page: (group, key) for group, known in enumerate(self._page_of) for key, page in known.items()
        }
        assert sum(map(len, self._page_of)) == len(self._place_of)
        assert self._worth.keys() == self._place_of.keys()
        assert set(self._idle) <= self._place_of.keys()
        assert len(self._idle) == self._pages.held("cached")
        for page in self._place_of:
            references = self._pages.references(page)
            assert references == 1 if page in self._idle else references > 0, (
                f"page {page}: {references} references"
            )
