"""`motet adapters push` and its neighbours, as they are typed."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from motet.cli.main import app
from motet.errors import AdapterConflict, AdapterRefused, ConfigError
from motet.registry.store import Registry
from tests.tiny import write_adapter, write_model


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and two adapters of it, and one of a wider model."""
    home = tmp_path_factory.mktemp("home")
    model = write_model(home / "model", "llama")
    wide = write_model(home / "wide", "llama", hidden_size=64)
    for base, name, seed in ((model, "one", 1), (model, "two", 2), (wide, "foreign", 3)):
        write_adapter(
            home / name, base, "llama", seed, r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]
        )
    return home


class Shell:
    """`motet adapters …` on one registry, by one user."""

    def __init__(self, home: Path, registry: Path) -> None:
        self.home, self.registry = home, registry

    def __call__(self, *arguments: object) -> str:
        result = self.run(*arguments)
        assert result.exit_code == 0, result.output + repr(result.exception)
        return result.output

    def run(self, *arguments: object) -> Result:
        runner = CliRunner(env={"COLUMNS": "300", "MOTET_REGISTRY": str(self.registry)})
        return runner.invoke(app, ["adapters", *map(str, arguments)])

    def push(self, folder: str, *options: str, name: str = "support") -> str:
        return self("push", self.home / folder, "--name", name, "--model", self.home / "model", *options)


@pytest.fixture
def motet(home: Path, tmp_path: Path) -> Shell:
    return Shell(home, tmp_path / "registry")


def test_a_release_on_the_command_line(motet: Shell) -> None:
    pushed = motet.push(
        "one", "--metric", "accuracy=0.91", "--license", "mit", "--who", "ada", "--expires", "2031-02-03"
    )
    assert "support@1" in pushed
    told = json.loads(motet("show", "support@1", "--json"))
    assert (told["facts"]["rank"], told["facts"]["modules"]) == (4, ["q", "v"])
    assert (told["label"]["metrics"], told["label"]["who"]) == ({"accuracy": 0.91}, "ada")
    assert told["label"]["expires"] == datetime(2031, 2, 4, tzinfo=UTC).timestamp()
    assert told["config"]["r"] == 4
    assert motet("promote", "support@1") == "support@prod → support@1\n"
    motet.push("two", "--who", "bob")
    assert (
        motet("canary", "support@2", "--weight", "0.1")
        == "support@prod → support@1, with support@2 for 10%\n"
    )
    assert "prod canary 10%" in motet("list")
    assert motet("promote", "support@2", "--who", "bob") == "support@prod → support@2\n"
    assert motet("alias", "support", "best") == "support@best → support@2\n"
    assert motet("rollback", "support") == "support@prod → support@1\n"
    motet("alias", "support@best", "--delete")
    assert motet("retire", "support@2") == "retired support@2\n"
    assert motet("gc") == "removed 1\n"
    assert motet("check") == "sound\n"
    listed = json.loads(motet("list", "--json"))
    assert [v["retired"] for v in listed["versions"].values()] == [False, True]
    actions = [event["action"] for event in json.loads(motet("log", "support", "--json"))]
    assert actions == [
        "retire",
        "drop",
        "rollback",
        "promote",
        "promote",
        "canary",
        "push",
        "promote",
        "push",
    ]
    assert "bob" in motet("log", "support@prod")


def test_what_is_wrong_is_said(motet: Shell, home: Path) -> None:
    def error(*arguments: object) -> BaseException:
        failure = motet.run(*arguments).exception
        assert failure is not None
        return failure

    foreign = error("push", home / "foreign", "--name", "x", "--model", home / "model")
    assert isinstance(foreign, AdapterRefused)
    bad = ("push", home / "one", "--name", "x", "--model", home / "model")
    assert isinstance(error(*bad, "--metric", "accuracy"), ConfigError)
    assert isinstance(error(*bad, "--expires", "tomorrow"), ConfigError)
    motet.push("one")
    assert isinstance(error("rollback", "support@prod"), Exception)
    assert isinstance(error("alias", "support@1"), ConfigError)
    assert isinstance(
        error("push", home / "one", "--name", "support", "--model", home / "model"), AdapterConflict
    )
    assert motet("check") == "sound\n"


def test_check_fails_where_a_byte_was_changed(motet: Shell) -> None:
    motet.push("one")
    registry = Registry(str(motet.registry))
    place = registry.artifacts.path(registry.version("support@1").artifact)
    weights = place / "adapter_model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    done = motet.run("check")
    assert done.exit_code == 1
    assert "support@1: its files have digest" in done.output
    shutil.rmtree(place)
    assert "cannot be read" in motet.run("check").output
