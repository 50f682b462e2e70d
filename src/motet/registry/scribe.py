"""Tells the audit log what a server refuses, without the server waiting for the registry.

One thread writes whatever waits in one transaction, and ends when nothing does; a process that exits waits for it. What
cannot be told, because too much waits or the registry fails, is counted and logged instead, and told when it
happens again.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from motet.errors import MotetError
from motet.registry.store import Registry

logger = logging.getLogger(__name__)
MAX_WAITING = 1000
MAX_TOLD = 10_000  # that are remembered; beyond them the oldest may be told again
Refusal = tuple[str, str]
"""A version, and to whom it was refused and why."""


class Scribe:
    """Tells of each refusal once, so that nobody can fill the log by asking. Any thread may call it."""

    def __init__(self, registry: Registry, lost: Callable[[], object]) -> None:
        """`lost` is called for each refusal that the log was not told of."""
        self._registry = registry
        self._lost = lost
        self._lock = threading.Lock()
        self._told: dict[Refusal, None] = {}  # oldest first
        self._waiting: list[Refusal] = []
        self._writing = False

    def tell(self, refusal: Refusal) -> None:
        """Have it written soon, unless it was before."""
        with self._lock:
            if refusal in self._told:
                return
            full = len(self._waiting) >= MAX_WAITING
            if not full:
                self._keep(refusal)
        if full:
            self._lose(refusal, f"{MAX_WAITING} others wait to be written")
        else:
            logger.warning("denied %s %s", *refusal)

    def _keep(self, refusal: Refusal) -> None:
        self._told[refusal] = None
        if len(self._told) > MAX_TOLD:
            del self._told[next(iter(self._told))]
        self._waiting.append(refusal)
        if not self._writing:
            self._writing = True
            threading.Thread(target=self._write, name="audit").start()

    def _write(self) -> None:
        while refusals := self._next():
            try:
                self._registry.note("policy", "deny", refusals)
            except MotetError as failure:
                self._failed(refusals, str(failure))
            except Exception as failure:  # whatever it is, the next ones are tried
                logger.exception("audit log")
                self._failed(refusals, repr(failure))

    def _next(self) -> list[Refusal]:
        """All that wait; nothing tells the thread to end."""
        with self._lock:
            refusals, self._waiting = self._waiting, []
            self._writing = bool(refusals)
            return refusals

    def _failed(self, refusals: list[Refusal], why: str) -> None:
        with self._lock:
            for refusal in refusals:
                self._told.pop(refusal, None)
        for refusal in refusals:
            self._lose(refusal, why)

    def _lose(self, refusal: Refusal, why: str) -> None:
        logger.error("the audit log was not told that %s was denied %s: %s", *refusal, why)
        self._lost()
