from __future__ import annotations

import pytest
import torch
from torch import Tensor

from motet.kernels.gpu.dense import MOST_ROWS
from motet.kernels.gpu.per_head import per_head
from tests.close import assert_close
from tests.kernels.gpu.conftest import TOLERANCE


def operands(rows: int, depth: int, features: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """x [rows, 3, depth], whose heads lie apart with what is not a number between them; weight [3, depth, features]."""
    wide = torch.full((rows, 3, depth + 5), torch.nan, device=device)
    wide[..., :depth] = torch.randn(rows, 3, depth, device=device)
    weight = torch.randn(3, depth, features, device=device) / depth**0.5
    return wide.to(dtype)[..., :depth], weight.to(dtype)


@pytest.mark.parametrize("rows", [0, 1, 21, MOST_ROWS, MOST_ROWS + 1])
@pytest.mark.parametrize(("depth", "features"), [(7, 130), (128, 64), (300, 57)], ids=str)
def test_matches_reference(rows: int, depth: int, features: int, dtype: torch.dtype, device: str) -> None:
    x, weight = operands(rows, depth, features, dtype, device)
    out = torch.full((rows, 3, features + 3), torch.nan, device=device).to(dtype)
    per_head(x, weight, out[..., :features])
    expected = torch.einsum("thk,hkn->thn", x.double(), weight.double())
    assert_close(out[..., :features].double(), expected, TOLERANCE[dtype])
    assert bool(out[..., features:].isnan().all())


def test_a_row_does_not_depend_on_how_many_there_are(dtype: torch.dtype, device: str) -> None:
    """On a device: 16, 32 and 64 columns of the tensor cores' products; the interpreter sums in one order anyway."""
    x, weight = operands(MOST_ROWS, 300, 57, dtype, device)

    def product(rows: slice) -> Tensor:
        out = torch.empty(len(x[rows]), 3, 57, dtype=dtype, device=device)
        per_head(x[rows], weight, out)
        return out

    together = product(slice(None))
    for rows in (slice(0, 1), slice(3, 8), slice(40, 57), slice(11, 44)):
        assert torch.equal(product(rows), together[rows])
