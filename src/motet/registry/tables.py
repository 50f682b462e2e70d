"""The registry's database: its tables, and transactions that survive kill -9 and other processes.

SQLite in WAL mode: readers never wait. A writer takes the write lock before it reads what it decides on
(BEGIN IMMEDIATE), so two processes never decide on the same state; the other one waits up to BUSY_SECONDS.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import (
    JSON,
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
)
from sqlalchemy.engine import URL
from sqlalchemy.exc import DatabaseError, OperationalError

from motet.errors import ConfigError, MotetError

BUSY_SECONDS = 30.0
metadata = MetaData()

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
    Column("id", Integer, primary_key=True),
    Column("name", String, nullable=False, index=True),
    Column("alias", String, nullable=False),
    Column("stable", Integer, nullable=False),
    ForeignKeyConstraint(["name", "stable"], ["versions.name", "versions.number"]),
)
audit = Table(
    "audit",
    metadata,
    Column("id", Integer, primary_key=True),
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


class RegistryDamaged(MotetError):
    """The registry's database cannot be read."""

    code = "registry_damaged"


class Database:
    """The database of one registry."""

    def __init__(self, file: Path) -> None:
        """Opens `file`, and makes it if it is not there. Raises ConfigError."""
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"registry {file.parent} cannot be made: {error.strerror}") from error
        self._engine = create_engine(
            URL.create("sqlite", database=str(file)), connect_args={"timeout": BUSY_SECONDS}
        )
        event.listen(self._engine, "connect", _on_connect)
        event.listen(self._engine, "begin", _on_begin)
        with self.write() as connection:
            metadata.create_all(connection)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """One state of all tables, whatever others write meanwhile."""
        with _told(), self._engine.begin() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that nobody else's can come between; committed at the end, or undone by an exception."""
        with _told(), _writing(self._engine).begin() as connection:
            yield connection

    def close(self) -> None:
        self._engine.dispose()

    def problems(self) -> list[str]:
        """What SQLite finds wrong with the file and between the tables."""
        with self.read() as connection:
            found = [str(row[0]) for row in connection.exec_driver_sql("PRAGMA integrity_check")]
            found += [
                f"a row of {row[0]} refers to no version"
                for row in connection.exec_driver_sql("PRAGMA foreign_key_check")
            ]
        return [line for line in found if line != "ok"]


def _writing(engine: Engine) -> Engine:
    return engine.execution_options(writing=True)


def _on_connect(connection: sqlite3.Connection, _: Any) -> None:
    connection.isolation_level = None  # sqlite3 begins no transaction of its own; _on_begin does
    for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
        connection.execute(f"PRAGMA {pragma}")


def _on_begin(connection: Connection) -> None:
    writing = connection.get_execution_options().get("writing")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")


@contextmanager
def _told() -> Iterator[None]:
    """SQLite's failures as ours."""
    try:
        yield
    except OperationalError as error:
        if "locked" in str(error.orig):
            raise RegistryBusy(f"the registry was locked for {BUSY_SECONDS:.0f} s") from error
        raise RegistryDamaged(f"the registry's database failed: {error.orig}") from error
    except DatabaseError as error:
        if isinstance(error.orig, sqlite3.IntegrityError):
            raise
        raise RegistryDamaged(f"the registry's database cannot be read: {error.orig}") from error
