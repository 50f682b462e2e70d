"""Adapters between disk, memory and pool under a whole engine: made again, swapped, forgotten, ten thousand times."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from motet.adapters.store import ImageStore, reading
from motet.config import EngineConfig
from motet.engine.client import EngineClient, EngineProcess, EngineThread
from motet.engine.messages import Ready
from motet.engine.tiers import share_of_base
from motet.errors import InvalidRequest, StorageFull
from motet.registry.catalog import Catalog
from motet.registry.prepare import Preparer
from motet.types import BASE, PreparedAdapter, Request, SamplingParams, SeqOutput, TierStats
from tests.engine.test_engine import Bench
from tests.tiny import write_adapter, write_model

PROMPT = tuple(range(10, 45))
KINDS: list[type[EngineClient]] = [EngineThread, EngineProcess]
pytestmark = pytest.mark.xdist_group("tiers")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture(scope="module")
def folders(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    home = tmp_path_factory.mktemp("adapters")
    targets = ["q_proj", "v_proj", "down_proj", "up_proj"]
    return [
        write_adapter(home / str(i), model, "llama", seed=i, r=4, lora_alpha=8, target_modules=targets)
        for i in range(3)
    ]


class House:
    """An engine behind a client, with images and sources that a test may spoil."""

    def __init__(self, client: EngineClient, ready: Ready, folder: Path, max_bytes: int) -> None:
        self.client = client
        self.store = ImageStore(folder, max_bytes)
        self.page_bytes = ready.page_bytes
        self.prepare = Preparer(ready.spec, ready.page_bytes, self.store)
        client.use_disk(self.prepare)

    async def register(self, source: Path) -> str:
        found = await asyncio.to_thread(self.prepare, source)
        await self.client.register_adapter(found.digest, found.image, found.num_pages, found.source)
        return found.digest

    async def ask(self, name: str, adapter: str = BASE, max_tokens: int = 8) -> SeqOutput:
        """The answer as one output: all tokens, and how it ended."""
        params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
        outputs = [o async for o in self.client.stream([Request(name, PROMPT, params, adapter)])]
        tokens = tuple(token for output in outputs for token in output.token_ids)
        return SeqOutput(
            name, tokens, finish=outputs[-1].finish, error=outputs[-1].error, code=outputs[-1].code
        )


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> type[EngineClient]:
    kind: type[EngineClient] = request.param
    return kind


def run(kind: type[EngineClient], model: Path, folder: Path, scenario: Any, **options: Any) -> None:
    """Run `scenario(house)` with an engine whose pool holds one of the adapters at a time, and little else."""
    max_bytes = options.pop("max_bytes", 1 << 30)

    async def main() -> None:
        defaults = {"pool_bytes": 100 << 10, "page_tokens": 4, "threads": 1}
        config = EngineConfig(model=str(model), **{**defaults, **options})
        client = kind(config)  # type: ignore[arg-type]  # the subclasses take a config
        try:
            await scenario(House(client, await client.started(), folder, max_bytes))
            stats = await client.stats()
            assert (stats.running, stats.waiting, stats.kv_pages) == (0, 0, 0)
        finally:
            await client.close()

    asyncio.run(main())


def test_an_image_that_left_the_disk_is_made_again(
    kind: type[EngineClient], model: Path, folders: list[Path], tmp_path: Path
) -> None:
    """The disk has room for one image, the pool for one adapter, and three are asked for in turn, twice."""
    sizes = ImageStore(tmp_path / "sizes")

    async def measure(house: House) -> None:
        house.prepare = Preparer(
            (await house.client.started()).spec, (await house.client.started()).page_bytes, sizes
        )
        await house.register(folders[0])

    run(EngineThread, model, tmp_path / "unused", measure)
    one = sizes.stats().bytes

    async def scenario(house: House) -> None:
        digests = [await house.register(folder) for folder in folders]
        answers = [await house.ask(f"{i}", digest) for i, digest in enumerate(digests)]
        assert {answer.finish for answer in answers} == {"length"}, answers
        assert len({answer.token_ids for answer in answers}) == 3
        again = [await house.ask(f"again {i}", digest) for i, digest in enumerate(digests)]
        assert [a.token_ids for a in again] == [a.token_ids for a in answers]
        stats = await house.client.stats()
        disk, pool = stats.tiers["disk"], stats.tiers["pool"]
        assert (disk.resident, disk.bytes) == (1, one)
        assert disk.loads >= 5
        assert disk.evictions == disk.loads - 1
        assert disk.hits == pool.loads == sum(stats.loads_by_adapter.values()) >= 4
        assert pool.evictions >= 3
        assert await house.ask("hit", digests[-1])
        assert (await house.client.stats()).tiers["pool"].hits == pool.hits + 1

    run(kind, model, tmp_path / "images", scenario, max_bytes=one + 100)


def test_a_source_that_changed_is_not_served_as_what_it_was(
    kind: type[EngineClient], model: Path, folders: list[Path], tmp_path: Path
) -> None:
    """While the image is there the checked bytes are served; without it, an error says why, and only once."""
    source = tmp_path / "adapter"
    shutil.copytree(folders[0], source)

    async def scenario(house: House) -> None:
        digest = await house.register(source)
        other = await house.register(folders[2])
        for name in os.listdir(source):
            shutil.copy(folders[1] / name, source / name)
        wanted = await house.ask("before", digest)
        assert wanted.finish == "length", "the image has what was checked"
        await house.ask("out of the pool", other)
        for path in (tmp_path / "images").glob(f"{digest}*"):
            path.unlink()
        failed = await house.ask("swapped", digest)
        assert (failed.finish, failed.code) == ("error", "adapter_load_failed")
        assert str(source) in (failed.error or "")
        assert "now holds digest" in (failed.error or "")
        shutil.rmtree(source)
        assert "cannot be made again" in ((await house.ask("gone", digest)).error or "")
        shutil.copytree(folders[0], source)
        assert (await house.ask("back", digest)).token_ids == wanted.token_ids

    run(kind, model, tmp_path / "images", scenario)


def test_requests_for_one_absent_adapter_share_a_load_and_its_failure(
    kind: type[EngineClient], model: Path, folders: list[Path], tmp_path: Path
) -> None:
    source = tmp_path / "adapter"
    shutil.copytree(folders[0], source)

    async def scenario(house: House) -> None:
        digest, other = await house.register(source), await house.register(folders[1])
        alone = await house.ask("alone", other)
        answers = await asyncio.gather(*(house.ask(f"shared {i}", digest) for i in range(6)))
        assert {answer.finish for answer in answers} == {"length"}
        assert (await house.client.stats()).loads_by_adapter == {digest: 1, other: 1}
        shutil.rmtree(source)
        for path in (tmp_path / "images").glob(f"{digest}*"):
            path.unlink()
        assert (await house.ask("other", other)).token_ids == alone.token_ids, "takes the pool"
        *failed, neighbour = await asyncio.gather(
            *(house.ask(f"fails {i}", digest) for i in range(4)), house.ask("neighbour", other)
        )
        assert {answer.code for answer in failed} == {"adapter_load_failed"}
        assert neighbour.token_ids == alone.token_ids

    run(kind, model, tmp_path / "images", scenario)


def test_an_engine_without_a_disk_says_so(
    kind: type[EngineClient], model: Path, folders: list[Path], tmp_path: Path
) -> None:
    async def scenario(house: House) -> None:
        digest = await house.register(folders[0])
        shutil.rmtree(tmp_path / "images")
        house.client._disk = None
        assert "has left the disk" in ((await house.ask("a", digest)).error or "")

    run(kind, model, tmp_path / "images", scenario)


def test_whatever_goes_wrong_in_making_an_image_again_ends_the_requests(
    kind: type[EngineClient], model: Path, folders: list[Path], tmp_path: Path
) -> None:
    class Broken:
        def __call__(self, source: Path) -> PreparedAdapter:
            raise ZeroDivisionError(source)

        def stats(self) -> TierStats:
            return TierStats()

    async def scenario(house: House) -> None:
        digest = await house.register(folders[0])
        shutil.rmtree(tmp_path / "images")
        house.client.use_disk(Broken())
        failed = await house.ask("fails", digest)
        assert failed.code == "adapter_load_failed"
        assert "ZeroDivisionError" in (failed.error or "")
        house.client.use_disk(house.prepare)
        assert (await house.ask("works", digest)).finish == "length"

    run(kind, model, tmp_path / "images", scenario)


def test_while_an_image_is_made_again_others_have_its_pages(
    kind: type[EngineClient], model: Path, folders: list[Path], tmp_path: Path
) -> None:
    """The pool holds one adapter; the disk is slow until the neighbour has its answer."""

    class Slow:
        def __init__(self, house: House) -> None:
            self.house = house
            self.asked: list[Path] = []
            self.go_on = threading.Event()

        def __call__(self, source: Path) -> PreparedAdapter:
            self.asked.append(source)
            assert self.go_on.wait(30)
            return self.house.prepare(source)

        def stats(self) -> TierStats:
            return TierStats()

    async def scenario(house: House) -> None:
        lost, other = await house.register(folders[0]), await house.register(folders[1])
        for path in (tmp_path / "images").glob(f"{lost}*"):
            path.unlink()
        disk = Slow(house)
        house.client.use_disk(disk)
        waiting = [asyncio.create_task(house.ask(f"lost {i}", lost)) for i in range(3)]
        while not disk.asked:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.01)
        assert (await house.client.stats()).residency[lost] == "remaking"
        assert (await asyncio.wait_for(house.ask("neighbour", other), 30)).finish == "length"
        assert not any(task.done() for task in waiting)
        disk.go_on.set()
        assert {(await task).finish for task in waiting} == {"length"}
        assert len(disk.asked) == 1
        assert (await house.client.stats()).loads_by_adapter == {lost: 1, other: 1}

    run(kind, model, tmp_path / "images", scenario)


def test_a_full_disk_refuses_the_newcomer_and_nobody_else(
    kind: type[EngineClient],
    model: Path,
    folders: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(house: House) -> None:
        digest = await house.register(folders[0])
        wanted = await house.ask("before", digest)
        images = set(os.listdir(tmp_path / "images"))

        def full(*_: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "posix_fallocate", full)
        with reading(house.store.path(digest, house.page_bytes, rounded=False)), pytest.raises(StorageFull):
            await house.register(folders[1])
        assert set(os.listdir(tmp_path / "images")) == images
        assert (await house.ask("after", digest)).token_ids == wanted.token_ids

    run(kind, model, tmp_path / "images", scenario)


def test_a_reload_is_another_digest_and_readers_finish_on_theirs(
    kind: type[EngineClient], model: Path, folders: list[Path], tmp_path: Path
) -> None:
    """Two choices of one request are under way while their name moves; then the old weights' memory returns."""

    async def scenario(house: House) -> None:
        ready = await house.client.started()
        catalog = Catalog(ready.spec, "base", str(model), house.prepare, house.client)
        old = await catalog.load("name", str(folders[0]))
        alone = [await house.ask(f"solo {i}", old.digest, 100) for i in range(2)]
        with catalog.hold("name") as held:
            assert held == old
            readers = [asyncio.create_task(house.ask(f"reader {i}", old.digest, 100)) for i in range(2)]
            while (await house.client.stats()).running < 2:
                pass
            new = await catalog.load("name", str(folders[1]), replace=True)
            assert new.digest != old.digest
            stats = await house.client.stats()
            assert (stats.running, stats.residency[old.digest]) == (2, "ready")
            moved = await house.ask("moved", new.digest)
            assert [(await reader).token_ids for reader in readers] == [answer.token_ids for answer in alone]
        while old.digest in (await house.client.stats()).residency:
            pass
        stats = await house.client.stats()
        assert stats.adapter_pages == new.num_pages
        assert set(stats.loads_by_adapter) == {new.digest}
        assert moved.token_ids == (await house.ask("again", new.digest)).token_ids
        assert moved.token_ids != alone[0].token_ids[:8]

    run(kind, model, tmp_path / "images", scenario, pool_bytes=1 << 20)


