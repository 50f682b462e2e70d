"""Versions, aliases, the audit log, and what is left when somebody else breaks the files."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from motet.errors import AdapterConflict, AdapterRefused, ConfigError, InvalidRequest, StorageFull
from motet.registry.records import Canary, NotRegistered, split_ref
from motet.registry.store import Registry
from motet.registry.tables import RegistryDamaged
from tests.databases import Postgres

from .house import BASE, adapter_at, examine, label, push, registry_at


@pytest.fixture(params=["sqlite", "postgresql"])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Registry]:
    database = ""
    if request.param == "postgresql":
        server: Postgres = request.getfixturevalue("postgres")
        database = server.url(server.database())
    registry = registry_at(tmp_path, database)
    yield registry
    registry.close()


def test_versions_are_numbered_and_keep_what_was_said_of_them(registry: Registry, tmp_path: Path) -> None:
    push(registry, tmp_path, "one", metrics={"accuracy": 0.9}, license="mit", org="acme")
    assert push(registry, tmp_path, "two", who="bob") == "support@2"
    assert push(registry, tmp_path, "one", name="acme/legal") == "acme/legal@1"
    first = registry.version("support@1")
    assert (first.facts.base, first.facts.rank, first.facts.num_parameters) == (BASE, 8, 3)
    assert (first.label.metrics, first.label.license, first.label.who) == ({"accuracy": 0.9}, "mit", "ada")
    assert first.config == {"r": 8}
    assert first.fine_tune("base") == f"ft:base:acme:support:{first.facts.digest[:12]}"
    assert (registry.artifacts.path(first.artifact) / "adapter_model.safetensors").read_text() == "one"
    assert registry.version("acme/legal@1").artifact == first.artifact, "equal files are kept once"
    assert registry.check() == []


def test_a_reopened_registry_has_everything(registry: Registry, tmp_path: Path) -> None:
    push(registry, tmp_path, "one")
    registry.promote("support@1", "ada")
    before = registry.snapshot()
    registry.close()
    with closing(Registry(registry.url)) as again:
        assert again.snapshot() == before


def test_pushing_what_is_there_is_a_conflict_and_pushing_what_is_bad_leaves_nothing(
    registry: Registry, tmp_path: Path
) -> None:
    push(registry, tmp_path, "one")
    with pytest.raises(AdapterConflict, match="support@1 has the same files"):
        push(registry, tmp_path, "one")
    with pytest.raises(AdapterRefused, match="bad"):
        push(registry, tmp_path, "bad")
    with pytest.raises(AdapterRefused, match=r"has no adapter_config\.json"):
        registry.push("support", tmp_path, examine, label())
    with pytest.raises(AdapterRefused, match=r"has no adapter_config\.json"):
        registry.push("support", tmp_path / "nowhere", examine, label())
    (special := adapter_at(tmp_path / "special", "x") / "adapter_model.safetensors").unlink()
    special.mkdir()
    with pytest.raises(AdapterRefused, match="not a regular file"):
        registry.push("support", special.parent, examine, label())
    assert len(list(registry.artifacts.root.iterdir())) == 1
    assert registry.check() == []


def test_a_signature_stays_when_the_same_files_come_under_another_name(
    registry: Registry, tmp_path: Path
) -> None:
    adapter = adapter_at(tmp_path / "a", "one")
    (adapter / "model.sig").write_text("of the release")
    registry.push("support", adapter, examine, label())
    (adapter / "model.sig").write_text("of somebody")
    registry.push("other", adapter, examine, label())
    artifact = registry.version("support@1").artifact
    assert registry.version("other@1").artifact == artifact
    assert (registry.artifacts.path(artifact) / "model.sig").read_text() == "of the release"


@pytest.mark.parametrize(
    "name", ["", "../x", "/a", "a/", "a/../b", "7", "a/7", "a@b", "x" * 65, "a\0", "-a", "ft:a"]
)
def test_names_that_could_be_something_else(registry: Registry, tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidRequest):
        registry.push(name, adapter_at(tmp_path / "a", "x"), examine, label())
    with pytest.raises(InvalidRequest):
        split_ref(f"{name}@1" if "@" in name or not name else name)


def test_a_bare_name_is_its_production_alias(registry: Registry, tmp_path: Path) -> None:
    push(registry, tmp_path, "one")
    with pytest.raises(NotRegistered, match="no alias support@prod"):
        registry.version("support")
    registry.promote("support@1", "ada")
    assert registry.version("support") == registry.version("support@prod") == registry.version("support@1")
    with pytest.raises(NotRegistered, match="no version support@9"):
        registry.promote("support@9", "ada")


def test_promote_and_rollback_walk_over_the_same_versions(registry: Registry, tmp_path: Path) -> None:
    for text in ("one", "two", "three"):
        registry.promote(push(registry, tmp_path, text), "ada")
    assert [registry.rollback("support", "bob").stable for _ in range(2)] == [2, 1]
    with pytest.raises(AdapterConflict, match="nothing but support@1"):
        registry.rollback("support@prod", "bob")
    assert registry.promote("support@3", "ada").stable == 3
    assert registry.rollback("support@prod", "bob").stable == 1
    assert registry.promote("support@1", "ada", to="staging").alias == "staging"
    assert registry.promote("support@staging", "ada").stable == 1


def test_a_canary_ends_with_a_promotion_or_a_rollback(registry: Registry, tmp_path: Path) -> None:
    registry.promote(push(registry, tmp_path, "one"), "ada")
    push(registry, tmp_path, "two")
    for weight in (0.0, 1.5, float("nan")):
        with pytest.raises(InvalidRequest, match="weight"):
            registry.canary("support", Canary(2, weight), "ada")
    with pytest.raises(AdapterConflict):
        registry.canary("support", Canary(1, 0.1), "ada")
    with pytest.raises(NotRegistered):
        registry.canary("support", Canary(7, 0.1), "ada")
    assert registry.canary("support@prod", Canary(2, 0.1), "ada").canary == Canary(2, 0.1)
    assert registry.rollback("support", "ada").canary is None
    assert registry.version("support").number == 1
    registry.canary("support", Canary(2, 0.5), "ada")
    alias = registry.promote("support@2", "ada")
    assert (alias.stable, alias.canary) == (2, None)
    assert registry.rollback("support", "ada").stable == 1


def test_what_an_alias_needs_is_not_retired(registry: Registry, tmp_path: Path) -> None:
    registry.promote(push(registry, tmp_path, "one"), "ada")
    push(registry, tmp_path, "two")
    registry.canary("support", Canary(2, 0.1), "ada")
    for ref in ("support@1", "support@2"):
        with pytest.raises(AdapterConflict, match="support@prod points at"):
            registry.retire(ref, "ada")
    registry.promote("support@2", "ada")
    assert registry.retire("support@1", "ada").retired
    with pytest.raises(AdapterConflict, match="support@1 is retired"):
        registry.rollback("support", "ada")
    with pytest.raises(AdapterConflict, match="support@1 is retired"):
        registry.promote("support@1", "ada")
    with pytest.raises(InvalidRequest, match="not a version"):
        registry.retire("support@prod", "ada")
    registry.drop_alias("support@prod", "ada")
    with pytest.raises(NotRegistered):
        registry.rollback("support", "ada")


def test_the_log_says_who_did_what(registry: Registry, tmp_path: Path) -> None:
    push(registry, tmp_path, "one", metrics={"f1": 0.5})
    push(registry, tmp_path, "one", name="sup")
    registry.promote("support@1", "bob", reason="looks good")
    registry.note("eve", "deny", [("support@1", "no signature")])
    told = [(event.who, event.action, event.subject) for event in registry.history("support")]
    assert told == [
        ("eve", "deny", "support@1"),
        ("bob", "promote", "support@prod"),
        ("ada", "push", "support@1"),
    ]
    assert "looks good" in registry.history("support@prod")[0].detail
    assert "f1 0.5" in registry.history("support@1")[1].detail
    assert registry.revision() == registry.history()[0].number == 4


def test_what_people_write_is_kept_or_refused_by_name(registry: Registry, tmp_path: Path) -> None:
    said = label("caf\udce9/\0", "Ada 🦉", license="a\0b", metrics={"size": 2.0**80})
    registry.push("support", adapter_at(tmp_path / "a", "one"), examine, said)
    assert registry.version("support@1").label == said
    registry.promote("support@1", "e\0ve", reason="caf\udce9")
    assert registry.history("support@prod")[0].who == "e\\0ve"
    assert "caf\\udce9" in registry.history("support@prod")[0].detail
    for number in (float("nan"), float("inf")):
        with pytest.raises(InvalidRequest, match="metric 'f1' is"):
            push(registry, tmp_path, "two", metrics={"f1": number})


def test_names_differ_by_small_and_large_letters(registry: Registry, tmp_path: Path) -> None:
    push(registry, tmp_path, "one", name="support")
    push(registry, tmp_path, "two", name="Support")
    assert [event.subject for event in registry.history("Support")] == ["Support@1"]


def test_gc_removes_what_no_version_needs(registry: Registry, tmp_path: Path) -> None:
    push(registry, tmp_path, "one")
    shared = registry.version("support@1").artifact
    push(registry, tmp_path, "one", name="legal")
    push(registry, tmp_path, "two")
    gone = registry.version("support@2").artifact
    registry.retire("support@1", "ada")
    registry.retire("support@2", "ada")
    (registry.artifacts.root / ".staging-dead").mkdir()
    with registry.artifacts.staged(adapter_at(tmp_path / "mine", "mine")) as (held, _):
        assert sorted(registry.collect("ada")) == sorted([gone, ".staging-dead"])
        assert held.exists()
    assert [entry.name for entry in registry.artifacts.root.iterdir()] == [shared]
    assert registry.collect("ada") == []
    assert registry.check() == []


def test_check_names_what_is_unsound(tmp_path: Path) -> None:
    registry = registry_at(tmp_path)
    for text in ("one", "two", "three"):
        push(registry, tmp_path, text)
    places = [registry.artifacts.path(registry.version(f"support@{n}").artifact) for n in (1, 2, 3)]
    (places[0] / "adapter_model.safetensors").write_text("onE")
    shutil.rmtree(places[1])
    registry.promote("support@3", "ada")
    file = tmp_path / "registry" / "registry.db"
    with sqlite3.connect(file) as db:
        db.execute("UPDATE versions SET retired = 1 WHERE number = 3")
        db.execute("INSERT INTO aliases VALUES ('support', 'odd', 12, NULL)")
    db.close()
    found = "\n".join(registry.check())
    assert "support@1: its files have digest" in found
    assert "support@2: adapter_config.json cannot be read" in found
    assert "support@prod points at support@3, which is retired" in found
    assert "support@odd points at support@12, which is not there" in found
    assert "a row of aliases refers to no version" in found


def test_a_damaged_artifact_is_mended_by_the_next_push_of_the_same_files(
    registry: Registry, tmp_path: Path
) -> None:
    push(registry, tmp_path, "one")
    place = registry.artifacts.path(registry.version("support@1").artifact)
    (place / "adapter_model.safetensors").write_text("broken")
    push(registry, tmp_path, "one", name="legal")
    assert registry.check() == []


def test_a_full_disk_leaves_nothing(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageFull):
        push(registry, tmp_path, "one")
    monkeypatch.undo()
    assert list(registry.artifacts.root.iterdir()) == []
    assert registry.check() == []


def test_a_database_that_is_none_and_urls_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "registry.db").write_text("this is not a database, " * 100)
    with pytest.raises(RegistryDamaged):
        Registry(str(tmp_path))
    for url in (
        "http://x/y",
        "sqlite://",
        "sqlite://host/file",
        "postgresql://ada:secret@x/y",
        "mysql://x/y",
    ):
        with pytest.raises(ConfigError, match="must be a folder, sqlite") as refused:
            Registry(url)
        assert "secret" not in str(refused.value)
    Registry(f"sqlite:///{tmp_path}/file/is/new.db").close()
    (tmp_path / "plain").touch()
    with pytest.raises(ConfigError, match="cannot be made"):
        Registry(str(tmp_path / "plain" / "registry"))
