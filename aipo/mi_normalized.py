"""Normalised HSIC of a token's coordinates with the gold state's: the form in the code of the peaks work.

    MI = tr(R_x R_y),     R = K (K + epsilon n I)^-1,     K = H Phi Phi^T H

counts shared directions of the two feature spaces, as canonical correlations do, where :mod:`aipo.mi` weighs them by
their variance. With features it is linear in n, because no matrix is larger than their number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aipo.mi import FourierFeatures, chebyshev, columns_beyond, near_and_far, tokens_that_fit

FAR = 16  # columns beyond REACH for which a chunk leaves room


@torch.no_grad()
def normalized_scores(
    hidden: Tensor,
    factors: Tensor,
    which: Tensor,
    phi_of: FourierFeatures,
    bandwidth: Tensor,
    center: bool,
    ridge: float,
    chunk: int | None = None,
) -> Tensor:
    """tr(R_x F F^T) for every state x and the factor F F^T = R_y of its gold state -> fp32 (N,), in fp64.

    Args:
        hidden: (N, d).
        factors: (Q, d, r) of :func:`aipo.mi.gold_factors` with the same ``ridge``, epsilon d.
        which: (N,) on the CPU, the place of each state's factor among them.
        bandwidth: fp32 (N, 1), of each state's kernel.
        chunk: states at a time.
    A state that is not finite scores 0, and one of constant coordinates does if centred.
    """
    N, d, r = len(hidden), *factors.shape[1:]
    scores = hidden.new_zeros(N, dtype=torch.float32)
    if not r or not N:
        return scores
    with torch.autocast(hidden.device.type, enabled=False):
        factors = factors.double()
        phi = phi_of.expansion.to(factors)
        m = phi.series.shape[1]
        for rows in torch.arange(N).split(chunk or tokens_that_fit(4 * d * (m + FAR))):
            part = rows.to(hidden.device)
            x = hidden.index_select(0, part).double()  # (c, d)
            measured = x.isfinite().all(1)
            x = torch.where(measured[:, None], x, 0) / bandwidth[part]
            columns = columns_beyond(x)
            near, far = near_and_far(x, columns)  # (c, d), (c, o)
            # Phi = P W^T, P (c, d, m + o) being the polynomials and an indicator of each coordinate beyond
            P = torch.nn.functional.pad(chebyshev(near, m).permute(1, 2, 0), (0, len(columns)))
            P[:, columns, m + torch.arange(len(columns), device=x.device)] = 1
            if center:
                P = P - P[:, :1]  # makes constant features exactly 0
                P = P - P.mean(1, keepdim=True)
            W = torch.cat([phi.series.expand(len(x), -1, -1), phi.beyond(far).transpose(0, 1)], 2)  # (c, D, m + o)
            M, S = W.mT @ W, P.mT @ P  # (c, m + o, m + o)
            shared = torch.stack([p.mT @ factors[gold] for p, gold in zip(P, which[rows].tolist())])  # (c, m + o, r)
            # R_x = P M (S M + ridge)^-1 P^T, by the push-through identity: no d-by-d matrix
            system = S @ M
            system.diagonal(dim1=1, dim2=2).add_(ridge)
            trace = (shared * (M @ torch.linalg.solve(system, shared))).sum((1, 2))  # (c,)
            scores[part] = torch.where(measured, trace, 0).float()
    return scores
