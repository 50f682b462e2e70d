"""Which version of an alias answers whom, and when a candidate is taken back: pure decisions, so that a release can be
played through without a server."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

from motet.registry.records import Limits
from motet.types import Struct


class Split(Struct, frozen=True):
    """What an alias serves: `stable`, and `canary` for a share `weight` of the users. All are served names."""

    stable: str
    canary: str | None = None
    weight: float = 0.0


class Ended(Struct, frozen=True):
    """How a request ended. `pace` is the engine's seconds per token after the first, if there were enough of them;
    `first_token` the seconds from its first step to its first token."""

    failed: bool = False
    pace: float | None = None
    first_token: float | None = None


class Figures(Struct, frozen=True):
    """What was seen of a version: requests that ended, and how many failed. `pace` and `first_token` are 95th
    percentiles of those of Ended; `measured` requests have a pace."""

    requests: int = 0
    failures: int = 0
    pace: float = 0.0
    measured: int = 0
    first_token: float = 0.0

    @property
    def error_rate(self) -> float:
        return self.failures / self.requests if self.requests else 0.0


class Divergence(Struct, frozen=True):
    """How answers of a shadow compare to those of the stable version, for requests whose answer is repeatable.

    `identical` answers have the same tokens; `shared` is the mean share of the stable answer's tokens before the first
    that differs.
    """

    answers: int = 0
    identical: int = 0
    shared: float = 0.0

    def and_one(self, stable: Sequence[int], shadow: Sequence[int]) -> Divergence:
        """With one more pair of answers."""
        same = next(
            (i for i, (a, b) in enumerate(zip(stable, shadow, strict=False)) if a != b),
            min(len(stable), len(shadow)),
        )
        identical = tuple(stable) == tuple(shadow)
        share = same / len(stable) if stable else float(identical)
        answers = self.answers + 1
        return Divergence(answers, self.identical + identical, self.shared + (share - self.shared) / answers)


def choose(alias: str, split: Split, user: str) -> str:
    """The served name for this user: always the same while the split stands, and a weight that grows only adds users.

    Users of one alias are drawn apart from those of another.
    """
    if split.canary is None:
        return split.stable
    draw = int.from_bytes(hashlib.sha256(f"{alias}\0{user}".encode()).digest()[:8], "big")
    return split.canary if draw < split.weight * 2**64 else split.stable


def figures(seen: Sequence[Ended]) -> Figures:
    """The figures of these requests."""
    failures = sum(ended.failed for ended in seen)
    paces = [ended.pace for ended in seen if ended.pace is not None]
    firsts = [ended.first_token for ended in seen if ended.first_token is not None]
    return Figures(len(seen), failures, _p95(paces), len(paces), _p95(firsts))


def _p95(values: Sequence[float]) -> float:
    return sorted(values)[math.ceil(0.95 * len(values)) - 1] if values else 0.0


def verdict(limits: Limits, stable: Figures, candidate: Figures) -> str | None:
    """Why the candidate must be taken back; None while nothing is against it.

    The time to the first token is no reason: a new version begins with an empty prefix cache.
    """
    if candidate.requests < limits.min_requests:
        return None
    if candidate.error_rate > stable.error_rate + limits.error_rate:
        failed = f"{candidate.error_rate:.1%} of {candidate.requests} requests failed"
        return f"{failed}, {stable.error_rate:.1%} of stable's"
    measured = min(stable.measured, candidate.measured)
    if measured >= limits.min_requests and candidate.pace > stable.pace * limits.latency:
        return f"p95 {candidate.pace * 1e3:.1f} ms per token, {stable.pace * 1e3:.1f} of stable's"
    return None
