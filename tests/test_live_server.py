"""The house as its users meet it: OpenAI's own clients against `motet serve`, and what goes wrong in a day.

Where greedy answers are compared, it is made sure first that no token of them was a near-tie: other company in the
batch changes the last bits of float32 sums, logits by about 1e-6, and cannot turn a decision by CLEAR_MARGIN.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import pickle
import shutil
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types import CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionMessageParam

from tests.live import LiveServer, live_server, until
from tests.tiny import write_adapter, write_expert_adapter, write_model

BASE = "model"
ADAPTERS = ("attention", "experts", "fused")
MODELS = (BASE, *ADAPTERS)
PROMPT = "The same prompt for every model."
LONG = 200  # tokens, about a third of a second: enough for something else to happen meanwhile
POOL = "--pool=16MiB"
NO_EOS = {"ignore_eos": True}
CLEAR_MARGIN = 2e-5
pytestmark = pytest.mark.xdist_group("live")  # one server for all, on one worker


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral, three adapters of different kinds to serve, two to load later, and three that are no good."""
    home = tmp_path_factory.mktemp("home")
    model = write_model(home / BASE, "mixtral", max_position_embeddings=2048)
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

    def write(name: str, seed: int, **config: object) -> None:
        write_adapter(home / name, model, "mixtral", seed, **config)

    write("fused", 1, r=5, lora_alpha=10, target_modules=attention, target_parameters=experts)
    write("attention", 2, r=16, lora_alpha=16, target_modules=["q_proj", "o_proj"])
    write_expert_adapter(home / "experts", model, 3, rank=6)
    write("red", 4, r=4, lora_alpha=8, target_modules=attention)
    write("blue", 5, r=4, lora_alpha=8, target_modules=attention)
    wide = write_model(home / "wide-model", "mixtral", hidden_size=64)
    write_adapter(home / "foreign", wide, "mixtral", 6, r=4, target_modules=["q_proj"])
    shutil.copytree(home / "red", home / "corrupt")
    os.truncate(home / "corrupt" / "adapter_model.safetensors", 5000)
    shutil.copytree(home / "red", home / "pickled")
    (home / "pickled" / "adapter_model.safetensors").unlink()
    (home / "pickled" / "adapter_model.bin").write_bytes(pickle.dumps(Trap(home / "sprung")))
    return home


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (str(self._file), "w")


@pytest.fixture(scope="module")
def server(home: Path) -> Iterator[LiveServer]:
    with live_server(home / BASE, {name: home / name for name in ADAPTERS}, home / "cache", POOL) as server:
        yield server
        until(server.is_idle)


@pytest.fixture
def own_server(home: Path) -> Iterator[LiveServer]:
    """A server that the test brings to its end."""
    adapters = {name: home / name for name in ADAPTERS}
    with live_server(home / BASE, adapters, home / "cache", POOL, stop=False) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="unused", max_retries=0, timeout=60) as client:
        yield client


def many(server: LiveServer) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="unused", max_retries=0, timeout=60)


def said(prompt: str) -> list[ChatCompletionMessageParam]:
    return [{"role": "user", "content": prompt}]


def text_of(answer: ChatCompletion) -> str:
    return answer.choices[0].message.content or ""


def measured(client: openai.OpenAI, model: str, prompt: str, max_tokens: int) -> tuple[str, float]:
    """The greedy answer to one request, and by how much the closest of its decisions was taken."""
    answer = client.chat.completions.create(
        model=model, messages=said(prompt), max_tokens=max_tokens, temperature=0, logprobs=True, top_logprobs=2,
        extra_body=NO_EOS,
    )  # fmt: skip
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    tops = [[top.logprob for top in token.top_logprobs] for token in logprobs.content]
    return text_of(answer), min(best - second for best, second in tops)


