"""What a step takes: a sum over what is in it, its coefficients fitted to what was measured.

seconds(step) = base
              + row     · rows that decode   + row_lora · those of them that have an adapter
              + prompt  · prompt tokens  + prompt_lora · those of them that have an adapter
              + adapter · different adapters, each weighted by its size over that of a measured one
              + context · tokens of context read, each row's and each chunk's own counted once
              + experts · the share of a layer's experts that some token of the step is sent to

The last is what a mixture of experts reads: with n tokens that each take k of E experts alike 1 - (1 - k/E)^n, so that
steps of one row are short and those of many hardly longer than those of some. A dense model has no such term.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from motet.errors import ConfigError

Vector = NDArray[np.float64]
TERMS = ("base", "row", "row_lora", "prompt", "prompt_lora", "adapter", "context", "experts")


class StepCost(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The coefficients, in seconds.

    `sparsity` is the share of a layer's experts that a token does without, 0 of a dense model. `error` is the mean
    relative error at the points that the coefficients were fitted to.
    """

    base: float
    row: float
    prompt: float
    prompt_lora: float
    adapter: float
    context: float
    row_lora: float = 0.0
    experts: float = 0.0
    sparsity: float = 0.0
    error: float = 0.0

    def seconds(
        self, rows: float, row_lora: float, prompt: float, prompt_lora: float, adapters: float, context: float
    ) -> float:
        """What a step takes with this in it, in the order of TERMS; `adapters` is the sum of their weights."""
        return (
            self.base
            + self.row * rows
            + self.row_lora * row_lora
            + self.prompt * prompt
            + self.prompt_lora * prompt_lora
            + self.adapter * adapters
            + self.context * context
            + self.experts * touched(rows + prompt, self.sparsity)
        )

    def scaled(self, decode: float, prompt: float) -> StepCost:
        """The same with decode terms and prompt terms that many times as long."""
        slower = {"prompt": prompt, "prompt_lora": prompt}
        terms = {name: getattr(self, name) * slower.get(name, decode) for name in TERMS}
        return msgspec.structs.replace(self, **terms)


def touched(tokens: float, sparsity: float) -> float:
    """The share of a layer's experts that so many tokens are sent to; 0 of a dense model, which has none."""
    return float(1 - sparsity**tokens) if sparsity else 0.0


def solve(
    equations: Sequence[tuple[Vector, float]], given: Mapping[str, float], sparsity: float = 0.0
) -> StepCost:
    """Coefficients that come closest to `equations`: sums of TERMS, and the seconds that they took.

    Least squares of relative errors, no coefficient negative; those `given`, in seconds, are as they are. ConfigError
    if there is nothing to fit to.
    """
    for name in given:
        if name not in TERMS:
            raise ConfigError(f"a curve gives the coefficient {name!r}; there are {', '.join(TERMS)}")
    if not equations:
        raise ConfigError("a curve has no measured points")
    if min(seconds for _, seconds in equations) <= 0:
        raise ConfigError("a curve has a point that took no time")
    matrix = np.array([terms / seconds for terms, seconds in equations])
    fixed = np.array([given.get(name, 0.0) for name in TERMS])
    free = [i for i, name in enumerate(TERMS) if name not in given and matrix[:, i].any()]
    solution = fixed + _non_negative(matrix, 1 - matrix @ fixed, free)
    error = float(np.abs(matrix @ solution - 1).mean())
    return StepCost(**dict(zip(TERMS, map(float, solution), strict=True)), sparsity=sparsity, error=error)


def _non_negative(matrix: NDArray[np.float64], target: Vector, free: list[int]) -> Vector:
    """Least squares over the `free` columns, giving up the most negative one until none is."""
    solution = np.zeros(matrix.shape[1])
    while free:
        columns = matrix[:, free]
        scale = np.linalg.norm(columns, axis=0)
        found = np.linalg.lstsq(columns / scale, target, rcond=None)[0] / scale
        if (found >= 0).all():
            solution[free] = found
            break
        free = [name for i, name in enumerate(free) if i != int(np.argmin(found * scale))]
    return solution
