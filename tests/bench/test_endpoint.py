from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeVar

import pytest

from motet.bench.calls import Call
from motet.bench.drive import Log, Plan, run
from motet.bench.endpoint import Api, Endpoint
from motet.bench.figures import Report, Spread, report
from motet.bench.http import BadResponse, Events, Response
from motet.bench.records import Answer, Record, Run, Settings
from motet.errors import ConfigError
from tests.bench.fake_endpoint import Behaviour, FakeEndpoint, fake_endpoint
from tests.bench.virtual import run_virtual

T = TypeVar("T")
CLOSE = 0.02


def with_endpoint(
    work: Callable[[Endpoint, FakeEndpoint], Awaitable[T]],
    behaviours: Mapping[str, Behaviour],
    timeout: float = 20.0,
    api: Api = "completions",
    run: Callable[[Coroutine[Any, Any, T]], T] = asyncio.run,
) -> T:
    async def main() -> T:
        async with (
            fake_endpoint(**behaviours) as (url, fake),
            Endpoint(url, api, timeout=timeout) as endpoint,
        ):
            return await work(endpoint, fake)

    return run(main())


def measure(
    calls: list[Call],
    concurrency: int | None,
    run_it: Callable[[Coroutine[Any, Any, tuple[Report, FakeEndpoint]]], tuple[Report, FakeEndpoint]],
    **behaviours: Behaviour,
) -> tuple[Report, FakeEndpoint]:
    """The report of a run, and what the endpoint says of it."""

    async def work(endpoint: Endpoint, fake: FakeEndpoint) -> tuple[Report, FakeEndpoint]:
        records = await run(endpoint, Plan(calls, concurrency), Log())
        settings = Settings("fake", "sonnet", tuple(behaviours), "one", 3, 3, concurrency=concurrency)
        return report(Run(settings, tuple(records))), fake

    return with_endpoint(work, behaviours, run=run_it)


def spread_of(values: list[float]) -> dict[str, float]:
    """Mean and percentiles, written out."""
    ordered = sorted(values)

    def percentile(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = int(place)
        return ordered[low] + (place - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])

    return {
        "mean": sum(values) / len(values),
        "p50": percentile(0.5),
        "p90": percentile(0.9),
        "p99": percentile(0.99),
    }


def assert_agrees(told: Spread | None, truth: list[float]) -> None:
    assert told is not None
    for name, value in spread_of(truth).items():
        assert getattr(told, name) == pytest.approx(value, rel=CLOSE), name


def test_every_figure_is_what_the_endpoints_own_clock_says() -> None:
    """Two models of different speed, eight requests at a time; each figure within 2 % of the log of the endpoint, whose
    delays are those asked for."""
    calls = [Call("slow" if i % 3 else "fast", "some words", 20 + i) for i in range(24)]
    told, fake = measure(calls, 8, run_virtual, slow=Behaviour(0.3, 0.03), fast=Behaviour(0.1, 0.01))
    for s in fake.seen:
        behaviour = fake.behaviours[s.model]
        assert s.written[0] - s.received == pytest.approx(behaviour.ttft)
        assert s.written[-1] - s.written[0] == pytest.approx(behaviour.gap * (s.body["max_tokens"] - 1))
    for part in (told.overall, *told.models):
        seen = [s for s in fake.seen if part.name in ("all", s.model)]
        assert part.completed == part.requests == len(seen)
        tokens = sum(len(s.written) for s in seen)
        assert part.output_tokens == tokens
        per_token = [(s.written[-1] - s.written[0]) / (len(s.written) - 1) for s in seen]
        assert_agrees(part.ttft, [s.written[0] - s.received for s in seen])
        assert_agrees(part.e2e, [s.written[-1] - s.received for s in seen])
        assert_agrees(part.tpot, per_token)
        gaps = [b - a for s in seen for a, b in zip(s.written, s.written[1:], strict=False)]
        assert_agrees(part.itl, gaps)
        took = max(s.written[-1] for s in fake.seen) - min(s.received for s in fake.seen)
        assert part.tokens_per_s == pytest.approx(tokens / took, rel=CLOSE)
        assert part.requests_per_s == pytest.approx(len(seen) / took, rel=CLOSE)
        assert part.otps == pytest.approx(len(seen) / sum(per_token), rel=CLOSE)


