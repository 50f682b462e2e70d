"""The script that measures what each device of the GPU path buys: its list, its options, and that all of it runs."""

from __future__ import annotations

import json
import math
import time

import pytest
import torch

from benchmarks import ablation
from benchmarks.ablation import (
    ABLATIONS,
    Findings,
    Row,
    json_lines,
    parse,
    run,
    show,
)
from benchmarks.gpu.ablation_stack import Size, Stack, gpt_oss_20b
from benchmarks.gpu.measure import Call
from motet.kernels.gpu import dense

TINY = Size(
    {
        **gpt_oss_20b(1).config, "hidden_size": 64, "intermediate_size": 32, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 3, "num_experts_per_tok": 2,
        "vocab_size": 96, "sliding_window": 4,
    },
    rows=3, context=5, prompt=17, adapters=2, rank=4, page_tokens=8, lengths=(2,),
)  # fmt: skip


def test_the_list_is_complete() -> None:
    assert set(ABLATIONS) == {
        "no_specialisation", "idle_sites", "base_batches", "programmatic_launch", "split_shrink", "split_product",
        "grouped_order", "even_k", "expand_in_place", "few_rows", "tuned_configurations",
    }  # fmt: skip
    assert all(one.__doc__ for one in ABLATIONS.values())


def test_options() -> None:
    options = parse([])
    assert (options.only, options.layers, options.json) == (list(ABLATIONS), 4, False)
    assert options.seconds <= 150
    options = parse(["--only", "even_k", "idle_sites", "--json", "--tuned-configs", "there"])
    assert (options.only, options.json, options.tuned_configs.name) == (
        ["even_k", "idle_sites"],
        True,
        "there",
    )
    with pytest.raises(SystemExit):
        parse(["--only", "everything"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["ablation.py"])
    assert ablation.main() == 2
    assert "torch finds no GPU here" in capsys.readouterr().err


def test_every_ablation_runs(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a stack small enough for the interpreter, timed by a clock that only runs what it is given."""
    ran = 0

    def clock(calls: list[Call], _launches: int) -> float:
        nonlocal ran
        ran += 1
        calls[0]()
        return float(ran)

    monkeypatch.setattr(dense, "MOST_ROWS", 16)  # fewer than a prompt of this size has
    stack = Stack(TINY, clock, device, torch.float32)
    with torch.inference_mode():
        for batch in (stack.decode(), stack.prefill(9)):
            assert bool(torch.isfinite(stack.decoder(batch)).all())
    found = run(stack, ABLATIONS, math.inf)
    assert not found.missing
    assert {name for name, _ in found.rows} == set(ABLATIONS)


def test_results_are_a_table_or_json_lines() -> None:
    found = Findings([("even_k", Row("prompt", 2.0, 3.0)), ("no_specialisation", Row("kernels", 0, 7, ""))])
    found.missing["few_rows"] = "no time left"
    table = show(found, "a GPU").splitlines()
    assert [line.split()[0] for line in table[2:]] == ["even_k", "no_specialisation", "few_rows"]
    assert table[2].split()[2:] == ["2.000", "3.000", "ms", "1.500"]
    assert [json.loads(line) for line in json_lines(found)] == [
        {"ablation": "even_k", "measure": "prompt", "on": 2.0, "off": 3.0, "unit": "ms"},
        {"ablation": "no_specialisation", "measure": "kernels", "on": 0, "off": 7, "unit": ""},
        {"ablation": "few_rows", "missing": "no time left"},
    ]


def test_what_does_not_fit_into_the_time_is_listed(device: str) -> None:
    stack = Stack(TINY, lambda _calls, _launches: 1.0, device, torch.float32)
    found = run(stack, ["even_k"], time.monotonic() - 1)
    assert (found.rows, found.missing) == ([], {"even_k": "no time left"})
