"""Tuning: which questions a model has, which changes are tried, that the best are found, kept and gone on from."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from motet.bench.stack import Stack, Work, few_layers
from motet.bench.tune import LOG, SUMS, Step, Tuner, candidates, steps_of
from motet.kernels.gpu import tuned
from motet.kernels.gpu.dense import DenseConfig
from motet.kernels.gpu.lora import LoraConfig
from motet.kernels.gpu.moe import ProductConfig
from tests.kernels.gpu.test_ablation import TINY

STEPS = [Step(False, 2), Step(True, 17), Step(True, 17, adapted=False)]


@pytest.fixture(scope="module")
def stack() -> Stack:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Stack(TINY.config, Work(3, 5, 24, 2, 4, 8), device, torch.float32)


def prefers(wanted: dict[str, dict[str, Any]]) -> Callable[[Stack, Step], float]:
    """A clock by which a step is the shorter, the more fields of what it asks for have these values."""

    def clock(stack: Stack, step: Step) -> float:
        del stack, step
        time = 1.0
        for one in (entry for source in tuned._entries for entry in source):
            for name, value in wanted.get(one.operation, {}).items():
                time *= 0.9 if getattr(one.config, name) == value else 1
        return time

    return clock


def test_a_model_asks_for_what_its_steps_use(stack: Stack, tmp_path: Path) -> None:
    asking = Tuner(stack, STEPS, tmp_path, "tiny", prefers({})).asking
    operations = {operation for operation, _ in asking}
    assert operations == set(tuned.OPERATIONS)
    for (operation, shape), steps in asking.items():
        if operation in ("lora_prefill", "moe_shrink_prefill"):
            assert steps == [Step(True, 17)]
        if operation in ("lora_decode", "moe_shrink_decode"):
            assert steps == [Step(False, 2)]
        if operation == "moe_product" and dict(shape)["packed"]:
            assert Step(False, 2) in steps


def test_the_best_is_found_written_and_gone_on_from(stack: Stack, tmp_path: Path) -> None:
    clock = prefers({"dense_product": {"stages": 6, "splits": 2}, "moe_shrink_decode": {"lanes": 3}})
    tuner = Tuner(stack, STEPS, tmp_path, "tiny", clock)
    count = len(tuner.questions)
    dense = [question for question in tuner.questions if question[0] == "dense_product"]
    for question in dense[:2]:
        answer = tuner.answer(question)
        assert (answer.config["stages"], answer.config["splits"]) == (6, 2)
        assert all(answer.after[step] < 0.85 * answer.before[step] for step in answer.before)
    assert len((tmp_path / LOG).read_text().splitlines()) == 2

    again = Tuner(stack, STEPS, tmp_path, "tiny", clock)
    assert len(again.questions) == count - 2
    shrink = next(question for question in again.questions if question[0] == "moe_shrink_decode")
    assert again.answer(shrink).config["lanes"] == 3
    tuned.load(tmp_path, stack.gpu)
    default = DenseConfig()
    for _, shape in dense[:2]:
        found = tuned.tuned("dense_product", default, **dict(shape))
        assert (found.stages, found.splits) == (6, 2)
    tuned.load(None, stack.gpu)


def test_no_step_may_pay_for_another(stack: Stack, tmp_path: Path) -> None:
    """Half the time for prompts is not taken if steps of single tokens get a percent longer."""

    def clock(stack: Stack, step: Step) -> float:
        del stack
        changed = any(
            one.config.stages == 6
            for source in tuned._entries
            for one in source
            if one.operation == "dense_product"
        )
        return 1.0 if not changed else 0.5 if step.prompt else 1.01

    tuner = Tuner(stack, STEPS, tmp_path, "tiny", clock)
    shared = next(q for q, steps in tuner.asking.items() if q[0] == "dense_product" and len(steps) == 3)
    before = tuner.best[shared]
    tuner.answer(shared)
    assert tuner.best[shared] == before


def test_nothing_changes_without_a_gain(stack: Stack, tmp_path: Path) -> None:
    tuner = Tuner(stack, STEPS[:1], tmp_path, "tiny", lambda _stack, _step: 1.0)
    question = tuner.questions[0]
    before = tuner.best[question]
    answer = tuner.answer(question)
    assert tuner.best[question] == before
    assert answer.tried > 0
    assert answer.before == answer.after


def test_changes_can_be_used_and_keep_the_sums_of_few_rows() -> None:
    shape = {"features": 64, "depth": 96, "sides": 2, "rows": 8, "few": 0, "packed": 1}
    start = ProductConfig(32, 32, 2, 3, split=2)
    names = {name for change in candidates(start, "moe_product", shape) for name in change}
    assert names == {"features", "warps", "stages", "ranks", "group", "ahead", "launch"}
    assert not names & set(SUMS)
    whole = replace(start, split=1, warps=4)
    names = {name for change in candidates(whole, "moe_product", {**shape, "packed": 0}) for name in change}
    assert not names & {"features", "warps", *SUMS}
    many = list(candidates(start, "moe_product", {**shape, "rows": 64}))
    assert {change["depth"] for change in many if "depth" in change} == {96}, "64 and 128 do not divide 96"
    lora = LoraConfig(16, 512, 512, 16, 8, 4, 128, 32, 4)
    for change in candidates(lora, "lora_decode", {"hidden": 64, "rank": 32}):
        depth, size = change.get("depth", 512), change.get("slice", 512)
        assert size % depth == 0


def test_few_layers_cut_what_is_listed_by_layer() -> None:
    values = {"num_hidden_layers": 4, "layer_types": list("abcd"), "other": [1, 2], "text_config": {"a": 1}}
    cut = few_layers(values, 2)
    assert (cut["num_hidden_layers"], cut["layer_types"], cut["other"]) == (2, ["a", "b"], [1, 2])
    assert few_layers({"text_config": values}, 3)["text_config"]["layer_types"] == ["a", "b", "c"]
    assert few_layers(values, 9)["num_hidden_layers"] == 4


def test_steps_are_of_both_kinds() -> None:
    assert [str(step) for step in steps_of([1, 16, 64], 1600)] == [
        "1 rows, with adapters", "16 rows, with adapters", "64 rows, with adapters", "16 rows, base",
        "prompt of 1600 tokens, with adapters", "prompt of 1600 tokens, base",
    ]  # fmt: skip


def test_the_log_is_json(stack: Stack, tmp_path: Path) -> None:
    tuner = Tuner(stack, STEPS[:1], tmp_path, "tiny", lambda _stack, _step: 1.0)
    tuner.answer(tuner.questions[0])
    (line,) = (tmp_path / LOG).read_text().splitlines()
    assert set(json.loads(line)) == {"operation", "shape", "config", "before", "after", "tried"}