def solo(client: openai.OpenAI, model: str, prompt: str = PROMPT, max_tokens: int = 32) -> str:
    """The greedy answer to one request, whose every token was a clear decision."""
    text, margin = measured(client, model, prompt, max_tokens)
    assert margin > CLEAR_MARGIN, "choose another prompt"
    return text


def clear_prompt(client: openai.OpenAI, model: str, max_tokens: int = LONG) -> tuple[str, str]:
    """A prompt with a long answer of clear decisions, and the answer."""
    for number in itertools.count():
        text, margin = measured(client, model, f"prompt {number}", max_tokens)
        if margin > CLEAR_MARGIN:
            return f"prompt {number}", text
    raise AssertionError


async def greedy(client: openai.AsyncOpenAI, model: str, prompt: str = PROMPT, max_tokens: int = 32) -> str:
    return text_of(
        await client.chat.completions.create(
            model=model, messages=said(prompt), max_tokens=max_tokens, temperature=0, extra_body=NO_EOS
        )
    )


async def streamed(
    client: openai.AsyncOpenAI,
    model: str,
    prompt: str = PROMPT,
    max_tokens: int = LONG,
    meanwhile: Callable[[], Awaitable[None]] | None = None,
) -> str:
    """A streamed greedy answer; `meanwhile` runs once its first event is here."""
    text = ""
    stream = await client.chat.completions.create(
        model=model,
        messages=said(prompt),
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
        extra_body=NO_EOS,
    )
    async for chunk in stream:
        text += chunk.choices[0].delta.content or ""
        if meanwhile is not None:
            await meanwhile()
            meanwhile = None
    return text


def sampled(client: openai.OpenAI, model: str, seed: int, n: int = 1) -> list[str]:
    answer = client.chat.completions.create(
        model=model, messages=said(PROMPT), max_tokens=24, temperature=1.0, top_p=0.98, seed=seed, n=n
    )
    return [choice.message.content or "" for choice in answer.choices]


# What every client expects


def test_names_choose_the_weights(client: openai.OpenAI, server: LiveServer) -> None:
    assert [model.id for model in client.models.list()] == [BASE, *ADAPTERS]
    assert len({solo(client, model) for model in MODELS}) == len(MODELS), "the adapters change nothing"
    with pytest.raises(openai.NotFoundError) as caught:
        solo(client, "nobody")
    assert caught.value.code == "model_not_found"
    assert all(repr(name) in caught.value.message for name in MODELS)
    assert server.get("/health").status_code == 200


@pytest.mark.parametrize("model", [BASE, "fused"])
def test_a_stream_says_what_the_whole_answer_says(client: openai.OpenAI, model: str) -> None:
    whole = client.chat.completions.create(
        model=model, messages=said(PROMPT), max_tokens=32, temperature=0, extra_body=NO_EOS
    )
    assert whole.choices[0].finish_reason == "length"
    assert whole.model == model
    *chunks, last = client.chat.completions.create(
        model=model, messages=said(PROMPT), max_tokens=32, temperature=0, extra_body=NO_EOS, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text_of(whole)
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == ["length"]
    prompt_tokens = len(f"<user>{PROMPT}\n<assistant>")
    for usage in (whole.usage, last.usage):
        assert isinstance(usage, CompletionUsage)
        assert (usage.prompt_tokens, usage.completion_tokens) == (prompt_tokens, 32)
        assert usage.total_tokens == prompt_tokens + 32


def test_text_completions(client: openai.OpenAI) -> None:
    prompts = ["first", "the second"]
    whole = client.completions.create(
        model="experts", prompt=prompts, max_tokens=12, temperature=0, logprobs=3, extra_body=NO_EOS
    )
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (15, 24)
    logprobs = whole.choices[1].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert len(logprobs.tokens) == 12
    texts = ["", ""]
    for chunk in client.completions.create(
        model="experts", prompt=prompts, max_tokens=12, temperature=0, stream=True, extra_body=NO_EOS
    ):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices]


