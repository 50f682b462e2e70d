"""Prefills that begin while their adapter is still being copied: the same answers, and nobody else waits.

Copies are slowed down, and pages poisoned before, so that whoever reads or writes too early is found out. All in
float32, where an answer does not depend on what else is in a step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from torch import Tensor

from motet.adapters.image import ChunkTable
from motet.adapters.store import ImageStore
from motet.config import EngineConfig
from motet.engine import loop
from motet.engine.gates import Gates
from motet.engine.gpu_runner import GpuRunner
from motet.engine.loop import Engine
from motet.engine.sampler import Draw, SamplingRow
from motet.errors import MotetError
from motet.layers.gpu import GpuDevice
from motet.memory import pool as pools
from motet.memory.pool import KV_DTYPE, Copies
from motet.registry.prepare import prepare
from motet.types import BASE, Load, Plan, PreparedAdapter, Request, SamplingParams
from tests.tiny import write_adapter, write_model

MILLISECOND = 2_000_000
"""In cycles, or a little more."""
POISON = 0x41
"""In every byte: numbers of about 12."""
PROMPT = tuple(range(11, 51))
TARGETS: dict[str, dict[str, Any]] = {
    "llama": {
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    },
    "gpt-oss": {
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    },
}


class Desk:
    """An engine whose loads take `page_ms` for every page, and what each step was launched with."""

    def __init__(self, model: Path, kind: str, folder: Path) -> None:
        config = EngineConfig(
            model=str(model), device="cuda", pool_bytes=32 << 20, page_tokens=16, max_step_tokens=64,
            max_running=8, host_bytes=32 << 20, prefix_caching=False,
        )  # fmt: skip
        self.loaded = Event()
        self.engine = Engine(config, on_loaded=self.loaded.set)
        assert isinstance(self.engine.runner, GpuRunner)
        self.runner = self.engine.runner
        self.page_ms = 0
        self.copies: dict[str, Copies] = {}
        self.pages: dict[str, tuple[int, ...]] = {}
        self.kv: set[int] = set()
        # Whether an adapter's first step was launched before its copies were over.
        self.early: dict[str, bool] = {}
        self._asked = 0
        self.found = [
            prepare(
                write_adapter(folder / str(i), model, kind, seed=i, r=16, lora_alpha=16, **TARGETS[kind]),
                self.engine.spec,
                self.runner.pool.page_bytes,
                ImageStore(folder / "images"),
            )
            for i in range(2)
        ]
        self._watch()
        for adapter in self.found:
            self.register(adapter)

    def register(self, adapter: PreparedAdapter) -> None:
        self.engine.register_adapter(adapter.digest, Path(adapter.image), adapter.num_pages)

    def _watch(self) -> None:
        pool, runner = self.runner.pool, self.runner
        copy, fetch, add, launch = pool._copy, pool._fetch, runner.add_adapter, runner.launch

        def copying(pages: Any, *rest: Any) -> Copies:
            pool.data.index_fill_(0, torch.tensor(pages).pin_memory().to("cuda", non_blocking=True), POISON)
            return copy(pages, *rest)

        def fetching(*what: Any) -> Tensor:
            torch.cuda._sleep(self.page_ms * MILLISECOND)
            return fetch(*what)

        def adding(load: Load, chunks: ChunkTable, copies: Copies) -> None:
            self.copies[load.digest], self.pages[load.digest] = copies, load.pages
            add(load, chunks, copies)

        def launching(plan: Plan, row: Callable[[int], SamplingRow]) -> Draw:
            draw = launch(plan, row)
            for chunk in plan.chunks:
                if chunk.adapter in self.copies:
                    self.early.setdefault(chunk.adapter, not self.copies[chunk.adapter][-1].query())
            self.kv = {page for chunk in plan.chunks for table in chunk.pages for page in table}
            return draw

        pool._copy, pool._fetch = copying, fetching  # type: ignore[method-assign, assignment]
        runner.add_adapter, runner.launch = adding, launching  # type: ignore[method-assign]

    def add(self, adapter: str, prompt: tuple[int, ...] = PROMPT, tokens: int = 6) -> str:
        self._asked += 1
        params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
        name = f"{self._asked}"
        assert not self.engine.add(Request(name, prompt, params, adapter))
        return name

    def run(self) -> dict[str, tuple[int, ...]]:
        """The answers of all that has been added. Who asks in vain all the time keeps the pager from Python's lock."""
        answers: dict[str, tuple[int, ...]] = {}
        while self.engine.has_work:
            if self.engine.must_wait:
                self.loaded.wait(20)
            self.loaded.clear()
            for output in self.engine.step():
                assert output.error is None, output.error
                answers[output.request_id] = answers.get(output.request_id, ()) + output.token_ids
            self.engine.scheduler.check_integrity()
        return answers

    def ask(self, adapter: str, prompt: tuple[int, ...] = PROMPT, tokens: int = 6) -> tuple[int, ...]:
        name = self.add(adapter, prompt, tokens)
        return self.run()[name]

    def until_reported(self, loads: int) -> None:
        """Wait for the pager, which is at work already."""
        deadline = time.monotonic() + 20
        while self.engine.pager._done.qsize() < loads:
            assert time.monotonic() < deadline
            time.sleep(0.0002)

    def cold(self) -> None:
        """Both adapters leave the pool and the host tier, and nothing is under way."""
        self.run()
        for adapter in self.found:
            self.engine.forget_adapter(adapter.digest)
        self.engine.step()
        self.engine.stats()
        for adapter in self.found:
            assert adapter.digest not in self.runner.table
            self.register(adapter)
        torch.cuda.synchronize()
        self.copies.clear()
        self.early.clear()


