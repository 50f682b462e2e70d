"""Names and digests: what loads, what conflicts, what the engine is told, and in which order."""

from __future__ import annotations

import asyncio
import errno
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from motet.engine.protocol import AdapterHost
from motet.errors import AdapterConflict, AdapterRefused, InvalidRequest, ModelNotFound
from motet.registry.catalog import Catalog, StorageFull
from motet.types import PreparedAdapter

from .fakes import SPEC, FakeEngine, adapter_at, prepare, run


def catalog(engine: FakeEngine, prepare: Callable[[Path], PreparedAdapter] = prepare) -> Catalog:
    return Catalog(SPEC, "base", "/models/fake", prepare, engine)


def test_it_is_an_adapter_host() -> None:
    host: AdapterHost = catalog(FakeEngine())
    assert (host.base, host.root, host.spec) == ("base", "/models/fake", SPEC)
    assert host.created > 0


def test_load_resolve_unload(tmp_path: Path) -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        host = catalog(engine)
        path = adapter_at(tmp_path / "a", "A")
        record = await host.load("a", path)
        assert record == host.resolve("a")
        assert host.resolve("base") is None
        assert (record.name, record.source, record.rank, record.size_bytes) == ("a", path, 8, 4096)
        assert record.image == str(tmp_path / "a" / "image")
        assert host.records() == [record]
        assert await host.unload("a") == record
        with pytest.raises(ModelNotFound):
            host.resolve("a")
        assert engine.log == [("register", record.digest), ("forget", record.digest)]

    run(scenario())


def test_the_same_digest_again_changes_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        host = catalog(engine)
        first = await host.load("a", adapter_at(tmp_path / "a", "A"))
        assert await host.load("a", adapter_at(tmp_path / "copy", "A")) is first
        assert await host.load("a", adapter_at(tmp_path / "copy", "A"), replace=True) is first
        assert len(engine.log) == 1

    run(scenario())


def test_other_weights_under_the_same_name(tmp_path: Path) -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        host = catalog(engine)
        old = await host.load("a", adapter_at(tmp_path / "a", "A"))
        other = adapter_at(tmp_path / "b", "B")
        with pytest.raises(AdapterConflict, match=rf"{old.digest}.*replace=true"):
            await host.load("a", other)
        assert host.resolve("a") == old
        new = await host.load("a", other, replace=True)
        assert host.resolve("a") == new
        assert new.digest != old.digest
        assert engine.known == {new.digest}
        assert engine.log == [("register", old.digest), ("register", new.digest), ("forget", old.digest)]

    run(scenario())


def test_two_names_may_share_a_digest(tmp_path: Path) -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        host = catalog(engine)
        path = adapter_at(tmp_path / "a", "A")
        a, b = await asyncio.gather(host.load("a", path), host.load("b", path))
        assert a.digest == b.digest
        assert len(engine.log) == 1
        await host.unload("a")
        assert engine.known == {b.digest}
        await host.unload("b")
        assert not engine.known

    run(scenario())


@pytest.mark.parametrize(
    "name",
    ["", "../x", "a/../b", "/abs", "a//b", "a/", "./a", ".", "..", "a..b", "%2e%2e/x", "a\0b", "a b", "ä",
     "a\n", "x" * 201, "base"],
)  # fmt: skip
def test_names_that_are_refused(tmp_path: Path, name: str) -> None:
    async def scenario() -> None:
        opened: list[Path] = []

        def spy(path: Path) -> PreparedAdapter:
            opened.append(path)
            return prepare(path)

        host = catalog(FakeEngine(), spy)
        with pytest.raises(InvalidRequest):
            await host.load(name, adapter_at(tmp_path / "a", "A"))
        assert not opened

    run(scenario())


@pytest.mark.parametrize("name", ["a", "org/model.v1", "team-a/poet@3", "poet:latest", "x" * 200])
def test_names_that_are_fine(tmp_path: Path, name: str) -> None:
    async def scenario() -> None:
        assert (await catalog(FakeEngine()).load(name, adapter_at(tmp_path / "a", "A"))).name == name

    run(scenario())


def test_paths_that_cannot_be_read(tmp_path: Path) -> None:
    async def scenario() -> None:
        host = catalog(FakeEngine())
        for path in ("", "a\0b", "x" * 5000):
            with pytest.raises(InvalidRequest):
                await host.load("a", path)
        with pytest.raises(AdapterRefused, match="No such file"):
            await host.load("a", str(tmp_path / "nothing"))
        assert host.records() == []

    run(scenario())


