"""The engine as a whole on a tiny model: who gets what, whatever else happens in the batch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from motet.adapters.image import ChunkTable
from motet.adapters.store import ImageStore
from motet.adapters.table import AdapterTable
from motet.config import EngineConfig
from motet.engine.loop import Engine
from motet.engine.sampler import Drawn
from motet.errors import ConfigError, ModelRefused, MotetError
from motet.registry.prepare import prepare
from motet.types import BASE, PENDING, Plan, PreparedAdapter, Request, SamplingParams, SeqOutput
from tests.tiny import write_adapter, write_model

PROMPT = tuple(range(10, 45))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture(scope="module")
def folders(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    home = tmp_path_factory.mktemp("adapters")
    targets = ["q_proj", "v_proj", "down_proj", "up_proj"]
    return [
        write_adapter(
            home / str(i), model, "llama", seed=i, r=2 + 3 * i, lora_alpha=8, target_modules=targets
        )
        for i in range(4)
    ]


class Bench:
    """An engine, its adapters, and the answers so far."""

    def __init__(self, model: Path, folders: list[Path], images: Path, **config: Any) -> None:
        options = {"pool_bytes": 1 << 20, "page_tokens": 4, "max_step_tokens": 32, **config}
        self.engine = Engine(EngineConfig(model=str(model), **options))
        size = self.engine.runner.pool.page_bytes
        self.adapters: list[PreparedAdapter] = [
            prepare(f, self.engine.spec, size, ImageStore(images)) for f in folders
        ]
        for adapter in self.adapters:
            self.register(adapter)
        self.answers: dict[str, list[int]] = {}
        self.ends: dict[str, SeqOutput] = {}
        self.cached: dict[str, int] = {}

    def register(self, adapter: PreparedAdapter) -> None:
        self.engine.register_adapter(adapter.digest, Path(adapter.image), adapter.num_pages)

    def ask(self, name: str, prompt: tuple[int, ...] = PROMPT, adapter: str = BASE, **params: Any) -> None:
        chosen = SamplingParams(**{"max_tokens": 8, "temperature": 0, "ignore_eos": True, **params})
        self.answers[name] = []
        self.take(self.engine.add(Request(name, prompt, chosen, adapter)))

    def take(self, outputs: list[SeqOutput]) -> None:
        for output in outputs:
            assert output.request_id not in self.ends, "an output after the terminal one"
            self.answers[output.request_id] += output.token_ids
            self.cached[output.request_id] = max(self.cached.get(output.request_id, 0), output.cached_tokens)
            if output.finish is not None:
                self.ends[output.request_id] = output

    def step(self) -> None:
        self.take(self.engine.step())
        self.engine.scheduler.check_integrity()

    def run(self) -> None:
        for _ in range(3000):
            if not self.engine.has_work:
                return
            self.step()
        raise AssertionError("the engine does not come to an end")

    def solo(self, prompt: tuple[int, ...] = PROMPT, adapter: str = BASE, **params: Any) -> list[int]:
        name = f"solo-{len(self.answers)}"
        self.ask(name, prompt, adapter, **params)
        self.run()
        return self.answers[name]


@pytest.fixture
def bench(model: Path, folders: list[Path], tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(model, folders, tmp_path)
    yield bench
    bench.engine.close()


def test_a_table_of_few_slots_makes_adapters_take_turns(
    model: Path, folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All four fit into the pool; the table of a GPU has so many slots, and a request waits for one."""
    monkeypatch.setattr(AdapterTable, "max_slots", 2)
    bench = Bench(model, folders, tmp_path)
    wanted = [bench.solo(adapter=adapter.digest) for adapter in bench.adapters]
    for i, adapter in enumerate(bench.adapters):
        bench.ask(f"{i}", adapter=adapter.digest)
    while bench.engine.has_work:
        bench.step()
        assert len(bench.engine.runner.table) <= 2
    assert [bench.answers[f"{i}"] for i in range(4)] == wanted
    bench.engine.close()


def test_mixed_batch_equals_solo_runs(bench: Bench) -> None:
    wanted = {i: bench.solo(adapter=a.digest) for i, a in enumerate(bench.adapters)}
    base = bench.solo()
    assert len({tuple(tokens) for tokens in [*wanted.values(), base]}) == 5, (
        "adapters that do not differ prove nothing"
    )
    for i, adapter in enumerate(bench.adapters):
        bench.ask(f"mixed-{i}", adapter=adapter.digest)
    bench.ask("mixed-base")
    bench.run()
    assert bench.answers["mixed-base"] == base
    assert {i: bench.answers[f"mixed-{i}"] for i in wanted} == wanted