@pytest.fixture(scope="module", params=["llama", "gpt-oss"])
def kept(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(KV_DTYPE, "cuda", torch.float32)
        patch.setattr(loop, "weights_device", lambda _: GpuDevice(torch.device("cuda"), torch.float32))
        patch.setattr(pools, "STAGED_PAGES", 1)
        desk = Desk(write_model(folder / "model", request.param), request.param, folder)
        for adapter in desk.found:
            assert adapter.num_pages >= 16
            desk.ask(adapter.digest)  # whatever is done only once
        yield desk
        desk.engine.close()


@pytest.fixture
def desk(kept: Desk) -> Iterator[Desk]:
    """With both adapters in the pool at first."""
    for adapter in kept.found:
        kept.ask(adapter.digest)
    yield kept
    kept.page_ms = 0
    kept.cold()


PROMPTS = [PROMPT, (7,)]


@pytest.mark.parametrize("prompt", PROMPTS, ids=["prompt", "single"])
def test_answers_are_those_of_an_adapter_that_was_there(desk: Desk, prompt: tuple[int, ...]) -> None:
    adapter = desk.found[0].digest
    expected = desk.ask(adapter, prompt)
    desk.cold()
    desk.page_ms = 5
    assert desk.ask(adapter, prompt) == expected
    assert desk.early == {adapter: True}, "its first step was to be launched before its copies are over"


def test_so_are_those_of_a_step_for_which_nothing_was_captured(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desk.runner, "_size_for", lambda _: 0)
    adapter = desk.found[0].digest
    expected = desk.ask(adapter)
    desk.cold()
    desk.page_ms = 5
    assert desk.ask(adapter) == expected
    assert desk.early == {adapter: True}


def first_only(self: Gates, digest: str, copies: Copies) -> None:
    """Every layer waits for what the first one needs."""
    self._coming[digest] = copies[:1] * len(copies)


@pytest.mark.parametrize("expect", [lambda *_: None, first_only], ids=["no waits", "first layer's"])
@pytest.mark.parametrize("prompt", PROMPTS, ids=["prompt", "single"])
def test_without_a_layers_wait_the_answer_is_another(
    desk: Desk, prompt: tuple[int, ...], expect: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the tests above can fail, and a prefill does begin with its first layer's copies."""
    adapter = desk.found[0].digest
    expected = desk.ask(adapter, prompt)
    desk.cold()
    desk.page_ms = 5
    monkeypatch.setattr(Gates, "expect", expect)
    assert desk.ask(adapter, prompt) != expected


@pytest.mark.parametrize("prompt", PROMPTS, ids=["prompt", "single"])
def test_two_adapters_that_come_at_once(desk: Desk, prompt: tuple[int, ...]) -> None:
    """The first prompts of both are in one step: one adapter is there by then, though no step has waited for it."""
    digests = [adapter.digest for adapter in desk.found]
    expected = [desk.ask(digest, prompt) for digest in digests]
    assert expected[0] != expected[1]
    desk.cold()
    desk.page_ms = 5
    names = [desk.add(digest, prompt) for digest in digests]
    desk.engine.step()
    desk.until_reported(loads=2)
    answers = desk.run()
    assert [answers[name] for name in names] == expected
    assert sorted(desk.early.values()) == [False, True]


def test_two_adapters_that_come_one_after_the_other(desk: Desk) -> None:
    digests = [adapter.digest for adapter in desk.found]
    expected = [desk.ask(digest) for digest in digests]
    desk.cold()
    desk.page_ms = 5
    names = [desk.add(digest) for digest in digests]
    answers = desk.run()
    assert [answers[name] for name in names] == expected
    assert desk.early == dict.fromkeys(digests, True)


def test_others_do_not_wait(desk: Desk) -> None:
    """A prompt with an adapter that is there is answered while another adapter comes."""
    resident, coming = (adapter.digest for adapter in desk.found)
    expected = desk.ask(resident)
    desk.cold()
    assert desk.ask(resident) == expected
    desk.page_ms = 25
    desk.engine.prefetch(coming)
    desk.engine.step()
    desk.until_reported(loads=1)
    desk.engine.step()
    name, answer = desk.add(resident), tuple[int, ...]()
    while len(answer) < len(expected):
        answer += tuple(t for output in desk.engine.step() for t in output.token_ids)
    assert not desk.copies[coming][-1].query()
    assert answer == expected, name
    desk.page_ms = 0
    assert desk.ask(coming) != expected


def test_pages_of_an_adapter_that_leaves_before_it_is_there(desk: Desk) -> None:
    """Nobody waits for it any more, and its pages are others' at once, who write to them after the copies."""
    adapter = desk.found[0].digest
    expected = desk.ask(BASE)
    desk.cold()
    desk.page_ms = 5
    name = desk.add(adapter)
    desk.engine.step()
    desk.until_reported(loads=1)
    desk.engine.abort(name)
    desk.engine.forget_adapter(adapter)
    desk.add(BASE)
    desk.engine.step()
    there = desk.copies[adapter][-1]
    assert desk.kv & set(desk.pages[adapter])
    assert not there.query()
    (answer,) = desk.run().values()
    assert answer == expected
    assert there.query()
    desk.register(desk.found[0])


def test_pages_of_an_adapter_for_which_the_table_has_no_room(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its load fails after its copies were enqueued; what is launched from then on runs behind them."""

    def full(*_: object) -> None:
        raise MotetError("the table is full")

    adapter = desk.found[0].digest
    desk.cold()
    desk.page_ms = 5
    with monkeypatch.context() as patch:
        patch.setattr(desk.runner.table, "add", full)
        name = desk.add(adapter)
        desk.engine.step()
        desk.until_reported(loads=1)
        (output,) = desk.engine.step()
        assert (output.request_id, output.finish) == (name, "error")
        there = desk.copies[adapter][-1]
        assert not there.query()
        torch.cuda.current_stream().synchronize()
        assert there.query()


def test_an_image_that_takes_anothers_place_in_memory(desk: Desk) -> None:
    """The host tier has room for one: what is read from it is not written to before it was fetched."""
    digests = [adapter.digest for adapter in desk.found]
    expected = [desk.ask(digest) for digest in digests]
    desk.cold()
    host, size = desk.engine.pager._host, desk.found[0].num_pages
    assert host is not None
    assert desk.found[1].num_pages == size
    while host.stats(0, 0.0).resident:
        time.sleep(0.001)
    host._free, put_by = host._free[-size:], host._free[:-size]
    desk.page_ms = 5
    names = [desk.add(digest) for digest in digests]
    answers = desk.run()
    host._free = sorted([*host._free, *put_by], reverse=True)
    assert [answers[name] for name in names] == expected
    assert host.stats(0, 0.0).evictions == 1
    assert desk.early == dict.fromkeys(digests, True)
    host.check_integrity()


@pytest.mark.parametrize("held", [True, False], ids=["held", "not held"])
def test_pages_given_away_are_written_to_after_their_copies(kept: Desk, held: bool) -> None:
    """And not before, as they are if nothing holds the steps."""
    pool, gates = kept.runner.pool, Gates(1)
    pages = kept.runner.pool.num_pages - 3, kept.runner.pool.num_pages - 1
    where = torch.tensor(pages, device="cuda")
    content = torch.full((2, pool.page_bytes), 9, dtype=torch.uint8, pin_memory=True)
    pool.data.index_fill_(0, where, 7)
    torch.cuda.synchronize()
    kept.page_ms = 20
    gates.expect("a", pool.fill(pages, [content]))
    kept.page_ms = 0
    if held:
        gates.hold_steps({"a"})
    pool.data.index_fill_(0, where, 7)
    torch.cuda.synchronize()
    assert (pool.data[where] == (7 if held else 9)).all()
