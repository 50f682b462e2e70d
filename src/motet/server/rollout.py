"""What a release needs to see of live requests: how each version does, and what a shadow would have answered.

Only requests that named an alias say how its versions do: who names a version has chosen it. What is measured is the
engine's work, by the engine's clock: how long a request waited its turn, and how fast its client reads, is not the
version's doing. A shadow runs after the answer that it is compared to has ended, behind all other work, and answers
nobody.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import msgspec

from motet.engine.protocol import AdapterHost, Generator
from motet.errors import EngineDead, MotetError
from motet.registry.follow import RegistryCatalog
from motet.registry.release import Ended
from motet.server.intake import Job
from motet.tenancy.load import QueueTimeout
from motet.types import Account, Delta, SamplingParams

logger = logging.getLogger(__name__)
MAX_SHADOWS = 4  # at a time; prompts that come meanwhile are not copied
BEHIND = -(1 << 30)  # a priority below every tenant's
MIN_TOKENS = 8  # of a choice: over fewer, one step that was shared with a long prompt decides
FAILED = Ended(failed=True)


class Pace:
    """When the engine had the tokens of one request."""

    def __init__(self) -> None:
        self._first_token: float | None = None
        self._began: dict[int, float] = {}  # by choice: when it had its first token
        self._latest: dict[int, tuple[float, int]] = {}  # and the latest, and how many after the first

    def add(self, delta: Delta) -> None:
        """A piece of the answer."""
        if delta.prefill_seconds is not None:
            self._first_token = max(self._first_token or 0.0, delta.prefill_seconds)
        if delta.at is None:
            return
        if delta.index not in self._began:
            self._began[delta.index] = delta.at
            self._latest[delta.index] = (delta.at, 0)
        else:
            self._latest[delta.index] = (delta.at, self._latest[delta.index][1] + len(delta.token_ids))

    def ended(self) -> Ended:
        """What there is to say of a request that ended well: of all its choices that are long enough together."""
        seconds, tokens = 0.0, 0
        for index, (latest, count) in self._latest.items():
            if count >= MIN_TOKENS - 1:
                seconds, tokens = seconds + latest - self._began[index], tokens + count
        return Ended(pace=seconds / tokens if tokens else None, first_token=self._first_token)


class Rollout:
    """Watches the answers of one server."""

    def __init__(
        self, generator: Generator, host: AdapterHost, draw: Callable[[], float] = random.random
    ) -> None:
        self._generator = generator
        self._host = host if isinstance(host, RegistryCatalog) else None
        self._draw = draw
        self._shadows: set[asyncio.Task[None]] = set()

    def watch(self, deltas: AsyncGenerator[Delta, None], job: Job) -> AsyncGenerator[Delta, None]:
        """The same deltas, seen."""
        alias = self._host.alias_of(job.asked) if self._host is not None else None
        if self._host is None or alias is None:
            return deltas
        return self._watched(self._host, alias, deltas, job)

    async def _watched(
        self, host: RegistryCatalog, alias: str, deltas: AsyncGenerator[Delta, None], job: Job
    ) -> AsyncGenerator[Delta, None]:
        said: list[int] = []
        pace = Pace()
        try:
            async with aclosing(deltas):
                async for delta in deltas:
                    pace.add(delta)
                    if not delta.index:
                        said += delta.token_ids
                    yield delta
        except (asyncio.CancelledError, GeneratorExit):  # the client went: that says nothing of the version
            raise
        except MotetError as failure:  # nor does what the client or the whole server is to blame for
            if failure.status >= 500 and not isinstance(failure, (QueueTimeout, EngineDead)):
                host.monitor.record(alias, job.model, FAILED)
            raise
        except Exception:
            host.monitor.record(alias, job.model, FAILED)
            raise
        host.monitor.record(alias, job.model, pace.ended())
        self._maybe_shadow(host, alias, job, said)

    def _maybe_shadow(self, host: RegistryCatalog, alias: str, job: Job, said: list[int]) -> None:
        shadow = host.shadow_of(alias)
        if shadow is None or len(self._shadows) >= MAX_SHADOWS or self._draw() >= shadow[1]:
            return
        task = asyncio.get_running_loop().create_task(self._run_shadow(host, alias, shadow[0], job, said))
        self._shadows.add(task)
        task.add_done_callback(self._shadows.discard)

    async def _run_shadow(
        self, host: RegistryCatalog, alias: str, candidate: str, job: Job, said: list[int]
    ) -> None:
        """Answer the first prompt again as `candidate`, and compare with the tokens that were said."""
        prompt = job.prompts[0]
        params = msgspec.structs.replace(prompt.params, n=1)
        tokens: list[int] = []
        try:
            with host.hold(candidate) as adapter:
                assert adapter is not None
                account = Account(tenant="shadow", priority=BEHIND)
                deltas = self._generator.generate(
                    prompt.tokens, params, adapter.digest, f"{job.id}-shadow", account
                )
                async for delta in deltas:
                    if delta.finish in ("error", "abort"):
                        raise MotetError(delta.error or "the shadow was aborted")
                    tokens += delta.token_ids
        except MotetError as failure:
            logger.warning("shadow %s: %s", candidate, failure)
            host.monitor.record(alias, candidate, FAILED)
            return
        host.monitor.record(alias, candidate, Ended())  # its pace is that of whoever comes last
        if _is_repeatable(params):
            host.monitor.compare(alias, candidate, said, tokens)


def _is_repeatable(params: SamplingParams) -> bool:
    """Whether the same weights would give the same answer again."""
    return params.temperature == 0 or params.seed is not None
