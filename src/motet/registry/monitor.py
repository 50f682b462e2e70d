"""What this server has seen of the versions of each alias, since the canary that they are compared in began."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence, Set

from motet.registry.release import Divergence, Ended, Figures, figures

KEPT = 1000  # the latest requests of a version


class Monitor:
    """The latest requests by alias and version. All methods belong to the event loop."""

    def __init__(self) -> None:
        self._seen: defaultdict[tuple[str, str], deque[Ended]] = defaultdict(lambda: deque(maxlen=KEPT))
        self._divergence: dict[tuple[str, str], Divergence] = {}

    def record(self, alias: str, version: str, ended: Ended) -> None:
        """A request that named the alias, and that `version` answered, ended."""
        self._seen[alias, version].append(ended)

    def compare(self, alias: str, candidate: str, stable: Sequence[int], shadow: Sequence[int]) -> None:
        """The tokens that stable answered with, and those of the shadow."""
        before = self.divergence(alias, candidate)
        self._divergence[alias, candidate] = before.and_one(stable, shadow)

    def figures(self, alias: str, version: str) -> Figures:
        return figures(self._seen.get((alias, version), ()))

    def divergence(self, alias: str, candidate: str) -> Divergence:
        return self._divergence.get((alias, candidate), Divergence())

    def forget(self, alias: str) -> None:
        """Begin again for this one."""
        self.keep({key for key in self._seen.keys() | self._divergence.keys() if key[0] != alias})

    def keep(self, versions: Set[tuple[str, str]]) -> None:
        """Forget all but these, by alias and version."""
        for key in self._seen.keys() - versions:
            del self._seen[key]
        for key in self._divergence.keys() - versions:
            del self._divergence[key]
