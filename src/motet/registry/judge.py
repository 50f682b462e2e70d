"""The policy at work in a running server: signatures are read, refusals are logged and told.

A version is judged when it is loaded, on the files that are loaded, and again for every request: tenants differ, and
versions expire.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from motet.errors import ModelNotFound
from motet.registry.policy import ANYBODY, Decision, Policy, PolicyDenied, decide, decide_base
from motet.registry.records import Version
from motet.registry.scribe import Scribe
from motet.registry.signing import SignatureRefused, signers
from motet.registry.store import Registry


class Judge:
    """Decides by one policy and remembers whose signatures were good."""

    def __init__(self, policy: Policy, registry: Registry, lost: Callable[[], object] = lambda: None) -> None:
        """`lost` is called for each refusal that the registry's audit log could not be told of."""
        self.policy = policy
        self._scribe = Scribe(registry, lost)
        self._signers: dict[str, frozenset[str]] = {}  # by version

    def check_base(self, digest: str) -> None:
        """Raise PolicyDenied unless this base may run."""
        decision = decide_base(self.policy, digest)
        if not decision.allowed:
            raise PolicyDenied("; ".join(decision.reasons))

    def admit(self, version: Version, folder: Path) -> None:
        """Raise SignatureRefused or PolicyDenied unless the files in `folder` may be served to anybody."""
        try:
            signed_by = signers(folder, self.policy.signers)
        except SignatureRefused as refusal:
            self.note(version, ANYBODY, Decision(False, (str(refusal),)))
            raise
        self._signers[version.ref] = signed_by
        self._require(version, self._decide(version, ANYBODY), ANYBODY)

    def check(self, version: Version, tenant: str | None) -> None:
        """Raise PolicyDenied, or ModelNotFound where no rule is about it and this tenant."""
        self._require(version, self._decide(version, tenant), tenant)

    def may_ask(self, version: Version, tenant: str | None) -> bool:
        """Whether a version that nobody promoted is to be loaded because this tenant asks for it."""
        return self.policy.on_demand and self.may_see(version, tenant)

    def may_see(self, version: Version, tenant: str | None) -> bool:
        """Whether a rule is about this version and tenant: to others it is not there."""
        return self._decide(version, tenant).visible

    def _decide(self, version: Version, tenant: str | None) -> Decision:
        return decide(self.policy, version, self._signers.get(version.ref, frozenset()), tenant, time.time())

    def _require(self, version: Version, decision: Decision, tenant: str | None) -> None:
        if decision.allowed:
            return
        self.note(version, tenant, decision)
        if not decision.visible and tenant is not ANYBODY:
            raise ModelNotFound(f"no model {version.ref!r}")
        raise PolicyDenied(f"{version.ref} may not be served: {'; '.join(decision.reasons)}")

    def note(self, version: Version, tenant: str | None, decision: Decision) -> None:
        """Tell the audit log; of the same refusal only once."""
        whom = "anybody" if tenant is ANYBODY else f"tenant {tenant!r}"
        self._scribe.tell((version.ref, f"to {whom}: {'; '.join(decision.reasons)}"))
