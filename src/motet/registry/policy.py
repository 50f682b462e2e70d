"""What may be served to whom: one TOML file, and decisions that give their reasons.

Without a file everything may be served. With one, nothing may that no rule allows:

    bases = ["9f2c…"]                # digests of base models that may run; "*" is any
    on_demand = true                 # load versions that nobody promoted when somebody asks for them
    fetch = ["hf://acme/*"]          # where adapters may be fetched from; none if left out

    [signers]
    release = "release.pub"          # a public key, or an authority's certificate; beside this file

    [[allow]]
    adapters = ["support", "acme/*"] # patterns of registry names
    tenants = ["acme"]               # patterns; all if left out
    sources = ["/models/*"]          # where it was pushed from
    signers = ["release"]            # one of these has signed it
    licenses = ["apache-2.0", "mit"]
    modules = ["q", "k", "v", "o"]   # what it may change
    max_rank = 64
    metrics = { accuracy = 0.9 }     # attached, and at least so much
    max_age_days = 90                # since it was pushed

A version is served if one rule that names it and the tenant has nothing against it.
"""

from __future__ import annotations

import time
import tomllib
from collections.abc import Iterator, Set
from fnmatch import fnmatchcase
from pathlib import Path

import msgspec

from motet.errors import ConfigError, MotetError
from motet.registry.records import Version
from motet.types import Struct

ANYBODY = None
"""For a version that is loaded before anybody has asked for it: some tenant must be allowed it."""


class PolicyDenied(MotetError):
    """The policy forbids it; the message says why."""

    status = 403
    code = "policy_denied"


class Rule(Struct, frozen=True, kw_only=True):
    """Versions that may be served; what is None is not looked at."""

    adapters: tuple[str, ...]
    tenants: tuple[str, ...] = ("*",)
    sources: tuple[str, ...] | None = None
    signers: tuple[str, ...] | None = None
    licenses: tuple[str, ...] | None = None
    modules: tuple[str, ...] | None = None
    max_rank: int | None = None
    metrics: dict[str, float] = msgspec.field(default_factory=dict)
    max_age_days: float | None = None

    def names(self, adapter: str, tenant: str | None) -> bool:
        """Whether the rule is about this adapter and tenant."""
        return _any(self.adapters, adapter) and (tenant is ANYBODY or _any(self.tenants, tenant))


class Policy(Struct, frozen=True, kw_only=True):
    """All of the file. `signers` are public keys by name, as absolute paths."""

    bases: tuple[str, ...]
    on_demand: bool = False
    fetch: tuple[str, ...] = ()
    signers: dict[str, Path] = msgspec.field(default_factory=dict)
    allow: tuple[Rule, ...] = ()


class Decision(Struct, frozen=True):
    """`visible` says that a rule is about this adapter and tenant, whatever it has against the version."""

    allowed: bool
    reasons: tuple[str, ...]
    visible: bool = True


def decide(policy: Policy, version: Version, signed_by: Set[str], tenant: str | None, now: float) -> Decision:
    """Whether `version`, signed by the holders of these keys, may be served to `tenant` at unix time `now`."""
    against = [*_against_base(policy, version.facts.base)]
    if version.retired:
        against.append("it is retired")
    if version.label.expires is not None and now >= version.label.expires:
        against.append(f"it expired on {_day(version.label.expires)}")
    about = [(i, rule) for i, rule in enumerate(policy.allow, 1) if rule.names(version.name, tenant)]
    if not about:
        whom = "anybody" if tenant is ANYBODY else f"tenant {tenant!r}"
        return Decision(False, (*against, f"no rule allows {version.name!r} to {whom}"), visible=False)
    judged = {number: list(_against(rule, version, signed_by, now)) for number, rule in about}
    if against:
        return Decision(False, tuple(against))
    for number, reasons in judged.items():
        if not reasons:
            return Decision(True, (f"rule {number} allows it",))
    return Decision(
        False, tuple(f"rule {number}: {reason}" for number, found in judged.items() for reason in found)
    )


def decide_base(policy: Policy, digest: str) -> Decision:
    """Whether a base model may run."""
    against = tuple(_against_base(policy, digest))
    return Decision(not against, against or ("its digest is listed",))


def read_policy(file: Path) -> Policy:
    """The policy in `file`. Raises ConfigError naming the key at fault."""
    try:
        values = tomllib.loads(file.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"policy {file} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"policy {file} is not valid TOML: {error}") from error
    try:
        policy = msgspec.convert(values, Policy, dec_hook=lambda _, value: file.parent.resolve() / value)
    except msgspec.ValidationError as error:
        raise ConfigError(f"policy {file}: {error}") from error
    for number, rule in enumerate(policy.allow, 1):
        if unknown := set(rule.signers or ()) - policy.signers.keys():
            raise ConfigError(
                f"policy {file}: rule {number} names signers without a key: {', '.join(sorted(unknown))}"
            )
    return policy


def _against_base(policy: Policy, digest: str) -> Iterator[str]:
    if not _any(policy.bases, digest):
        yield f"base {digest[:16]}… is not among the bases that may run"


def _against(rule: Rule, version: Version, signed_by: Set[str], now: float) -> Iterator[str]:
    """What this rule has against this version."""
    facts, label = version.facts, version.label
    if rule.sources is not None and not _any(rule.sources, label.source):
        yield f"source {label.source!r} is not allowed"
    if rule.signers is not None and not signed_by & set(rule.signers):
        yield f"signed by {', '.join(sorted(signed_by)) or 'nobody'}, not by {' or '.join(rule.signers)}"
    if rule.licenses is not None and label.license not in rule.licenses:
        yield f"license {label.license or 'not stated'} is not allowed"
    if rule.modules is not None and (others := set(facts.modules) - set(rule.modules)):
        yield f"changes {', '.join(sorted(others))}"
    if rule.max_rank is not None and facts.rank > rule.max_rank:
        yield f"rank {facts.rank} is above {rule.max_rank}"
    for name, least in rule.metrics.items():
        value = label.metrics.get(name)
        if value is None or not value >= least:
            yield f"{name} is {'not attached' if value is None else f'{value:g}'}, must be at least {least:g}"
    if rule.max_age_days is not None and now - version.created > rule.max_age_days * 86400:
        yield f"pushed more than {rule.max_age_days:g} days ago"


def _any(patterns: tuple[str, ...], text: str) -> bool:
    return any(fnmatchcase(text, pattern) for pattern in patterns)


def _day(at: float) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(at))