def test_on_a_real_clock_figures_are_what_the_delays_make_them() -> None:
    told, _ = measure([Call("m", "words", 11) for _ in range(6)], 2, asyncio.run, m=Behaviour(0.5, 0.1))
    part = told.overall
    assert part.ttft is not None
    assert part.itl is not None
    assert part.tpot is not None
    assert part.e2e is not None
    assert part.ttft.p50 == pytest.approx(0.5, rel=CLOSE)
    assert part.itl.p50 == pytest.approx(0.1, rel=CLOSE)
    assert part.tpot.p50 == pytest.approx(0.1, rel=CLOSE)
    assert part.e2e.p50 == pytest.approx(1.5, rel=CLOSE)
    assert part.otps == pytest.approx(10, rel=CLOSE)
    assert part.tokens_per_s == pytest.approx(6 * 11 / 4.5, rel=CLOSE)


def test_pieces_of_several_tokens_are_counted_by_usage() -> None:
    told, _ = measure([Call("m", "words", 9)], 1, run_virtual, m=Behaviour(0.05, 0.1, per_piece=2))
    assert told.overall.output_tokens == 9
    assert told.overall.tpot is not None
    assert told.overall.tpot.mean == pytest.approx(4 * 0.1 / 8, rel=CLOSE)


def test_requests_of_an_open_loop_leave_when_they_are_due_whatever_is_in_flight() -> None:
    calls = [Call("m", "words", 2, at=0.1 * i) for i in range(5)]
    told, fake = measure(calls, None, run_virtual, m=Behaviour(0.6, 0.01))
    came = [seen.received - fake.seen[0].received for seen in fake.seen]
    assert came == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert told.late < 1e-6


def test_a_chat_counts_no_role_as_a_token_and_sends_messages() -> None:
    async def work(endpoint: Endpoint, fake: FakeEndpoint) -> tuple[Answer, FakeEndpoint]:
        return await endpoint.send(Call("m", "some words", 3)), fake

    answer, fake = with_endpoint(work, {"m": Behaviour(0.2, 0.01)}, api="chat", run=run_virtual)
    assert len(answer.times) == answer.output_tokens == 3
    assert answer.times[0] - answer.sent == pytest.approx(0.2)
    assert fake.seen[0].path == "/v1/chat/completions"
    assert fake.seen[0].body["messages"] == [{"role": "user", "content": "some words"}]


@pytest.mark.parametrize(
    ("fault", "error", "said"),
    [
        ("busy", "http 503", "busy"),
        ("event", "error event", "engine failed"),
        ("cut", "cut short", "finish_reason"),
        ("abort", "disconnected", ""),
        ("drop", "connection", ""),
        ("garbage", "bad response", "SMTP"),
        ("hang", "timeout", "0.3 s"),
        ("silent", "no text", ""),
    ],
)
def test_what_goes_wrong_is_told_by_its_class(fault: str, error: str, said: str) -> None:
    async def work(endpoint: Endpoint, _fake: FakeEndpoint) -> tuple[Answer, Answer]:
        bad = await endpoint.send(Call("bad", "words", 5))
        return bad, await endpoint.send(Call("good", "words", 5))

    behaviours = {"bad": Behaviour(0.01, 0.01, fault=fault), "good": Behaviour(0.01, 0.01)}
    bad, good = with_endpoint(work, behaviours, timeout=0.3, run=run_virtual)
    assert bad.error == error
    assert said in bad.message
    assert good.error == ""
    assert len(good.times) == 5


