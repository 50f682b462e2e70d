"""Chat completions: what comes back, whole and streamed."""

from __future__ import annotations

import json

import pytest

from motet.types import BASE

from .fakes import FakeGenerator, House, build


def events(text: str) -> list[dict[str, object]]:
    """The JSON of a stream's events, [DONE] aside."""
    *lines, done, end = text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_a_whole_answer(house: House) -> None:
    response = house.chat(temperature=0, max_tokens=7)
    answer = response.json()
    assert response.status_code == 200
    assert answer["id"].startswith("chatcmpl-")
    assert isinstance(answer["created"], int)
    assert {k: v for k, v in answer.items() if k not in ("id", "created")} == {
        "object": "chat.completion",
        "model": "base",
        "system_fingerprint": "fp_ba5eba5eba5e",
        "choices": [
            {
                "index": 0,
                "message": {"content": "Hello!", "role": "assistant", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": len("<user>hi"),
            "completion_tokens": 3,
            "total_tokens": len("<user>hi") + 3,
            "prompt_tokens_details": {"cached_tokens": 2},
        },
    }
    assert response.headers["x-motet-adapter-digest"] == "base"
    prompt, params, adapter, request_id = house.generator.calls[0]
    assert bytes(prompt) == b"<user>hi"
    assert (params.temperature, params.max_tokens, params.n, adapter) == (0, 7, 1, BASE)
    assert request_id == answer["id"]


def test_a_stream_byte_for_byte(house: House) -> None:
    response = house.chat(stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    first = json.loads(response.text.split("\n\n")[0].removeprefix("data: "))
    head = (
        f'{{"id":"{first["id"]}","object":"chat.completion.chunk","created":{first["created"]},'
        '"model":"base","system_fingerprint":"fp_ba5eba5eba5e","choices":[{"index":0,"delta":'
    )
    tail = ',"logprobs":null,"finish_reason":null}]}\n\n'
    assert response.text == (
        f'data: {head}{{"role":"assistant","content":""}}{tail}'
        f'data: {head}{{"content":"Hel"}}{tail}'
        f'data: {head}{{"content":"lo"}}{tail}'
        f'data: {head}{{"content":"!"}}{tail}'
        f'data: {head}{{}},"logprobs":null,"finish_reason":"stop"}}]}}\n\n'
        "data: [DONE]\n\n"
    )


def test_a_stream_with_usage(house: House) -> None:
    *chunks, last = events(house.chat(stream=True, stream_options={"include_usage": True}).text)
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"] == {
        "prompt_tokens": 8,
        "completion_tokens": 3,
        "total_tokens": 11,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


def test_usage_is_absent_unless_asked_for(house: House) -> None:
    assert all("usage" not in chunk for chunk in events(house.chat(stream=True).text))


def test_several_choices(house: House) -> None:
    answer = house.chat(n=3).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert {choice["message"]["content"] for choice in answer["choices"]} == {"Hello!"}
    assert answer["usage"] == {
        "prompt_tokens": 8,
        "completion_tokens": 9,
        "total_tokens": 17,
        "prompt_tokens_details": {"cached_tokens": 2},
    }
    chunks = [chunk["choices"] for chunk in events(house.chat(n=3, stream=True).text)]
    roles = [c[0]["index"] for c in chunks[:3] if c[0]["delta"].get("role") == "assistant"]  # type: ignore[index]
    ends = [c[0]["index"] for c in chunks if c[0]["finish_reason"]]  # type: ignore[index]
    assert roles == ends == [0, 1, 2]


def test_logprobs(house: House) -> None:
    assert house.chat(logprobs=True).json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []
    content = house.chat(logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]["content"]
    assert [token["token"] for token in content] == ["H", "l", "!"]
    assert content[0] == {
        "token": "H",
        "logprob": -0.5,
        "bytes": [72],
        "top_logprobs": [
            {"token": "H", "logprob": -0.5, "bytes": [72]},
            {"token": "I", "logprob": -1.5, "bytes": [73]},
        ],
    }
    chunks = events(house.chat(logprobs=True, top_logprobs=2, stream=True).text)
    streamed = [c["choices"][0]["logprobs"] for c in chunks if c["choices"][0]["logprobs"]]  # type: ignore[index]
    assert [token for piece in streamed for token in piece["content"]] == content


def test_half_a_character_has_no_bytes() -> None:
    house = build(FakeGenerator(["é"]))
    token = house.chat(logprobs=True).json()["choices"][0]["logprobs"]["content"][0]
    assert token == {"token": "\N{REPLACEMENT CHARACTER}", "logprob": -0.5, "bytes": None, "top_logprobs": []}


def test_an_adapter_answers_under_its_name(house: House, poet: str) -> None:
    response = house.chat(model="poet")
    assert response.json()["model"] == "poet"
    assert response.json()["system_fingerprint"] == "fp_" + poet.removeprefix("sha256:")[:12]
    assert response.headers["x-motet-adapter-digest"] == poet
    assert house.generator.calls[0][2] == poet
    assert house.chat(model="poet", stream=True).headers["x-motet-adapter-digest"] == poet


def test_messages_reach_the_template(house: House) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": parts, "name": "ann"},
        {"role": "assistant", "content": "ok", "tool_calls": [], "refusal": None, "annotations": None},
        {"role": "user", "content": "go"},
    ]
    assert house.chat(messages=messages).status_code == 200
    assert bytes(house.generator.calls[0][0]) == b"<system>be brief<user>one\ntwo<assistant>ok<user>go"


def test_the_default_length_is_the_rest_of_the_context(house: House) -> None:
    house.chat()
    house.chat(max_completion_tokens=9)
    house.chat(max_completion_tokens=9, max_tokens=9)
    assert [call[1].max_tokens for call in house.generator.calls] == [500 - 8, 9, 9]


def test_every_sampling_field_arrives(house: House) -> None:
    fields = {
        "temperature": 0.3,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "seed": -(2**63),
        "presence_penalty": -2,
        "frequency_penalty": 2,
        "repetition_penalty": 1.1,
        "logit_bias": {"7": -100, "9": 1.5},
        "stop": ["\n\n", "END"],
        "stop_token_ids": [3, 4],
        "ignore_eos": True,
        "min_tokens": 2,
        "max_tokens": 20,
        "n": 2,
        "logprobs": True,
        "top_logprobs": 5,
    }
    neutral = {
        "user": "u", "metadata": {"a": "b"}, "service_tier": "auto", "store": False, "tools": [],
        "tool_choice": "none", "response_format": {"type": "text"}, "modalities": ["text"],
        "parallel_tool_calls": True, "verbosity": None,
    }  # fmt: skip
    assert house.chat(**fields, **neutral).status_code == 200
    params = house.generator.calls[0][1]
    expected = {**fields, "logit_bias": {7: -100, 9: 1.5}, "stop": ("\n\n", "END"), "stop_token_ids": (3, 4)}
    expected["logprobs"] = expected.pop("top_logprobs")
    assert {name: getattr(params, name) for name in expected} == expected


def test_null_fields_are_defaults(house: House) -> None:
    names = (
        "max_tokens",
        "temperature",
        "top_p",
        "n",
        "seed",
        "stop",
        "logit_bias",
        "stream",
        "stream_options",
    )
    assert house.chat(**dict.fromkeys(names)).status_code == 200
    house.chat()
    assert house.generator.calls[0][1] == house.generator.calls[1][1]


@pytest.mark.parametrize(("asked", "meant"), [(-1, 0), (0, 0), (5, 5)])
def test_top_k_minus_one_is_all(house: House, asked: int, meant: int) -> None:
    house.chat(top_k=asked)
    assert house.generator.calls[0][1].top_k == meant


def test_a_single_stop_string(house: House) -> None:
    house.chat(stop="END")
    assert house.generator.calls[0][1].stop == ("END",)
