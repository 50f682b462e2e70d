"""The engine: one device's loop. A step is one sentence: collect loads, schedule, launch, land.

On a GPU the step that lands is the one before, so that the device always has the next one to go on with.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from motet.adapters.image import open_image
from motet.adapters.pager import ImageFile, LoadResult, Pager
from motet.config import EngineConfig
from motet.engine.device import (
    fitting,
    has_gpu,
    make_host_tier,
    make_pool,
    make_runner,
    resolve,
    weights_device,
    with_prompt_copies,
    workspace_bytes,
)
from motet.engine.probe import probe_adapter
from motet.engine.sampler import Draw, SamplingRow
from motet.engine.tiers import PoolTier, share_of_base
from motet.engine.times import StepTimes
from motet.errors import ConfigError, MotetError
from motet.models.registry import load_model, load_spec, locate, return_freed_memory
from motet.scheduler.scheduler import Scheduler, SchedulerConfig
from motet.types import EngineStats, ModelSpec, Plan, Request, SeqOutput

logger = logging.getLogger(__name__)
Progress = Callable[[str, float], None]
OnMissing = Callable[[str, str], None]
"""Asks for the image of an adapter (its digest) to be made again from a directory."""


@dataclass(frozen=True)
class _Flight:
    """A step under way."""

    plan: Plan
    draw: Draw


class Engine:
    """Owns the model, the pool and the scheduler; everything else talks to it in values.

    Not thread-safe: one thread calls its methods between steps.
    """

    def __init__(
        self,
        config: EngineConfig,
        on_progress: Progress | None = None,
        on_loaded: Callable[[], None] = lambda: None,
        on_missing: OnMissing | None = None,
    ) -> None:
        """`on_progress` hears the stages of starting.

        `on_loaded` is called from another thread when a load ends, `on_missing` by a step when an adapter is wanted
        whose image is not there; `image_remade` is to answer it.
        """
        progress = on_progress or (lambda _stage, _fraction: None)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        config = resolve(config, has_gpu())
        directory = locate(config.model)
        self.spec = load_spec(directory)
        self.max_model_len = max_len = resolve_max_model_len(config, self.spec)
        with fitting("the model", "take a smaller one, or one with smaller weights"):
            model = load_model(
                directory,
                self.spec,
                max_len,
                lambda fraction: progress("reading weights", 0.8 * fraction),
                weights_device(config),
            )
            model = with_prompt_copies(config, self.spec, model)
        progress("reserving memory", 0.8)
        with fitting("the pool", "lower pool_bytes, or leave it out and set memory_fraction"):
            pool = make_pool(config, self.spec)
        with fitting("a step", "lower memory_fraction, max_running or max_step_tokens"):
            self.runner = make_runner(config, model.decoder, pool, max_len)
            progress("warming up kernels", 0.9)
            self.runner.warm_up()
        return_freed_memory()
        self.pager = Pager(pool, make_host_tier(config, pool.page_bytes), on_loaded)
        self._on_missing = on_missing
        step_tokens = config.max_step_tokens
        assert step_tokens is not None
        self.scheduler = Scheduler(
            SchedulerConfig(
                page_tokens=config.page_tokens,
                max_step_tokens=step_tokens,
                max_running=config.max_running,
                max_model_len=max_len,
                prefix_caching=config.prefix_caching,
                kv_groups=self.spec.kv_groups,
                eos_token_ids=self.spec.eos_token_ids,
                max_resident=self.runner.table.max_slots,
            ),
            pool.num_pages,
        )
        self._images: dict[str, ImageFile] = {}
        self._pinned: set[str] = set()
        self._leaving: set[str] = set()  # forgotten, but perhaps with requests that are not over
        self._verify = config.verify_adapters
        self._weight_bytes = model.nbytes
        self._workspace_bytes = workspace_bytes(config, pool, model.nbytes)
        self._steps = 0
        self._times = StepTimes()
        self._tier = PoolTier()
        self._flight: _Flight | None = None
        self._stalled = False
        progress("ready", 1.0)

    def step(self) -> list[SeqOutput]:
        """One step of the loop; outputs of every sequence that got a token or ended."""
        began = time.monotonic()
        outputs = self._collect_loads()
        plan = self.scheduler.schedule()
        before = self._flight
        self._flight = self._launch(plan)
        outputs += self._land(before)
        landed = before
        if self._flight is not None and not self._flight.draw.overlaps:
            now, self._flight = self._flight, None
            outputs += self._land(now)
            landed = now
        if landed is not None:
            self._times.landed(landed.plan, time.monotonic() - began)
        self._stalled = not plan.chunks and before is None
        return self._times.told(outputs)

    @property
    def has_work(self) -> bool:
        """Whether a step could make progress now or once a load ends."""
        return self.scheduler.has_work or self.pager.busy or self._flight is not None

    @property
    def must_wait(self) -> bool:
        """Whether another step is of no use before a load ends or a message comes, as that an image is there again."""
        return not self.has_work or (self._stalled and (self.pager.busy or self.scheduler.is_remaking))

    def add(self, request: Request) -> list[SeqOutput]:
        """Accept a request; one that cannot be served ends at once with its error."""
        try:
            self.scheduler.add(request)
            self._tier.asked(request.adapter)
        except MotetError as error:
            return [SeqOutput(request.id, finish="error", error=str(error), code=error.code)]
        return []

    def abort(self, request_id: str) -> list[SeqOutput]:
        """End a request now; nothing if it is unknown or over."""
        output = self.scheduler.abort(request_id)
        return self._times.told([output]) if output is not None else []

    def register_adapter(self, digest: str, image: Path, num_pages: int, source: str = "") -> None:
        """Make an adapter known; it is loaded when a request wants it.

        The image has just been checked, and can be made again from the directory `source`, if that is given. With
        `verify_adapters`, AdapterRefused if it does not do what its file says.
        """
        if self._verify:
            probe_adapter(self.runner.decoder, self.spec, open_image(image)).require()
        self._images[digest] = ImageFile.just_checked(image, source)
        self._leaving.discard(digest)
        self.scheduler.register_adapter(digest, num_pages, share_of_base(image, self.spec))

    def forget_adapter(self, digest: str) -> None:
        """Drop an adapter once its last request has ended; a waiting one may still need its image loaded."""
        self.scheduler.forget_adapter(digest)
        self._leaving.add(digest)
        self._pinned.discard(digest)
        self._let_go()

    def prefetch(self, digest: str) -> None:
        """Load an adapter soon, if there is room that nobody wants."""
        self.scheduler.prefetch(digest)

    def pin_adapter(self, digest: str, pinned: bool) -> None:
        """Never evict an adapter, or do so again; it is not pinned any more once it is forgotten."""
        self.scheduler.pin_adapter(digest, pinned)
        (self._pinned.add if pinned else self._pinned.discard)(digest)

    def image_remade(self, digest: str, error: str | None = None) -> list[SeqOutput]:
        """The answer to `on_missing`: the image is there again, or why it cannot be, which ends requests."""
        file = self._images.get(digest)
        if error is None and file is not None:
            self._images[digest] = ImageFile.just_checked(file.path, file.source)
        return self._times.told(self.scheduler.image_remade(digest, error and _not_loaded(digest, error)))

    def stats(self) -> EngineStats:
        """A snapshot for metrics and health."""
        self._let_go()
        stats = self.scheduler.stats()
        return msgspec.structs.replace(
            stats,
            steps=self._steps,
            prefill_seconds=self._times.prefill_seconds,
            decode_seconds=self._times.decode_seconds,
            graph_replays=self.runner.graph_replays,
            graph_captures=self.runner.graph_captures,
            loads=self._tier.loads,
            load_seconds=self.pager.load_seconds,
            page_bytes=self.runner.pool.page_bytes,
            weight_bytes=self._weight_bytes,
            workspace_bytes=self._workspace_bytes,
            tiers={
                "pool": self._tier.stats(stats, self.runner.pool.page_bytes, self.pager.load_seconds),
                **self.pager.stats(),
            },
            loads_by_adapter=dict(self._tier.loads_of),
            pinned=tuple(sorted(self._pinned)),
        )

    def close(self) -> None:
        """End the pager's thread."""
        self.pager.close()

    def _launch(self, plan: Plan) -> _Flight | None:
        self._tier.left(plan.evictions)
        for load in plan.loads:
            self.pager.start(load, self._images[load.digest])
        for digest in plan.remakes:
            assert self._on_missing is not None
            self._on_missing(digest, self._images[digest].source)
        self._times.launched(plan, lambda seq: self.scheduler.sequence(seq).request, time.monotonic())
        draw = self.runner.launch(plan, self._sampling_row)
        self._steps += bool(plan.chunks)
        return _Flight(plan, draw) if plan.chunks else None

    def _land(self, flight: _Flight | None) -> list[SeqOutput]:
        if flight is None:
            return []
        return self.scheduler.commit(flight.plan, flight.draw.result())

    def _collect_loads(self) -> list[SeqOutput]:
        outputs: list[SeqOutput] = []
        for result in self.pager.finished():
            digest = result.load.digest
            if result.is_missing and self._can_remake(digest):
                reason = result.error or "unknown"
                logger.info("the image of adapter %s is made again: %s", digest[:12], reason)
                outputs += self.scheduler.adapter_missing(digest, _not_loaded(digest, reason))
                continue
            self._tier.tried(digest)
            if (error := self._publish(result)) is not None:
                outputs += self.scheduler.adapter_failed(digest, error)
                continue
            self._tier.came(digest)
            self.scheduler.adapter_loaded(digest, is_over=not result.copies)
        for digest in self.runner.arrived():
            self.scheduler.adapter_arrived(digest)
        return outputs

    def _publish(self, result: LoadResult) -> str | None:
        """Let kernels find an adapter that has come; why they cannot, or it has not."""
        digest = result.load.digest
        if result.chunks is None:
            return _not_loaded(digest, result.error or "unknown")
        try:
            self.runner.add_adapter(result.load, result.chunks, result.copies)
        except MotetError as failure:
            return _not_loaded(digest, str(failure))
        return None

    def _can_remake(self, digest: str) -> bool:
        """Is there somebody to ask for its image, and a source?"""
        return self._on_missing is not None and bool(self._images[digest].source)

    def _let_go(self) -> None:
        """Keep nothing of forgotten adapters that no request needs any more."""
        if not self._leaving:
            return
        known = self.scheduler.stats().residency
        for digest in [digest for digest in self._leaving if digest not in known]:
            self._leaving.discard(digest)
            self._images.pop(digest, None)
            self._tier.forget(digest)
            self.pager.forget(digest)

    def _sampling_row(self, seq: int) -> SamplingRow:
        sequence = self.scheduler.sequence(seq)
        request = sequence.request
        eos = self.spec.eos_token_ids
        return SamplingRow(seq, request.params, sequence.tokens, len(request.prompt), sequence.position, eos)


def _not_loaded(digest: str, reason: str) -> str:
    return f"adapter {digest[:12]} could not be loaded: {reason}"


def resolve_max_model_len(config: EngineConfig, spec: ModelSpec) -> int:
    """The configured context length, or the model's own."""
    if config.max_model_len is None:
        return spec.max_model_len
    if config.max_model_len > spec.max_model_len:
        raise ConfigError(
            f"max_model_len {config.max_model_len} is more than the model's {spec.max_model_len}"
        )
    return config.max_model_len
