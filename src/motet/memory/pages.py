"""Who holds which page of the pool: counts only, the bytes live elsewhere.

The pool is one allocation cut into equal pages. KV cache, cached prefixes and adapters draw from the same
free list, so the border between them moves with demand.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Literal

Owner = Literal["kv", "cached", "adapter"]


class PageAllocator:
    """`num_pages` pages, each free or held by one kind of owner through a count of references.

    "kv" pages are in the block table of a running sequence (one reference per sequence), "cached" pages are
    kept for reuse and belong to the prefix index, "adapter" pages hold weights.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._references = [0] * num_pages
        self._owner: list[Owner] = ["kv"] * num_pages
        self._held: dict[Owner, int] = {"kv": 0, "cached": 0, "adapter": 0}

    @property
    def free(self) -> int:
        """How many pages nobody holds."""
        return len(self._free)

    def held(self, owner: Owner) -> int:
        """How many pages this kind of owner holds; a shared page counts once."""
        return self._held[owner]

    def references(self, page: int) -> int:
        return self._references[page]

    def alloc(self, count: int, owner: Owner) -> tuple[int, ...]:
        """Take `count` free pages with one reference each. The caller has made sure that they are free."""
        assert 0 <= count <= self.free, f"{count} pages asked for, {self.free} free"
        pages = tuple(self._free.pop() for _ in range(count))
        for page in pages:
            self._references[page] = 1
            self._owner[page] = owner
        self._held[owner] += count
        return pages

    def retain(self, page: int) -> None:
        """One more holder of a page that is held already."""
        assert self._references[page] > 0, f"page {page} is free"
        self._references[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """One holder less of each page; at zero it is free."""
        for page in pages:
            assert self._references[page] > 0, f"page {page} is free already"
            self._references[page] -= 1
            if self._references[page] == 0:
                self._held[self._owner[page]] -= 1
                self._free.append(page)

    def hand_over(self, page: int, owner: Owner) -> None:
        """The only reference to this page now belongs to another kind of owner."""
        assert self._references[page] == 1, f"page {page} has {self._references[page]} holders"
        self._held[self._owner[page]] -= 1
        self._owner[page] = owner
        self._held[owner] += 1

    def check_integrity(self) -> None:
        """Every page is either free or held, and the counts say which."""
        free = set(self._free)
        assert len(free) == len(self._free), "a page is on the free list twice"
        for page, references in enumerate(self._references):
            assert references >= 0, f"page {page} has {references} references"
            assert (references == 0) == (page in free), (
                f"page {page}: {references} references, free={page in free}"
            )
        held = Counter(self._owner[page] for page in range(self.num_pages) if page not in free)
        assert dict(held) == {owner: count for owner, count in self._held.items() if count}, (
            held,
            self._held,
        )
