"""A private PostgreSQL and a private Redis in temporary folders, for what only the real ones can show.

They listen on a Unix socket only, and nothing of them is left. Tests that need one skip where its programs are not
installed (Debian: postgresql, redis-server).
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

START_SECONDS = 60.0


def postgres_programs() -> Path | None:
    """The folder of the newest PostgreSQL's programs."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    path = found[-1] if found else shutil.which("initdb")
    return Path(path).parent if path else None


def redis_program() -> str | None:
    return shutil.which("redis-server")


@dataclass
class Postgres:
    """A server; whoever needs a database gets one of its own."""

    home: Path

    def url(self, database: str = "postgres", user: str = "postgres") -> str:
        return f"postgresql+psycopg://{user}@/{database}?host={self.home}"

    def database(self) -> str:
        """The name of a new, empty database."""
        name = f"db{uuid.uuid4().hex}"
        self.run(f"CREATE DATABASE {name}")
        return name

    def drop(self, name: str) -> None:
        self.run(f"DROP DATABASE {name} WITH (FORCE)")

    def run(self, statement: str, database: str = "postgres") -> None:
        """Run a statement as the superuser, outside of a transaction."""
        from sqlalchemy import create_engine, text  # not there where only the GPU's tests are run

        engine = create_engine(self.url(database), isolation_level="AUTOCOMMIT")
        try:
            with engine.connect() as connection:
                connection.execute(text(statement))
        finally:
            engine.dispose()


@contextmanager
def postgres_server(programs: Path) -> Iterator[Postgres]:
    """Make a cluster and start it. PostgreSQL does not run as root, so then it runs as somebody else."""
    user = _somebody() if os.getuid() == 0 else None
    with _folder(user) as home:
        data = home / "data"
        make = [
            str(programs / "initdb"),
            "-D",
            str(data),
            "-U",
            "postgres",
            "-A",
            "trust",
            "-E",
            "UTF8",
            "--no-sync",
        ]
        subprocess.run(make, check=True, capture_output=True, user=user, cwd=home)
        serve = [str(programs / "postgres"), "-D", str(data), "-k", str(home), "-c", "listen_addresses="]
        with (home / "log").open("wb") as log, subprocess.Popen(
            [*serve, "-c", "fsync=off"], stderr=log, user=user, cwd=home
        ) as process:  # fmt: skip
            try:
                from sqlalchemy.exc import OperationalError

                server = Postgres(home)
                _wait(lambda: server.run("SELECT 1"), OperationalError, process)
                yield server
            finally:
                process.send_signal(signal.SIGQUIT)  # at once: nothing of it is kept


@dataclass
class RedisServer:
    """A server that forgets everything when it is stopped."""

    program: str
    home: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"unix://{self.home / 'socket'}"

    def start(self) -> None:
        socket = self.home / "socket"
        command = [self.program, "--port", "0", "--unixsocket", str(socket), "--save", ""]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=self.home)
        _wait(socket.stat, OSError, self.process)

    def stop(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait(START_SECONDS)
        (self.home / "socket").unlink()


@contextmanager
def redis_server(program: str) -> Iterator[RedisServer]:
    with _folder(None) as home:
        server = RedisServer(program, home)
        server.start()
        try:
            yield server
        finally:
            server.stop()


def _somebody() -> str:
    """A user without privileges."""
    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


@contextmanager
def _folder(user: str | None) -> Iterator[Path]:
    """A folder with a short name, as a socket needs, that is `user`'s."""
    with tempfile.TemporaryDirectory(prefix="motet-") as name:
        if user is not None:
            shutil.chown(name, user)
        yield Path(name)


def _wait(attempt: Callable[[], object], early: type[Exception], process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + START_SECONDS
    while True:
        try:
            attempt()
            return
        except early:
            assert process.poll() is None, "the server has ended"
            assert time.monotonic() < end, "the server did not start"
            time.sleep(0.02)
