"""Two servers on one registry: what is done through one, or beside both, is served by both."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from motet.models.registry import load_spec
from motet.registry.examine import examine
from motet.registry.records import Label
from tests.databases import Postgres
from tests.live import LiveServer, live_server, until
from tests.tiny import write_adapter, write_model

from .house import registry_at

pytestmark = pytest.mark.xdist_group("live")


def answers(server: LiveServer, model: str) -> str | None:
    """Which version answers as `model`; None if nobody does."""
    body = {"model": model, "prompt": "x", "max_tokens": 2, "ignore_eos": True, "user": "ada"}
    answer = server.post("/v1/completions", body)
    assert answer.status_code in (200, 404), answer.text
    return answer.json()["model"] if answer.status_code == 200 else None


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_two_servers(tmp_path: Path, database: str, request: pytest.FixtureRequest) -> None:
    url = ""
    if database == "postgresql":
        postgres: Postgres = request.getfixturevalue("postgres")
        url = postgres.url(postgres.database())
    model = write_model(tmp_path / "base", "llama")
    for number in (1, 2):
        write_adapter(tmp_path / f"v{number}", model, "llama", number, r=4, target_modules=["q_proj"])
    registry = registry_at(tmp_path, url)

    def push(number: int) -> None:
        source = tmp_path / f"v{number}"
        registry.push("support", source, partial(examine, spec=load_spec(model)), Label(str(source), "ada"))

    option = f"--registry={registry.url}"
    with ExitStack() as stack:
        first, second = (
            stack.enter_context(live_server(model, {}, tmp_path / "cache", option, "--pool=8MiB"))
            for _ in range(2)
        )
        push(1)
        registry.promote("support@1", "ada")
        for server in (first, second):
            until(lambda server=server: answers(server, "support") == "support@1")  # type: ignore[misc]
        body = {"name": "support", "source": str(tmp_path / "v2"), "metrics": {"accuracy": 0.9}}
        assert first.post("/admin/v1/adapters", body).json()["number"] == 2
        assert answers(second, "support@2") == "support@2", "on demand, without waiting"
        assert first.post("/admin/v1/promote", {"ref": "support@2"}).status_code == 200
        assert answers(first, "support@prod") == "support@2", "at once where it was asked for"
        until(lambda: answers(second, "support@prod") == "support@2")
        assert second.post("/admin/v1/rollback", {"ref": "support"}).status_code == 200
        assert answers(second, "support") == "support@1"
        until(lambda: answers(first, "support") == "support@1")
        assert second.post("/admin/v1/retire", {"ref": "support@2"}).status_code == 200
        until(lambda: answers(first, "support@2") is None)
    assert registry.check() == []
    registry.close()
