"""What came to the pool and what was found there: the uppermost tier's figures; and how heavy an adapter is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from motet.adapters.image import open_image
from motet.errors import MotetError
from motet.types import BASE, EngineStats, ModelSpec, TierStats


def share_of_base(image: Path, spec: ModelSpec) -> float:
    """The adapter's parameters in those of the base's layers: about what it adds to the work of a token.

    0 for an image that has left the disk since it was checked; it is made again when it is wanted.
    """
    try:
        chunks = open_image(image).chunks
    except (OSError, MotetError):
        return 0.0
    own = np.sum(chunks.rank.astype(np.int64) * (chunks.in_features + chunks.out_features))
    layers = (site for site in spec.sites if site.module not in ("embed", "head"))
    return float(own) / sum(site.in_features * site.out_features for site in layers)


class PoolTier:
    """Counts for metrics. `loads` are all attempts, failed ones too."""

    def __init__(self) -> None:
        self.loads = 0
        self.loads_of: Counter[str] = Counter()
        self._hits = 0
        self._ready: set[str] = set()

    def asked(self, digest: str) -> None:
        """A request has come: its adapter is there already, or it is not."""
        self._hits += digest in self._ready

    def tried(self, digest: str) -> None:
        """A load has been reported: on a GPU its copies have been enqueued, and may still be under way."""
        self.loads += 1
        self.loads_of[digest] += 1

    def came(self, digest: str) -> None:
        self._ready.add(digest)

    def left(self, digests: Iterable[str]) -> None:
        self._ready.difference_update(digests)

    def forget(self, digest: str) -> None:
        """Nothing more will come of this adapter."""
        self.loads_of.pop(digest, None)

    def stats(self, stats: EngineStats, page_bytes: int, load_seconds: float) -> TierStats:
        """The pool as a tier, given a snapshot of the scheduler."""
        assert BASE not in self._ready
        return TierStats(
            resident=len(self._ready),
            bytes=stats.adapter_pages * page_bytes,
            max_bytes=stats.total_pages * page_bytes,
            hits=self._hits,
            loads=self.loads,
            load_seconds=load_seconds,
            evictions=stats.evictions,
        )
