"""The audit log of refusals: one writer, a bounded queue, and nothing lost in silence."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from motet.registry import scribe as scribe_module
from motet.registry.scribe import Scribe
from motet.registry.store import Registry
from motet.registry.tables import RegistryBusy

from .house import registry_at
from .test_crashes import ROOT


class Desk:
    """A registry, a scribe, and what was lost."""

    def __init__(self, home: Path) -> None:
        self.registry = registry_at(home)
        self.lost = Counter[str]()
        self.scribe = Scribe(self.registry, lambda: self.lost.update(["lost"]))

    def tell(self, *numbers: int) -> None:
        for number in numbers:
            self.scribe.tell(("support@1", f"to tenant {number}"))

    def told(self) -> list[int]:
        """The tenants in the log, in its order, once all is written."""
        while writers():
            time.sleep(0.005)
        return [int(event.detail.split()[-1]) for event in reversed(self.registry.history(last=10_000))]


def writers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "audit"]


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(tmp_path)
    yield desk
    desk.registry.close()


@contextmanager
def locked(registry: Registry) -> Iterator[None]:
    """Another process writes, and the writer has already begun to wait for it."""
    with registry._db.write():
        yield


def test_a_thousand_refusals_take_one_thread_and_nobody_waits(desk: Desk) -> None:
    with locked(desk.registry):
        began = time.monotonic()
        desk.tell(*range(1000), *range(1000))
        assert time.monotonic() - began < 1.0, "30 s is what the registry's lock is waited for"
        assert len(writers()) == 1
    assert desk.told() == list(range(1000))
    assert desk.lost["lost"] == 0


def test_what_does_not_fit_is_counted_and_logged_and_told_the_next_time(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(scribe_module, "MAX_WAITING", 5)
    with locked(desk.registry):
        desk.tell(0)
        while vars(desk.scribe)["_waiting"]:  # the writer takes it, and waits for the lock
            time.sleep(0.005)
        desk.tell(1, 2, 3, 4, 5, 6, 7)
        assert desk.lost["lost"] == 2
        said = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
        assert [line for line in said if "to tenant 6: 5 others wait" in line]
        assert len(said) == 2
    assert desk.told() == [0, 1, 2, 3, 4, 5]
    desk.tell(*range(8))
    assert desk.told() == [0, 1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("failure", [RegistryBusy("locked"), ZeroDivisionError("a fault of ours")])
def test_a_registry_that_fails_loses_nothing_in_silence(
    desk: Desk, failure: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise failure

    with monkeypatch.context() as broken:
        broken.setattr(Registry, "note", fail)
        desk.tell(1, 2)
        assert desk.told() == []
    assert desk.lost["lost"] == 2
    assert "not told that support@1 was denied to tenant 2" in caplog.text
    desk.tell(1, 2)
    assert desk.told() == [1, 2]


def test_what_is_remembered_is_bounded_and_what_is_not_is_told_again(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scribe_module, "MAX_TOLD", 3)
    desk.tell(1, 2, 3, 1, 4, 4, 3, 1)
    assert desk.told() == [1, 2, 3, 4, 1]


PROGRAM = """
import sys
from pathlib import Path
from motet.registry.scribe import Scribe
from tests.registry.house import registry_at

scribe = Scribe(registry_at(Path(sys.argv[1])), lambda: None)
for number in range(300):
    scribe.tell(("support@1", f"to tenant {number}"))
"""


def test_a_process_that_exits_has_told_all(desk: Desk, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], check=True, cwd=ROOT, capture_output=True)
    assert desk.told() == list(range(300))
