"""Files that PEFT's own versions wrote (fixtures/generate.py) give exactly the changes that these versions make."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file

from motet.adapters.checkpoint import load_checkpoint
from motet.adapters.describe import describe
from motet.errors import AdapterRefused
from motet.types import ModelSpec
from tests.adapters.bases import base
from tests.adapters.fixtures import generate
from tests.adapters.peft_files import WEIGHTS

FIXTURES = sorted(path.parent for path in generate.HERE.glob(f"peft-*/*/{WEIGHTS}"))
TWO_LAYOUTS = (
    r"experts\.lora_A\.weight': with hidden size 22 and intermediate size {} its shape fits two layouts"
)
REFUSED = {
    "ambiguous-square": TWO_LAYOUTS.format(22),
    "ambiguous-half": TWO_LAYOUTS.format(11),
    "saved-embeddings": r"'base_model\.model\.(lm_head|model\.embed_tokens)\.base_layer\.weight' is a weight of the "
    r"base itself.*save_embedding_layers=False",
    "peft-0.18.1/tied": "ensure_weight_tying=True, but .* does not hold one update",  # this version tied nothing
}


def spec_of(case: str) -> ModelSpec:
    made = generate.CASES[case]
    return base(made.kind.removesuffix("-classic"), wide=made.shape.get("intermediate_size", generate.WIDE))


def refusal(folder: Path) -> str | None:
    return REFUSED.get(folder.name) or REFUSED.get(f"{folder.parent.name}/{folder.name}")


def title(folder: Path) -> str:
    return f"{folder.parent.name}/{folder.name}"


def test_all_versions_are_there() -> None:
    every, classic, tied = set(generate.CASES), {"mixtral-classic"}, {"tied"}
    found: dict[str, set[str]] = {}
    for folder in FIXTURES:
        found.setdefault(folder.parent.name, set()).add(folder.name)
    assert found == {
        "peft-0.17.0": every - tied,
        "peft-0.18.1": every - classic,
        "peft-0.19.0": every - classic,
        "peft-0.21.2": every - classic,
    }


@pytest.mark.parametrize("folder", [f for f in FIXTURES if not refusal(f)], ids=title)
def test_every_site_changes_as_in_peft(folder: Path) -> None:
    spec = spec_of(folder.name)
    checkpoint = load_checkpoint(folder, spec)
    found = {str(spec.sites[site]): one for site, one in checkpoint.factors.items()}
    expected = load_file(folder / "expected.safetensors")
    assert found.keys() == expected.keys()
    for name, change in expected.items():
        one = found[name]
        assert one.a.is_contiguous()
        assert one.b.is_contiguous()
        assert torch.equal(one.scaling * (one.b @ one.a), change.float()), name


@pytest.mark.parametrize("folder", [f for f in FIXTURES if refusal(f)], ids=title)
def test_what_cannot_be_told_is_refused(folder: Path) -> None:
    with pytest.raises(AdapterRefused, match=refusal(folder)):
        load_checkpoint(folder, spec_of(folder.name))
    report = describe(folder, spec_of(folder.name))
    assert report.binds is False
    assert report.digest is None


@pytest.mark.parametrize(
    ("case", "swapped"),
    [
        ("mixtral", [True, True, True, False]),
        ("gpt-oss", [False, False, True, False]),
        ("llama4", [False, False, False, True]),
    ],
)
def test_versions_differ_as_the_table_says(case: str, swapped: list[bool]) -> None:
    """Were the layouts alike, one of the two would go untested."""
    widths = []
    for version in ("0.17.0", "0.18.1", "0.19.0", "0.21.2"):
        tensors = load_file(generate.HERE / f"peft-{version}" / case / WEIGHTS)
        widths += [one.shape[1] for name, one in tensors.items() if ".base_layer.lora_A" in name]
    assert widths == [2 * generate.WIDE if swap else generate.HIDDEN for swap in swapped]


@pytest.mark.skipif(peft.__version__ != "0.21.2", reason="fixtures are of other versions")
@pytest.mark.filterwarnings("ignore")  # PEFT and transformers on tiny models
@pytest.mark.parametrize("case", ["mixtral", "gpt-oss", "llama4", "embeddings"])
def test_the_script_still_writes_them(case: str, tmp_path: Path) -> None:
    generate.write(generate.CASES[case], tmp_path, list(generate.CASES).index(case))
    stored = generate.HERE / "peft-0.21.2" / case
    for name in (WEIGHTS, "expected.safetensors"):
        ours, theirs = load_file(tmp_path / name), load_file(stored / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())