def test_a_hint_loads_and_a_pin_keeps(
    kind: type[EngineClient], model: Path, folders: list[Path], tmp_path: Path
) -> None:
    """The pool holds one adapter beside a request's pages, or two and nothing."""

    async def scenario(house: House) -> None:
        client = house.client
        kept, other, third = [await house.register(folder) for folder in folders]
        await client.prefetch(kept)
        while (await client.stats()).residency[kept] != "ready":  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.01)
        assert (await client.stats()).loads_by_adapter == {kept: 1}
        await client.pin_adapter(kept, True)
        for name, digest in (("a", other), ("b", third), ("c", other)):
            assert (await house.ask(name, digest)).finish == "length"
        stats = await client.stats()
        assert (stats.residency[kept], stats.pinned) == ("ready", (kept,))
        assert stats.loads_by_adapter[kept] == 1
        await client.pin_adapter(kept, False)
        for name, digest in (("d", third), ("e", other), ("f", third), ("g", other)):
            assert (await house.ask(name, digest)).finish == "length"
        assert (await client.stats()).residency[kept] == "absent"
        await client.pin_adapter(kept, True)
        await client.forget_adapter(kept)
        assert not (await client.stats()).pinned
        with pytest.raises(InvalidRequest):
            await client.prefetch(kept)

    run(kind, model, tmp_path / "images", scenario, pool_bytes=110 << 10)


