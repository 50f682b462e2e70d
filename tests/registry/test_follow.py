"""A server's names follow the registry: at once, all or none, and without touching what runs."""

from __future__ import annotations

import asyncio
from contextlib import AbstractContextManager
from pathlib import Path
from unittest import mock

import pytest

from motet.errors import AdapterConflict, AdapterRefused, ModelNotFound
from motet.registry import follow
from motet.registry.follow import RegistryCatalog
from motet.registry.records import Canary, Facts
from motet.registry.store import Registry
from motet.types import PreparedAdapter
from tests.server.fakes import SPEC, FakeEngine, run, until

from .house import adapter_at, label
from .house import examine as examine_any


def examine(folder: Path) -> Facts:
    facts = examine_any(folder)
    return Facts(facts.digest, SPEC.digest, facts.rank, facts.modules, facts.num_parameters)


def prepare(folder: Path) -> PreparedAdapter:
    facts = examine(folder)
    return PreparedAdapter(facts.digest, str(folder / "image"), facts.rank, facts.num_parameters, 3, 4096)


class House:
    """A registry and a server that follows it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.registry = Registry(str(home / "registry"))
        self.engine = FakeEngine()
        self.catalog = self.server(self.engine)

    def server(self, engine: FakeEngine) -> RegistryCatalog:
        registry = Registry(self.registry.url)
        return RegistryCatalog(registry, self.home / "copies", SPEC, "base", "/models/base", prepare, engine)

    def push(self, text: str, name: str = "support", org: str = "") -> str:
        source = adapter_at(self.home / text, text)
        return self.registry.push(name, source, examine, label(str(source), org=org)).ref

    def digest(self, name: str, user: str = "") -> str:
        record = self.catalog.resolve(name, user)
        assert record is not None
        return record.digest


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


def test_names_of_every_kind(house: House) -> None:
    async def scenario() -> None:
        house.registry.promote(house.push("one", org="acme"), "ada")
        house.push("two")
        await house.catalog.sync()
        one = house.registry.version("support@1").facts.digest
        names = ["support", "support@1", "support@prod", f"ft:base:acme:support:{one[:12]}"]
        assert {house.digest(name) for name in names} == {one}
        assert [record.name for record in house.catalog.records()] == ["support", "support@1", "support@prod"]
        artifact = house.registry.version("support@1").artifact
        assert {r.source for r in house.catalog.records()} == {str(house.registry.artifacts.path(artifact))}
        for name in ("support@2", "support@3", "support@best", f"ft:other:acme:support:{one[:12]}"):
            with pytest.raises(ModelNotFound):
                house.catalog.resolve(name)
        assert list((house.home / "copies").iterdir()) == []

    run(scenario())


def test_what_nobody_promoted_is_loaded_when_somebody_asks(house: House) -> None:
    async def scenario() -> None:
        two = house.registry.version(house.push("one")).fine_tune("base")
        house.push("two")
        await house.catalog.sync()
        assert house.engine.log == []
        artifacts, copies = house.catalog.registry.artifacts, 0

        def counted(digest: str, parent: Path) -> AbstractContextManager[Path]:
            nonlocal copies
            copies += 1
            return type(artifacts).private_copy(artifacts, digest, parent)

        with mock.patch.object(artifacts, "private_copy", counted):
            await asyncio.gather(*(house.catalog.want("support@2") for _ in range(5)))
        assert copies == 1
        assert house.digest("support@2") == house.registry.version("support@2").facts.digest
        await house.catalog.want(two)
        assert house.digest(two) == house.digest("support@1")
        assert len(house.engine.log) == 2
        for name in ("base", "support@9", "support", "../x", "ft:", "x" * 1000):
            await house.catalog.want(name)
        assert len(house.engine.log) == 2
        house.push("three", name="new")
        house.registry.promote("new@1", "ada")
        await house.catalog.want("new")
        assert house.digest("new@prod") == house.registry.version("new@1").facts.digest, (
            "without waiting for the poll"
        )

    run(scenario())


def test_a_version_that_fails_oddly_keeps_no_other_from_being_served(house: House) -> None:
    async def scenario() -> None:
        house.registry.promote(house.push("one"), "ada")
        house.registry.promote(house.push("two", name="odd"), "ada")
        odd = house.registry.version("odd@1").artifact
        artifacts = house.catalog.registry.artifacts

        def fails(digest: str, parent: Path) -> AbstractContextManager[Path]:
            if digest == odd:
                raise MemoryError("no room")
            return type(artifacts).private_copy(artifacts, digest, parent)

        with mock.patch.object(artifacts, "private_copy", fails):
            await house.catalog.sync()
        assert house.digest("support") == house.registry.version("support@1").facts.digest
        with pytest.raises(ModelNotFound):
            house.catalog.resolve("odd")
        await house.catalog.sync()
        assert house.digest("odd") == house.registry.version("odd@1").facts.digest

    run(scenario())


def test_a_promotion_moves_all_names_and_keeps_what_runs(house: House) -> None:
    async def scenario() -> None:
        house.registry.promote(house.push("one"), "ada")
        await house.catalog.sync()
        one = house.digest("support")
        house.registry.promote(house.push("two"), "ada")
        with house.catalog.hold("support") as held:
            await house.catalog.sync()
            assert held is not None
            assert held.digest == one
            two = house.digest("support")
            assert two == house.digest("support@prod") == house.digest("support@2") != one
            house.registry.retire("support@1", "ada")
            await house.catalog.sync()
            with pytest.raises(ModelNotFound):
                house.catalog.resolve("support@1")
            assert one in house.engine.known
        await asyncio.sleep(0.02)
        assert house.engine.known == {two}

    run(scenario())


def test_every_request_sees_one_promotion_or_the_other(house: House) -> None:
    """Aliases of two adapters that are moved together are never seen apart."""

    async def scenario() -> None:
        for text in ("one", "two"):
            house.push(text, name="a")
            house.push(text, name="b")
        for name in ("a", "b"):
            house.registry.promote(f"{name}@1", "ada")
        await house.catalog.sync()
        for name in ("a", "b"):
            house.registry.promote(f"{name}@2", "ada")
        syncing = asyncio.create_task(house.catalog.sync())
        seen = set()
        while not syncing.done():
            seen.add((house.digest("a"), house.digest("b")))
            await asyncio.sleep(0)
        seen.add((house.digest("a"), house.digest("b")))
        assert len(seen) == 2
        assert all(a == b for a, b in seen)

    run(scenario())


def test_a_version_that_cannot_be_loaded_moves_nothing(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        house.registry.promote(house.push("one"), "ada")
        await house.catalog.sync()
        one = house.digest("support")
        ref = house.push("two")
        artifact = house.registry.version(ref).artifact
        weights = house.registry.artifacts.path(artifact) / "adapter_model.safetensors"
        weights.write_text("twO")
        house.registry.promote(ref, "ada")
        for _ in range(3):
            await house.catalog.sync()
            assert house.digest("support") == one
        assert caplog.text.count("support@2 is not served: the files of artifact") == 1
        with pytest.raises(AdapterRefused, match="were changed"):
            await house.catalog.want("support@2")
        weights.write_text("two")
        await house.catalog.sync()
        assert house.digest("support") == house.registry.version("support@2").facts.digest

    run(scenario())


def test_files_that_bind_to_another_digest_than_was_pushed_are_not_served(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        house.registry.promote(house.push("one"), "ada")
        monkeypatch.setattr(
            house.catalog, "_prepare", lambda _: PreparedAdapter("other", "/image", 8, 1, 1, 1)
        )
        with pytest.raises(AdapterRefused, match="must have digest"):
            await house.catalog.want("support@1")
        assert house.engine.log == []

    run(scenario())


def test_versions_for_another_base_are_somebody_elses(house: House) -> None:
    async def scenario() -> None:
        source = adapter_at(house.home / "x", "x")
        house.registry.promote(house.registry.push("other", source, examine_any, label()).ref, "ada")
        await house.catalog.sync()
        await house.catalog.want("other@1")
        assert house.catalog.records() == []

    run(scenario())


def test_the_canary_has_its_share_and_keeps_its_users(house: House) -> None:
    async def scenario() -> None:
        house.registry.promote(house.push("one"), "ada")
        house.push("two")
        house.registry.canary("support", Canary(2, 0.25), "ada")
        await house.catalog.sync()
        one, two = (house.registry.version(f"support@{n}").facts.digest for n in (1, 2))
        users = [f"user-{i}" for i in range(2000)]
        first = {user: house.digest("support@prod", user) for user in users}
        assert 400 < list(first.values()).count(two) < 600
        house.registry.canary("support", Canary(2, 0.5), "ada")
        await house.catalog.sync()
        second = {user: house.digest("support@prod", user) for user in users}
        assert 900 < list(second.values()).count(two) < 1100
        assert all(second[user] == two for user in users if first[user] == two), (
            "a growing share loses nobody"
        )
        house.registry.canary("support", Canary(2, 1.0, shadow=True), "ada")
        await house.catalog.sync()
        assert {house.digest("support@prod", user) for user in users} == {one}, "a shadow answers nobody"

    run(scenario())


def test_names_by_hand_stay_and_come_first(house: House) -> None:
    async def scenario() -> None:
        house.registry.promote(house.push("one"), "ada")
        mine = await house.catalog.load("support", str(adapter_at(house.home / "mine", "mine")))
        await house.catalog.sync()
        assert house.digest("support") == mine.digest
        assert house.digest("support@prod") == house.registry.version("support@1").facts.digest
        for name in ("support@1", "support@prod"):
            with pytest.raises(AdapterConflict, match="served from the registry"):
                await house.catalog.unload(name)

    run(scenario())


def test_two_servers_follow_one_registry(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "POLL_SECONDS", 0.01)

    async def scenario() -> None:
        servers = [house.catalog, house.server(FakeEngine())]
        followers = [asyncio.create_task(server.follow()) for server in servers]
        for text in ("one", "two", "three"):
            ref = house.push(text)
            house.registry.promote(ref, "ada")
            digest = house.registry.version(ref).facts.digest

            def moved(server: RegistryCatalog, digest: str = digest) -> bool:
                return any(r.name == "support" and r.digest == digest for r in server.records())

            for server in servers:
                await until(lambda server=server: moved(server))  # type: ignore[misc]
        for follower in followers:
            follower.cancel()
        await asyncio.gather(*followers, return_exceptions=True)

    run(scenario())


def test_a_registry_that_cannot_be_read_takes_nothing_away(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "POLL_SECONDS", 0.01)

    async def scenario() -> None:
        house.registry.promote(house.push("one"), "ada")
        await house.catalog.sync()
        database = house.home / "registry" / "registry.db"
        house.registry.close()
        house.catalog.registry.close()
        kept = database.read_bytes()
        database.write_bytes(b"no database " * 1000)
        (house.home / "registry" / "registry.db-wal").unlink(missing_ok=True)
        follower = asyncio.create_task(house.catalog.follow())
        await asyncio.sleep(0.1)
        assert house.digest("support")
        house.catalog.registry.close()
        database.write_bytes(kept)
        house.registry.promote(house.push("two"), "ada")
        await until(lambda: house.digest("support") == house.registry.version("support@2").facts.digest)
        follower.cancel()

    run(scenario())


def test_metrics_are_told_of_what_is_retired(house: House) -> None:
    async def scenario() -> None:
        gone: list[str] = []
        registry = Registry(house.registry.url)
        catalog = RegistryCatalog(
            registry, house.home / "copies", SPEC, "base", "/b", prepare, FakeEngine(), forget=gone.append
        )
        await catalog.want(house.push("one"))
        house.push("two")
        await catalog.sync()
        assert gone == []
        for ref in ("support@1", "support@2"):
            house.registry.retire(ref, "ada")
        await catalog.sync()
        assert gone == ["support@1"], "the other was never served"

    run(scenario())


def test_an_alias_whose_new_version_fails_stays_on_the_old_one_until_that_is_retired(house: House) -> None:
    async def scenario() -> None:
        for text in ("one", "two", "three"):
            house.push(text)
        house.registry.promote("support@1", "ada")
        house.registry.canary("support", Canary(2, 1.0), "ada")
        await house.catalog.sync()
        assert house.digest("support") == house.registry.version("support@2").facts.digest
        broken = house.registry.artifacts.path(house.registry.version("support@3").artifact)
        (broken / "adapter_model.safetensors").unlink()
        house.registry.promote("support@3", "ada")
        house.registry.retire("support@2", "ada")
        for _ in range(2):
            await house.catalog.sync()
            assert house.digest("support") == house.registry.version("support@1").facts.digest
        house.registry.retire("support@1", "ada")
        for _ in range(2):
            await house.catalog.sync()
            assert house.catalog.records() == []

    run(scenario())
