"""The served models as one principal sees them: another tenant's adapter is not there, in the words for any name that
is not there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from motet.engine.protocol import AdapterHost
from motet.errors import ModelNotFound
from motet.tenancy.access import Principal
from motet.types import AdapterRecord

_LISTED = 50  # names in a "not found" message


class Visible:
    """A view of the host."""

    def __init__(self, host: AdapterHost, principal: Principal) -> None:
        self._host = host
        self._principal = principal
        self._tenant = principal.tenant.name

    @property
    def base(self) -> bool:
        """The base model is there."""
        return self._principal.sees_base

    def records(self) -> list[AdapterRecord]:
        """The adapters that are there."""
        return [record for record in self._host.records(self._tenant) if self._principal.may_see(record.name)]

    def check(self, name: str) -> None:
        """Raise ModelNotFound for what is hidden, whether or not it exists."""
        shown = self.base if name == self._host.base else self._principal.may_see(name)
        if not shown:
            raise self._not_found(name)

    def resolve(self, name: str) -> AdapterRecord | None:
        """As the host's, of what is there."""
        with self._as_seen(name):
            return self._host.resolve(name, tenant=self._tenant)

    async def want(self, name: str) -> None:
        """As the host's, of what may be there."""
        with self._as_seen(name):
            await self._host.want(name, self._tenant)

    @contextmanager
    def hold(self, name: str, user: str = "") -> Iterator[AdapterRecord | None]:
        """As the host's, of what is there."""
        with ExitStack() as held:
            with self._as_seen(name):
                record = held.enter_context(self._host.hold(name, user, self._tenant))
            yield record

    @contextmanager
    def _as_seen(self, name: str) -> Iterator[None]:
        self.check(name)
        try:
            yield
        except ModelNotFound:
            if self._principal.is_admin:
                raise
            raise self._not_found(name) from None

    def _not_found(self, name: str) -> ModelNotFound:
        names = [record.name for record in self.records()]
        if self.base:
            names.insert(0, self._host.base)
        more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        served = ", ".join(repr(n) for n in names[:_LISTED]) or "nothing"
        return ModelNotFound(f"no model {name[:200]!r}; served here: {served}{more}")