# In this process


@pytest.fixture
def bench(model: Path, folders: list[Path], tmp_path: Path) -> Iterator[Bench]:
    """Host copies of two of three adapters, a pool for one and its request."""
    bench = Bench(model, folders, tmp_path, pool_bytes=100 << 10, host_bytes=56 << 10)
    yield bench
    bench.engine.close()


def test_host_copies_serve_what_the_disk_would(bench: Bench, tmp_path: Path) -> None:
    first, second, _ = (adapter.digest for adapter in bench.adapters)
    wanted = [bench.solo(adapter=digest) for digest in (first, second)]
    shutil.rmtree(tmp_path)
    for _ in range(3):
        assert [bench.solo(adapter=digest) for digest in (first, second)] == wanted
    tiers = bench.engine.stats().tiers
    assert tiers["disk"].hits == tiers["host"].loads == tiers["host"].resident == 2
    assert tiers["host"].hits >= 5
    assert tiers["pool"].loads == tiers["host"].hits + 2
    bench.engine.forget_adapter(first)
    bench.engine.forget_adapter(second)
    bench.run()
    assert bench.engine.stats().tiers["pool"].resident == 0


def test_the_work_of_an_adapter_is_its_share_of_the_base(bench: Bench) -> None:
    """q, v, up and down of a layer of 48, 24 and 80 features have a rank of 4; k, o and gate are the base's alone."""
    adapted = 4 * ((48 + 48) + (48 + 24) + 2 * (48 + 80))
    base = 2 * 48 * 48 + 2 * 48 * 24 + 3 * 48 * 80
    image = Path(bench.adapters[0].image)
    assert share_of_base(image, bench.engine.spec) == pytest.approx(adapted / base)
    image.unlink()
    assert share_of_base(image, bench.engine.spec) == 0.0


def test_nothing_is_kept_of_an_adapter_that_was_forgotten(bench: Bench) -> None:
    digest = bench.adapters[0].digest
    bench.ask("reader", adapter=digest, max_tokens=12)
    for _ in range(3):
        bench.step()
    bench.engine.forget_adapter(digest)
    assert digest in bench.engine._images, "a preempted reader may need it again"
    assert bench.engine.stats().residency[digest] == "draining"
    bench.run()
    stats = bench.engine.stats()
    assert digest not in bench.engine._images
    assert digest not in stats.loads_by_adapter
    assert digest not in stats.residency
    assert not bench.engine._leaving
    assert bench.ends["reader"].finish == "length"
