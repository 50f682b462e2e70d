"""What the registry keeps, as values: versions, the aliases that point at them, and who did what.

A version never changes once it is there; it can only be retired. Everything that moves is an alias.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from motet.errors import InvalidRequest, ModelNotFound
from motet.types import Struct

PROD = "prod"
"""The alias that a bare name stands for."""

_WORD = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,63}")


class NotRegistered(ModelNotFound):
    """The registry has no such adapter, version or alias."""

    code = "not_registered"


class Facts(Struct, frozen=True):
    """What binding an adapter to its base tells of it. `modules` are the kinds of linear maps that it changes."""

    digest: str
    base: str
    rank: int
    modules: tuple[str, ...]
    num_parameters: int


class Label(Struct, frozen=True):
    """What the one who pushes says of a version. `metrics` are evaluations by name; `expires` is unix time."""

    source: str
    who: str
    metrics: dict[str, float] = msgspec.field(default_factory=dict)
    license: str = ""
    org: str = ""
    expires: float | None = None


class Version(Struct, frozen=True):
    """One immutable version. `artifact` is the digest of its files, `config` its adapter_config.json."""

    name: str
    number: int
    artifact: str
    facts: Facts
    label: Label
    config: dict[str, Any]
    created: float
    retired: bool = False

    @property
    def ref(self) -> str:
        """The name that it is always served under."""
        return f"{self.name}@{self.number}"

    def fine_tune(self, base: str) -> str:
        """The name that OpenAI would give it: ft:base:org:name:id."""
        return f"ft:{base}:{self.label.org}:{self.name}:{self.facts.digest.rpartition(':')[2][:12]}"


class Limits(Struct, frozen=True):
    """When a canary is taken back: more errors, or a slower 95th percentile, than the stable version may have.

    `error_rate` is the share of failed requests above stable's; `latency` the ratio of p95 seconds per token to
    stable's. Nothing is decided before `min_requests` on the candidate, nor of latency before so many of either had
    answers long enough to measure.
    """

    error_rate: float = 0.05
    latency: float = 2.0
    min_requests: int = 20


class Canary(Struct, frozen=True):
    """A candidate beside the stable version: a `weight` in (0, 1] of the users, or as `shadow` of copied prompts."""

    number: int
    weight: float
    shadow: bool = False
    limits: Limits = Limits()


class Alias(Struct, frozen=True):
    """A name that moves: `support@prod` points at `stable`, and a canary may take a share."""

    name: str
    alias: str
    stable: int
    canary: Canary | None = None

    @property
    def ref(self) -> str:
        return f"{self.name}@{self.alias}"


class Event(Struct, frozen=True):
    """A line of the audit log. Numbers only grow; `detail` is one sentence."""

    number: int
    at: float
    who: str
    action: str
    subject: str
    detail: str


class Snapshot(Struct, frozen=True):
    """The registry at one moment: `revision` is the number of its last event."""

    revision: int
    versions: dict[str, Version]
    aliases: dict[str, Alias]


def check_word(word: str, what: str) -> str:
    """Raise InvalidRequest unless `word` is one that can be told from a number and a path."""
    if not _WORD.fullmatch(word) or ".." in word:
        raise InvalidRequest(
            f"{what} {word[:100]!r} must begin with a letter and have 1-64 of the characters A-Z a-z 0-9 . _ -",
            what,
        )
    return word


def check_name(name: str) -> str:
    """Raise InvalidRequest unless `name` is one word, or several with a slash between: `acme/support`."""
    if len(name) > 128:
        raise InvalidRequest(f"name {name[:100]!r}… has more than 128 characters", "name")
    for word in name.split("/"):
        check_word(word, "name")
    return name


def split_ref(ref: str) -> tuple[str, str]:
    """`support@prod` to its halves; a bare name means its production alias. Raises InvalidRequest."""
    name, at, which = ref.partition("@")
    check_name(name)
    which = which if at else PROD
    if not which.isascii() or not which.isdigit():
        check_word(which, "alias")
    elif len(which) > 9:
        raise InvalidRequest(f"{ref[:100]!r} has no version number", "name")
    return name, which


def version_number(ref: str) -> tuple[str, int]:
    """`support@7` to its name and number. Raises InvalidRequest for an alias."""
    name, which = split_ref(ref)
    if not which.isdigit():
        raise InvalidRequest(f"{ref!r} is not a version; write {name}@NUMBER", "name")
    return name, int(which)


def to_json(value: object) -> str:
    return msgspec.json.encode(value).decode()
