"""Fixtures for all tests: the databases that a server may be given."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.databases import (
    Postgres,
    RedisServer,
    postgres_programs,
    postgres_server,
    redis_program,
    redis_server,
)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A real PostgreSQL."""
    programs = postgres_programs()
    if programs is None:
        pytest.skip("PostgreSQL is not installed")
    pytest.importorskip("psycopg", reason="needs the extra: pip install 'motet[postgresql]'")
    with postgres_server(programs) as server:
        yield server


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    """A real Redis, of its own for each test."""
    program = redis_program()
    if program is None:
        pytest.skip("redis-server is not installed")
    with redis_server(program) as server:
        yield server
