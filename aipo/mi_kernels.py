"""The products behind coordinate scores on a GPU, without ever holding the polynomials that go into them.

Imported only where there are CUDA tensors and Triton; aipo/mi.py does the same with plain PyTorch elsewhere.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COORDINATES = 128, 32  # of a tile


def chebyshev_products(x: Tensor, first: int, count: int, factor: Tensor) -> Tensor:
    """``chebyshev(x, count)[first:] @ factor``: x (c, d) in [-1, 1], factor (d, r) -> fp32 (count - first, c, r).

    With theta = asin(x), T_k(x) is sin(k theta) for odd k and cos(k theta) for even k, up to its alternating sign;
    unlike acos, asin keeps the small x exact.
    """
    (c, d), r = x.shape, factor.shape[1]
    theta, factor = torch.asin(x.float()).contiguous(), factor.float().contiguous()
    out = theta.new_empty(count - first, c, r)
    columns = min(64, max(16, triton.next_power_of_2(r)))
    grid = (triton.cdiv(c * (count - first), ROWS), triton.cdiv(r, columns))
    _products[grid](theta, factor, out, c, d, r, first, count - first, ROWS, COORDINATES, columns)
    return out


@triton.jit
def _products(
    theta, factor, out, c, d, r, first, count, ROWS: tl.constexpr, COORDINATES: tl.constexpr, COLUMNS: tl.constexpr
):
    # A matrix product (c count, d) @ (d, r) whose left side is made tile by tile: row = token * count + k.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # places in long batches pass 2**31
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    token, k = row // count, row % count
    degree = first + k
    phase = tl.where(degree % 2 == 0, 1.5707963267948966, 0.0)  # turns the sine into a cosine
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, d, COORDINATES):
        i = start + tl.arange(0, COORDINATES)
        # theta is 0 and the factor is 0 outside: those terms vanish
        angle = tl.load(theta + token[:, None] * d + i, mask=(token < c)[:, None] & (i < d), other=0.0)
        tile = tl.load(factor + i[:, None] * r + column, mask=(i < d)[:, None] & (column < r), other=0.0)
        basis = tl.sin(degree.to(tl.float32)[:, None] * angle + phase[:, None])
        total = tl.dot(basis, tile, total, input_precision="tf32x3")  # as exact as fp32
    place = (k * c + token)[:, None] * r + column
    tl.store(out + place, total, mask=(token < c)[:, None] & (column < r))
