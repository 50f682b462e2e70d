"""Every bad request is answered with a status and an error that names the field, and costs little."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator

import pytest

from motet.config import ServerConfig
from motet.errors import CapacityExceeded, EngineDead

from .fakes import House, build, run


def error_of(response: object) -> dict[str, object]:
    body = response.json()  # type: ignore[attr-defined]
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    error: dict[str, object] = body["error"]
    return error


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 10**9}, "n"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**12}, "max_tokens"),
        ({"max_tokens": 493}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 10**300}, "seed"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 10**9}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logit_bias": {"256": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {str(i): 1 for i in range(301)}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": "x" * 1001}, "stop"),
        ({"stop_token_ids": [256]}, "stop_token_ids"),
        ({"stop_token_ids": [1] * 65}, "stop_token_ids"),
        ({"temperature": "hot"}, "temperature"),
        ({"n": True}, "n"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_obfuscation": 1}},
         "stream_options.include_obfuscation"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": "y" * 9999}}, "response_format"),
        ({"functions": [{}]}, "functions"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"store": True}, "store"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"chat_template": "{{ x }}"}, "chat_template"),
        ({"no_such_field": 1}, "no_such_field"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": None}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": "x", "mood": "sad"}]}, "messages[0].mood"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
         "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
    ],
)  # fmt: skip
def test_a_bad_chat_field_is_named(house: House, fields: dict[str, object], param: str) -> None:
    response = house.chat(**fields)
    error = error_of(response)
    assert response.status_code == 400, response.text
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert not house.generator.calls
    assert house.chat().status_code == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": ["a", [1]]}, "prompt"),
        ({"prompt": [256]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [[1], [1.5]]}, "prompt[1][0]"),
        ({"prompt": ["a"] * 257}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"echo": True}, "echo"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "!"}, "suffix"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"messages": []}, "messages"),
    ],
)
def test_a_bad_completion_field_is_named(house: House, fields: dict[str, object], param: str) -> None:
    response = house.complete(**fields)
    assert response.status_code == 400, response.text
    assert error_of(response)["param"] == param
    assert not house.generator.calls


def test_missing_fields(house: House) -> None:
    assert error_of(house.post("/v1/chat/completions", {"model": "base"}))["param"] == "messages"
    assert error_of(house.post("/v1/completions", {"prompt": "x"}))["param"] == "model"


def test_over_long_prompts(house: House) -> None:
    for response in (
        house.chat(messages=[{"role": "user", "content": "x" * 500}]),
        house.chat(messages=[{"role": "user", "content": "x" * 40_000}]),
        house.chat(messages=[{"role": "user", "content": ""}] * 600),
        house.complete(prompt="x" * 500),
        house.complete(prompt=[1] * 500),
        house.complete(prompt="x" * 490, max_tokens=11),
    ):
        assert response.status_code == 400
        assert error_of(response)["code"] == "context_length_exceeded"
        assert "500 tokens" in response.text
    assert not house.generator.calls


def test_an_unknown_model(house: House, poet: str) -> None:
    response = house.chat(model="nobody")
    assert (response.status_code, error_of(response)["code"]) == (404, "model_not_found")
    assert "'base', 'poet'" in response.text
    assert poet


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"{'model': 1}",
        b'{"model": "base"} x',
        b'{"model": "\xff"}',
        b'{"model": "\\ud800"}',
        b'{"temperature": NaN}',
        b'{"temperature": 1e999}',
        b'{"n": ' + b"9" * 100_000 + b"}",
    ],
)
def test_malformed_json(house: House, body: bytes) -> None:
    response = house.post_bytes("/v1/chat/completions", body)
    assert response.status_code == 400
    assert error_of(response)["code"] == "invalid_request"


BOMBS = {
    "depth of arrays": b'{"tools": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "depth of objects": b'{"tools": ' + b'{"a":' * 100_000,
    "depth in an unknown field": b'{"zzz": ' + b"[" * 100_000,
    "depth in a known field": b'{"messages": ' + b"[" * 100_000,
    "depth outside": b"[" * 1_000_000,
    "many arrays": b'{"tools": [' + b"[]," * 2_600_000 + b"[]]}",
    "many tokens": b'{"model": "base", "prompt": [' + b"1," * 4_000_000 + b"1]}",
    "many stops": b'{"stop": [' + b'"",' * 2_600_000 + b'""]}',
    "many biases": b'{"logit_bias": {' + b",".join(b'"%d":1' % i for i in range(600_000)) + b"}}",
    "a long text": json.dumps({"model": "base", "prompt": "lorem " * 1_300_000}).encode(),
    "a long number": b'{"seed": 1' + b"0" * 8_000_000 + b"}",
    "many messages": b'{"model": "base", "messages": [' + b'{"role":"user","content":""},' * 60_000
    + b'{"role":"user","content":""}]}',
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_bombs_are_refused_quickly(house: House, name: str, path: str) -> None:
    house.chat()
    start = time.process_time()
    response = house.post_bytes(path, BOMBS[name])
    took = time.process_time() - start
    assert response.status_code == 400, response.text
    assert took < 0.15, f"{took:.3f} s"
    assert len(response.content) < 2_000


def test_an_over_large_body_is_refused_before_it_is_read() -> None:
    house = build(config=ServerConfig(max_body_bytes=1000))
    read = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal read
        while True:
            read += 100
            yield b" " * 100

    async def scenario() -> None:
        headers = {"content-type": "application/json"}
        async with house.client() as client:
            declared = await client.post("/v1/completions", content=b" " * 1001, headers=headers)
            chunked = await client.post("/v1/completions", content=endless(), headers=headers)
            absurd = await client.post(
                "/v1/completions", content=endless(), headers={**headers, "content-length": "9" * 4000}
            )
            odd = await client.post(
                "/v1/completions", content=b"{}", headers={**headers, "content-length": "-1"}
            )
        for response in (declared, chunked, absurd):
            assert response.status_code == 413
            assert error_of(response)["code"] == "request_too_large"
        assert odd.status_code == 400

    run(scenario())
    assert read <= 1200


def test_other_media_types_are_refused(house: House) -> None:
    async def scenario() -> None:
        async with house.client() as client:
            for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
                response = await client.post("/v1/completions", content=b"{}", headers={"content-type": kind})
                assert response.status_code == 415
                assert error_of(response)["code"] == "unsupported_media_type"
            body = json.dumps({"model": "base", "prompt": "x"})
            kind = "application/json; charset=utf-8"
            response = await client.post("/v1/completions", content=body, headers={"content-type": kind})
            assert response.status_code == 200

    run(scenario())


def test_routes_and_methods(house: House) -> None:
    response = house.get("/nowhere")
    assert (response.status_code, error_of(response)["code"]) == (404, "not_found")
    response = house.get("/v1/chat/completions")
    assert (response.status_code, error_of(response)["code"]) == (405, "method_not_allowed")
    assert response.headers["allow"] == "POST"
    for path in ("/v1/models/", "//v1/models", "/v1/%2e%2e/health", "/docs", "/redoc"):
        assert house.get(path).status_code == 404


def test_an_engine_that_is_not_there(house: House) -> None:
    house.generator.ready = False
    for response in (house.chat(), house.complete(), house.get("/ready")):
        assert (response.status_code, error_of(response)["code"]) == (503, "unavailable")
        assert response.headers["retry-after"] == "1"
    assert house.get("/health").status_code == 200
    house.generator.alive = False
    for response in (house.chat(), house.get("/ready"), house.get("/health")):
        assert (response.status_code, error_of(response)["code"]) == (503, "engine_dead")


@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_by_the_engine_has_a_status(house: House, stream: bool) -> None:
    house.generator.refusal = CapacityExceeded("the pool has room for 9 pages")
    response = house.chat(stream=stream)
    assert (response.status_code, error_of(response)["code"]) == (400, "capacity_exceeded")
    house.generator.refusal = EngineDead("gone")
    assert house.chat(stream=stream).status_code == 503


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_before_the_first_token_has_a_status(house: House, stream: bool) -> None:
    house.generator.fail_after = 0
    response = house.chat(stream=stream)
    assert (response.status_code, error_of(response)["code"]) == (500, "generation_failed")


@pytest.mark.parametrize("stream", [False, True])
def test_a_bug_of_ours_is_a_plain_500(house: House, stream: bool) -> None:
    house.generator.fail_after, house.generator.failure = 0, RuntimeError("secret path /etc/x")
    response = house.chat(stream=stream)
    assert response.status_code == 500
    assert error_of(response) == {
        "message": "internal server error", "type": "server_error", "param": None, "code": "internal_error"
    }  # fmt: skip
    assert "x-request-id" in response.headers


def test_an_error_in_a_stream_is_its_last_event(house: House) -> None:
    house.generator.fail_after = 2
    *_, last, end = house.chat(stream=True).text.split("\n\n")
    assert end == ""
    assert json.loads(last.removeprefix("data: "))["error"] == {
        "message": "the engine fell over", "type": "server_error", "param": None, "code": "generation_failed"
    }  # fmt: skip
    house.generator.failure = RuntimeError("secret path /etc/x")
    house.generator.yielded = 0
    text = house.complete(stream=True).text
    assert "secret" not in text
    assert '"code":"internal_error"' in text
    assert "[DONE]" not in text


def test_tokenising_a_long_text_leaves_the_loop_free() -> None:
    """A text as long as the check allows, with a tokenizer that takes its time."""
    house = build()

    def slow(text: str) -> list[int]:
        time.sleep(0.15)
        return list(text.encode())

    house.generator.encode = slow  # type: ignore[method-assign]

    async def scenario() -> None:
        async with house.client() as client:
            call = asyncio.create_task(
                client.post("/v1/completions", json={"model": "base", "prompt": "x" * 30_000})
            )
            worst, last = 0.0, time.perf_counter()
            while not call.done():
                await asyncio.sleep(0.001)
                now = time.perf_counter()
                worst, last = max(worst, now - last), now
            assert (await call).status_code == 400
            assert worst < 0.1

    run(scenario())