def test_a_model_that_is_not_served_and_a_port_where_nobody_listens_are_told() -> None:
    async def work(endpoint: Endpoint, _fake: FakeEndpoint) -> Answer:
        return await endpoint.send(Call("nobody", "words", 5))

    answer = with_endpoint(work, {"m": Behaviour(0.0, 0.0)})
    assert (answer.error, "no model nobody" in answer.message) == ("http 404", True)
    assert asyncio.run(Endpoint("http://127.0.0.1:9").send(Call("m", "words", 1))).error == "refused"


def test_connections_are_used_again_and_one_that_the_server_closed_is_replaced() -> None:
    async def work(endpoint: Endpoint, fake: FakeEndpoint) -> list[int]:
        counts = []
        for _ in range(2):
            await endpoint.send(Call("m", "words", 2))
            counts.append(fake.connections)
        endpoint._idle[0].close()
        assert (await endpoint.send(Call("m", "words", 2))).error == ""
        return [*counts, fake.connections]

    assert with_endpoint(work, {"m": Behaviour(0.0, 0.0)}) == [1, 1, 2]


def test_a_request_that_meets_a_closing_connection_is_sent_once_more() -> None:
    async def work(endpoint: Endpoint, fake: FakeEndpoint) -> tuple[str, int, int]:
        await endpoint.send(Call("good", "words", 2))
        answer = await endpoint.send(Call("bad", "words", 2))
        return answer.error, len(fake.seen), fake.connections

    behaviours = {"good": Behaviour(0.0, 0.0), "bad": Behaviour(0.0, 0.0, fault="drop")}
    assert with_endpoint(work, behaviours) == ("connection", 1 + 2, 2)


def test_models_are_asked_for() -> None:
    async def work(endpoint: Endpoint, _fake: FakeEndpoint) -> list[str]:
        return await endpoint.models()

    assert with_endpoint(work, {"base": Behaviour(0.0, 0.0), "a": Behaviour(0.0, 0.0)}) == ["base", "a"]
    with pytest.raises(ConfigError, match="no endpoint answers"):
        asyncio.run(Endpoint("127.0.0.1:9").models())


@pytest.mark.parametrize("url", ["ftp://host", "http://", "http://host:none"])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="URL"):
        Endpoint(url)


@pytest.mark.parametrize("step", [1, 2, 3, 7, 1000])
def test_a_response_is_the_same_however_its_bytes_are_cut(step: int) -> None:
    wire = (
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"9\r\ndata: one\r\n5;x=1\r\n\n\n: c\r\n8\r\n\ndata: 2\r\n2\r\n\r\n\r\n0\r\nTrailer: x\r\n\r\n"
    )
    response, events, found = Response(), Events(), []
    for at in range(0, len(wire), step):
        assert not response.complete
        found += events.feed(response.feed(wire[at : at + step]))
    assert response.complete
    assert response.reusable
    assert found == [b"one", b"2"]


@pytest.mark.parametrize(
    ("head", "body", "complete"), [(b"Content-Length: 5\r\n", b"abcde", True), (b"", b"abcdef", False)]
)
def test_bodies_without_chunks_end_by_length_or_with_the_connection(
    head: bytes, body: bytes, complete: bool
) -> None:
    response = Response()
    assert response.feed(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n" + body) == body
    assert response.complete == complete
    response.close()
    assert response.complete


@pytest.mark.parametrize(
    "wire", [b"nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n"]
)
def test_bytes_that_are_no_response_are_refused(wire: bytes) -> None:
    with pytest.raises(BadResponse):
        Response().feed(wire)


def test_records_are_kept_in_seconds_since_the_run_began() -> None:
    ended: list[Record] = []

    async def work(endpoint: Endpoint, _fake: FakeEndpoint) -> list[Record]:
        calls = [Call("m", "words", 3) for _ in range(3)]
        plan = Plan(calls[1:], 1, lead_in=calls[:1], warm_up=[Call("m", "words", 1)])
        return await run(endpoint, plan, Log(ended.append))

    records = with_endpoint(work, {"m": Behaviour(0.01, 0.01)})
    assert records == ended
    assert [record.phase for record in records] == ["warm-up", "lead-in", "measured", "measured"]
    assert 0 <= records[0].sent < records[0].times[0] < records[1].sent < 5