def test_log_probabilities(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="fused", messages=said(PROMPT), max_tokens=16, temperature=0, logprobs=True, top_logprobs=4,
        extra_body=NO_EOS,
    )  # fmt: skip
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 16
    for token in logprobs.content:
        values = [top.logprob for top in token.top_logprobs]
        assert len(values) == 4
        assert values == sorted(values, reverse=True)
        assert values[0] == token.logprob < 0
        assert token.top_logprobs[0].token == token.token


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_text_before_it(
    client: openai.OpenAI, server: LiveServer, stream: bool
) -> None:
    free = solo(client, "experts", max_tokens=60)
    stop = next(free[at : at + 2] for at in range(8, 40) if "\ufffd" not in free[at : at + 2])
    body = {
        "model": "experts",
        "messages": said(PROMPT),
        "max_tokens": 60,
        "temperature": 0,
        "stop": ["never", stop],
    }
    answer = server.post("/v1/chat/completions", {**body, **NO_EOS, "stream": stream})
    if stream:
        events = [json.loads(line[6:]) for line in answer.text.split("\n\n")[:-2]]
        text = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
        finish = events[-1]["choices"][0]["finish_reason"]
    else:
        choice = answer.json()["choices"][0]
        text, finish = choice["message"]["content"], choice["finish_reason"]
    assert text == free[: free.index(stop)]
    assert finish == "stop"
    until(server.is_idle)


def test_choices_differ_and_repeat_with_the_seed(client: openai.OpenAI) -> None:
    first = sampled(client, "attention", seed=7, n=3)
    assert len(set(first)) == 3
    assert sampled(client, "attention", seed=7, n=3) == first
    assert sampled(client, "attention", seed=7) == first[:1]
    assert sampled(client, "attention", seed=8, n=3) != first


def test_a_seed_gives_the_same_text_alone_and_in_company(client: openai.OpenAI, server: LiveServer) -> None:
    wanted = {model: sampled(client, model, seed=11)[0] for model in MODELS}

    async def one(company: openai.AsyncOpenAI, model: str, prompt: str, seed: int | None) -> str:
        return text_of(
            await company.chat.completions.create(
                model=model, messages=said(prompt), max_tokens=24, temperature=1.0, top_p=0.98, seed=seed
            )
        )

    async def scenario() -> list[str]:
        async with many(server) as company:
            noise = [one(company, MODELS[i % 4], f"noise {i}", None) for i in range(12)]
            answers = await asyncio.gather(*(one(company, m, PROMPT, 11) for m in MODELS), *noise)
            return list(answers[: len(MODELS)])

    assert asyncio.run(scenario()) == list(wanted.values())


# Many at once


def test_mixed_requests_get_their_own_answers(client: openai.OpenAI, server: LiveServer) -> None:
    jobs: list[tuple[str, str, int]] = []
    wanted: list[str] = []
    for number in itertools.count():
        job = (MODELS[number % len(MODELS)], f"{number}: " + "a b c " * (number % 5), 10 + 3 * len(jobs))
        text, margin = measured(client, *job)
        if margin > CLEAR_MARGIN:
            jobs.append(job)
            wanted.append(text)
        if len(jobs) == 24:
            break

    async def scenario() -> list[str]:
        async with many(server) as company:
            ask = (streamed, greedy)
            return list(await asyncio.gather(*(ask[i % 2](company, *job) for i, job in enumerate(jobs))))

    assert asyncio.run(scenario()) == wanted


def test_a_client_that_leaves_stops_the_work(server: LiveServer) -> None:
    async def scenario() -> None:
        async with many(server) as company:
            streams = [
                await company.chat.completions.create(
                    model=model, messages=said(PROMPT), max_tokens=1900, stream=True, extra_body=NO_EOS, n=n
                )
                for model, n in ((BASE, 1), ("fused", 3))
            ]
            for stream in streams:
                async for _ in stream:
                    break
            assert server.samples()["motet_requests_running"] == 4
            for stream in streams:
                await stream.close()

    asyncio.run(scenario())
    until(server.is_idle, 5)
    assert server.samples()['motet_requests_total{model="fused",outcome="cancelled"}'] == 1


