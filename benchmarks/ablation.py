"""What each device of the GPU path buys: measured with it and without it: `python benchmarks/ablation.py [--json]`.

Runs on one GPU, on a random stack of gpt-oss-20b's shape with few layers that is made in its memory: a decode step of
16 rows with 8 adapters of rank 32 at 1,900 tokens of context, a prompt of 1,600 tokens with an adapter, or where a step
does not show it the kernels alone. Steps are medians of graph replays, so what the host does is not in them.

Everything that is switched is an option by name: configurations (`dense.DenseConfig`, `lora.LoraConfig`,
`moe_lora.ShrinkConfig`, `moe.ProductConfig`) through a folder of tuned configurations, `pdl` and `idle` of a batch,
`dense.MOST_ROWS`, `do_not_specialize` of a kernel. About two minutes, most of it compilation; what does not fit into
--seconds is left out and listed. --only NAME … measures some; --json prints a JSON line per row instead of the table.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import pkgutil
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import linear

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.gpu.ablation_stack import Stack, gpt_oss_20b  # first: it finds Motet
from benchmarks.gpu.measure import measure
from motet.kernels import gpu as kernels
from motet.kernels.gpu import dense, jit, lora, tuned
from motet.kernels.gpu.dense import dense_config, dense_product
from motet.layers.batch import LinearMap
from motet.layers.gpu import GpuBatch

# What is switched


@dataclass(frozen=True)
class Row:
    """`measure` with the device on and off, in `unit`."""

    measure: str
    on: float
    off: float
    unit: str = "ms"


def no_specialisation(stack: Stack) -> Iterator[Row]:
    """Kernels are not compiled for values of integers that vary with the lengths of contexts (do_not_specialize)."""
    on, off = (_compilations(stack, specialise) for specialise in (False, True))
    last = max(stack.size.lengths)
    yield Row(f"kernels compiled for prompts of 1 to {last} tokens", on, off, "")


def idle_sites(stack: Stack) -> Iterator[Row]:
    """Nothing is launched for embedding, head and router where no adapter of the step has them."""
    yield Row("decode step", stack.ms(stack.decode()), stack.ms(stack.decode(idle=False)))
    yield Row("prompt", stack.ms(stack.prefill()), stack.ms(stack.prefill(idle=False)))


def base_batches(stack: Stack) -> Iterator[Row]:
    """A step whose rows are all of the base launches no LoRA kernel."""
    on, off = (stack.decode(adapted=False, launch_lora=launched) for launched in (False, True))
    yield Row("decode step of the base", stack.ms(on), stack.ms(off))


def programmatic_launch(stack: Stack) -> Iterator[Row]:
    """A kernel starts while the one in front of it ends (pdl)."""
    yield Row("decode step", stack.ms(stack.decode()), stack.ms(stack.decode(pdl=False)))
    yield Row("prompt", stack.ms(stack.prefill()), stack.ms(stack.prefill(pdl=False)))


def split_shrink(stack: Stack) -> Iterator[Row]:
    """Shrink cuts K into slices (dense projections), or columns among warps (experts)."""
    on = stack.ms(stack.decode())
    ((_, how),) = stack.defaults("lora_decode")
    wide = max(one.weight.shape[1] for pair in stack.maps for one in pair)
    with stack.configured(lora_decode={"slice": -(-wide // how.depth) * how.depth}):
        yield Row("decode step: slices of dense shrink", on, stack.ms(stack.decode()))
    with stack.configured(moe_shrink_decode={"split": False}):
        yield Row("decode step: warps of expert shrink", on, stack.ms(stack.decode()))


def split_product(stack: Stack) -> Iterator[Row]:
    """Products of few features split their sums; the last program of a block adds them up."""
    on = stack.ms(stack.decode())
    with stack.configured(dense_product={"splits": 1}):
        yield Row("decode step", on, stack.ms(stack.decode()))


def grouped_order(stack: Stack) -> Iterator[Row]:
    """Programs are numbered so that tiles which share weights or factors run together (`group`)."""
    default = stack.ms(stack.prefill())
    with stack.configured(moe_product={"group": 1}):
        yield Row("prompt: experts, tiles of a group / one by one", default, stack.ms(stack.prefill()))
    with stack.configured(lora_prefill={"group": 8}):
        grouped = stack.ms(stack.prefill())
    with stack.configured(lora_prefill={"group": 0}):
        yield Row("prompt: dense LoRA, 8 tiles / all", grouped, stack.ms(stack.prefill()))


def even_k(stack: Stack) -> Iterator[Row]:
    """No masks where block sizes divide (`even`)."""
    decode, prefill = stack.ms(stack.decode()), stack.ms(stack.prefill())
    off = {"even": False}
    with stack.configured(dense_product=off):
        yield Row("decode step: products", decode, stack.ms(stack.decode()))
    with stack.configured(lora_decode=off, lora_prefill=off):
        yield Row("decode step: shrink", decode, stack.ms(stack.decode()))
        yield Row("prompt: shrink and expand", prefill, stack.ms(stack.prefill()))


def expand_in_place(stack: Stack) -> Iterator[Row]:
    """Expand is part of the product, or adds to the product's output, and makes no tensor of its own."""
    rows, prompt = stack.decode(), stack.prefill()
    fused = stack.us([partial(_linear, rows, pair) for pair in stack.maps])
    place, tensor = (
        stack.us([partial(_updated, rows, pair, separate) for pair in stack.maps])
        for separate in (False, True)
    )
    size = stack.size
    yield Row(f"qkv and o of {size.rows} rows: in the product / added to its output", fused, place, "us")
    yield Row(f"qkv and o of {size.rows} rows: added to its output / by another tensor", place, tensor, "us")
    place, tensor = (
        stack.us([partial(_updated, prompt, pair, separate) for pair in stack.maps])
        for separate in (False, True)
    )
    yield Row(
        f"qkv and o of {size.prompt} rows: added to its output / by another tensor", place, tensor, "us"
    )


