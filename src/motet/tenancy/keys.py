"""API keys: random tokens that are stored hashed.

A token is `mk-ID-SECRET`. The secret is 256 random bits, so one SHA-256 keeps it as safe as a slow hash would: there
is no dictionary to try. The id is public: it finds the record, and names the key in lists and logs.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from typing import Literal

from motet.types import Struct

Role = Literal["inference", "metrics", "admin"]
_TOKEN = re.compile(r"mk-([0-9a-f]{16})-([A-Za-z0-9_-]{43})")


class KeyRecord(Struct, frozen=True):
    """What is kept of a key. Times are unix time in seconds; `revoked` is None while the key is good."""

    id: str
    tenant: str
    role: Role
    hash: str
    created: float
    revoked: float | None = None


def new_key(tenant: str, role: Role) -> tuple[KeyRecord, str]:
    """A key for `tenant` and its token, which is known only now."""
    key_id = secrets.token_hex(8)
    token = f"mk-{key_id}-{secrets.token_urlsafe(32)}"
    return KeyRecord(key_id, tenant, role, _hash(token), time.time()), token


def key_id_of(token: str) -> str | None:
    """The public id in a token; None if it is not one of ours."""
    match = _TOKEN.fullmatch(token)
    return match[1] if match else None


def opens(record: KeyRecord, token: str) -> bool:
    """Whether `token` is this key's and the key was not revoked; takes as long for a wrong token as for a right one."""
    return hmac.compare_digest(record.hash, _hash(token)) and record.revoked is None


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
