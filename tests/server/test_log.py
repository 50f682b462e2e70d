"""Log lines: one per event, with their fields, and safe from what clients send."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from motet.observe.log import setup
from motet.tenancy.keys import key_id_of

from .fakes import House
from .tenants import platform


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


def test_text() -> None:
    stream = io.StringIO()
    setup("info", stream=stream)
    logging.getLogger("motet.x").info("hello %s", "a\nb", extra={"model": "m", "path": "a b", "empty": ""})
    logging.getLogger("motet.x").debug("not shown")
    line = stream.getvalue()
    assert line.endswith(' INFO motet.x: hello a\\nb model=m path="a b" empty=""\n')
    assert line.count("\n") == 1
    assert line[10] == "T"


def test_json() -> None:
    stream = io.StringIO()
    setup("DEBUG", as_json=True, stream=stream)
    try:
        raise ValueError("boom")
    except ValueError:
        logging.getLogger("motet.x").exception("oh\nno", extra={"model": "m"})
    line = json.loads(stream.getvalue())
    assert (line["level"], line["logger"], line["message"], line["model"]) == (
        "ERROR",
        "motet.x",
        "oh\nno",
        "m",
    )
    assert "ValueError: boom" in line["traceback"]


def test_requests_are_logged_without_what_they_carry(house: House) -> None:
    stream = io.StringIO()
    setup(stream=stream)
    house.complete(prompt="my secret")
    house.get("/health?api_key=secret", authorization="Bearer secret")
    lines = "".join(line for line in stream.getvalue().splitlines() if " motet." in line)
    assert "POST /v1/completions" in lines
    assert "model=base status=200" in lines
    assert "secret" not in lines


def test_a_line_of_json_says_who_asked_and_not_what(tmp_path: Path) -> None:
    served = platform(tmp_path)
    stream = io.StringIO()
    setup(as_json=True, stream=stream)
    messages = [{"role": "user", "content": "my secret"}]
    served.ask(
        served.acme,
        "POST",
        "/v1/chat/completions?q=secret",
        {"model": "acme/poet", "messages": messages},
        **{"x-request-id": "abc"},
    )
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    (line,) = [line for line in lines if line["logger"] == "motet.server.envelope"]
    assert {
        "request_id": "abc",
        "model": "acme/poet",
        "status": 200,
        "tenant": "acme",
    }.items() <= line.items()
    assert line["key"] == key_id_of(served.acme)
    ours = [str(line) for line in lines if line["logger"].startswith("motet")]
    assert not any("secret" in line or served.acme.split("-", 2)[2] in line for line in ours)