def few_rows(stack: Stack) -> Iterator[Row]:
    """Few rows are multiplied by a kernel made for them, with the update in it, and not by cuBLAS (MOST_ROWS)."""
    for name, adapted in (("", True), (" of the base", False)):
        batch = stack.decode(adapted=adapted, launch_lora=adapted)
        on = stack.ms(batch)
        with mock.patch.object(dense, "MOST_ROWS", 0):
            yield Row(f"decode step{name}", on, stack.ms(batch))


def tuned_configurations(stack: Stack) -> Iterator[Row]:
    """Configurations from --tuned-configs, or those shipped, instead of the defaults."""
    try:
        tuned.load(stack.folder, stack.gpu)
        on = stack.ms(stack.decode()), stack.ms(stack.prefill())
        tuned.load(None, "no device")
        off = stack.ms(stack.decode()), stack.ms(stack.prefill())
    finally:
        tuned.load(None, stack.gpu)
    yield Row("decode step", on[0], off[0])
    yield Row("prompt", on[1], off[1])


ABLATIONS: dict[str, Callable[[Stack], Iterator[Row]]] = {
    one.__name__: one
    for one in (
        few_rows, expand_in_place, programmatic_launch, split_product, split_shrink, idle_sites, base_batches, even_k,
        grouped_order, tuned_configurations, no_specialisation,
    )
}  # fmt: skip


def _linear(batch: GpuBatch, pair: tuple[LinearMap, LinearMap]) -> None:
    """qkv and o as a step has them."""
    for one in pair:
        batch.linear(_input(batch, one), one)


def _updated(batch: GpuBatch, pair: tuple[LinearMap, LinearMap], separate: bool) -> None:
    """The same with the update after the product: in place, or `separate`."""
    assert batch.lora is not None
    how = batch.lora
    for one in pair:
        x = _input(batch, one)
        if len(x) <= dense.MOST_ROWS:
            y = x.new_empty(len(x), len(one.weight))
            features, depth = one.weight.shape
            config = dense_config(features, depth)
            config = tuned.tuned("dense_product", config, features=features, depth=depth)
            dense_product(x, one.weight, one.bias, y, batch.arrived, config, pdl=batch.pdl)
        else:
            y = linear(x, one.weight, one.bias)
        z = lora.shrunk(
            len(x), x.shape[1], len(one.widths) * how.rank_blocks * lora.RANKS, how.config, x.device
        )
        to = torch.zeros_like(y) if separate else y
        lora.lora_add(to, x, how.table, one.site, one.widths, how.tiles, z, how.config, pdl=batch.pdl)
        if separate:
            y += to