# Adapters come, change and go


def test_load_replace_and_unload_while_serving(client: openai.OpenAI, server: LiveServer, home: Path) -> None:
    def load(name: str, folder: str, **more: object) -> httpx.Response:
        body = {"lora_name": name, "lora_path": str(home / folder), **more}
        return server.post("/v1/load_lora_adapter", body)

    loaded = load("paint", "red")
    assert loaded.status_code == 200, loaded.text
    prompt, red = clear_prompt(client, "paint")
    assert solo(client, "paint", prompt, LONG) == red, "its prefix is cached now"

    assert load("sky", "blue").status_code == 200
    blue = solo(client, "sky", prompt)
    assert not red.startswith(blue[:20])
    refused = load("paint", "blue")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "adapter_conflict")
    replaced: list[httpx.Response] = []

    async def replace() -> None:
        replaced.append(await asyncio.to_thread(load, "paint", "blue", replace=True))

    async def scenario() -> str:
        async with many(server) as company:
            return await streamed(company, "paint", prompt, meanwhile=replace)

    assert asyncio.run(scenario()) == red, "a stream ends on the weights that it began with"
    assert replaced[0].status_code == 200
    assert replaced[0].json()["digest"] != loaded.json()["digest"]
    assert solo(client, "paint", prompt) == blue, "the new weights met the old weights' KV cache"

    def residents() -> set[str]:
        return {name for name in server.samples() if name.startswith("motet_adapter_resident{")}

    for name in ("paint", "sky"):
        assert server.post("/v1/unload_lora_adapter", {"lora_name": name}).status_code == 200
        with pytest.raises(openai.NotFoundError):
            solo(client, name)
    assert residents() == {f'motet_adapter_resident{{model="{name}"}}' for name in ADAPTERS}
    assert [model.id for model in client.models.list()] == [BASE, *ADAPTERS]


# Bad input, one client's

CHAT, COMPLETIONS, LOAD = "/v1/chat/completions", "/v1/completions", "/v1/load_lora_adapter"
COMPLETION = {"model": BASE, "prompt": "x"}


@pytest.fixture(scope="module")
def neighbour(client: openai.OpenAI) -> tuple[str, str]:
    """A prompt to `fused`, and its long answer when it is alone."""
    return clear_prompt(client, "fused")


def chat_body(**fields: Any) -> bytes:
    return json.dumps({"model": BASE, "messages": said("hi"), **fields}).encode()


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "message"),
    [
        pytest.param(CHAT, chat_body(messages=said("long " * 600)), 400, "context_length_exceeded", "2048",
                     id="over-long prompt"),
        pytest.param(CHAT, chat_body(messages=said("long " * 10**6)), 400, "context_length_exceeded", "2048",
                     id="absurd prompt"),
        pytest.param(CHAT, chat_body(model="nobody"), 404, "model_not_found", "'fused'", id="unknown model"),
        pytest.param(CHAT, b'{"model": "model", "messages": [', 400, "invalid_request", "not valid JSON",
                     id="malformed JSON"),
        pytest.param(CHAT, chat_body(n=10**9), 400, "invalid_request", "n must be between 1 and 16", id="n"),
        pytest.param(CHAT, chat_body(max_tokens=10**12), 400, "invalid_request", "max_tokens must be",
                     id="max_tokens"),
        pytest.param(CHAT, chat_body(max_tokens=5000), 400, "context_length_exceeded", "5000",
                     id="max_tokens over the context"),
        pytest.param(LOAD, "corrupt", 422, "adapter_refused", "adapter_model.safetensors", id="corrupt adapter"),
        pytest.param(LOAD, "foreign", 422, "adapter_refused", "q_proj", id="adapter of another base"),
        pytest.param(LOAD, "pickled", 422, "adapter_refused", "is a pickle", id="pickle"),
        pytest.param(LOAD, "nowhere", 422, "adapter_refused", "is not a directory", id="no adapter"),
    ],
)  # fmt: skip
def test_bad_input_is_told_to_its_sender_and_felt_by_nobody_else(
    client: openai.OpenAI,
    server: LiveServer,
    home: Path,
    neighbour: tuple[str, str],
    path: str,
    body: bytes | str,
    status: int,
    code: str,
    message: str,
) -> None:
    if isinstance(body, str):
        body = json.dumps({"lora_name": "bad", "lora_path": str(home / body)}).encode()
    answers: list[httpx.Response] = []

    async def offend() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as offender:
            headers = {"Content-Type": "application/json"}
            answers.append(await offender.post(path, content=body, headers=headers))

    async def scenario() -> str:
        async with many(server) as company:
            return await streamed(company, "fused", neighbour[0], meanwhile=offend)

    assert asyncio.run(scenario()) == neighbour[1]
    assert answers[0].status_code == status
    error = answers[0].json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert message in error["message"]
    assert not (home / "sprung").exists(), "the pickle was opened"
    assert [model.id for model in client.models.list()] == [BASE, *ADAPTERS]


