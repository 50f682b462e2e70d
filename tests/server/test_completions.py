"""Text completions: the kinds of prompt, numbering, log-probabilities, streams."""

from __future__ import annotations

import json

from .fakes import FakeGenerator, House, build
from .test_chat import events


def test_a_whole_answer(house: House) -> None:
    answer = house.complete().json()
    assert answer["id"].startswith("cmpl-")
    assert answer["object"] == "text_completion"
    assert answer["choices"] == [{"index": 0, "text": "Hello!", "logprobs": None, "finish_reason": "stop"}]
    assert answer["usage"]["prompt_tokens"] == 3
    assert house.generator.calls[0][1].max_tokens == 16


def test_a_stream_byte_for_byte(house: House) -> None:
    text = house.complete(stream=True).text
    first = json.loads(text.split("\n\n")[0].removeprefix("data: "))
    head = (
        f'data: {{"id":"{first["id"]}","object":"text_completion","created":{first["created"]},'
        '"model":"base","system_fingerprint":"fp_ba5eba5eba5e","choices":[{"index":0,"text":'
    )
    assert text == (
        f'{head}"Hel","logprobs":null,"finish_reason":null}}]}}\n\n'
        f'{head}"lo","logprobs":null,"finish_reason":null}}]}}\n\n'
        f'{head}"!","logprobs":null,"finish_reason":"stop"}}]}}\n\n'
        "data: [DONE]\n\n"
    )


def test_token_ids(house: House) -> None:
    assert house.complete(prompt=[5, 6, 7]).status_code == 200
    assert house.generator.calls[0][0] == (5, 6, 7)


def test_several_prompts_are_numbered_as_openai_does(house: House) -> None:
    answer = house.complete(prompt=["a", "bcd"], n=2).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"] == {
        "prompt_tokens": 4,
        "completion_tokens": 12,
        "total_tokens": 16,
        "prompt_tokens_details": {"cached_tokens": 4},
    }
    prompts = [bytes(call[0]) for call in house.generator.calls]
    assert prompts == [b"a", b"bcd"]
    assert len({call[3] for call in house.generator.calls}) == 2
    house.complete(prompt=[[1, 2], [3]])
    assert [call[0] for call in house.generator.calls[2:]] == [(1, 2), (3,)]


def test_several_prompts_stream(house: House) -> None:
    chunks = events(house.complete(prompt=["a", "b"], n=2, stream=True).text)
    texts = dict.fromkeys(range(4), "")
    for chunk in chunks:
        choice = chunk["choices"][0]  # type: ignore[index]
        texts[choice["index"]] += choice["text"]
    assert texts == dict.fromkeys(range(4), "Hello!")


def test_one_failing_prompt_fails_the_request(house: House) -> None:
    house.generator.fail_after = 2
    response = house.complete(prompt=["a", "b", "c"])
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "the engine fell over"
    assert house.generator.running == 0


def test_logprobs(house: House) -> None:
    logprobs = house.complete(logprobs=2).json()["choices"][0]["logprobs"]
    assert logprobs == {
        "tokens": ["H", "l", "!"],
        "token_logprobs": [-0.5, -0.5, -0.5],
        "top_logprobs": [{"H": -0.5, "I": -1.5}, {"l": -0.5, "m": -1.5}, {"!": -0.5, '"': -1.5}],
        "text_offset": [0, 1, 2],
    }
    chunks = events(house.complete(logprobs=2, stream=True).text)
    pieces = [chunk["choices"][0]["logprobs"] for chunk in chunks]  # type: ignore[index]
    for column, values in logprobs.items():
        assert [value for piece in pieces for value in piece[column]] == values
    assert house.complete(logprobs=0).json()["choices"][0]["logprobs"]["top_logprobs"][0] == {"H": -0.5}


def test_impossible_tokens_have_finite_logprobs() -> None:
    house = build(FakeGenerator(["x"]))
    top = house.complete(logprobs=2).json()["choices"][0]["logprobs"]["top_logprobs"]
    assert top == [{"x": -0.5, "y": -1.5}]


def test_the_default_length_is_clipped_to_the_context(house: House) -> None:
    house.complete(prompt="x" * 490)
    assert house.generator.calls[0][1].max_tokens == 10


def test_neutral_values_of_unsupported_fields(house: House) -> None:
    assert house.complete(echo=False, best_of=1, suffix=None).status_code == 200


def test_length_is_reported(house: House) -> None:
    assert house.complete(max_tokens=3).json()["choices"][0]["finish_reason"] == "length"
