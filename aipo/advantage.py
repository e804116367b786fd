"""Advantages of rollouts from their rewards (eq. 4), and their blend with mutual information (Alg. 1, line 34)."""

from __future__ import annotations

import torch
from torch import Tensor

from aipo.mask import NOISE
from aipo.rollouts import token_grid


def group_advantages(rewards: Tensor, group_size: int, *, baseline: str = "group", normalize: str = "none") -> Tensor:
    """A = R - baseline (eq. 4), optionally divided by the standard deviation (GRPO).

    Args:
        rewards: (B,), rollouts of one question adjacent.
        group_size: rollouts a question; must divide B.
        baseline: ``group`` mean, ``batch`` mean, or ``leave_one_out`` (mean of the group's others).
        normalize: ``none``, or ``std``: divide by sample standard deviation + 1e-6, over the group (over the batch
            with ``baseline="batch"``). Fewer than two samples have none: their advantage is 0.

    Returns:
        (B,) float32; exactly 0 in a group whose rewards are all equal (unless the baseline is the batch's).
    """
    if group_size < 1 or len(rewards) % group_size:
        raise ValueError(f"group_size {group_size} does not divide the {len(rewards)} rewards")
    if baseline not in ("group", "batch", "leave_one_out") or normalize not in ("none", "std"):
        raise ValueError(f"unknown baseline {baseline!r} or normalize {normalize!r}")
    groups = rewards.float().reshape((1, -1) if baseline == "batch" else (-1, group_size))  # (Q, n)
    n = groups.shape[1]
    centred = groups - groups.mean(1, keepdim=True)  # (Q, n)
    centred = centred.masked_fill(constant_groups(groups)[:, None], 0.0)  # no rounding residue
    if baseline == "leave_one_out" and n > 1:
        centred = centred * (n / (n - 1))  # R_i - mean of the others
    if normalize == "std":
        std = groups.std(1, keepdim=True) if n > 1 else torch.zeros_like(groups)  # (Q, 1)
        centred = centred / (std + 1e-6)
    return centred.reshape(-1)


def constant_groups(groups: Tensor, tolerance: float = 1e-6) -> Tensor:
    """True for a group (Q, n) whose rewards do not vary by more than ``tolerance``. (Q,)"""
    return groups.max(1).values - groups.min(1).values <= tolerance


def blend(advantages: Tensor, scores: Tensor, lengths: Tensor, *, how: str, weight: float) -> Tensor:
    """Advantage of each token: A + w z(MI) (``additive``) or A (1 + w z(MI)) (``multiplicative``).

    z is the z-score of a token's MI within its sequence (0 where MI is constant).

    Args:
        advantages: (B,); scores: (B, T) MI; lengths: (B,) completion tokens.

    Returns:
        (B, T), or ``advantages`` itself with ``how="none"``.
    """
    if how == "none":
        return advantages
    tokens = token_grid(lengths, scores.shape[1])  # (B, T)
    count = lengths.clamp(min=1)[:, None]  # (B, 1)
    scores = torch.where(tokens, scores, 0.0).double()  # (B, T)
    mean = scores.sum(1, keepdim=True) / count  # (B, 1)
    centred = torch.where(tokens, scores - mean, 0.0)  # (B, T)
    std = (centred.square().sum(1, keepdim=True) / count).sqrt()  # (B, 1)
    z = torch.where(std > NOISE * mean.abs(), centred / std, 0.0).to(advantages)  # (B, T)
    if how == "additive":
        return advantages[:, None] + weight * z
    if how == "multiplicative":
        return advantages[:, None] * (1 + weight * z)
    raise ValueError(f"unknown blend {how!r}")
