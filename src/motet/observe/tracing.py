"""A trace per request, where somebody collects them: OpenTelemetry, sent as OTLP over HTTP.

A request is one span that continues the client's trace (`traceparent`); what happens to it on the way is events of the
span. Attributes carry OpenTelemetry's names where it has some. Prompts, answers and keys are in none of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from motet.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

_SEND_SECONDS = 2.0  # of trying to send a batch; the end of the server waits for the last one
Attributes = Mapping[str, str | int | float]


class Trace:
    """The trace of one request. This one goes nowhere."""

    def event(self, name: str) -> None:
        """Something happened now."""

    def set(self, attributes: Attributes) -> None:
        """Something is known."""

    def end(self, status: int) -> None:
        """The request is over."""


class Tracer:
    """Begins traces. This one's go nowhere."""

    def request(self, name: str, headers: Mapping[str, str]) -> Trace:  # noqa: ARG002 - for those that go somewhere
        """The trace of a request with these headers."""
        return NO_TRACE

    def close(self) -> None:
        """Send what is not sent yet."""


NO_TRACE = Trace()
NO_TRACER = Tracer()


class SpanTrace(Trace):
    """A span."""

    def __init__(self, span: Span) -> None:
        self._span = span

    def event(self, name: str) -> None:
        self._span.add_event(name)

    def set(self, attributes: Attributes) -> None:
        self._span.set_attributes(attributes)

    def end(self, status: int) -> None:
        from opentelemetry.trace import StatusCode

        self._span.set_attribute("http.response.status_code", status)
        if status >= 500 or not status:
            self._span.set_status(StatusCode.ERROR)
        self._span.end()


class SpanTracer(Tracer):
    """Spans, sent in batches by a thread of their own."""

    def __init__(self, exporter: SpanExporter) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = TracerProvider(resource=Resource.create({"service.name": "motet"}))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("motet")
        self._propagator = TraceContextTextMapPropagator()

    def request(self, name: str, headers: Mapping[str, str]) -> Trace:
        from opentelemetry.trace import SpanKind

        parent = self._propagator.extract(dict(headers))
        return SpanTrace(self._tracer.start_span(name, parent, kind=SpanKind.SERVER))

    def close(self) -> None:
        self._provider.shutdown()


def tracer_of(endpoint: str | None) -> Tracer:
    """Traces to the collector at `endpoint` (http://host:4318), or none. Raises ConfigError without the extra."""
    if endpoint is None:
        return NO_TRACER
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise ConfigError("traces need the extra: pip install 'motet[otel]'") from error
    return SpanTracer(OTLPSpanExporter(endpoint.rstrip("/") + "/v1/traces", timeout=_SEND_SECONDS))
