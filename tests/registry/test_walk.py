"""docs/releasing.md, line by line, against a live server under load: no request fails."""

from __future__ import annotations

import re
import shlex
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import LoraConfig, get_peft_model
from typer.testing import CliRunner

from motet.cli.main import app
from motet.registry.store import Registry
from tests.live import LiveServer, live_server, until
from tests.tiny import load_reference, write_model

from .test_signing import key_pair

DOC = Path(__file__).parents[2] / "docs" / "releasing.md"
pytestmark = pytest.mark.xdist_group("live")


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", DOC.read_text("utf-8"), re.DOTALL)


def commands() -> list[list[str]]:
    """The arguments of every `motet` line of the page, in its order."""
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("motet ")]


def train(folder: Path, model: Path, seed: int) -> None:
    """A few steps of PEFT on one sentence."""
    torch.manual_seed(seed)
    tuned = get_peft_model(
        load_reference(model, "llama"), LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    )
    optimizer = torch.optim.SGD((p for p in tuned.parameters() if p.requires_grad), lr=10.0)
    tokens = torch.tensor([list(b"How can I help you today?")]) + 2 + seed
    for _ in range(4):
        loss = tuned(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    tuned.save_pretrained(str(folder), save_embedding_layers=False)


@dataclass
class Traffic:
    """Users who ask `support` and the base without a pause, from the first promotion on."""

    url: str
    answers: list[tuple[float, str]] = field(
        default_factory=list
    )  # when it was asked, which version answered
    failures: list[str] = field(default_factory=list)
    over: bool = False

    def user(self, number: int) -> None:
        with httpx.Client(base_url=self.url, timeout=60) as client:
            for i in range(1_000_000):
                if self.over:
                    return
                model = "base" if number == 0 else "support"
                body: dict[str, Any] = {
                    "model": model, "prompt": f"{number} asks {i}", "max_tokens": 6,
                    "user": f"user {number * 97 + i % 40}",
                    "ignore_eos": True, "stream": i % 2 == 1,
                }  # fmt: skip
                asked = time.monotonic()
                answer = client.post("/v1/completions", json=body)
                whole = answer.status_code == 200 and '"error"' not in answer.text
                if not whole or (i % 2 and not answer.text.endswith("data: [DONE]\n\n")):
                    self.failures.append(f"{answer.status_code} {answer.text[:500]}")
                    return
                found = re.search(r'"model":"(.*?)"', answer.text)
                assert found is not None
                if number:
                    self.answers.append((asked, found[1]))

    def since(self, moment: float) -> Counter[str]:
        """Which versions answered what was asked after `moment`."""
        return Counter(version for asked, version in list(self.answers) if asked > moment)


@contextmanager
def traffic(url: str) -> Iterator[Traffic]:
    made = Traffic(url)
    users = [threading.Thread(target=made.user, args=(number,)) for number in range(4)]
    for user in users:
        user.start()
    try:
        yield made
    finally:
        made.over = True
        for user in users:
            user.join()


def run(*arguments: str) -> str:
    done = CliRunner(env={"COLUMNS": "300"}).invoke(app, list(arguments))
    assert done.exit_code == 0, f"{arguments}: {done.output} {done.exception!r}"
    return done.output


def test_the_page_is_a_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_model(tmp_path / "base", "llama")
    for number in (1, 2):
        train(tmp_path / f"support-v{number}", model, number)
    key_pair(tmp_path, "release")
    (tmp_path / "policy.toml").write_text(blocks("toml")[0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOTET_REGISTRY", str(tmp_path / "registry"))
    lines = commands()
    check, serve = lines.pop(0), lines.pop(0)
    assert run(*check).startswith("1 bases, 1 signers, 1 rules")
    assert serve[:2] == ["serve", "./base"]
    with live_server(model, {}, tmp_path / "cache", *serve[2:], "--pool=8MiB") as server:
        walk(server, lines)
    registry = Registry(str(tmp_path / "registry"))
    assert registry.check() == []
    assert [event.action for event in reversed(registry.history())] == [
        "push", "sign", "promote", "push", "sign", "canary", "promote", "rollback", "promote", "drop", "retire", "gc",
    ]  # fmt: skip


def walk(server: LiveServer, lines: list[list[str]]) -> None:
    """Every line but the first two, with traffic from the first promotion on."""

    def served(*names: str) -> bool:
        models = {model["id"] for model in server.get("/v1/models").json()["data"]}
        return set(names) <= models

    while lines[0][1] != "promote":
        run(*lines.pop(0))
    assert not served("support")
    run(*lines.pop(0))
    until(lambda: served("support", "support@prod", "support@1"))
    with traffic(server.url) as users:
        until(lambda: len(users.answers) > 20)
        while lines[0][1] != "canary":
            run(*lines.pop(0))
        assert set(users.since(0)) == {"support@1"}
        run(*lines.pop(0))
        until(lambda: users.since(0)["support@2"] >= 5, 40)
        began = time.monotonic()
        until(lambda: users.since(began)["support@2"] >= 5 and users.since(began).total() >= 100, 60)
        share = users.since(began)["support@2"] / users.since(began).total()
        assert 0.01 < share < 0.35, f"a tenth of the users, not {share:.0%}"
        release = server.get("/admin/v1/releases").json()["releases"]["support@prod"]
        assert release["stable"]["requests"] > release["canary"]["requests"] >= 5
        assert release["canary"]["failures"] == 0
        assert server.samples()['motet_requests_total{model="support@2",outcome="length"}'] >= 5
        while lines[0][1] != "promote":
            run(*lines.pop(0))
        for version in ("support@2", "support@1"):  # promote, rollback
            run(*lines.pop(0))
            # Once a version answers what it did not before, the whole server has moved.
            until(lambda version=version: moved(users, version), 20)  # type: ignore[misc]
        for line in lines:
            run(*line)
        until(lambda: not served("support@2"), 20)
        moment = time.monotonic()
        until(lambda: users.since(moment).total() > 20)
    assert users.failures == []
    assert set(users.since(moment)) == {"support@1"}
    assert len(users.answers) > 200
    until(server.is_idle)


def moved(users: Traffic, version: str) -> bool:
    """Whether the last half second's requests were all answered by `version`."""
    last = users.since(time.monotonic() - 0.5)
    return last[version] == last.total() > 3