def test_a_full_disk(tmp_path: Path) -> None:
    def full(path: Path) -> PreparedAdapter:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    async def scenario() -> None:
        with pytest.raises(StorageFull) as caught:
            await catalog(FakeEngine(), full).load("a", str(tmp_path))
        assert caught.value.status == 507

    run(scenario())


def test_unloading_what_is_not_there() -> None:
    async def scenario() -> None:
        host = catalog(FakeEngine())
        with pytest.raises(ModelNotFound, match=r"no model 'a'; served here: 'base'$"):
            await host.unload("a")
        with pytest.raises(InvalidRequest):
            await host.unload("base")

    run(scenario())


def test_a_long_list_of_models_is_cut(tmp_path: Path) -> None:
    async def scenario() -> None:
        host = catalog(FakeEngine())
        path = adapter_at(tmp_path / "a", "A")
        for i in range(60):
            await host.load(f"a{i}", path)
        with pytest.raises(ModelNotFound, match="and 11 more"):
            host.resolve("x")

    run(scenario())


def test_an_engine_that_refuses_leaves_no_name(tmp_path: Path) -> None:
    class Refusing(FakeEngine):
        async def register_adapter(self, digest: str, image: str, num_pages: int, source: str) -> None:
            raise AdapterRefused(
                f"{digest} at {image} of {source} has {num_pages} pages, which is more than the pool"
            )

    async def scenario() -> None:
        host = catalog(Refusing())
        with pytest.raises(AdapterRefused):
            await host.load("a", adapter_at(tmp_path / "a", "A"))
        assert host.records() == []

    run(scenario())


def test_one_name_one_load_at_a_time_and_other_names_beside_it(tmp_path: Path) -> None:
    lock = threading.Lock()
    busy: dict[str, int] = {}
    most: dict[str, int] = {}
    together = 0

    def slow(path: Path) -> PreparedAdapter:
        nonlocal together
        key = path.parent.name
        with lock:
            busy[key] = busy.get(key, 0) + 1
            most[key] = max(most.get(key, 0), busy[key])
            together = max(together, sum(busy.values()))
        time.sleep(0.02)
        with lock:
            busy[key] -= 1
        return prepare(path)

    async def scenario() -> None:
        engine = FakeEngine()
        host = catalog(engine, slow)
        loads: list[Awaitable[object]] = []
        for name in ("a", "b", "c"):
            for version in range(3):
                path = adapter_at(tmp_path / name / str(version), f"{name}{version}")
                loads.append(host.load(name, path, replace=True))
        await asyncio.gather(*loads)
        assert engine.known == {record.digest for record in host.records()}

    run(scenario())
    assert most == {"a": 1, "b": 1, "c": 1}
    assert together > 1


def test_loading_and_unloading_the_same_digest_at_once(tmp_path: Path) -> None:
    """A digest that one name leaves while another takes it stays known to the engine."""

    async def scenario() -> None:
        engine = FakeEngine(delay=0.001)
        host = catalog(engine)
        path = adapter_at(tmp_path / "a", "A")

        async def churn(name: str) -> None:
            for _ in range(20):
                record = await host.load(name, path)
                assert record.digest in engine.known
                await host.unload(name)

        await asyncio.gather(*(churn(f"name{i}") for i in range(5)))
        assert not engine.known
        assert host.records() == []

    run(scenario())


def test_a_held_digest_is_forgotten_when_its_last_request_ends(tmp_path: Path) -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        host = catalog(engine)
        old = await host.load("a", adapter_at(tmp_path / "old", "A"))
        with host.hold("a") as first, host.hold("a") as second:
            assert first == second == old
            new = await host.load("a", adapter_at(tmp_path / "new", "B"), replace=True)
            assert host.resolve("a") == new
            assert ("forget", old.digest) not in engine.log
        await asyncio.sleep(0.05)
        assert engine.log[-1] == ("forget", old.digest)
        assert len(engine.log) == 3

    run(scenario())


def test_a_held_digest_that_gets_a_name_again_is_kept(tmp_path: Path) -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        host = catalog(engine)
        record = await host.load("a", adapter_at(tmp_path / "a", "A"))
        with host.hold("a"):
            await host.unload("a")
            await host.load("b", adapter_at(tmp_path / "a", "A"))
        await asyncio.sleep(0.05)
        assert engine.log == [("register", record.digest)]

    run(scenario())
