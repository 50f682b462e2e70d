"""Logits → tokens on the device: greedy, temperature, top-k, top-p and min-p, each row by itself.

Semantics, for a row of logits l [V] with parameters temperature T, seed, position, top_k, top_p, min_p:
    T <= 0: the token of the largest logit, the first of equals
    else:   argmax over the kept tokens of l / T + g,  g = -log(-log(u)): a sample of softmax(l / T) over them (Gumbel)
            u of token v is Philox4x32-7 with key `seed` and a counter of (v, position), in (0, 1) in steps of 2^-23
    kept:   top_k > 0: tokens with logits down to the k-th largest, and those equal to it;
            top_p < 1: of these the most likely ones, until their share of all of these reaches top_p, and those equal
            to the last; min_p > 0: those at least min_p times as likely as the most likely
    returns tokens [S] and logprobs [S] float32, log softmax(l)[token] of the unchanged distribution
    logits: [S, V] bfloat16, float16 or float32; temperature, top_p, min_p [S] float32, seed [S] int64, position,
    top_k [S] int32.

A row's token depends on its logits and parameters only, not on the batch. Two launches: one program per (row, chunk of
the vocabulary) leaves maxima and sums, one program per row ends the job. Thresholds are found by bisection over the
logits' bit patterns, which are ordered like the logits; only chunks whose maximum reaches the threshold are looked at.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from motet.kernels.gpu.jit import kernel, launch_options, tl, triton

CHUNK = 4096
"""Tokens of a program of the first launch; part of the random numbers' definition."""
ROUNDS = 7
"""Rounds of Philox from which on it passes the statistical tests; three less than its authors' safety margin."""
CONSTANT_BITS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}
"""Low bits that say nothing once a logit is a float32: bisection leaves them out."""


@dataclass(frozen=True)
class SamplingTensors:
    """Each row's parameters, [S] each; see the module's semantics."""

    temperature: Tensor
    seed: Tensor
    position: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor


