"""`motet tune`: the configurations of GPU kernels with which whole steps of a model are fastest on this GPU.

A configuration is judged in its place, by graph replays of whole steps: kernels overlap at their ends, share caches and
wait for each other, so what is fastest alone need not be. The four operations of experts, shrink and product of gate
and up, shrink and product of down, share their tiles and are tuned together in this sense: each is varied while the
others are the best found so far.

Which configurations a model asks for, and at which shapes, its steps say themselves (`tuned.asked`). Each is varied
field by field; what helps by itself is then tried together. Candidates are compiled by processes of their own, all at a
time, into the cache that the measuring process reads.

OUT gets a file for each operation (`kernels.gpu.tuned`) and a line in LOG for each question that was answered: what was
tried, steps before and after. Tuning that was interrupted goes on behind the last line.
"""

from __future__ import annotations

import json
import logging
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from motet.bench.stack import Stack, Work
from motet.errors import ConfigError
from motet.kernels.gpu import tuned
from motet.kernels.gpu.dense import DenseConfig
from motet.kernels.gpu.lora import LoraConfig
from motet.kernels.gpu.moe import ProductConfig
from motet.kernels.gpu.moe_lora import ShrinkConfig
from motet.layers.gpu import GpuBatch

logger = logging.getLogger(__name__)

LOG = "tuning.jsonl"
GAIN, LOSS = 0.995, 1.004
"""For a change to be taken, some step must become this much shorter, and none so much longer: less is noise."""
TOGETHER = 4
"""How many changes that helped by themselves are tried together."""
REPLAYS = 15
WARM = 0.02
"""Seconds of replays before those that count: clocks fall while the GPU waits for a compiler."""
VALUES: Mapping[type, Mapping[str, Sequence[int | bool]]] = {
    DenseConfig: {
        "features": (64, 128), "depth": (64, 128, 256), "warps": (4, 8), "stages": (3, 4, 6, 8),
        "splits": (1, 2, 3, 4, 6, 8), "ranks": (32, 64, 128), "prefetch": (0, 128, 256, 512),
    },
    LoraConfig: {
        "rows": (16, 32, 64, 128), "slice": (512, 1024, 1536, 2048, 3072, 4096), "depth": (32, 64, 128, 256, 512),
        "ranks": (16, 32, 64), "groups": (1, 2, 4, 8), "shrink_warps": (2, 4, 8), "columns": (64, 128, 256),
        "expand_ranks": (16, 32, 64), "expand_warps": (4, 8), "stages": (2, 3, 4, 5), "group": (0, 8),
    },
    ProductConfig: {
        "features": (32, 64, 128, 256), "depth": (32, 64, 96, 128), "warps": (1, 2, 4, 8), "stages": (2, 3, 4, 5, 6),
        "ranks": (16, 32, 64, 128), "group": (1, 2, 4, 8, 16), "ahead": (False, True), "launch": (0, 2, 3),
    },
    ShrinkConfig: {
        "warps": (2, 4, 8), "split": (False, True), "depth": (32, 64, 128, 256), "ranks": (16, 32, 64),
        "lanes": (1, 2, 3, 4), "stages": (2, 3, 4, 5, 7),
    },
}  # fmt: skip
"""What the fields of a configuration may be."""
SUMS = ("depth", "split")
"""Fields that the order of a product's sums follows from: of experts' products of few rows they stay as they are, so
that a row has the same bits in decode steps of all sizes. Unless sums are split, so do those that Triton's choice of
instructions follows from."""
INSTRUCTIONS = ("warps", "features")
UPDATES = ("lora", "moe_shrink")
"""What operations of adapters alone are called."""

Question = tuple[str, tuple[tuple[str, int], ...]]
"""An operation and its shape."""


@dataclass(frozen=True)
class Step:
    """A step that is measured: `rows` single tokens, or a prompt of so many; with adapters or of the base."""

    prompt: bool
    rows: int
    adapted: bool = True

    def __str__(self) -> str:
        what = f"prompt of {self.rows} tokens" if self.prompt else f"{self.rows} rows"
        return f"{what}, {'with adapters' if self.adapted else 'base'}"

    def batch(self, stack: Stack) -> GpuBatch:
        """Its inputs, with the configurations of now."""
        if self.prompt:
            return stack.prefill(self.rows, adapted=self.adapted)
        return stack.decode(self.rows, adapted=self.adapted, launch_lora=self.adapted)


