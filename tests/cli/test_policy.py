"""`motet policy` and `motet adapters sign`, as they are typed."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest
from typer.testing import CliRunner, Result

from motet.cli.main import app
from motet.errors import ConfigError
from motet.registry.https import SourceRefused
from motet.registry.signing import SignatureRefused
from motet.registry.store import Registry
from tests.registry.house import adapter_at, push
from tests.registry.test_signing import key_pair
from tests.tiny import write_adapter, write_model

POLICY = """
bases = ["ba5e"]
[signers]
release = "release.pub"
[[allow]]
adapters = ["support"]
tenants = ["acme"]
signers = ["release"]
max_rank = 8
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A registry with support@1, a policy that wants it signed, and keys."""
    registry = Registry(str(tmp_path / "registry"))
    push(registry, tmp_path, "one")
    registry.close()
    (tmp_path / "policy.toml").write_text(POLICY)
    for name in ("release", "other"):
        key_pair(tmp_path, name)
    return tmp_path


def motet(home: Path, *arguments: object) -> Result:
    places = {"MOTET_REGISTRY": str(home / "registry"), "MOTET_POLICY": str(home / "policy.toml")}
    return CliRunner(env={"COLUMNS": "300", **places}).invoke(app, list(map(str, arguments)))


def test_explain_says_why(home: Path) -> None:
    explain = ("policy", "explain", "support@1", "--tenant", "acme")
    denied = motet(home, *explain)
    assert denied.exit_code == 1
    assert denied.output == "support@1: denied\n  rule 1: signed by nobody, not by release\n"
    assert (
        motet(home, "adapters", "sign", "support@1", "--key", home / "release.pem").output
        == "signed support@1\n"
    )
    allowed = motet(home, *explain)
    assert (allowed.exit_code, allowed.output) == (0, "support@1: allowed\n  rule 1 allows it\n")
    stranger = motet(home, "policy", "explain", "support@1", "--tenant", "evil")
    assert stranger.output.endswith("no rule allows 'support' to tenant 'evil'\n")
    assert motet(home, "adapters", "sign", "support@1", "--key", home / "other.pem").exit_code == 0
    assert "the signature is none of release's" in motet(home, *explain).output
    signed = [
        event for event in Registry(str(home / "registry")).history("support@1") if event.action == "sign"
    ]
    assert signed[1].detail.endswith("release.pem")


def test_check_reads_the_file_and_its_keys(home: Path) -> None:
    assert motet(home, "policy", "check", home / "policy.toml").output == "1 bases, 1 signers, 1 rules\n"
    (home / "release.pub").write_text("no key")
    assert isinstance(motet(home, "policy", "check", home / "policy.toml").exception, ConfigError)


def test_a_signature_is_verified_when_it_is_pushed(home: Path) -> None:
    model = write_model(home / "model", "llama")
    adapter = write_adapter(home / "adapter", model, "llama", 1, r=4, target_modules=["q_proj"])
    command = ("adapters", "push", adapter, "--name", "signed", "--model", model)
    assert motet(home, "adapters", "sign", adapter, "--key", home / "other.pem").exit_code == 0
    assert isinstance(motet(home, *command).exception, SignatureRefused)
    assert motet(home, "adapters", "sign", adapter, "--key", home / "release.pem").exit_code == 0
    assert motet(home, *command).exit_code == 0
    registry = Registry(str(home / "registry"))
    place = registry.artifacts.path(registry.version("signed@1").artifact)
    assert (place / "model.sig").read_bytes() == (adapter / "model.sig").read_bytes()


def test_what_may_be_fetched_is_in_the_policy(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_model(home / "model", "llama")
    adapter = write_adapter(home / "adapter", model, "llama", 1, r=4, target_modules=["q_proj"])
    bucket = fsspec.filesystem("memory")
    bucket.put(str(adapter), "/acme/adapter", recursive=True)
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda url: (bucket, "/" + url.partition("://")[2]))
    command = ("adapters", "push", "s3://acme/adapter", "--name", "far", "--model", model)
    assert isinstance(motet(home, *command).exception, SourceRefused)
    (home / "policy.toml").write_text('fetch = ["s3://acme/*"]\n' + POLICY)
    assert motet(home, *command).exit_code == 0
    assert Registry(str(home / "registry")).version("far@1").label.source == "s3://acme/adapter"
    bucket.rm("/acme", recursive=True)


def test_keys_and_versions_that_are_not_there(home: Path) -> None:
    adapter_at(home / "adapter", "x")
    for target in ("support@1", home / "adapter"):
        assert isinstance(
            motet(home, "adapters", "sign", target, "--key", home / "nokey").exception, ConfigError
        )
    assert motet(home, "adapters", "sign", "support@9", "--key", home / "release.pem").exit_code == 1
