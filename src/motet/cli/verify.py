"""Printing what an adapter does to its base model."""

from __future__ import annotations

from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from motet.adapters.checkpoint import load_checkpoint
from motet.adapters.image import pack
from motet.cli.progress import progress_bar
from motet.engine.probe import PAGE_TOKENS, PROMPT_TOKENS, AdapterEffect, probe_adapter
from motet.memory.pool import page_bytes
from motet.models.registry import load_model, load_spec


def verify_adapter(console: Console, status: Console, model: Path, path: Path, as_json: bool) -> None:
    """Print the effect of the adapter at `path` by layer and projection; AdapterRefused if a part of it has none."""
    spec = load_spec(model)
    image = pack(load_checkpoint(path, spec), page_bytes(spec, PAGE_TOKENS))
    with progress_bar(status, "model") as report:
        loaded = load_model(model, spec, PROMPT_TOKENS, lambda fraction: report("reading weights", fraction))
    effect = probe_adapter(loaded.decoder, spec, image)
    if as_json:
        console.print_json(msgspec.json.encode(effect).decode())
    else:
        console.print(_by_layer(effect))
        unreached = sum(not site.reached for site in effect.sites)
        if unreached:
            console.print(
                f"{unreached} expert projections met no token of the prompt; random inputs were used"
            )
        console.print(f"largest change of a logit: {effect.logits:.1%} of the largest logit")
        console.print(
            "rows of the base model beside it: " + ("untouched" if effect.base_untouched else "CHANGED")
        )
    effect.require()


def _by_layer(effect: AdapterEffect) -> Table:
    """A row per layer, a column per projection: the largest update over the base's largest output there."""
    modules = list(dict.fromkeys(site.module for site in effect.sites))
    table = Table(title="largest update / largest output of the base", box=None, padding=(0, 2, 0, 0))
    table.add_column("layer", justify="right")
    for module in modules:
        table.add_column(module, justify="right")
    for layer in sorted({site.layer for site in effect.sites}):
        cells = []
        for module in modules:
            here = [s.relative for s in effect.sites if (s.layer, s.module) == (layer, module)]
            cells.append(_range(here))
        table.add_row(str(layer) if layer >= 0 else "embed", *cells)
    return table


def _range(values: list[float]) -> str:
    """One value, or the smallest and largest over a layer's experts."""
    if not values:
        return ""
    low, high = min(values), max(values)
    return f"{high:.1%}" if len(values) == 1 else f"{low:.1%}–{high:.1%}"