def _input(batch: GpuBatch, one: LinearMap) -> Tensor:
    """Something to multiply: keys and values of the pool."""
    size = len(batch.tokens) * one.weight.shape[1]
    found: Tensor = batch.kv.flat[:size].view(len(batch.tokens), -1)
    return found


def _compilations(stack: Stack, specialise: bool) -> int:
    """How many kernels prompts of all lengths ask for that begin with none; `specialise` drops do_not_specialize.

    They are counted and neither compiled nor run.
    """
    wanted: set[str] = set()

    def count(**facts: Any) -> bool:
        wanted.add(f"{facts['repr']} {facts['key']}")
        return True

    with ExitStack() as patches, torch.inference_mode():
        for module, name, function in _kernels():
            options = {} if specialise else {"do_not_specialize": function.do_not_specialize or ()}
            patches.enter_context(mock.patch.object(module, name, jit.triton.jit(function.fn, **options)))
        patches.enter_context(mock.patch.object(jit.triton.knobs.runtime, "jit_cache_hook", count))
        short = replace(stack.decoder, layers=stack.decoder.layers[:2])
        for length in stack.size.lengths:
            for adapted in (False, True):
                short(stack.prefill(length, adapted=adapted))
    return len(wanted)


def _kernels() -> Iterator[tuple[Any, str, Any]]:
    """Module, name and function of everything written for Triton. All of it: a kernel that ran among others that do
    not would read what they have not written."""
    for found in pkgutil.iter_modules(kernels.__path__):
        module = importlib.import_module(f"{kernels.__name__}.{found.name}")
        for name, value in list(vars(module).items()):
            if isinstance(value, jit.triton.JITFunction) and value.__module__ == module.__name__:
                yield module, name, value


# Running and printing


@dataclass
class Findings:
    """Rows in the order they were measured, and what has none."""

    rows: list[tuple[str, Row]] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)


def run(stack: Stack, names: Iterable[str], until: float) -> Findings:
    """Measure these, as long as it is not `until` (monotonic seconds)."""
    found = Findings()
    for name in names:
        if time.monotonic() > until:
            found.missing[name] = "no time left"
            continue
        begin = time.monotonic()
        try:
            found.rows += [(name, row) for row in ABLATIONS[name](stack)]
        except Exception:  # noqa: BLE001  # the others may be fine
            found.missing[name] = traceback.format_exc(limit=-3)
        gc.collect()
        print(f"{name}: {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
    return found


def show(found: Findings, title: str) -> str:
    """One table."""
    lines = [f"{title}", f"{'':22} {'':62} {'with':>9} {'without':>9}  without / with"]
    for name, row in found.rows:
        ratio = f"{row.off / row.on:6.3f}" if row.on else ""
        digits = 0 if row.unit == "" else 3 if row.unit == "ms" else 2
        numbers = f"{row.on:9.{digits}f} {row.off:9.{digits}f} {row.unit:2} {ratio}"
        lines.append(f"{name:22} {row.measure:62} {numbers}")
    lines += [f"{name:22} not measured: {why}" for name, why in found.missing.items()]
    return "\n".join(lines)


def json_lines(found: Findings) -> Iterator[str]:
    for name, row in found.rows:
        yield json.dumps({"ablation": name, **asdict(row)})
    for name, why in found.missing.items():
        yield json.dumps({"ablation": name, "missing": why})


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=ABLATIONS, default=list(ABLATIONS), metavar="NAME")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=150, help="begin nothing after so many")
    parser.add_argument(
        "--tuned-configs",
        type=Path,
        metavar="DIR",
        help="what is compared with the defaults [default: those shipped]",
    )
    parser.add_argument("--json", action="store_true", help="JSON lines instead of the table")
    return parser.parse_args(arguments)


def main() -> int:
    options, begin = parse(), time.monotonic()
    if not torch.cuda.is_available():
        print("benchmarks/ablation.py measures GPU kernels, and torch finds no GPU here", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    stack = Stack(gpt_oss_20b(options.layers), lambda calls, launches: measure(calls, launches)[0])
    stack.folder = options.tuned_configs
    tuned.load(None, stack.gpu)
    found = run(stack, options.only, begin + options.seconds)
    title = f"{stack.gpu}, torch {torch.__version__}, {options.layers} layers of gpt-oss-20b's shape"
    print("\n".join(json_lines(found)) if options.json else show(found, title))
    return int(any(why != "no time left" for why in found.missing.values()))


if __name__ == "__main__":
    sys.exit(main())
