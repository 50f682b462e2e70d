"""The registry's tables, and its database: SQLite, or PostgreSQL. Transactions survive kill -9 and other processes.

Readers never wait and see one moment. A writer takes the registry's one lock before it reads what it decides on and
holds it until its changes are seen. So two never decide on the same state, nothing has to be tried again, and events
get their numbers in order; the other one waits up to BUSY_SECONDS. In SQLite (WAL mode) the lock is the file's (BEGIN
IMMEDIATE), in PostgreSQL an advisory one.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Connection,
    Engine,
    Float,
    ForeignKeyConstraint,
    Integer,
    MetaData,
    String,
    Table,
    create_engine,
    event,
    inspect,
)
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.schema import CreateSchema

from motet.errors import ConfigError, MotetError

BUSY_SECONDS = 30.0
SCHEMA = "motet"  # in PostgreSQL, where others may have tables of these names
metadata = MetaData()
_Serial = BigInteger().with_variant(Integer, "sqlite")

versions = Table(
    "versions",
    metadata,
    Column("name", String, primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("artifact", String, nullable=False),
    Column("facts", JSON, nullable=False),
    Column("label", JSON, nullable=False),
    Column("config", JSON, nullable=False),
    Column("created", Float, nullable=False),
    Column("retired", Boolean, nullable=False, default=False),
)
aliases = Table(
    "aliases",
    metadata,
    Column("name", String, primary_key=True),
    Column("alias", String, primary_key=True),
    Column("stable", Integer, nullable=False),
    Column("canary", JSON(none_as_null=True)),
    ForeignKeyConstraint(["name", "stable"], ["versions.name", "versions.number"]),
)
moves = Table(  # where an alias pointed, newest last: what a rollback goes back to
    "moves",
    metadata,
    Column("id", _Serial, primary_key=True),
    Column("name", String, nullable=False, index=True),
    Column("alias", String, nullable=False),
    Column("stable", Integer, nullable=False),
    ForeignKeyConstraint(["name", "stable"], ["versions.name", "versions.number"]),
)
audit = Table(
    "audit",
    metadata,
    Column("id", _Serial, primary_key=True),
    Column("at", Float, nullable=False),
    Column("who", String, nullable=False),
    Column("action", String, nullable=False),
    Column("subject", String, nullable=False, index=True),
    Column("detail", String, nullable=False),
    sqlite_autoincrement=True,
)


class RegistryBusy(MotetError):
    """Another process held the registry's write lock for too long."""

    status = 503
    code = "registry_busy"


class RegistryUnavailable(MotetError):
    """The registry's database cannot be reached."""

    status = 503
    code = "registry_unavailable"


class RegistryDamaged(MotetError):
    """The registry's database cannot be read."""

    code = "registry_damaged"


class Database:
    """The database of one registry."""

    def __init__(self, url: URL) -> None:
        """Opens a SQLite file, made if it is not there, or a PostgreSQL database. Raises ConfigError."""
        if url.get_backend_name() == "sqlite":
            _make_folder(Path(str(url.database)).parent)
            self._reading = _sqlite(url)
            self._writing = self._reading.execution_options(writing=True)
        else:
            engine = _postgresql(url)
            self._reading = engine.execution_options(
                isolation_level="REPEATABLE READ", postgresql_readonly=True
            )
            self._writing = engine.execution_options(isolation_level="READ COMMITTED", writing=True)
        with self.write() as connection:
            if not self._is_sqlite and not inspect(connection).has_schema(SCHEMA):
                connection.execute(CreateSchema(SCHEMA))
            metadata.create_all(connection)

    @property
    def _is_sqlite(self) -> bool:
        return self._reading.dialect.name == "sqlite"

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """One state of all tables, whatever others write meanwhile."""
        with _told(), self._reading.begin() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that nobody else's can come between; committed at the end, or undone by an exception."""
        with _told(), self._writing.begin() as connection:
            yield connection

    def close(self) -> None:
        self._reading.dispose()

    def problems(self) -> list[str]:
        """What SQLite finds wrong with the file and between the tables; PostgreSQL lets nothing get wrong there."""
        if not self._is_sqlite:
            return []
        with self.read() as connection:
            found = [str(row[0]) for row in connection.exec_driver_sql("PRAGMA integrity_check")]
            found += [
                f"a row of {row[0]} refers to no version"
                for row in connection.exec_driver_sql("PRAGMA foreign_key_check")
            ]
        return [line for line in found if line != "ok"]


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"registry {folder} cannot be made: {error.strerror}") from error


def _sqlite(url: URL) -> Engine:
    engine = create_engine(url, connect_args={"timeout": BUSY_SECONDS})
    event.listen(engine, "connect", _on_sqlite_connect)
    event.listen(engine, "begin", _on_sqlite_begin)
    return engine


def _on_sqlite_connect(connection: sqlite3.Connection, _: Any) -> None:
    connection.isolation_level = None  # sqlite3 begins no transaction of its own; _on_sqlite_begin does
    for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
        connection.execute(f"PRAGMA {pragma}")


def _on_sqlite_begin(connection: Connection) -> None:
    writing = connection.get_execution_options().get("writing")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")


# Both ends notice within seconds that the other is cut off, so that nobody dead holds the lock: seconds, and of
# tcp_user_timeout milliseconds. The URL may say others. 0x6d6f746574 is "motet".
_KEEPALIVES = {"keepalives_idle": "5", "keepalives_interval": "2", "keepalives_count": "3"}
_REACH = {"connect_timeout": "5", "tcp_user_timeout": "10000", **_KEEPALIVES}
_TAKE_LOCK = "; ".join(
    [f"SET LOCAL lock_timeout = '{BUSY_SECONDS:.0f}s'"]
    + [f"SET LOCAL tcp_{name} = {seconds}" for name, seconds in _KEEPALIVES.items()]
    + [f"SELECT pg_advisory_xact_lock({0x6D6F746574})"]
)


def _postgresql(url: URL) -> Engine:
    try:
        engine = create_engine(url.set(query={**_REACH, **url.query}), pool_pre_ping=True)
    except ImportError as error:
        raise ConfigError(
            "a registry in PostgreSQL needs the extra: pip install 'motet[postgresql]'"
        ) from error
    engine = engine.execution_options(schema_translate_map={None: SCHEMA})
    event.listen(engine, "begin", _on_postgresql_begin)
    return engine


def _on_postgresql_begin(connection: Connection) -> None:
    if connection.get_execution_options().get("writing"):
        connection.exec_driver_sql(_TAKE_LOCK)


@contextmanager
def _told() -> Iterator[None]:
    """The database's failures as ours."""
    try:
        yield
    except IntegrityError:
        raise
    except PoolTimeout as error:
        raise RegistryBusy("the registry's connections are all in use") from error
    except DBAPIError as error:
        raise _as_ours(error) from error


def _as_ours(error: DBAPIError) -> MotetError:
    said = str(error.orig).partition("\n")[0]
    sqlite = isinstance(error.orig, sqlite3.Error)
    if getattr(error.orig, "sqlstate", None) == "55P03" or (sqlite and "locked" in said):
        return RegistryBusy(f"the registry was locked for {BUSY_SECONDS:.0f} s")
    if sqlite:
        return RegistryDamaged(f"the registry's database failed: {said}")
    return RegistryUnavailable(f"the registry's database failed: {said}")
