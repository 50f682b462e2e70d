"""The counters and histograms of requests, told apart by one label: the served model, or the tenant.

Both labels on one series would multiply them: 200 models times 200 tenants times 40 buckets.
"""

from __future__ import annotations

from typing import TypeVar, cast

from prometheus_client import CollectorRegistry, Counter, Histogram

M = TypeVar("M", Counter, Histogram)
MAX_LABELS = 200
OTHER = "other"

_QUEUE = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TTFT = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3, 6, 12, 30, 60)
_INTER_TOKEN = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.4, 0.8, 2)
_E2E = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)


class Series:
    """What is measured of requests, by `label`. At most MAX_LABELS values have series of their own."""

    def __init__(self, registry: CollectorRegistry, prefix: str, label: str) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"{prefix}_{name}", text, (label, *labels), registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"{prefix}_{name}_seconds", text, (label,), buckets=buckets, registry=registry)

        self._label = label
        self._known: set[str] = set()
        self._children: dict[tuple[Counter | Histogram, str], Counter | Histogram] = {}
        self.requests = counter("requests", "Accepted requests that ended, by outcome", "outcome")
        self.errors = counter("errors", "Requests that failed, by error code", "code")
        self.prompt = counter("prompt_tokens", "Prompt tokens of accepted requests")
        self.cached = counter("cached_prompt_tokens", "Prompt tokens that were not computed again")
        self.generated = counter("generation_tokens", "Generated tokens")
        self.queue = histogram("queue", "From the engine's inbox to the first step", _QUEUE)
        self.ttft = histogram("ttft", "From a request's arrival to its first token", _TTFT)
        self.inter_token = histogram("inter_token", "Between tokens of a choice", _INTER_TOKEN)
        self.e2e = histogram("e2e", "From a request's arrival to its end", _E2E)

    def track(self, value: str) -> None:
        """Give a value its series, while there is room."""
        if len(self._known) < MAX_LABELS:
            self._known.add(value)

    def forget(self, value: str) -> None:
        """Drop a value and its series; what is still in flight counts as "other"."""
        self._known.discard(value)
        self._children = {key: child for key, child in self._children.items() if key[1] != value}
        for metric in (
            self.requests, self.errors, self.prompt, self.cached, self.generated,
            self.queue, self.ttft, self.inter_token, self.e2e,
        ):  # fmt: skip
            metric.remove_by_labels({self._label: value})

    def on(self, metric: M, label: str) -> M:
        """`metric.labels(label)`, remembered: the library's own look-up takes 6 µs, six of them a token."""
        found = self._children.get((metric, label))
        if found is None:
            found = self._children[metric, label] = metric.labels(label)
        return cast("M", found)

    def of(self, value: str) -> str:
        """The label's value for it."""
        return value if value in self._known else OTHER
