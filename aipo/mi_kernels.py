"""Coordinate scores on a GPU in two launches, which hold neither the polynomials nor the features that go into them.

Imported only where there are CUDA tensors and Triton; aipo/mi.py does the same with plain PyTorch elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS, DEGREES, COORDINATES = 16, 8, 32  # of a tile of the products
FEATURES, TERMS = 64, 32  # of a tile of the norms


def chebyshev_products(x: Tensor, first: int, count: int, factors: Tensor, spans: Sequence[tuple[int, int]]) -> Tensor:
    """``chebyshev(x, count)[first:] @ factors[q]`` of every token's own factor: x (c, d) in [-1, 1], factors (Q, d, r),
    spans (q, length) of tokens in a row with factor q -> fp32 (c, count - first, r).

    With theta = asin(x), T_k(x) is sin(k theta) for odd k and cos(k theta) for even k, up to its alternating sign;
    unlike acos, asin keeps the small x exact.
    """
    (c, d), r = x.shape, factors.shape[2]
    tiles, start = [], 0  # no tile has tokens of two factors
    for gold, length in spans:
        tiles += [(token, start + length, gold) for token in range(start, start + length, TOKENS)]
        start += length
    theta, factors = torch.asin(x.float()).contiguous(), factors.float().contiguous()
    out = theta.new_empty(c, count - first, r)
    columns = _columns(r)
    table = torch.tensor(tiles, dtype=torch.int64).to(x.device)  # (tiles, 3)
    grid = (len(tiles), triton.cdiv(count - first, DEGREES), triton.cdiv(r, columns))
    _products[grid](theta, factors, table, out, d, r, first, count - first, TOKENS, DEGREES, COORDINATES, columns)
    return out


@triton.jit
def _products(
    theta, factors, tiles, out, d, r, first, count,
    TOKENS: tl.constexpr, DEGREES: tl.constexpr, COORDINATES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # A matrix product (tokens degrees, d) @ (d, r) whose left side is made tile by tile.
    tile = tiles + 3 * tl.program_id(0)
    start, end, gold = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)  # int64
    row = tl.arange(0, TOKENS * DEGREES)
    token, k = start + row // DEGREES, tl.program_id(1) * DEGREES + row % DEGREES
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    degree = first + k
    phase = tl.where(degree % 2 == 0, 1.5707963267948966, 0.0)  # turns the sine into a cosine
    total = tl.zeros((TOKENS * DEGREES, COLUMNS), tl.float32)
    for coordinate in range(0, d, COORDINATES):
        i = coordinate + tl.arange(0, COORDINATES)
        # theta is 0 and the factor is 0 outside: those terms vanish
        angle = tl.load(theta + token[:, None] * d + i, mask=(token < end)[:, None] & (i < d), other=0.0)
        place = (gold * d + i)[:, None] * r + column
        part = tl.load(factors + place, mask=(i < d)[:, None] & (column < r), other=0.0)
        basis = tl.sin(degree.to(tl.float32)[:, None] * angle + phase[:, None])
        total = tl.dot(basis, part, total, input_precision="tf32x3")  # as exact as fp32
    place = (token * count + k)[:, None] * r + column
    tl.store(out + place, total, mask=((token < end) & (k < count))[:, None] & (column < r))


def squared_norms(
    sums: Tensor, far: Tensor, outer: Tensor, which: Tensor, series: Tensor, waves: Sequence[Tensor]
) -> Tensor:
    """|| series sums + beyond(far) outer ||_F^2 of every token, without holding the D-by-r products: sums (c, m, r),
    far (c, o), outer (Q, o, r), which (c,) of them, series (D, m), waves (frequency, phase, amplitude; (D,) each) of
    :class:`aipo.mi.Expansion` -> fp32 (c,)."""
    (c, m, r), o = sums.shape, far.shape[1]
    out = sums.new_empty(c)
    arguments = [part.contiguous() for part in (sums, series, *waves, far, outer)]
    _norms[(c,)](*arguments, which, out, len(series), m, o, r, FEATURES, TERMS, _columns(r))
    return out


@triton.jit(do_not_specialize=["o"])  # the data's: a compilation for some of its values would come in any step
def _norms(
    sums, series, frequency, phase, amplitude, far, outer, which, out, D, m, o, r,
    FEATURES: tl.constexpr, TERMS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    gold = tl.load(which + token)  # int64
    norm = tl.zeros((FEATURES,), tl.float32)
    for first_column in range(0, r, COLUMNS):
        column = first_column + tl.arange(0, COLUMNS)
        for first_feature in range(0, D, FEATURES):
            f = first_feature + tl.arange(0, FEATURES)
            w = tl.load(frequency + f, mask=f < D, other=0.0)
            b = tl.load(phase + f, mask=f < D, other=0.0)
            a = tl.load(amplitude + f, mask=f < D, other=0.0)
            total = tl.zeros((FEATURES, COLUMNS), tl.float32)
            for term in range(0, m, TERMS):
                i = term + tl.arange(0, TERMS)
                left = tl.load(series + f[:, None] * m + i, mask=(f < D)[:, None] & (i < m), other=0.0)
                place = (token * m + i)[:, None] * r + column
                right = tl.load(sums + place, mask=(i < m)[:, None] & (column < r), other=0.0)
                total = tl.dot(left, right, total, input_precision="tf32x3")
            for term in range(0, o, TERMS):
                i = term + tl.arange(0, TERMS)
                x = tl.load(far + token * o + i, mask=i < o, other=0.0)
                left = a[:, None] * (tl.cos(w[:, None] * x + b[:, None]) - tl.cos(b)[:, None])
                place = (gold * o + i)[:, None] * r + column
                right = tl.load(outer + place, mask=(i < o)[:, None] & (column < r), other=0.0)
                total = tl.dot(left, right, total, input_precision="tf32x3")
            norm += tl.sum(total * total, 1)
    tl.store(out + token, tl.sum(norm, 0))


def _columns(r: int) -> int:
    return min(64, max(16, triton.next_power_of_2(r)))