class Ahead:
    """A runner whose results may be asked for after the next launch, as a GPU's: it keeps what it has chosen."""

    def __init__(self, runner: Any) -> None:
        self.runner = runner
        self.pool, self.table = runner.pool, runner.table
        self.chosen: dict[int, int] = {}
        self.arrived = runner.arrived

    def launch(self, plan: Plan, row: Any) -> Drawn:
        chunks = [
            replace(c, tokens=tuple(self.chosen[c.seq] if token == PENDING else token for token in c.tokens))
            for c in plan.chunks
        ]
        drawn = self.runner.launch(replace(plan, chunks=tuple(chunks)), row)
        self.chosen = {sampled.seq: sampled.token_id for sampled in drawn.sampled}
        return Drawn(drawn.sampled, overlaps=True)


def test_an_engine_that_runs_ahead_of_its_results_answers_the_same(bench: Bench) -> None:
    digests = [BASE, *(adapter.digest for adapter in bench.adapters)]
    prompts = [tuple(range(5 + i, 12 + 7 * i)) for i in range(len(digests))]
    options: list[dict[str, Any]] = [
        {"max_tokens": 1},
        {"temperature": 0.8, "seed": 5, "max_tokens": 12},
        {"max_tokens": 20, "stop_token_ids": tuple(range(30))},
        {"ignore_eos": False, "temperature": 2.0, "seed": 9, "max_tokens": 40},
        {"max_tokens": 9},
    ]
    asked = list(zip(prompts, digests, options, strict=True))
    wanted = [bench.solo(prompt, digest, **how) for prompt, digest, how in asked]
    bench.engine.runner = Ahead(bench.engine.runner)  # type: ignore[assignment]
    for i, (prompt, digest, how) in enumerate(asked):
        bench.ask(f"ahead-{i}", prompt, digest, **how)
        bench.step()
    bench.run()
    assert [bench.answers[f"ahead-{i}"] for i in range(len(asked))] == wanted
    assert any(len(answer) < how["max_tokens"] for answer, how in zip(wanted, options, strict=True)), (
        "nobody ended before its last token: no row was in vain"
    )
    assert not bench.engine.has_work


def test_prefix_is_shared_within_an_adapter_and_never_across(bench: Bench) -> None:
    a, b = bench.adapters[0].digest, bench.adapters[1].digest
    for name, digest in (("first", a), ("again", a), ("other", b), ("base", BASE)):
        bench.ask(name, adapter=digest)
        bench.run()
    assert bench.cached["first"] == bench.cached["other"] == bench.cached["base"] == 0
    assert bench.cached["again"] == 32, "eight full pages of four tokens; the last token is computed"
    assert bench.answers["again"] == bench.answers["first"]


def test_without_prefix_caching_nothing_is_reused(model: Path, folders: list[Path], tmp_path: Path) -> None:
    bench = Bench(model, folders, tmp_path, prefix_caching=False)
    first = bench.solo()
    bench.ask("again")
    bench.run()
    assert bench.cached["again"] == 0
    assert bench.answers["again"] == first
    bench.engine.close()


def test_small_pool_evicts_and_preempts_without_changing_answers(
    model: Path, folders: list[Path], tmp_path: Path
) -> None:
    bench = Bench(model, folders, tmp_path)
    prompts = [tuple(range(5 + i, 40 + i)) for i in range(6)]
    digests = [BASE, *(a.digest for a in bench.adapters), BASE]
    wanted = [bench.solo(p, d, max_tokens=30) for p, d in zip(prompts, digests, strict=True)]
    pages = max(a.num_pages for a in bench.adapters) + 24
    small = Bench(model, folders, tmp_path, pool_bytes=pages * bench.engine.runner.pool.page_bytes)
    for i, (prompt, digest) in enumerate(zip(prompts, digests, strict=True)):
        small.ask(str(i), prompt, digest, max_tokens=30)
    small.run()
    assert [small.answers[str(i)] for i in range(6)] == wanted
    stats = small.engine.stats()
    assert stats.evictions > 0, "the pool was not small enough to prove anything"
    assert stats.preemptions > 0, "the pool was not small enough to prove anything"
    bench.engine.close()
    small.engine.close()


def test_abort_frees_everything_and_leaves_neighbours_alone(bench: Bench) -> None:
    wanted = bench.solo(adapter=bench.adapters[0].digest, max_tokens=20)
    bench.ask("stays", adapter=bench.adapters[0].digest, max_tokens=20)
    bench.ask("goes", adapter=bench.adapters[1].digest, max_tokens=20)
    bench.ask("never starts", adapter=bench.adapters[2].digest, max_tokens=20)
    bench.take(bench.engine.abort("never starts"))
    for _ in range(6):
        bench.step()
    bench.take(bench.engine.abort("goes"))
    assert bench.engine.abort("goes") == []
    bench.run()
    assert bench.ends["goes"].finish == bench.ends["never starts"].finish == "abort"
    assert bench.answers["stays"] == wanted
    assert bench.engine.stats().kv_pages == 0


