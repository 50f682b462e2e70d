"""How many adapters fit at what hit rate: an estimate from the order in which they were asked for."""

from __future__ import annotations

REMEMBERED = 4096
"""Adapters; the walk to the last of them takes 0.2 ms, to one that is often asked for a microsecond."""

SIZES = tuple(2.0**i for i in range(-4, 7))
"""Pools to estimate, in pools: from a sixteenth to 64."""


class GhostList:
    """Adapters by their last request, with their sizes, whether they are in the pool or not.

    A pool of P pages that keeps the most recently used adapters has one at hand if it and the different ones asked for
    since fit into P (Mattson et al., "Evaluation techniques for storage hierarchies", 1970). What Motet keeps
    by cost is seldom worse than that. KV cache takes its part of the pool besides.
    """

    def __init__(self, num_pages: int) -> None:
        self._sizes = tuple(max(1, round(size * num_pages)) for size in SIZES)
        self._hits = [0] * len(SIZES)
        self._pages: dict[str, int] = {}  # the last one asked for at the end
        self.requests = 0

    def ask(self, digest: str, pages: int) -> None:
        """A request wants this adapter."""
        self.requests += 1
        if digest in self._pages:
            depth = self._depth(digest)
            for index, size in enumerate(self._sizes):
                self._hits[index] += depth <= size
            del self._pages[digest]
        elif len(self._pages) == REMEMBERED:
            del self._pages[next(iter(self._pages))]
        self._pages[digest] = pages

    def hits(self) -> dict[int, int]:
        """Pages → how many of the requests would have found their adapter among so many pages of adapters."""
        return dict(zip(self._sizes, self._hits, strict=True))

    def _depth(self, digest: str) -> int:
        depth = 0
        for other, pages in reversed(self._pages.items()):
            depth += pages
            if other == digest:
                break
        return depth
