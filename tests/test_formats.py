"""Every adapter format for every family: served in one mixed batch and equal to PEFT, or refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from motet.adapters.checkpoint import load_checkpoint
from motet.errors import AdapterRefused
from motet.models.registry import load_spec
from tests.formats import FAMILIES, FORMATS, applies, document, tiny_specs, write_all
from tests.parity import check_mixed_batch
from tests.tiny import KINDS, write_model

DOCUMENT = Path(__file__).parents[1] / "docs" / "models.md"


def test_every_family_has_a_row() -> None:
    assert FAMILIES.keys() == KINDS.keys()


@pytest.mark.parametrize("kind", FAMILIES)
def test_formats_that_are_served_match_peft(kind: str, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", kind)
    adapters = write_all(tmp_path, model, kind, refused=False)
    spec = load_spec(model)
    assert list(adapters) == [f for f in FORMATS if f.refused is None and applies(f, kind, spec)]
    lengths = [5 + 7 * number for number in range(len(adapters) + 1)]
    check_mixed_batch(model, kind, [*adapters.values(), None], lengths, pool_bytes=16 << 20)


@pytest.mark.parametrize("kind", FAMILIES)
def test_formats_that_are_refused_say_why(kind: str, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", kind)
    spec = load_spec(model)
    for format, path in write_all(tmp_path, model, kind, refused=True).items():
        with pytest.raises(AdapterRefused, match=str(format.refused)):
            load_checkpoint(path, spec)


def test_the_document_says_what_is_tested(tmp_path: Path) -> None:
    said = "run `python -m tests.formats > docs/models.md`"
    assert DOCUMENT.read_text() == document(tiny_specs(tmp_path)), said