def test_same_seed_same_tokens_in_any_company(bench: Bench) -> None:
    hot: dict[str, Any] = {"temperature": 1.0, "seed": 11, "top_p": 0.95}
    wanted = bench.solo(adapter=bench.adapters[2].digest, **hot)
    other = bench.solo(adapter=bench.adapters[2].digest, **{**hot, "seed": 12})
    assert other != wanted
    for i in range(5):
        bench.ask(f"noise-{i}", tuple(range(20 + i, 50)), temperature=1.3, seed=i)
    bench.ask("seeded", adapter=bench.adapters[2].digest, **hot)
    bench.run()
    assert bench.answers["seeded"] == wanted


def test_ends_by_stop_token_and_by_length(bench: Bench) -> None:
    free = bench.solo(max_tokens=6)
    bench.ask("stop", max_tokens=6, stop_token_ids=(free[3],))
    bench.run()
    assert bench.answers["stop"] == free[: free.index(free[3]) + 1]
    assert bench.ends["stop"].finish == "stop"
    bench.ask("length", max_tokens=3)
    bench.run()
    assert bench.ends["length"].finish == "length"
    assert bench.answers["length"] == free[:3]


def test_min_tokens_hold_the_end_back(bench: Bench) -> None:
    free = bench.solo(max_tokens=6)
    bench.ask("late", max_tokens=6, stop_token_ids=(free[0],), min_tokens=3)
    bench.run()
    assert free[0] not in bench.answers["late"][:3]
    assert len(bench.answers["late"]) >= 3


def test_impossible_requests_end_at_once_with_the_reason(bench: Bench) -> None:
    bench.ask("long", tuple(range(2, 250)), max_tokens=20)
    assert bench.ends["long"].code == "invalid_request"
    assert "268" in (bench.ends["long"].error or "")
    bench.ask("nobody", adapter="0" * 64)
    assert bench.ends["nobody"].finish == "error"
    bench.ask("fine")
    bench.run()
    assert bench.ends["fine"].finish == "length"


def test_a_failed_load_ends_its_requests_only_and_does_not_poison_the_adapter(bench: Bench) -> None:
    adapter = bench.adapters[3]
    image = Path(adapter.image)
    good = image.read_bytes()
    image.write_bytes(good[:100])
    bench.ask("unlucky", adapter=adapter.digest)
    bench.ask("fine", adapter=bench.adapters[0].digest)
    bench.run()
    assert bench.ends["unlucky"].finish == "error"
    assert adapter.digest[:12] in (bench.ends["unlucky"].error or "")
    assert bench.ends["fine"].finish == "length"
    image.write_bytes(good)
    assert len(bench.solo(adapter=adapter.digest)) == 8


def test_an_adapter_without_room_in_the_table_fails_its_requests_only(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, adapter, other = bench.engine.runner.table, bench.adapters[2], bench.adapters[1]
    add = table.add

    def full(digest: str, chunks: ChunkTable, pages: tuple[int, ...]) -> object:
        if digest == adapter.digest:
            raise MotetError("the table is full")
        return add(digest, chunks, pages)

    with monkeypatch.context() as patch:
        patch.setattr(table, "add", full)
        bench.ask("unlucky", adapter=adapter.digest)
        bench.ask("fine", adapter=other.digest)
        bench.run()
    assert bench.ends["unlucky"].finish == "error"
    assert "the table is full" in (bench.ends["unlucky"].error or "")
    assert bench.ends["fine"].finish == "length"
    assert len(bench.solo(adapter=adapter.digest)) == 8


def test_forget_waits_for_readers_and_returns_the_pages(bench: Bench) -> None:
    digest = bench.adapters[0].digest
    wanted = bench.solo(adapter=digest, max_tokens=12)
    bench.ask("reader", adapter=digest, max_tokens=12)
    for _ in range(4):
        bench.step()
    bench.engine.forget_adapter(digest)
    bench.ask("late", adapter=digest)
    assert bench.ends["late"].finish == "error", "a forgotten adapter takes no new requests"
    bench.run()
    assert bench.answers["reader"] == wanted
    assert bench.engine.stats().adapter_pages == 0
    assert len(bench.engine.runner.table) == 0
    bench.register(bench.adapters[0])
    assert bench.solo(adapter=digest, max_tokens=12) == wanted


def test_base_only_batches_launch_no_lora_kernel(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.solo(adapter=bench.adapters[0].digest)
    assert len(bench.engine.runner.table) == 1

    def forbidden(*_: object) -> None:
        raise AssertionError("a LoRA kernel was launched for the base")

    monkeypatch.setattr("motet.layers.cpu.lora_add", forbidden)
    assert len(bench.solo()) == 8


def test_refuses_what_it_cannot_run(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds 0 pages"):
        Engine(EngineConfig(model=str(model), pool_bytes=100))
    with pytest.raises(ConfigError, match="max_model_len 999"):
        Engine(EngineConfig(model=str(model), max_model_len=999))
    with pytest.raises(ModelRefused, match=r"no config\.json"):
        Engine(EngineConfig(model=str(tmp_path)))
