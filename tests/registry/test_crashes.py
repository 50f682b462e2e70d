"""kill -9 at every line of push, promote, rollback and gc, and processes that share a registry, on both databases.

A child process is killed when it reaches its nth line inside the registry, for n = 1, 2, … until it gets through.
Children are forked, because starting an interpreter for each of some hundred lines would take minutes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from motet.registry.store import Registry
from tests.databases import Postgres

from .house import push, registry_at

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, os, shutil, signal, sys
from pathlib import Path

from motet.registry.records import Canary
from motet.registry.store import Registry
from tests.databases import Postgres
from tests.registry.house import push, registry_at

ROOM = os.path.join("motet", "registry", "")
TABLES = ("versions", "aliases", "moves", "audit")
RESTORE = "; ".join(
    [f"TRUNCATE {', '.join('motet.' + table for table in TABLES)}"]
    + [f"INSERT INTO motet.{table} SELECT * FROM saved.{table}" for table in TABLES]
)

def killed_at(line, work):
    seen = 0
    def trace(frame, event, _):
        nonlocal seen
        if ROOM not in frame.f_code.co_filename:
            return None
        if event == "line":
            seen += 1
            if seen == line:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace
    pid = os.fork()
    if not pid:
        sys.settrace(trace)
        work()
        os._exit(0)
    return os.waitpid(pid, 0)[1] != 0

def work(home, database):
    registry = registry_at(home, database)
    if step == "push":
        push(registry, home, "three")
    elif step == "promote":
        registry.promote("support@2", "ada")
    elif step == "rollback":
        registry.rollback("support", "ada")
    else:
        registry.collect("ada")

step, home, database, where = sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4]
server = Postgres(Path(where)) if where else None
states, line = [], 0
while True:
    line += 1
    here = home / str(line)
    shutil.copytree(home / "before", here)
    if server:
        server.run(RESTORE, database)
    url = server.url(database) if server else ""
    died = killed_at(line, lambda: work(here, url))
    registry = registry_at(here, url)
    problems = registry.check()
    snapshot = registry.snapshot()
    prod = snapshot.aliases["support@prod"].stable
    files = {v.ref: (registry.artifacts.path(v.artifact) / "adapter_model.safetensors").read_text()
             for v in snapshot.versions.values() if not v.retired}
    registry.collect("ada")
    rubbish = len(list(registry.artifacts.root.iterdir())) - len(files)
    again = push(registry, here, "four")
    states.append((problems, prod, files, rubbish, again, registry.check()))
    registry.close()
    shutil.rmtree(here)
    if not died:
        break
print(json.dumps(states))
"""


@pytest.fixture(params=["sqlite", "postgresql"])
def postgres_or_none(request: pytest.FixtureRequest) -> Postgres | None:
    server: Postgres | None = request.getfixturevalue("postgres") if request.param == "postgresql" else None
    return server


@pytest.mark.parametrize("step", ["push", "promote", "rollback", "gc"])
def test_kill_9_at_every_line_leaves_a_sound_registry(
    tmp_path: Path, step: str, postgres_or_none: Postgres | None
) -> None:
    home, server = tmp_path / "home", postgres_or_none
    database = server.database() if server else ""
    registry = registry_at(home / "before", server.url(database) if server else "")
    push(registry, tmp_path, "zero", name="old")
    registry.retire("old@1", "ada")
    for text in ("one", "two"):
        push(registry, tmp_path, text)
    registry.promote("support@1", "ada")
    if step == "rollback":
        registry.promote("support@2", "ada")
    registry.close()
    if server:
        server.run("CREATE SCHEMA saved", database)
        for table in ("versions", "aliases", "moves", "audit"):
            server.run(f"CREATE TABLE saved.{table} AS TABLE motet.{table}", database)
    where = str(server.home) if server else ""
    program = [sys.executable, "-c", PROGRAM, step, str(home), database, where]
    done = subprocess.run(program, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    states = json.loads(done.stdout)
    assert len(states) > 30, "the lines of the registry were not seen"
    kept = {"support@1": "one", "support@2": "two"}
    for problems, prod, files, rubbish, again, after in states:
        assert problems == after == []
        assert rubbish == 0, "gc takes what the dead left, and nothing else"
        new = {"support@3": "three"} if "support@3" in files else {}
        assert files == {**kept, **new}
        assert again == f"support@{len(files) + 1}"
        assert prod in {"push": {1}, "gc": {1}, "promote": {1, 2}, "rollback": {1, 2}}[step]
    first, last = states[0], states[-1]
    if step == "push":
        assert ("support@3" in first[2], "support@3" in last[2]) == (False, True)
    if step in ("promote", "rollback"):
        assert first[1] != last[1]


WRITER = """
import sys
from pathlib import Path
from motet.errors import AdapterConflict
from tests.registry.house import push, registry_at

home, me, database = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
registry = registry_at(home, database)
for i in range(12):
    ref = push(registry, home / me, f"{me}-{i}", who=me)
    registry.promote(ref, me)
    registry.collect(me)
    if i % 3 == 2:
        try:
            registry.retire(ref, me)
        except AdapterConflict:
            pass
"""


def test_processes_share_a_registry(tmp_path: Path, postgres_or_none: Postgres | None) -> None:
    server = postgres_or_none
    database = server.url(server.database()) if server else ""
    registry = registry_at(tmp_path, database)
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), name, database], cwd=ROOT)
        for name in ("ada", "bob", "eve")
    ]
    revision = 0
    while any(writer.poll() is None for writer in writers):
        snapshot = registry.snapshot()
        assert snapshot.revision >= revision
        revision = snapshot.revision
        for alias in snapshot.aliases.values():
            assert f"{alias.name}@{alias.stable}" in snapshot.versions, "half a promotion was seen"
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    snapshot = registry.snapshot()
    assert sorted(v.number for v in snapshot.versions.values()) == list(range(1, 37))
    assert len(registry.history(last=1000)) == snapshot.revision
    assert registry.check() == []
    with closing(Registry(registry.url)) as again:
        assert again.snapshot() == snapshot
    registry.close()