@dataclass(frozen=True)
class Answer:
    """A question's best configuration, milliseconds of each step that asks it before and after, changes tried."""

    operation: str
    shape: dict[str, int]
    config: dict[str, Any]
    before: dict[str, float]
    after: dict[str, float]
    tried: int

    def __str__(self) -> str:
        shape = " ".join(f"{name}={value}" for name, value in self.shape.items())
        gains = ", ".join(
            f"{step} {self.before[step]:.3f} → {self.after[step]:.3f} ms" for step in self.before
        )
        return f"{self.operation} {shape}: {gains}"


def steps_of(rows: Sequence[int], prompt: int) -> list[Step]:
    """The steps to tune for: single tokens with adapters, the middle size without too, and a prompt of both kinds."""
    middle = rows[len(rows) // 2]
    return [
        *(Step(False, count) for count in rows),
        Step(False, middle, adapted=False),
        Step(True, prompt),
        Step(True, prompt, adapted=False),
    ]


def candidates(config: Any, operation: str, shape: tuned.Shape) -> Iterator[dict[str, Any]]:
    """Changes of one field of a configuration (of a loop's part and its step at once) that its operation can use."""
    kept: tuple[str, ...] = ()
    if operation == "moe_product" and shape["rows"] < 64:
        kept = SUMS if config.split > 1 else (*SUMS, *INSTRUCTIONS)
    changes: list[dict[str, Any]] = [
        {name: value} for name, values in VALUES[type(config)].items() if name not in kept for value in values
    ]
    if isinstance(config, LoraConfig):
        changes += [{"slice": size, "depth": size} for size in (256, 512, 1024)]
    for change in changes:
        if all(getattr(config, name) == value for name, value in change.items()):
            continue
        try:
            changed = replace(config, **change)
        except ConfigError:
            continue
        if tuned.OPERATIONS[operation].fits(changed, shape):
            yield change


def milliseconds(stack: Stack, step: Step) -> float:
    """Median of graph replays of a step; infinite if a kernel of it cannot be compiled or launched."""
    with torch.inference_mode():
        try:
            batch = step.batch(stack)
            stack.decoder(batch)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                stack.decoder(batch)
        except Exception as error:  # noqa: BLE001  # too many registers, too much shared memory, …
            logger.info("%s: %s", step, str(error).splitlines()[:1])
            return math.inf
        begin = time.monotonic()
        while time.monotonic() < begin + WARM:
            graph.replay()
            torch.cuda.synchronize()
        times = []
        for _ in range(REPLAYS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
    return float(statistics.median(times))


class Tuner:
    """Answers a stack's questions one after the other; `best` are the configurations so far."""

    def __init__(
        self,
        stack: Stack,
        steps: Sequence[Step],
        out: Path,
        name: str,
        clock: Callable[[Stack, Step], float] = milliseconds,
    ) -> None:
        """`name` is the model's in the names of the files. What is in LOG already is taken as answered."""
        self.stack, self.out, self.name, self.clock = stack, out, name, clock
        self.best: dict[Question, Any] = {}
        self.asking: dict[Question, list[Step]] = {}
        self.answers: list[Answer] = []
        out.mkdir(parents=True, exist_ok=True)
        tuned.load(None, stack.gpu)
        for step in steps:
            with torch.inference_mode():
                stack.decoder(step.batch(stack))
            for question, config in _asked():
                self.best.setdefault(question, config)
                asking = self.asking.setdefault(question, [])
                if step.adapted or not question[0].startswith(UPDATES):  # of the base they ask for tiles only
                    asking.append(step)
            tuned.load(None, stack.gpu)
        log = out / LOG
        for line in log.read_text().splitlines() if log.is_file() else ():
            answer = Answer(**json.loads(line))
            question = answer.operation, tuple(answer.shape.items())
            if question in self.best:
                self.best[question] = replace(self.best[question], **answer.config)
                self.answers.append(answer)
        for operation in {answer.operation for answer in self.answers}:
            self.write(operation)

    @property
    def questions(self) -> list[Question]:
        """Those without an answer, experts' products first, which take most."""
        answered = {(answer.operation, tuple(answer.shape.items())) for answer in self.answers}
        order = ("moe_product", "lora", "moe_shrink", "dense_product")
        left = [question for question in self.best if question not in answered]
        return sorted(left, key=lambda q: next(i for i, name in enumerate(order) if q[0].startswith(name)))

    def entries(self, question: Question, config: Any) -> list[tuple[str, tuned.Shape, Any]]:
        """All configurations, with this one for the question."""
        chosen = {**self.best, question: config}
        return [(operation, dict(shape), one) for (operation, shape), one in chosen.items()]

    def answer(self, question: Question, compiling: Executor | None = None) -> Answer:
        """Find the best configuration for a question, write it down and keep to it."""
        operation, shape = question[0], dict(question[1])
        start, steps = self.best[question], self.asking[question]
        changes = list(candidates(start, operation, shape))
        if compiling is not None:
            jobs = [self.entries(question, replace(start, **change)) for change in changes]
            list(compiling.map(_compile, jobs, [steps] * len(jobs)))
        before = self._times(question, start)
        helped = []
        for change in changes:
            times = self._times(question, replace(start, **change))
            if _better(times, before):
                helped.append((_ratio(times, before), change))
        helped.sort(key=lambda one: one[0])
        best, after, done = start, before, set[str]()
        for _, change in helped[:TOGETHER]:
            if done & set(change):
                continue
            try:
                trial = replace(best, **change)
            except ConfigError:
                continue
            times = self._times(question, trial)
            if _better(times, after) and tuned.OPERATIONS[operation].fits(trial, shape):
                best, after, done = trial, times, done | set(change)
        self.best[question] = best
        tuned.use(self.entries(question, best))
        found = Answer(operation, shape, asdict(best), _named(before), _named(after), len(changes))
        self.answers.append(found)
        with (self.out / LOG).open("a") as log:
            log.write(json.dumps(asdict(found)) + "\n")
        self.write(operation)
        return found

    def write(self, operation: str) -> None:
        """The file of an operation, with what is answered of it."""
        configs = [
            (answer.shape, self.best[answer.operation, tuple(answer.shape.items())])
            for answer in self.answers
            if answer.operation == operation
        ]
        device = self.stack.gpu.replace(" ", "-")
        file = self.out / f"{device}-{self.name}-{operation}.json"
        scratch = file.with_suffix(".new")
        scratch.write_text(tuned.dump(self.stack.gpu, operation, configs))
        scratch.replace(file)

    def _times(self, question: Question, config: Any) -> dict[Step, float]:
        tuned.use(self.entries(question, config))
        return {step: self.clock(self.stack, step) for step in self.asking[question]}


def _named(times: Mapping[Step, float]) -> dict[str, float]:
    return {str(step): round(time, 4) for step, time in times.items()}


def _better(times: Mapping[Step, float], before: Mapping[Step, float]) -> bool:
    ratios = [times[step] / before[step] for step in before]
    return min(ratios) < GAIN and max(ratios) < LOSS


def _ratio(times: Mapping[Step, float], before: Mapping[Step, float]) -> float:
    """How much longer steps take, the geometric mean."""
    return math.exp(statistics.fmean(math.log(times[step] / before[step]) for step in before))


def _asked() -> Iterator[tuple[Question, Any]]:
    for operation in tuned.OPERATIONS:
        for shape, config in tuned.asked(operation):
            yield (operation, tuple(shape.items())), config


def tune_model(
    values: Mapping[str, Any],
    work: Work,
    steps: Sequence[Step],
    out: Path,
    name: str,
    seconds: float,
    jobs: int,
) -> Iterator[tuple[float, Answer]]:
    """Yield (fraction done, answer) for each question of the model with this config.json, see `stack.few_layers`.

    No question is begun after so many seconds. `jobs` processes compile; each takes a copy of the stack in the GPU's
    memory.
    """
    until = time.monotonic() + seconds
    stack = Stack(values, work)
    tuner = Tuner(stack, steps, out, name)
    pool: AbstractContextManager[Executor | None] = nullcontext()
    if jobs > 1:
        pool = ProcessPoolExecutor(
            jobs, get_context("spawn"), _start, (values, replace(work, adapters=2, context=31))
        )
    with pool as compiling:
        left = tuner.questions
        for number, question in enumerate(left, 1):
            if time.monotonic() > until:
                break
            yield number / len(left), tuner.answer(question, compiling)


_stack: list[Stack] = []
"""A compiling process's own."""


def _start(values: Mapping[str, Any], work: Work) -> None:
    os.nice(5)
    _stack.append(Stack(values, work))


def _compile(entries: Sequence[tuple[str, tuned.Shape, Any]], steps: Sequence[Step]) -> None:
    """Run steps once, so that the kernels they launch are in Triton's cache."""
    tuned.use(entries)
    for step in steps:
        with torch.inference_mode():
            try:
                _stack[0].decoder(step.batch(_stack[0]))
                torch.cuda.synchronize()
            except Exception as error:  # noqa: BLE001  # as in `milliseconds`, where it counts
                logger.info("%s: %s", step, str(error).splitlines()[:1])