def sample_torch(logits: Tensor, rows: SamplingTensors, truncate: bool) -> tuple[Tensor, Tensor]:
    """Reference, in float64."""
    wide, columns = logits.double(), logits.shape[1]
    heat = rows.temperature.double().clamp_min(1e-30)[:, None]
    kept = torch.ones_like(wide, dtype=torch.bool)
    if truncate:
        k = torch.where(rows.top_k > 0, rows.top_k, columns).clamp_max(columns).long()
        ordered = wide.sort(-1, descending=True).values
        kept = wide >= ordered.gather(1, k[:, None] - 1)
        share = torch.softmax((wide / heat).masked_fill(~kept, -torch.inf), -1)
        above = torch.nn.functional.pad(share.sort(-1, descending=True).values.cumsum(-1), (1, 0))
        more_likely = above.gather(1, torch.searchsorted(-ordered, -wide))
        kept &= (more_likely < rows.top_p.double()[:, None]) | (rows.top_p >= 1)[:, None]
        kept &= share >= rows.min_p.double()[:, None] * share.amax(-1, keepdim=True)
    token = torch.arange(columns, device=logits.device)
    quarter = CHUNK // 4
    bits = torch.stack(_philox_torch(rows.seed, token // CHUNK * quarter + token % quarter, rows.position))
    lane = (token % CHUNK // quarter).expand(1, *wide.shape)
    uniform = ((bits.gather(0, lane)[0] >> 9).double() + 0.5) * 2**-23
    noisy = (wide / heat - torch.log(-torch.log(uniform))).masked_fill(~kept, -torch.inf)
    tokens = torch.where(rows.temperature > 0, noisy.argmax(-1), wide.argmax(-1))
    return tokens, torch.log_softmax(wide, -1).gather(1, tokens[:, None])[:, 0].float()


def _philox_torch(seed: Tensor, counter: Tensor, position: Tensor) -> list[Tensor]:
    """Seven rounds of Philox4x32 (Salmon et al., 2011): four [S, N] int64 of 32 bits."""
    mask = 0xFFFFFFFF
    key = [seed[:, None] & mask, seed[:, None] >> 32 & mask]
    zero = torch.zeros(len(seed), len(counter), dtype=torch.int64, device=seed.device)
    words = [counter.long() + zero, position[:, None].long() + zero, zero, zero]
    for _ in range(ROUNDS):
        # Modulo 2^64, as int64 counts, the high half is right all the same.
        low, high = words[0] * 0xD2511F53, words[2] * 0xCD9E8D57
        words = [
            high >> 32 & mask ^ words[1] ^ key[0], high & mask,
            low >> 32 & mask ^ words[3] ^ key[1], low & mask,
        ]  # fmt: skip
        key = [key[0] + 0x9E3779B9 & mask, key[1] + 0xBB67AE85 & mask]
    return words


def sample(
    logits: Tensor, rows: SamplingTensors, truncate: bool, out: tuple[Tensor, Tensor] | None = None, *,
    pdl: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Tokens and their logprobs, in `out` if given. Without `truncate`, top_k, top_p and min_p are ignored."""
    count, vocabulary = logits.shape
    assert logits.is_contiguous()
    chunks = -(-vocabulary // CHUNK)
    if out is None:
        tokens = torch.empty(count, dtype=torch.int64, device=logits.device)
        out = tokens, torch.empty(count, device=logits.device)
    tokens, logprobs = out
    assert tokens.shape == logprobs.shape == (count,)
    stats = torch.empty(4, count, chunks, device=logits.device)
    best = torch.empty(count, chunks, dtype=torch.int32, device=logits.device)
    if count:
        tensors = rows.temperature, rows.seed, rows.position, rows.top_k, rows.top_p, rows.min_p
        _chunks_kernel[(count, chunks)](
            logits, *tensors, stats, best, vocabulary, TRUNCATE=truncate, CHUNK=CHUNK, num_warps=4,
            **launch_options(pdl),
        )  # fmt: skip
        _rows_kernel[(count,)](
            logits, *tensors, stats, best, tokens, logprobs, vocabulary, TRUNCATE=truncate, CHUNK=CHUNK,
            CHUNKS=chunks, CHUNKS_PADDED=triton.next_power_of_2(chunks), SHIFT=CONSTANT_BITS[logits.dtype],
            num_warps=32 if truncate else 2, **launch_options(pdl),
        )  # fmt: skip
    return tokens, logprobs


@kernel()
def _truncated(temperature, top_k, top_p, min_p, row):  # type: ignore[no-untyped-def]
    """Whether a row keeps some tokens only."""
    kept = (tl.load(top_k + row) > 0) | (tl.load(top_p + row) < 1.0) | (tl.load(min_p + row) > 0.0)
    return kept & (tl.load(temperature + row) > 0.0)


@kernel()
def _quarter(row_logits, token, vocabulary):  # type: ignore[no-untyped-def]
    return tl.load(row_logits + token, token < vocabulary, other=float("-inf")).to(tl.float32)


@kernel()
def _gumbel(bits):  # type: ignore[no-untyped-def]
    return -tl.log(-tl.log(((bits >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07))


@kernel()
def _best(value, token):  # type: ignore[no-untyped-def]
    """The largest value and the first token that has it."""
    top = tl.max(value, axis=0)
    return top, tl.min(tl.where(value == top, token, 2147483647), axis=0)


@kernel()
def _best_of_chunk(  # type: ignore[no-untyped-def]
    x0, x1, x2, x3, chunk, seed, position, inverse, NOISE: tl.constexpr, CHUNK: tl.constexpr
):
    """The best (value, token) of a chunk, whose quarters the x are; one counter gives the noise of a token of each."""
    QUARTER: tl.constexpr = CHUNK // 4
    i = tl.arange(0, QUARTER)
    if NOISE:
        b0, b1, b2, b3 = tl.philox(seed, chunk * QUARTER + i, position, 0, 0, 7)
        x0, x1 = x0 * inverse + _gumbel(b0), x1 * inverse + _gumbel(b1)
        x2, x3 = x2 * inverse + _gumbel(b2), x3 * inverse + _gumbel(b3)
    value, token = x0, i
    token = tl.where(x1 > value, i + QUARTER, token)
    value = tl.maximum(x1, value)
    token = tl.where(x2 > value, i + 2 * QUARTER, token)
    value = tl.maximum(x2, value)
    token = tl.where(x3 > value, i + 3 * QUARTER, token)
    value = tl.maximum(x3, value)
    return _best(value, chunk * CHUNK + token)


@kernel()
def _chunks_kernel(  # type: ignore[no-untyped-def]
    logits, temperature, seed, position, top_k, top_p, min_p, stats, best, vocabulary,
    TRUNCATE: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row, chunk, rows, chunks = tl.program_id(0), tl.program_id(1), tl.num_programs(0), tl.num_programs(1)
    QUARTER: tl.constexpr = CHUNK // 4
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    heat = tl.load(temperature + row)
    inverse = tl.where(heat > 0, 1.0 / tl.where(heat > 0, heat, 1.0), 1.0)
    row_logits, token = logits + row.to(tl.int64) * vocabulary, chunk * CHUNK + tl.arange(0, QUARTER)
    x0, x1 = _quarter(row_logits, token, vocabulary), _quarter(row_logits, token + QUARTER, vocabulary)
    x2, x3 = (
        _quarter(row_logits, token + 2 * QUARTER, vocabulary),
        _quarter(row_logits, token + 3 * QUARTER, vocabulary),
    )
    top = tl.max(tl.maximum(tl.maximum(x0, x1), tl.maximum(x2, x3)), axis=0)
    level = tl.where(top > float("-inf"), top, 0.0)
    total = tl.sum(tl.exp(x0 - level) + tl.exp(x1 - level) + tl.exp(x2 - level) + tl.exp(x3 - level), axis=0)
    kept, heated = False, total
    if TRUNCATE:
        kept = _truncated(temperature, top_k, top_p, min_p, row)
        if kept:
            y0, y1 = tl.exp((x0 - level) * inverse), tl.exp((x1 - level) * inverse)
            y2, y3 = tl.exp((x2 - level) * inverse), tl.exp((x3 - level) * inverse)
            heated = tl.sum((y0 + y1) + (y2 + y3), axis=0)
    if (heat > 0) & (not kept):
        value, winner = _best_of_chunk(
            x0, x1, x2, x3, chunk, tl.load(seed + row), tl.load(position + row), inverse, True, CHUNK
        )
    else:
        value, winner = _best_of_chunk(x0, x1, x2, x3, chunk, 0, 0, 1.0, False, CHUNK)
    at = row * chunks + chunk
    tl.store(best + at, winner)
    tl.store(stats + at, value)
    tl.store(stats + rows * chunks + at, top)
    tl.store(stats + 2 * rows * chunks + at, total)
    tl.store(stats + 3 * rows * chunks + at, heated)


@kernel()
def _order(x, SHIFT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Integers in the order of the floats x."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@kernel()
def _amount(  # type: ignore[no-untyped-def]
    row_logits, maxima, threshold, top, inverse, vocabulary, COUNT: tl.constexpr, CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """How many tokens reach the threshold, or how likely they are together: sum of exp((l - top) / T)."""
    i, four = tl.arange(0, 4 * CHUNK), tl.arange(0, 4)
    sums = tl.zeros([4 * CHUNK], tl.float32)
    for chunk in range(0, CHUNKS, 4):  # one read at a time: it should be a large one
        best = tl.load(maxima + chunk + four, chunk + four < CHUNKS, other=float("-inf"))
        if _order(tl.max(best, axis=0), SHIFT) >= threshold:
            x = _quarter(row_logits, chunk * CHUNK + i, vocabulary)
            weight = 1.0 if COUNT else tl.exp((x - top) * inverse)
            sums += tl.where(_order(x, SHIFT) >= threshold, weight, 0.0)
    return tl.sum(sums, axis=0)


@kernel()
def _bisect(  # type: ignore[no-untyped-def]
    row_logits, maxima, low, high, wanted, top, inverse, vocabulary, COUNT: tl.constexpr, CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """The highest threshold in [low, high) that the wanted amount reaches; `low` if none does."""
    while high - low > 1:
        middle = (low + high) >> 1
        got = _amount(row_logits, maxima, middle, top, inverse, vocabulary, COUNT, CHUNK, CHUNKS, SHIFT)
        low = tl.where(got >= wanted, middle, low)
        high = tl.where(got >= wanted, tl.where(COUNT & (got == wanted), middle + 1, high), middle)
    return low


@kernel()
def _threshold(  # type: ignore[no-untyped-def]
    row_logits, maxima, top, least, heat, heated, k, p, vocabulary, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    SHIFT: tl.constexpr,
):  # fmt: skip
    """What logits must reach, in their order, by top-k and then by top-p of the rest, whose sum is `heated`.

    `top` and `least` are the largest and the least of the chunks' maxima.
    """
    inverse = 1.0 / heat
    low, high = tl.full([], -2147483648, tl.int64) >> SHIFT, _order(top, SHIFT).to(tl.int64) + 1
    if (k > 0) & (k < vocabulary):
        if k <= CHUNKS:  # every chunk has a token that reaches the least of their maxima
            low = _order(least, SHIFT).to(tl.int64)
        low = _bisect(row_logits, maxima, low, high, k, top, inverse, vocabulary, True, CHUNK, CHUNKS, SHIFT)
        if p < 1:
            heated = _amount(row_logits, maxima, low, top, inverse, vocabulary, False, CHUNK, CHUNKS, SHIFT)
    if p < 1:
        # Less likely tokens than a V-th of what top_p leaves out do not matter: together they are less than that.
        bound = top + heat * tl.log(tl.maximum((1 - p) * heated / vocabulary, 1e-30))
        low = tl.minimum(tl.maximum(low, _order(bound, SHIFT).to(tl.int64)), high - 1)
        wanted = p * heated
        low = _bisect(
            row_logits, maxima, low, high, wanted, top, inverse, vocabulary, False, CHUNK, CHUNKS, SHIFT
        )
    return low


@kernel()
def _rows_kernel(  # type: ignore[no-untyped-def]
    logits, temperature, seed, position, top_k, top_p, min_p, stats, best, tokens, logprobs, vocabulary,
    TRUNCATE: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, CHUNKS_PADDED: tl.constexpr,
    SHIFT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row, rows = tl.program_id(0), tl.num_programs(0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row_logits, c = logits + row.to(tl.int64) * vocabulary, tl.arange(0, CHUNKS_PADDED)
    there, at, plane = c < CHUNKS, stats + row * CHUNKS + c, rows * CHUNKS
    value = tl.load(at, there, other=float("-inf"))
    maxima = tl.load(at + plane, there, other=float("-inf"))
    totals = tl.load(at + 2 * plane, there, other=0.0)
    value, winner = _best(value, tl.load(best + row * CHUNKS + c, there, other=2147483647))
    top = tl.max(maxima, axis=0)
    normaliser = top + tl.log(tl.sum(totals * tl.exp(maxima - top), axis=0))
    if TRUNCATE:  # noqa: SIM102 (decided by the compiler, the inner one by the row)
        if _truncated(temperature, top_k, top_p, min_p, row):
            heat, maxima_at = tl.load(temperature + row), stats + plane + row * CHUNKS
            heated = tl.sum(tl.load(at + 3 * plane, there, other=0.0) * tl.exp((maxima - top) / heat), axis=0)
            least = tl.min(tl.where(there, maxima, float("inf")), axis=0)
            low = _threshold(
                row_logits, maxima_at, top, least, heat, heated, tl.load(top_k + row), tl.load(top_p + row),
                vocabulary, CHUNK, CHUNKS, SHIFT,
            )  # fmt: skip
            share = tl.load(min_p + row)
            floor = tl.where(share > 0, top + heat * tl.log(tl.maximum(share, 1e-30)), float("-inf"))
            value, winner = _best_kept(
                row_logits, maxima_at, low, floor, tl.load(seed + row), tl.load(position + row), 1.0 / heat,
                vocabulary, CHUNK, CHUNKS, SHIFT,
            )  # fmt: skip
    winner = tl.minimum(winner, vocabulary - 1)
    tl.store(tokens + row, winner.to(tl.int64))
    tl.store(logprobs + row, tl.load(row_logits + winner).to(tl.float32) - normaliser)


@kernel()
def _best_kept(  # type: ignore[no-untyped-def]
    row_logits, maxima, low, floor, seed, position, inverse, vocabulary, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    SHIFT: tl.constexpr,
):  # fmt: skip
    """The best (value, token) of those that reach both thresholds."""
    QUARTER: tl.constexpr = CHUNK // 4
    value, winner = float("-inf"), 2147483647
    for chunk in range(CHUNKS):
        if _order(tl.load(maxima + chunk), SHIFT) >= low:
            token = chunk * CHUNK + tl.arange(0, QUARTER)
            x0 = _kept(_quarter(row_logits, token, vocabulary), low, floor, SHIFT)
            x1 = _kept(_quarter(row_logits, token + QUARTER, vocabulary), low, floor, SHIFT)
            x2 = _kept(_quarter(row_logits, token + 2 * QUARTER, vocabulary), low, floor, SHIFT)
            x3 = _kept(_quarter(row_logits, token + 3 * QUARTER, vocabulary), low, floor, SHIFT)
            new, other = _best_of_chunk(x0, x1, x2, x3, chunk, seed, position, inverse, True, CHUNK)
            winner = tl.where(new > value, other, winner)
            value = tl.maximum(new, value)
    return value, winner


@kernel()
def _kept(x, low, floor, SHIFT: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.where((_order(x, SHIFT) >= low) & (x >= floor), x, float("-inf"))
