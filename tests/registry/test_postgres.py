"""A registry in PostgreSQL: lost connections, a lost lock, the tables of others, and what a file cannot meet."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from motet.errors import ConfigError
from motet.registry import tables
from motet.registry.artifacts import Artifacts
from motet.registry.store import Registry
from motet.registry.tables import RegistryBusy, RegistryUnavailable
from tests.databases import Postgres

from .house import push, registry_at
from .test_crashes import ROOT

CUT = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{}'"
HOLDER = """
import sys, time
from pathlib import Path
from tests.registry.house import registry_at

registry = registry_at(Path(sys.argv[1]), sys.argv[2])
with registry._db.write():
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def database(postgres: Postgres) -> str:
    return postgres.database()


@pytest.fixture
def registry(postgres: Postgres, database: str, tmp_path: Path) -> Iterator[Registry]:
    registry = registry_at(tmp_path, postgres.url(database))
    yield registry
    registry.close()


def test_a_connection_that_was_cut_is_made_anew(
    registry: Registry, postgres: Postgres, database: str, tmp_path: Path
) -> None:
    push(registry, tmp_path, "one")
    postgres.run(CUT.format(database))
    assert push(registry, tmp_path, "two") == "support@2"
    postgres.run(CUT.format(database))
    assert registry.snapshot().versions.keys() == {"support@1", "support@2"}


def test_a_database_that_is_gone_is_503(registry: Registry, postgres: Postgres, database: str) -> None:
    postgres.drop(database)
    with pytest.raises(RegistryUnavailable, match="does not exist") as gone:
        registry.snapshot()
    assert gone.value.status == 503


def test_a_server_that_is_not_there_and_a_driver_that_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"postgresql://ada:secret@127.0.0.1:9/none?artifacts={tmp_path}"
    with pytest.raises(RegistryUnavailable, match="refused") as gone:
        Registry(url)
    assert "secret" not in str(gone.value)
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ConfigError, match=r"motet\[postgresql\]"):
        Registry(url)


def test_what_the_url_says_of_the_connection_comes_first(postgres: Postgres, tmp_path: Path) -> None:
    url = f"{postgres.url(postgres.database())}&connect_timeout=nonsense"
    with pytest.raises(RegistryUnavailable, match="connect_timeout"):
        registry_at(tmp_path, url)


def test_others_tables_of_the_same_names(postgres: Postgres, database: str, tmp_path: Path) -> None:
    postgres.run("CREATE TABLE audit (note text)", database)
    registry = registry_at(tmp_path, postgres.url(database))
    push(registry, tmp_path, "one")
    assert registry.revision() == 1
    registry.close()


def test_a_number_that_32_bits_do_not_hold(
    registry: Registry, postgres: Postgres, database: str, tmp_path: Path
) -> None:
    postgres.run(f"SELECT setval('motet.audit_id_seq', {2**31 - 1})", database)
    postgres.run(f"SELECT setval('motet.moves_id_seq', {2**31 - 1})", database)
    registry.promote(push(registry, tmp_path, "one"), "ada")
    registry.promote(push(registry, tmp_path, "two"), "ada")
    assert registry.rollback("support", "ada").stable == 1
    assert registry.revision() == 2**31 + 4


def test_the_lock_of_a_killed_process_is_free_at_once_and_that_of_a_living_one_is_waited_for(
    registry: Registry, postgres: Postgres, database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "_TAKE_LOCK", tables._TAKE_LOCK.replace("30s", "500ms"))
    command = [sys.executable, "-c", HOLDER, str(tmp_path), postgres.url(database)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RegistryBusy):
            registry.note("ada", "look", [("support", "")])
        assert registry.revision() == 0, "who reads does not wait"
        os.kill(holder.pid, signal.SIGKILL)
    registry.note("ada", "look", [("support", "")])
    assert registry.revision() > 0


def test_readers_see_one_moment(registry: Registry, tmp_path: Path) -> None:
    push(registry, tmp_path, "one")
    with registry._db.read() as connection:
        before = connection.execute(text("SELECT count(*) FROM motet.versions")).scalar()
        push(registry, tmp_path, "two")
        assert connection.execute(text("SELECT count(*) FROM motet.versions")).scalar() == before == 1


def test_a_sweep_that_lost_its_lock_takes_no_file_that_a_push_relies_on(
    registry: Registry, postgres: Postgres, database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its connection breaks after it has decided what to remove; the same files are pushed again meanwhile."""
    push(registry, tmp_path, "one")
    registry.retire("support@1", "ada")
    sweep = Artifacts.sweep
    pusher = threading.Thread(target=push, args=(registry, tmp_path, "one"), kwargs={"name": "legal"})

    def slow(artifacts: Artifacts, wanted: set[str]) -> list[str]:
        postgres.run(CUT.format(database))
        pusher.start()
        pusher.join(0.5)
        return sweep(artifacts, wanted)

    monkeypatch.setattr(Artifacts, "sweep", slow)
    with pytest.raises(RegistryUnavailable):
        registry.collect("ada")
    pusher.join()
    assert registry.version("legal@1").number == 1
    assert registry.check() == []


def test_servers_that_start_together(postgres: Postgres, database: str, tmp_path: Path) -> None:
    failures = list[BaseException]()

    def start() -> None:
        try:
            registry_at(tmp_path, postgres.url(database)).close()
        except BaseException as failure:  # noqa: BLE001 - told below
            failures.append(failure)

    starts = [threading.Thread(target=start) for _ in range(8)]
    for thread in starts:
        thread.start()
    for thread in starts:
        thread.join()
    assert failures == []


def test_a_role_that_may_not_make_tables_uses_those_that_are_there(
    postgres: Postgres, database: str, tmp_path: Path
) -> None:
    registry_at(tmp_path, postgres.url(database)).close()
    postgres.run("CREATE ROLE releaser LOGIN")
    for grant in ("USAGE ON SCHEMA motet", "ALL ON ALL TABLES IN SCHEMA motet",
                  "USAGE ON ALL SEQUENCES IN SCHEMA motet"):  # fmt: skip
        postgres.run(f"GRANT {grant} TO releaser", database)
    registry = registry_at(tmp_path, postgres.url(database, "releaser"))
    registry.promote(push(registry, tmp_path, "one"), "ada")
    registry.close()


def test_a_database_that_serialises_by_default(postgres: Postgres, database: str, tmp_path: Path) -> None:
    """Writers read after they have the lock, whatever isolation an administrator has chosen for the database."""
    postgres.run(f"ALTER DATABASE {database} SET default_transaction_isolation = 'serializable'")
    registries = [registry_at(tmp_path, postgres.url(database)) for _ in range(4)]
    failures = list[BaseException]()

    def work(number: int) -> None:
        try:
            for i in range(5):
                registries[number].promote(push(registries[number], tmp_path, f"{number}-{i}"), "ada")
        except BaseException as failure:  # noqa: BLE001 - told below
            failures.append(failure)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert failures == []
    assert len(registries[0].snapshot().versions) == 20
    for registry in registries:
        registry.close()
