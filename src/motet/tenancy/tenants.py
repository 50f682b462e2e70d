"""Who a tenant is: its name, its policy, what it may see, and what its requests are charged to."""

from __future__ import annotations

import hashlib
import hmac
import re
from fnmatch import fnmatchcase

from motet.config import TenantPolicy
from motet.errors import ConfigError
from motet.types import Account, Struct

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Tenant(Struct, frozen=True):
    """A tenant that a request was recognised to come from."""

    name: str
    policy: TenantPolicy = TenantPolicy()

    def may_use(self, model: str) -> bool:
        """Whether the adapter served as `model` exists for this tenant.

        A version, `name@7` or as OpenAI would call it, ft:base:org:name:id, goes with its name.
        """
        patterns = self.policy.adapters
        if patterns is None:
            patterns = (self.name, f"{self.name}/*")
        parts = model.split(":")
        name = parts[3] if parts[0] == "ft" and len(parts) == 5 else model.partition("@")[0]
        return any(fnmatchcase(name, pattern) for pattern in patterns)

    def account(self, secret: bytes) -> Account:
        """What its requests are charged to. Nobody can compute the salt without the server's `secret`."""
        salt = hmac.new(secret, self.name.encode(), hashlib.sha256).hexdigest()
        return Account(self.name, self.policy.weight, self.policy.priority, salt)


def check_tenant_name(name: str) -> None:
    """Raise ConfigError for a name that could be taken for a pattern or a path."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"tenant name {name[:100]!r} must be 1-64 of the characters A-Z a-z 0-9 . _ - and not begin with . _ -"
        )