# The end


def test_sigterm_lets_work_in_flight_finish(own_server: LiveServer) -> None:
    """The signal goes to every process of the service, as supervisors send it."""
    engine = own_server.engine_pid

    async def scenario() -> list[str]:
        async with many(own_server) as company:
            everyone = asyncio.Barrier(7)

            async def together() -> None:
                await everyone.wait()

            streams = [
                asyncio.create_task(streamed(company, MODELS[i % 4], str(i), 500, together)) for i in range(6)
            ]
            whole = asyncio.create_task(greedy(company, BASE, "whole", 500))
            await everyone.wait()
            os.kill(engine, signal.SIGTERM)
            own_server.process.send_signal(signal.SIGTERM)
            await asyncio.to_thread(until, lambda: own_server.get("/ready").status_code == 503)
            with pytest.raises(openai.InternalServerError, match="shutting down"):
                await greedy(company, BASE)
            return [*await asyncio.gather(*streams), await whole]

    texts = asyncio.run(scenario())
    assert own_server.wait() == 0
    assert all(texts), "every stream came to its [DONE], or the client had raised"
    until(lambda: not Path(f"/proc/{engine}").exists())


def test_an_engine_that_is_killed_ends_streams_and_turns_health_red(own_server: LiveServer) -> None:
    async def scenario() -> None:
        async with many(own_server) as company:
            everyone = asyncio.Barrier(3)

            async def together() -> None:
                await everyone.wait()

            streams = [
                asyncio.create_task(streamed(company, model, max_tokens=1900, meanwhile=together))
                for model in (BASE, "fused")
            ]
            whole = asyncio.create_task(greedy(company, BASE, max_tokens=1900))
            await everyone.wait()
            os.kill(own_server.engine_pid, signal.SIGKILL)
            killed = time.monotonic()
            for stream in streams:
                with pytest.raises(openai.APIError) as caught:
                    await asyncio.wait_for(stream, 5)
                assert caught.value.code == "engine_dead"
            with pytest.raises(openai.InternalServerError) as refused:
                await asyncio.wait_for(whole, 5)
            assert (refused.value.status_code, refused.value.code) == (503, "engine_dead")
            await asyncio.to_thread(until, lambda: own_server.get("/health").status_code == 503)
            assert time.monotonic() - killed < 5
            with pytest.raises(openai.InternalServerError, match="engine"):
                await greedy(company, BASE)

    asyncio.run(scenario())
    red = {"lora_name": "red", "lora_path": "/nowhere"}
    assert own_server.get("/ready").status_code == 503
    assert own_server.post("/v1/load_lora_adapter", red).status_code >= 400
    assert own_server.samples()["motet_engine_up"] == 0
    own_server.process.send_signal(signal.SIGTERM)
    assert own_server.wait() == 0
