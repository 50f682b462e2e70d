"""The Python API on a tiny model: `from motet import LLM`."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import motet
from motet import LLM, SamplingParams
from motet.errors import AdapterRefused, InvalidRequest, ModelNotFound, ModelRefused
from tests.live import until
from tests.tiny import write_adapter, write_model

GREEDY = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
PROMPT = "a prompt"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    model = write_model(home / "model", "llama")
    for seed, name in enumerate(("red", "blue")):
        write_adapter(
            home / name, model, "llama", seed, r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"]
        )
    return home


@pytest.fixture(scope="module", autouse=True)
def cache(home: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOTET_CACHE", str(home / "cache"))
        yield


@pytest.fixture(scope="module")
def llm(home: Path) -> Iterator[LLM]:
    with LLM(str(home / "model"), {"red": str(home / "red")}, pool_bytes=1 << 20, threads=1) as llm:
        llm.load_adapter("blue", str(home / "blue"))
        yield llm
        stats = llm.stats()
        assert (stats.running, stats.waiting, stats.kv_pages) == (0, 0, 0)


def test_a_batch_of_base_and_adapters(llm: LLM) -> None:
    names = [None, "red", "blue"]
    alone = [llm.complete(PROMPT, GREEDY, name) for name in names]
    assert len({answer.text for answer in alone}) == 3
    together = llm.generate([PROMPT, PROMPT, PROMPT, "another"], GREEDY, [*names, "red"])
    assert together[:3] == alone
    assert all((len(a.token_ids), a.finish) == (16, "length") for a in together)
    assert llm.generate([PROMPT], GREEDY) == alone[:1]


def test_text_and_tokens_are_the_same_prompt(llm: LLM) -> None:
    said: list[dict[str, object]] = [{"role": "user", "content": "hello"}]
    tokens = llm.encode_chat(said)
    assert llm.chat(said, GREEDY, "red") == llm.complete(tokens, GREEDY, "red")
    assert llm.complete("<user>hello\n<assistant>", GREEDY, "red") == llm.complete(tokens, GREEDY, "red")


def test_seeds(llm: LLM) -> None:
    def drawn(seed: int | None, n: int = 1) -> list[str]:
        params = SamplingParams(max_tokens=16, seed=seed, n=n, ignore_eos=True)
        return [answer.text for answer in llm.generate([PROMPT], params, ["blue"])]

    assert drawn(3) == drawn(3) != drawn(4)
    choices = drawn(3, n=3)
    assert choices == drawn(3, n=3)
    assert choices[:1] == drawn(3)
    assert len(set(choices)) == 3
    assert drawn(None) != drawn(None)


def test_stop_strings_and_log_probabilities(llm: LLM) -> None:
    params = SamplingParams(max_tokens=32, temperature=0, ignore_eos=True, logprobs=2)
    free = llm.complete(PROMPT, params)
    assert len(free.logprobs) == 32
    assert all(p.token_id == p.top[0][0] for p in free.logprobs)
    stop = next(c for c in free.text[4:] if c != "\ufffd")
    cut = llm.complete(PROMPT, SamplingParams(max_tokens=32, temperature=0, ignore_eos=True, stop=(stop,)))
    assert (cut.text, cut.finish) == (free.text[: free.text.index(stop)], "stop")


def test_what_is_wrong_is_told(llm: LLM, home: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"no model 'green'; served here: 'model', 'blue', 'red'"):
        llm.complete(PROMPT, GREEDY, "green")
    with pytest.raises(InvalidRequest, match="300"):
        llm.complete(PROMPT, SamplingParams(max_tokens=300))
    with pytest.raises(InvalidRequest, match="empty"):
        llm.complete("")
    with pytest.raises(AdapterRefused, match="nowhere"):
        llm.load_adapter("green", str(home / "nowhere"))
    with pytest.raises(ModelRefused, match=r"no config\.json"):
        LLM(str(tmp_path))
    assert llm.complete(PROMPT, GREEDY, "red").finish == "length"


def test_closing_ends_every_thread(home: Path) -> None:
    before = set(threading.enumerate())
    llm = LLM(str(home / "model"), pool_bytes=1 << 20, threads=1)
    assert {thread.name for thread in set(threading.enumerate()) - before} >= {"motet-llm", "motet-engine"}
    llm.close()
    until(lambda: set(threading.enumerate()) <= before)
    llm.close()


def test_a_start_that_fails_leaves_no_thread(home: Path) -> None:
    before = set(threading.enumerate())
    with pytest.raises(AdapterRefused, match="nowhere"):
        LLM(str(home / "model"), {"red": str(home / "nowhere")}, pool_bytes=1 << 20, threads=1)
    until(lambda: set(threading.enumerate()) <= before)


def test_a_name_can_be_given_other_weights(home: Path) -> None:
    with LLM(str(home / "model"), {"it": str(home / "red")}, pool_bytes=1 << 20, threads=1) as llm:
        red = llm.complete(PROMPT, GREEDY, "it")
        digest = llm.load_adapter("it", str(home / "blue"))
        assert llm.complete(PROMPT, GREEDY, "it") != red
        assert set(llm.stats().residency) == {digest}


def test_the_package_has_what_it_names() -> None:
    assert motet.__all__ == ["LLM", "SamplingParams"]
    with pytest.raises(AttributeError, match="Quartet"):
        _ = motet.Quartet
