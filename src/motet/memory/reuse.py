"""How likely a thing is to be used again: how often it was used, old uses counting less.

Semantics: uses at times t_1 … t_n give worth(t) = log Σ exp(t_i − t), least recently and least frequently used in one
(Lee et al., "LRFU", 2001). As time passes all fall alike, so log Σ exp(t_i) keeps the order and never has to be
computed anew. Time is counted in uses, not in seconds: a quiet night ages nothing. One unit is TURNOVERS pools of pages
used.
"""

from __future__ import annotations

from math import exp, inf, log1p

TURNOVERS = 4
"""Simulated on traces from Zipf to bursts (docs/residency.md): less forgets what is popular, more notices late what has
become so."""

NEVER = -inf


class Reuse:
    """The clock that all things in one pool share."""

    def __init__(self, num_pages: int) -> None:
        self._now = 0.0
        self._tick = 1 / (TURNOVERS * num_pages)

    def used(self, worth: float, pages: int) -> float:
        """The worth of a thing of so many pages that was worth so much and is used now; NEVER if it never was."""
        self._now += pages * self._tick
        return max(worth, self._now) + log1p(exp(-abs(worth - self._now)))
