"""From a token to a principal: which tenant a request is from, and what its key may do.

The database is read as a whole every few seconds, so a request costs one dictionary look-up and one hash, and a key is
dead `REFRESH_SECONDS` after it was revoked, on every server. Where no key exists everybody is the operator.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future

from motet.config import TenantPolicy
from motet.errors import MotetError
from motet.tenancy.keys import Role, key_id_of, opens
from motet.tenancy.store import Contents
from motet.tenancy.tenants import Tenant, check_tenant_name
from motet.types import ANYBODY, Account, Struct

logger = logging.getLogger(__name__)
REFRESH_SECONDS = 2.0
READ_SECONDS = 1.0  # that a request waits for a database
GIVE_UP_SECONDS = 10.0  # after which a database that has not answered is asked again
EMPTY = Contents({}, {})


class Unauthenticated(MotetError):
    """No API key, or one that is unknown or revoked. One message for all, so that nobody learns which."""

    status = 401
    code = "invalid_api_key"


class Principal(Struct, frozen=True):
    """Whom a request is from. `key` is the public id of the key, "" where no keys exist."""

    tenant: Tenant
    role: Role
    account: Account
    key: str = ""

    @property
    def is_admin(self) -> bool:
        return self.role == "admin"

    def may_see(self, model: str) -> bool:
        """Whether the adapter served as `model` exists for this principal."""
        return self.is_admin or self.tenant.may_use(model)

    @property
    def sees_base(self) -> bool:
        """Whether the base model exists for this principal."""
        return self.is_admin or self.tenant.policy.base


OPERATOR = Principal(Tenant(""), "admin", ANYBODY)
"""Everybody, on a server without keys."""


class Guard:
    """Recognises principals. Once it has seen a key it never lets anybody in without one again."""

    def __init__(
        self,
        read: Callable[[], Contents] | None = None,
        configured: Mapping[str, TenantPolicy] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`read` may block; it is called at once, and again in a thread. `configured` tenants come first."""
        self._read = read
        self._configured = dict(configured or {})
        for name in self._configured:
            check_tenant_name(name)
        self._clock = clock
        self._secret = secrets.token_bytes(32)
        self._contents = EMPTY
        self._locked = False
        self._until = 0.0
        self._take(read() if read else EMPTY)
        self._reading: asyncio.Future[Contents] | None = None
        self._asked = 0.0

    @property
    def is_open(self) -> bool:
        """No key exists, so nobody needs one."""
        return not self._locked

    async def principal(self, token: str | None) -> Principal:
        """Whom `token` belongs to. Raises Unauthenticated."""
        await self._refresh()
        if self.is_open:
            return OPERATOR
        record = self._contents.keys.get(key_id_of(token or "") or "")
        if record is None or not opens(record, token or ""):
            raise Unauthenticated("a valid API key is needed: Authorization: Bearer mk-...")
        tenant = Tenant(record.tenant, self._policy(record.tenant))
        return Principal(tenant, record.role, tenant.account(self._secret), record.id)

    def _policy(self, tenant: str) -> TenantPolicy:
        return self._configured.get(tenant) or self._contents.tenants.get(tenant) or TenantPolicy()

    async def _refresh(self) -> None:
        """Read again what is too old. Who comes meanwhile waits too, but for a slow database only so long."""
        if self._read is None or self._clock() < self._until:
            return
        if self._reading is None:
            self._reading = _in_thread_of_its_own(self._read)
            self._asked = self._clock()
        reading = self._reading
        await asyncio.wait({reading}, timeout=READ_SECONDS)
        if self._reading is not reading or self._clock() < self._until:
            return  # another request has seen to it
        self._until = self._clock() + REFRESH_SECONDS
        if not reading.done():
            logger.error("keys and tenants are as they were: the database does not answer")
            if self._clock() > self._asked + GIVE_UP_SECONDS:
                self._reading = None  # ask anew: that connection may be dead
            return
        self._reading = None
        try:
            self._take(reading.result())
        except MotetError as error:
            logger.error("keys and tenants are as they were: %s", error)
        except Exception:  # a row that only a newer version can read: refuse nobody for it
            logger.exception("keys and tenants are as they were")

    def _take(self, contents: Contents) -> None:
        self._contents = contents
        self._locked = self._locked or bool(contents.keys)
        self._until = self._clock() + REFRESH_SECONDS


def _in_thread_of_its_own(read: Callable[[], Contents]) -> asyncio.Future[Contents]:
    """What `read` answers. If it never does, it keeps no thread from others' work and the process from no exit."""
    answer = Future[Contents]()

    def work() -> None:
        try:
            answer.set_result(read())
        except BaseException as error:  # noqa: BLE001 - it is the answer
            answer.set_exception(error)

    threading.Thread(target=work, name="tenancy", daemon=True).start()
    return asyncio.wrap_future(answer)
