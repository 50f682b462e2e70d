"""A server with a policy: what it loads, what it refuses, whom it tells. Case 10 and 11 of the catalogue of faults."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from motet.errors import ModelNotFound
from motet.registry import judge as judge_module
from motet.registry.artifacts import Tampered
from motet.registry.follow import RegistryCatalog
from motet.registry.judge import Judge
from motet.registry.policy import Policy, PolicyDenied, Rule
from motet.registry.records import Version
from motet.registry.signing import SignatureRefused, sign
from motet.registry.store import Registry
from tests.server.fakes import SPEC, FakeEngine, run

from .house import adapter_at, label
from .test_follow import House, examine, prepare
from .test_signing import key_pair

RULE = Rule(adapters=("support",), tenants=("acme",), signers=("release",))


class Court(House):
    """A server with a policy, and two keys of which it knows one."""

    def __init__(self, home: Path, *rules: Rule, on_demand: bool = True) -> None:
        self.private, public = key_pair(home, "release")
        self.others, _ = key_pair(home, "other")
        rules = rules or (RULE,)
        self.policy = Policy(
            bases=(SPEC.digest,), on_demand=on_demand, signers={"release": public}, allow=rules
        )
        super().__init__(home)

    def server(self, engine: FakeEngine) -> RegistryCatalog:
        registry = Registry(self.registry.url)
        judge = Judge(self.policy, registry)
        return RegistryCatalog(registry, self.home / "copies", SPEC, "base", "/base", prepare, engine, judge)

    def sign(self, ref: str, key: Path) -> None:
        version = self.registry.version(ref)
        self.registry.sign(ref, sign(self.registry.artifacts.path(version.artifact), key), "ada", str(key))

    async def denials(self) -> list[str]:
        await asyncio.sleep(0.1)  # they are written by a thread
        return [event.detail for event in self.registry.history() if event.action == "deny"]


def test_only_what_the_policy_allows_is_loaded_and_refusals_are_in_the_log(tmp_path: Path) -> None:
    async def scenario() -> None:
        court = Court(tmp_path)
        unsigned, others, good = court.push("one"), court.push("two"), court.push("three")
        court.sign(others, court.others)
        court.sign(good, court.private)
        court.registry.promote(unsigned, "ada")
        await court.catalog.sync()
        assert court.engine.log == []
        with pytest.raises(PolicyDenied, match="signed by nobody, not by release"):
            await court.catalog.want(unsigned, "acme")
        with pytest.raises(SignatureRefused):
            await court.catalog.want(others, "acme")
        assert court.engine.log == []
        court.registry.promote(good, "ada")
        await court.catalog.sync()
        assert court.catalog.resolve("support", tenant="acme") is not None
        assert len(await court.denials()) == 2
        for _ in range(5):
            with pytest.raises(PolicyDenied):
                await court.catalog.want(unsigned, "acme")
        assert len(await court.denials()) == 2, "the same refusal is told once"

    run(scenario())


def test_one_flipped_byte_of_a_signed_adapter(tmp_path: Path) -> None:
    async def scenario() -> None:
        court = Court(tmp_path)
        ref = court.push("one")
        court.sign(ref, court.private)
        weights = (
            court.registry.artifacts.path(court.registry.version(ref).artifact) / "adapter_model.safetensors"
        )
        weights.write_text("onf")
        with pytest.raises(Tampered, match="were changed") as caught:
            await court.catalog.want(ref, "acme")
        assert caught.value.status == 403
        assert court.engine.log == []
        assert "were changed" in (await court.denials())[0]

    run(scenario())


def test_the_bytes_that_were_verified_are_the_bytes_that_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is swapped after the signature was read and before the weights are."""

    async def scenario() -> None:
        court = Court(tmp_path)
        ref = court.push("one")
        court.sign(ref, court.private)
        version = court.registry.version(ref)
        judge_admits = Judge.admit

        def swap(judge: Judge, admitted: Version, folder: Path) -> None:
            judge_admits(judge, admitted, folder)
            (court.registry.artifacts.path(version.artifact) / "adapter_model.safetensors").write_text("evil")

        monkeypatch.setattr(Judge, "admit", swap)
        await court.catalog.want(ref, "acme")
        assert court.digest(ref) == version.facts.digest

    run(scenario())


def test_tenants_and_expiry_are_judged_for_every_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        court = Court(tmp_path, RULE, Rule(adapters=("support",), tenants=("umbrella",), signers=()))
        ref = court.push("one")
        court.sign(ref, court.private)
        source = adapter_at(tmp_path / "two", "two")
        soon = time.time() + 3600
        court.registry.push("support", source, examine, label(expires=soon))
        court.sign("support@2", court.private)
        court.registry.promote(ref, "ada")
        await court.catalog.sync()
        assert [r.name for r in court.catalog.records("acme")] == ["support", "support@1", "support@prod"]
        assert court.catalog.records("other") == []
        assert len(court.catalog.records()) == 3
        for name in ("support", ref):
            assert court.catalog.resolve(name, tenant="acme") is not None
            with pytest.raises(ModelNotFound):
                court.catalog.resolve(name, tenant="other")
            with (
                pytest.raises(PolicyDenied, match="signed by release, not by"),
                court.catalog.hold(name, "", "umbrella"),
            ):
                pass
        await court.catalog.want("support@2", "other")
        with pytest.raises(ModelNotFound):
            court.catalog.resolve("support@2", tenant="other")
        await court.catalog.want("support@2", "acme")
        assert court.catalog.resolve("support@2", tenant="acme") is not None
        monkeypatch.setattr(judge_module.time, "time", lambda: soon + 1)  # type: ignore[attr-defined]
        with pytest.raises(PolicyDenied, match="expired"):
            court.catalog.resolve("support@2", tenant="acme")
        assert court.catalog.resolve(ref, tenant="acme") is not None

    run(scenario())


def test_what_a_policy_switches_off(tmp_path: Path) -> None:
    async def scenario() -> None:
        court = Court(tmp_path, Rule(adapters=("*",)), on_demand=False)
        await court.catalog.want(court.push("one"), "acme")
        assert court.engine.log == []
        with pytest.raises(PolicyDenied, match="must come from the registry"):
            await court.catalog.load("mine", str(tmp_path / "one"))
        other = Policy(bases=("other",))
        with pytest.raises(PolicyDenied, match="not among the bases"):
            Judge(other, court.registry).check_base(SPEC.digest)

    run(scenario())
