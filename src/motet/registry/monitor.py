"""What this server has seen of each version, since the canary that it is compared in began."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Sequence

from motet.registry.release import Divergence, Figures, figures

KEPT = 1000  # the latest requests of a version


class Monitor:
    """The latest requests of each version. All methods belong to the event loop."""

    def __init__(self) -> None:
        self._paces: defaultdict[str, deque[float | None]] = defaultdict(lambda: deque(maxlen=KEPT))
        self._divergence: dict[str, Divergence] = {}

    def record(self, version: str, pace: float | None) -> None:
        """A request ended, at `pace` seconds per token; None if it failed."""
        self._paces[version].append(pace)

    def compare(self, candidate: str, stable: Sequence[int], shadow: Sequence[int]) -> None:
        """The tokens that stable answered with, and those of the shadow."""
        self._divergence[candidate] = self._divergence.get(candidate, Divergence()).and_one(stable, shadow)

    def figures(self, version: str) -> Figures:
        seen = self._paces.get(version, ())
        paces = [pace for pace in seen if pace is not None]
        return figures(paces, len(seen) - len(paces))

    def divergence(self, candidate: str) -> Divergence:
        return self._divergence.get(candidate, Divergence())

    def forget(self, versions: Iterable[str]) -> None:
        """Begin again for these."""
        for version in versions:
            self._paces.pop(version, None)
            self._divergence.pop(version, None)
