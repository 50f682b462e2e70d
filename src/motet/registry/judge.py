"""The policy at work in a running server: signatures are read, refusals are logged and told.

A version is judged when it is loaded, on the files that are loaded, and again for every request: tenants differ, and
versions expire.
"""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

from motet.errors import ModelNotFound, MotetError
from motet.registry.policy import ANYBODY, Decision, Policy, PolicyDenied, decide, decide_base
from motet.registry.records import Version
from motet.registry.signing import SignatureRefused, signers
from motet.registry.store import Registry

logger = logging.getLogger(__name__)
MAX_NOTED = 10_000  # different refusals that the audit log is told of


class Judge:
    """Decides by one policy and remembers whose signatures were good."""

    def __init__(self, policy: Policy, registry: Registry) -> None:
        self.policy = policy
        self._registry = registry
        self._signers: dict[str, frozenset[str]] = {}  # by version
        self._noted: set[tuple[str, str]] = set()

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
        """Tell the audit log; of the same refusal only once, so that nobody can fill it by asking."""
        whom = "anybody" if tenant is ANYBODY else f"tenant {tenant!r}"
        detail = f"to {whom}: {'; '.join(decision.reasons)}"
        if (version.ref, detail) in self._noted or len(self._noted) >= MAX_NOTED:
            return
        self._noted.add((version.ref, detail))
        logger.warning("denied %s %s", version.ref, detail)
        # In a thread, because the event loop must not wait for the registry's lock.
        threading.Thread(target=self._write, args=(version.ref, detail)).start()

    def _write(self, ref: str, detail: str) -> None:
        try:
            self._registry.note("policy", "deny", ref, detail)
        except MotetError as failure:
            self._noted.discard((ref, detail))  # the next time
            logger.error("the audit log was not told that %s was denied %s: %s", ref, detail, failure)
