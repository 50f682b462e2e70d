"""A request's span: whose trace it continues, what it says, and what it never says."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from motet.observe.tracing import NO_TRACER, SpanTracer, tracer_of

from .tenants import platform

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Traced:
    """A platform whose spans are kept."""

    def __init__(self, root: Path) -> None:
        self._exporter = InMemorySpanExporter()
        self._tracer = SpanTracer(self._exporter)
        self.platform = platform(root, tracer=self._tracer)

    def spans(self) -> list[ReadableSpan]:
        """Those after the two loads of adapters."""
        self._tracer.close()
        return list(self._exporter.get_finished_spans())[2:]


@pytest.fixture
def traced(tmp_path: Path) -> Traced:
    return Traced(tmp_path)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_a_span(traced: Traced, stream: bool) -> None:
    served = traced.platform
    body = {"model": "acme/poet", "prompt": "my secret", "stream": stream, "max_tokens": 9}
    served.ask(served.acme, "POST", "/v1/completions", body, traceparent=PARENT)
    (span,) = traced.spans()
    assert span.name == "POST /v1/completions"
    assert span.context is not None
    assert f"{span.context.trace_id:032x}" == PARENT.split("-")[1]
    assert span.parent is not None
    assert f"{span.parent.span_id:016x}" == PARENT.split("-")[2]
    attributes = dict(span.attributes or {})
    assert attributes["gen_ai.request.model"] == "acme/poet"
    assert attributes["gen_ai.usage.input_tokens"] == 9
    assert attributes["gen_ai.usage.output_tokens"] == 3
    assert attributes["motet.tenant"] == "acme"
    assert attributes["motet.outcome"] == "stop"
    assert attributes["motet.queue_seconds"] == 0.02
    assert attributes["http.response.status_code"] == 200
    assert [event.name for event in span.events] == ["tokenized", "first_token"]
    assert "secret" not in span.to_json()
    assert served.acme.split("-", 2)[2] not in span.to_json()


def test_failures_are_told_and_probes_are_not(traced: Traced) -> None:
    served = traced.platform
    served.ask(None, "GET", "/health")
    served.chat(None)
    served.house.generator.fail_after = 0
    served.chat(served.acme)
    refused, failed = traced.spans()
    assert (refused.attributes or {})["http.response.status_code"] == 401
    assert refused.status.status_code == StatusCode.UNSET
    assert (failed.attributes or {})["http.response.status_code"] == 500
    assert failed.status.status_code == StatusCode.ERROR
    assert (failed.attributes or {})["motet.outcome"] == "error"


def test_a_collector_that_is_not_there_is_felt_by_nobody(tmp_path: Path) -> None:
    assert tracer_of(None) is NO_TRACER
    tracer = tracer_of("http://127.0.0.1:9")
    served = platform(tmp_path, tracer=tracer)
    assert served.chat(served.acme).status_code == 200
    began = time.monotonic()
    tracer.close()
    assert time.monotonic() - began < 10
