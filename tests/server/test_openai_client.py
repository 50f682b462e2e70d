"""The official client, synchronous and asynchronous, over a real socket."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from .fakes import FakeGenerator, House, adapter_at, build, listening, run, until

HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[House, str]]:
    house = build(FakeGenerator(delay=0.002))
    path: Path = tmp_path_factory.mktemp("adapters")
    body = {"lora_name": "poet", "lora_path": adapter_at(path, "verse")}
    assert house.post("/v1/load_lora_adapter", body).status_code == 200
    with listening(house) as url:
        yield house, url + "/v1"


@pytest.fixture(scope="module")
def client(served: tuple[House, str]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=served[1], api_key="unused", max_retries=0) as client:
        yield client


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="poet", messages=HELLO, max_tokens=10, temperature=0.5, seed=3
    )
    assert answer.choices[0].message.content == "Hello!"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert (answer.usage.total_tokens, answer.usage.prompt_tokens_details.cached_tokens) == (11, 2)
    dumped = answer.choices[0].message.model_dump()
    history: list[ChatCompletionMessageParam] = [*HELLO, dumped, {"role": "user", "content": "on"}]  # type: ignore[list-item]
    assert (
        client.chat.completions.create(model="poet", messages=history).choices[0].message.content == "Hello!"
    )


def test_chat_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="base", messages=HELLO, logprobs=True, top_logprobs=3)
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.content is not None
    assert [len(token.top_logprobs) for token in answer.choices[0].logprobs.content] == [3, 3, 3]


def test_chat_stream(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="poet", messages=HELLO, stream=True, n=2, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    for index in range(2):
        mine = [c.choices[0] for c in chunks if c.choices[0].index == index]
        assert mine[0].delta.role == "assistant"
        assert "".join(choice.delta.content or "" for choice in mine) == "Hello!"
        assert [choice.finish_reason for choice in mine if choice.finish_reason] == ["stop"]
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 6


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="base", prompt=["a", "b"], logprobs=2)
    assert [choice.text for choice in answer.choices] == ["Hello!", "Hello!"]
    assert answer.choices[1].logprobs is not None
    assert answer.choices[1].logprobs.text_offset == [0, 1, 2]
    stream = client.completions.create(model="base", prompt="a", stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "Hello!"


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["base", "poet"]
    assert client.models.retrieve("poet").id == "poet"


def test_errors(client: openai.OpenAI, served: tuple[House, str]) -> None:
    with pytest.raises(openai.NotFoundError, match="served here: 'base', 'poet'"):
        client.chat.completions.create(model="nobody", messages=HELLO)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="base", messages=HELLO, temperature=3)
    assert (caught.value.param, caught.value.code) == ("temperature", "invalid_request")
    with pytest.raises(openai.BadRequestError, match="best_of is not supported"):
        client.completions.create(model="base", prompt="x", best_of=3)
    generator = served[0].generator
    generator.ready = False
    with pytest.raises(openai.InternalServerError, match="warming up"):
        client.completions.create(model="base", prompt="x")
    generator.ready = True


def test_an_error_in_a_stream(client: openai.OpenAI, served: tuple[House, str]) -> None:
    generator = served[0].generator
    generator.fail_after = generator.yielded + 2
    said = ""
    try:
        for chunk in client.chat.completions.create(model="base", messages=HELLO, stream=True):
            said += chunk.choices[0].delta.content or ""
    except openai.APIError as error:
        said += f" ({error.message})"
    finally:
        generator.fail_after = None
    assert said == "Hello (the engine fell over)"


def test_the_asynchronous_client(served: tuple[House, str]) -> None:
    house, url = served

    async def scenario() -> None:
        async with openai.AsyncOpenAI(base_url=url, api_key="unused", max_retries=0) as client:
            answer = await client.chat.completions.create(model="base", messages=HELLO)
            assert answer.choices[0].message.content == "Hello!"
            stream = await client.completions.create(model="base", prompt="x", stream=True)
            assert "".join([chunk.choices[0].text async for chunk in stream]) == "Hello!"
            raw = await client.chat.completions.with_raw_response.create(model="poet", messages=HELLO)
            assert raw.headers["x-motet-adapter-digest"].startswith("sha256:")
            with pytest.raises(openai.NotFoundError):
                await client.completions.create(model="nobody", prompt="x")

    run(scenario())
    assert house.generator.running == 0


def test_cancelling_with_the_asynchronous_client(served: tuple[House, str]) -> None:
    house, url = served
    house.generator.words, words = ["a"] * 400, house.generator.words
    house.generator.aborted.clear()

    async def scenario() -> None:
        async with openai.AsyncOpenAI(base_url=url, api_key="unused", max_retries=0) as client:
            stream = await client.completions.create(model="base", prompt="x", stream=True, max_tokens=400)
            async for _ in stream:
                break
            await stream.close()
            await until(lambda: house.generator.running == 0)
            assert len(house.generator.aborted) == 1

    try:
        run(scenario())
    finally:
        house.generator.words = words
