"""What a release needs to see of live requests: how each version does, and what a shadow would have answered.

A shadow runs after the answer that it is compared to has ended, behind all other work, and answers nobody.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import msgspec

from motet.engine.protocol import AdapterHost, Generator
from motet.errors import EngineDead, MotetError
from motet.registry.follow import RegistryCatalog
from motet.server.intake import Job
from motet.tenancy.load import QueueTimeout
from motet.types import Account, Delta, SamplingParams

logger = logging.getLogger(__name__)
MAX_SHADOWS = 4  # at a time; prompts that come meanwhile are not copied
BEHIND = -(1 << 30)  # a priority below every tenant's


class Rollout:
    """Watches the answers of one server."""

    def __init__(
        self, generator: Generator, host: AdapterHost, draw: Callable[[], float] = random.random
    ) -> None:
        self._generator = generator
        self._host = host if isinstance(host, RegistryCatalog) else None
        self._draw = draw
        self._shadows: set[asyncio.Task[None]] = set()

    def watch(
        self, deltas: AsyncGenerator[Delta, None], job: Job, arrival: float
    ) -> AsyncGenerator[Delta, None]:
        """The same deltas, seen; `arrival` is of `time.perf_counter`."""
        if self._host is None or not job.digest:
            return deltas
        return self._watched(self._host, deltas, job, arrival)

    async def _watched(
        self, host: RegistryCatalog, deltas: AsyncGenerator[Delta, None], job: Job, arrival: float
    ) -> AsyncGenerator[Delta, None]:
        said: list[int] = []
        count = 0
        try:
            async with aclosing(deltas):
                async for delta in deltas:
                    count += len(delta.token_ids)
                    if not delta.index:
                        said += delta.token_ids
                    yield delta
        except (asyncio.CancelledError, GeneratorExit):  # the client went: that says nothing of the version
            raise
        except MotetError as failure:  # nor does what the client or the whole server is to blame for
            if failure.status >= 500 and not isinstance(failure, (QueueTimeout, EngineDead)):
                host.monitor.record(job.model, None)
            raise
        except Exception:
            host.monitor.record(job.model, None)
            raise
        host.monitor.record(job.model, (time.perf_counter() - arrival) / max(count, 1))
        self._maybe_shadow(host, job, said)

    def _maybe_shadow(self, host: RegistryCatalog, job: Job, said: list[int]) -> None:
        shadow = host.shadow_of(job.model)
        if shadow is None or len(self._shadows) >= MAX_SHADOWS or self._draw() >= shadow[1]:
            return
        task = asyncio.get_running_loop().create_task(self._run_shadow(host, shadow[0], job, said))
        self._shadows.add(task)
        task.add_done_callback(self._shadows.discard)

    async def _run_shadow(self, host: RegistryCatalog, candidate: str, job: Job, said: list[int]) -> None:
        """Answer the first prompt again as `candidate`, and compare with the tokens that were said."""
        prompt = job.prompts[0]
        params = msgspec.structs.replace(prompt.params, n=1)
        tokens: list[int] = []
        began = time.perf_counter()
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
            host.monitor.record(candidate, None)
            return
        host.monitor.record(candidate, (time.perf_counter() - began) / max(len(tokens), 1))
        if _is_repeatable(params):
            host.monitor.compare(candidate, said, tokens)


def _is_repeatable(params: SamplingParams) -> bool:
    """Whether the same weights would give the same answer again."""
    return params.temperature == 0 or params.seed is not None
